"""Bad workdirs, checkpoints and prompts; what is in a stranger's runs no code."""

import ast
import contextlib
import io
import json
import os
import pickle
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from jaxdp.common import cli
from jaxdp.common import config as configs
from jaxdp.common.errors import ConfigError, RunError
from jaxdp.data.cache import open_cache
from jaxdp.run import workdir_access
from jaxdp.workdir import metrics, parameters
from jaxdp.workdir.generation import generate
from support.bad_input import (
    ARGUMENTS,
    HARM,
    IDS,
    JSON,
    NUMBERS,
    SURROGATE,
    TRIED,
    Reached,
    assert_clear,
    contents,
    harm,
    plant,
    renewed,
    replace_in,
    run_command,
    train,
    tries,
)
from support.checkpoints import open_checkpoints, state_of, two_checkpoints
from support.texts import REPOSITORY, TEXT

SMALL = [
    "0",
    "1",
    "-1",
    "0.5",
    "1e-30",
    "1e-320",
    "1e30",
    "nan",
    "inf",
    "-inf",
    "1.5",
    "2",
    "1e999",
]
NO_NUMBERS = ["", "x", "0x10", "1_0", "True", "None", "٣", "9" * 30, "9" * 5000]
NUMBER_TEXTS = st.sampled_from([*SMALL, *NO_NUMBERS, str(2**31 - 1), str(2**31)])


@tries(120)
@given(
    prompt=st.one_of(
        st.sampled_from(["", "1 is", "😀", SURROGATE, "a" * 10_000, "\n", "1\ufeff", "e\u0301"]),
        st.text("0123456789 isaeqru,.\n", max_size=40),
        ARGUMENTS,
    ),
    flag=st.sampled_from(["temperature", "top_p", "top_k", "seed", "num_tokens"]),
    number=NUMBER_TEXTS,
)
def test_prompts_and_flags_of_generate(prompt, flag, number, workdir):
    assume((flag, number) != ("num_tokens", str(2**31 - 1)))  # It would take days.
    before = contents(workdir)
    line = [f"--workdir={workdir}", "--num_tokens=3", f"--prompt={prompt}", f"--{flag}={number}"]
    status, out = run_command("prompts and flags", "generate", *line)
    assert status == cli.WRONG_INPUT or out.startswith(prompt)
    assert status == 0 or not out
    assert contents(workdir) == before


@pytest.fixture(scope="module")
def right(trained) -> list[str]:
    return generate(trained, ["1 is"], num_tokens=3)


@tries(150)
@given(
    name=st.sampled_from(["config.json", "tokenizer.json"]),
    replaced=st.one_of(st.none(), st.tuples(st.integers(0, 200), st.one_of(JSON, IDS, NUMBERS))),
    **HARM,
)
def test_harmed_files_of_a_workdir(
    name, replaced, how, where, noise, right, trained, workdir, no_compiling
):
    """One of another model or tokenizer is found, too: generating gives the same text, or none."""
    TRIED["workdir files"] += 2
    config = configs.load(trained / "config.json")
    renewed(workdir, trained)
    path = workdir / name
    if replaced is None:
        harm(path, how, where, noise)
    else:
        try:
            path.write_text(replace_in(path.read_text(), *replaced))
        except ValueError:  # An int of too many digits can't be written.
            assume(False)
    before = contents(workdir)
    try:
        text = generate(workdir, ["1 is"], num_tokens=3)
    except ConfigError as error:
        assert_clear(str(error))
    else:
        assert text == right
    try:
        train(config, workdir)
    except ConfigError as error:
        assert_clear(str(error))
    except Reached:
        pass
    assert contents(workdir) == before


@tries(80)
@given(
    lines=st.lists(st.one_of(st.binary(max_size=20), JSON.map(json.dumps).map(str.encode))),
    **HARM,
)
def test_harmed_metrics(lines, how, where, noise, tmp_path, config):
    """A line that is none is left out; where no file can be, the run is refused."""
    TRIED["metrics"] += 1
    path = tmp_path / "metrics.jsonl"
    records = [{"step": 1, "train/loss": 3.0}, {"step": 2, "train/loss": 2.0}]
    good = [json.dumps(r).encode() for r in records]
    path.write_bytes(b"\n".join([good[0], *lines, good[1]]) + b"\n")
    found = metrics.read_jsonl(tmp_path)
    assert found[0] == records[0] and found[-1] == records[1]
    harm(path, how, where, noise)
    if how in ("folder", "link", "loop"):
        with pytest.raises(ConfigError, match=r"metrics\.jsonl is not a file"):
            workdir_access.check_workdir(tmp_path)
    else:
        metrics.MetricsWriter(tmp_path, config, 1).__exit__()
        assert how == "delete" or all(r["step"] <= 1 for r in metrics.read_jsonl(tmp_path))
    path.rmdir() if how == "folder" else path.unlink(missing_ok=True)
    shutil.rmtree(tmp_path / "tensorboard", ignore_errors=True)


@pytest.mark.parametrize("name", ["checkpoints", "tensorboard", "config.json", "tokenizer.json"])
def test_a_workdir_with_something_else_in_a_files_place(name, trained, workdir, no_compiling):
    TRIED["workdir files"] += 1
    path = workdir / name
    if path.is_dir():
        shutil.rmtree(path)
        path.write_text("x")
    else:
        path.unlink()
        path.mkdir()
    before = contents(workdir)
    kind = "file" if "." in name else "folder"
    with pytest.raises(
        ConfigError, match=rf"\A{path} is not a {kind}, which a run needs: move it away"
    ):
        train(configs.load(trained / "config.json"), workdir)
    assert contents(workdir) == before


STRAYS = ["abc", "-1", "007", "3.5", "٣", "5.orbax-checkpoint-tmp", ".hidden", "9" * 30, "9", "1e3"]


@pytest.fixture
def two(tmp_path, config):
    """A workdir with checkpoints 3 and 5 of a tiny state."""
    two_checkpoints(tmp_path / "whole", config)
    return tmp_path / "whole"


def assert_one_that_was_saved(step: int, params) -> None:
    assert step in (3, 5)
    expected = state_of(step, value=float(step)).params
    for a, b in zip(*map(jax.tree.leaves, (params, expected)), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def check_checkpoints(kind: str, workdir: Path, config) -> list[str]:
    """Reads parameters, then the state; returns what is reported."""
    TRIED[kind] += 2
    before, reports = contents(workdir), []
    try:
        params, step = parameters.load_params(workdir, state_of(0).params, report=reports.append)
    except (ConfigError, RunError) as error:
        assert_clear(str(error))
    else:
        assert_one_that_was_saved(step, params)
    assert contents(workdir) == before
    try:
        with open_checkpoints(workdir, config, report=reports.append) as opened:
            found = opened.restore(state_of(0))
    except (ConfigError, RunError) as error:
        assert_clear(str(error))
        assert contents(workdir) == before
    else:
        assert found is None or (assert_one_that_was_saved(found[0], found[2].params) is None)
    return reports


@tries(60)
@given(
    harms=st.lists(st.tuples(st.integers(0, 60), st.fixed_dictionaries(HARM)), max_size=3),
    strays=st.lists(
        st.tuples(st.sampled_from(STRAYS), st.sampled_from(["file", "dir"])), max_size=2
    ),
)
def test_harmed_checkpoints(harms, strays, two, tmp_path, config):
    shutil.rmtree(tmp_path / "harmed", ignore_errors=True)  # Of an example that failed.
    workdir = Path(shutil.copytree(two, tmp_path / "harmed"))
    files = sorted(p for p in workdir.rglob("*") if p.is_file())
    for number, how in harms:
        path = files[number % len(files)]
        if path.is_file() and not path.is_symlink():
            harm(path, **how)
    for name, kind in strays:
        path = workdir / "checkpoints" / name
        if not path.exists():
            path.mkdir() if kind == "dir" else path.write_text("x")
    check_checkpoints("checkpoints", workdir, config)


@pytest.mark.parametrize("part", ["", "state", "extra", "metrics", "state/d", "state/_METADATA"])
@pytest.mark.parametrize("how", ["delete", "file", "folder", "link", "loop", "moved"])
def test_parts_of_a_checkpoint_replaced(part, how, two, tmp_path, config):
    path = two / "checkpoints" / "5" / part
    path.rename(tmp_path / "moved")
    if how == "file":
        path.write_text("x")
    elif how == "moved":  # A link to what was there is as good.
        path.symlink_to(tmp_path / "moved")
    else:
        plant(path, how)
    reports = check_checkpoints("checkpoints", two, config)
    if how == "moved":
        assert reports == []


@pytest.mark.parametrize("name", ["9", "007", "-1", "abc"])
def test_a_renamed_checkpoint_is_not_taken_for_another_step(name, two, config):
    (two / "checkpoints" / "5").rename(two / "checkpoints" / name)
    TRIED["checkpoints"] += 1
    with open_checkpoints(two, config) as opened:
        assert opened.restore(state_of(0))[0] == 3


def test_a_checkpoint_of_other_shapes_is_refused_by_name(two, config):
    before = contents(two)
    state = state_of(0)
    other = state.replace(params=state.params | {"a": state.params["b"]["c"]})
    message = r"params/a is \(2, 3\) in checkpoint \d and \(4,\) by the config"
    TRIED["checkpoints"] += 2
    with open_checkpoints(two, config) as opened, pytest.raises(ConfigError, match=message):
        opened.restore(other)
    with pytest.raises(ConfigError, match=message):
        parameters.load_params(two, other.params)
    assert contents(two) == before


def test_a_text_with_a_new_character_is_told_from_a_damaged_checkpoint(
    trained, workdir, tmp_path, cache_dir
):
    config = configs.load(trained / "config.json")
    config.data.path = str(tmp_path / "changed.txt")
    (tmp_path / "changed.txt").write_text(TEXT + "é")
    before = contents(workdir)
    with pytest.raises(
        ConfigError, match="no longer gives the tokens that this workdir was trained"
    ):
        train(config, workdir)
    assert contents(workdir) == before


class Payload:
    """Makes a file when it is unpickled."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return (os.mkdir, (str(self.marker),))


def payloads(marker: Path) -> list[bytes]:
    array = io.BytesIO()
    np.save(array, np.array([Payload(marker)], dtype=object), allow_pickle=True)
    code = f"__import__('os').mkdir({str(marker)!r})"
    tag = json.dumps({"py/reduce": [{"py/function": "os.mkdir"}, {"py/tuple": [str(marker)]}]})
    return [pickle.dumps(Payload(marker)), array.getvalue(), code.encode(), tag.encode()]


def test_the_payloads_work(tmp_path):
    plain, array, code, _ = payloads(tmp_path / "marker")
    for run in (
        lambda: pickle.loads(plain),
        lambda: np.load(io.BytesIO(array), allow_pickle=True),
        lambda: eval(code),
    ):
        run()
        (tmp_path / "marker").rmdir()


@pytest.mark.parametrize("number", range(4))
def test_a_strangers_files_run_no_code(number, trained, two, tmp_path, config, no_compiling):
    marker = tmp_path / "marker"
    payload = payloads(marker)[number]
    config.data.cache_dir = str(tmp_path / "cache")
    cache = open_cache(config)
    for path in sorted(cache.folder.iterdir()):
        TRIED["payloads"] += 1
        path.unlink()
        path.write_bytes(payload)
        open_cache(config)
    saved = configs.load(trained / "config.json")
    for name in ("config.json", "tokenizer.json", "metrics.jsonl"):
        TRIED["payloads"] += 1
        workdir = renewed(tmp_path / "run", trained)
        (workdir / name).write_bytes(payload)
        with contextlib.suppress(ConfigError, Reached):
            train(saved, workdir)
        with contextlib.suppress(ConfigError):
            generate(workdir, ["1"], num_tokens=2)
        metrics.MetricsWriter(workdir, config, 1).__exit__()
    files = [p.relative_to(two) for p in (two / "checkpoints" / "5").rglob("*") if p.is_file()]
    for name in files:
        workdir = renewed(tmp_path / "harmed", two)
        (workdir / name).write_bytes(payload)
        check_checkpoints("payloads", workdir, config)
    for name in ("params.pkl", "state.npy", "treedef.pkl", "__init__.py", "checkpoint"):
        for folder in ("checkpoints/5/state", "checkpoints/5", ""):
            (two / folder / name).write_bytes(payload)
        # Orbax takes a file of the last name for all of the state, in a format of its own.
        assert bool(check_checkpoints("payloads", two, config)) == (name == "checkpoint")
    assert not marker.exists()


RUN_CODE = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib", "jsonpickle"}


@pytest.mark.parametrize(
    "path",
    sorted((REPOSITORY / "jaxdp").rglob("*.py")),
    ids=lambda p: str(p.relative_to(REPOSITORY)),
)
def test_the_source_reads_nothing_that_could_run(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import | ast.ImportFrom):
            modules = [alias.name for alias in node.names] + [getattr(node, "module", "") or ""]
            assert not RUN_CODE & {part for name in modules for part in name.split(".")}
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in ("eval", "exec", "compile", "__import__")
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            # numpy.load doesn't unpickle unless it is told to; what doesn't read can't be told.
            assert (node.value.id, node.attr) not in {("np", "load"), ("yaml", "load")}
        if isinstance(node, ast.keyword):
            assert node.arg != "allow_pickle"
