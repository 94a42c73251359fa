"""The how-to pages of docs/: their commands run as they stand there, but for tiny sizes."""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdp.common.choices import CHOICES
from jaxdp.configs import quickstart
from jaxdp.run import loop
from jaxdp.sync.methods import METHODS
from support.processes import command
from support.steps import start, train
from support.texts import REPOSITORY, TEXT

# Blocks that are not run here, by page and beginning, and why.
NOT_RUN = {
    ("first_model", "git clone"): "installs jaxdp, as CI does",
    ("gpus", "pip install"): "needs GPUs",
    ("gpus", "python -m jaxdp.train --processes=2"): "tests/drills/test_clusters.py starts several",
    ("gpus", "python -m jaxdp.plan"): "compiles for H100s, for minutes",
    ("machines", "sbatch"): "needs a cluster; tests/drills/test_launch.py runs the script",
    ("machines", "launch/ssh.sh"): "needs a cluster; tests/drills/test_launch.py runs the script",
    ("machines", "python -m jaxdp.train"): "needs a cluster; test_clusters.py has two processes",
    ("machines", "python -m jaxdp.plan"): "compiles for H100s, for minutes",
    ("out_of_memory", "python -m jaxdp.plan --config=configs/gpt2.py"): "compiles for minutes",
    (
        "sizes",
        "python -m jaxdp.plan",
    ): "takes the time that it is given; tests/estimate/test_budget.py",
    ("which_sync", "python -m jaxdp.plan"): "compiles for H100s, for minutes",
    ("new_method", "JAX_NUM_CPU_DEVICES=4"): "needs the method's name in the code; tried below",
}
ON_THE_HUB = {"Qwen/Qwen3-0.6B": "first"}  # The model that first_model.md exports takes its place.
TINY = {
    "num_train_steps": 2,
    "global_batch_size": 8,
    "seq_len": 16,
    "eval_every": 2,
    "eval_max_batches": 2,
    "checkpoint.every": 2,
    "optimizer.warmup_steps": 1,
    "sample.num_tokens": 4,
}
TINY_MODEL = {
    "tokenizer": "byte",
    "model.num_layers": 1,
    "model.num_heads": 2,
    "model.embed_dim": 16,
}
# A shell's `python` writes down what it was called with; all else runs.
RECORD = """
python() { printf '%s\\0' "${JAX_NUM_CPU_DEVICES:-1}" "$@" >> calls; printf '\\n' >> calls; }
"""


def blocks(page, language="bash"):
    text = (REPOSITORY / "docs" / f"{page}.md").read_text()
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def reason(page, block):
    """Why a block is not run, or None."""
    found = [
        why for (at, begins), why in NOT_RUN.items() if at == page and block.startswith(begins)
    ]
    return found[0] if found else None


def small(name, arguments, cache_dir):
    """The arguments with tiny sizes; of several values of a key, the last counts."""
    arguments = [re.sub("|".join(ON_THE_HUB), lambda m: ON_THE_HUB[m[0]], x) for x in arguments]
    more = {"data.cache_dir": cache_dir} if name in ("train", "evaluate") else {}
    if name in ("train", "plan"):
        tuned = any("finetune" in argument for argument in arguments)
        more |= TINY if tuned else TINY | TINY_MODEL
        if not any("config.data.path" in argument for argument in arguments):
            more["data.path"] = "FILE.txt"
    return [*arguments, *(f"--config.{key}={value}" for key, value in more.items())]


def run_page(page, folder, cache_dir):
    """Runs the bash blocks of a page in a folder; returns what was printed.

    Of the runs of a loop, which differ in values only, the first is trained and then copied.
    """
    printed = []
    for block in blocks(page):
        trained: dict = {}
        if reason(page, block):
            continue
        done = subprocess.run(
            ["bash", "-euc", f"unset JAX_NUM_CPU_DEVICES\n{RECORD}\n{block}"],
            cwd=folder,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, (block, done.stderr)
        printed += [done.stdout] * bool(done.stdout)
        calls = folder / "calls"
        called = calls.read_text() if calls.exists() else ""
        calls.unlink(missing_ok=True)
        for call in called.split("\0\n")[:-1]:
            devices, dash_m, module, *arguments = call.split("\0")
            assert dash_m == "-m", call
            name = module.removeprefix("jaxdp.")
            given = small(name, arguments, cache_dir)
            if name == "train":
                [workdir] = [x.partition("=")[2] for x in given if x.startswith("--workdir=")]
                keys = tuple(x.partition("=")[0] for x in given)
                if trained.setdefault(keys, workdir) != workdir:
                    shutil.copytree(folder / trained[keys], folder / workdir)
                    continue
            done = command(name, *given, devices=int(devices), cwd=folder)
            printed.append(done.stdout)
    return printed


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What the pages take for granted: the repository, texts, and room for runs."""
    folder = tmp_path_factory.mktemp("how_to")
    for name in ("configs", "jaxdp"):
        (folder / name).symlink_to(REPOSITORY / name)
    (folder / "FILE.txt").write_text(TEXT)
    (folder / "OTHER.txt").write_text(TEXT[::-1])
    records = [{"question": f"{i} is", "answer": "odd" if i % 2 else "even"} for i in range(99)]
    (folder / "questions.jsonl").write_text("\n".join(map(json.dumps, records)))
    return folder


@pytest.fixture(scope="module")
def first_model(folder, cache_dir):
    """What the commands of the first page print."""
    return run_page("first_model", folder, cache_dir)


def test_the_first_model(first_model, folder):
    trained, plotted, written, evaluated, exported = first_model
    assert "evaluation at step 2" in trained and plotted == "first.svg\n"
    assert written.startswith("It was") and "evaluation at step 2" in evaluated
    assert exported == "first: the model after step 2\n"
    assert {"first.svg", "first"} <= set(os.listdir(folder))


def test_fine_tuning(first_model, folder, cache_dir):
    tuned, evaluated, written, exported, answers = run_page("finetune", folder, cache_dir)
    assert "Starting from the weights of hf:first" in tuned
    assert "evaluation at step 2" in evaluated and written.startswith("Once upon a time")
    assert exported == "tuned: the model after step 2\n"
    assert "evaluation at step 2" in answers


def test_several_gpus(folder, cache_dir):
    first, four = run_page("gpus", folder, cache_dir)
    assert "runs/char" in first and "4 x cpu in 1 process" in four


def test_out_of_memory(folder, cache_dir):
    planned, small, sharded = run_page("out_of_memory", folder, cache_dir)
    assert "FITS" in planned
    assert "1 per micro-batch" in small or "micro" in small
    assert "sharded" in sharded


def test_sizes(folder, cache_dir):
    assert run_page("sizes", folder, cache_dir)[-1] == "rates.svg\n"


def test_sweeps(folder, cache_dir, short, monkeypatch):
    *_, plotted, numbers = run_page("sweeps", folder, cache_dir)
    assert plotted == "sweep.svg\n"
    assert re.fullmatch(r'(runs/sweep/\w+-\d "eval/loss": \d+\.\d+\n){6}', numbers)
    monkeypatch.chdir(folder)
    monkeypatch.setattr(quickstart, "get_config", short.copy_and_resolve_references)
    [code] = blocks("sweeps", "python")
    exec(code, {})


@pytest.fixture
def sign_vote(monkeypatch):
    """The method of the page, where the page says that it goes."""
    [code] = blocks("new_method", "python")
    found: dict = {}
    exec(code, found)
    monkeypatch.setitem(METHODS, "sign_vote", found["SignVote"])
    monkeypatch.setitem(CHOICES, "sync.method", (*CHOICES["sync.method"], "sign_vote"))
    return found["SignVote"]


def test_a_new_method_does_what_its_page_says(sign_vote, config, tmp_path, capsys):
    """With plain SGD of rate r each step moves each parameter by r, or not at all, after a tie."""
    config.sync.method = "sign_vote"
    config.optimizer.update({"name": "sgd", "b1": 0.0, "clip_norm": 0.0, "weight_decay": 0.0})
    config.optimizer.update({"schedule": "constant", "warmup_steps": 0, "learning_rate": 2**-10})
    _, _, state = start(config, 2)
    before = jax.device_get(state.params)
    _, after = train(config, 2, steps=1)
    moved = jax.tree.map(lambda a, b: np.abs(a - b).ravel(), before, after)
    sizes = np.concatenate(jax.tree.leaves(moved)) / 2**-10
    # Parameters are below 1 or 2, so a difference is rounded by 2^-24 at most: 2^-14 of the rate.
    assert np.all((sizes < 2**-13) | (np.abs(sizes - 1) < 2**-13))
    assert 0.2 < np.mean(sizes > 0.5) < 1

    config.optimizer.warmup_steps = 1
    result = loop.train(config, tmp_path / "run", devices=jax.local_devices()[:4])
    assert result.finished and all(
        jnp.isfinite(x).all() for x in jax.tree.leaves(result.state.params)
    )
    assert "sign_vote" in capsys.readouterr().out


def test_each_how_to_is_tried_and_each_reason_is_of_a_block():
    """Pages are tried above by their names; those that only explain have no blocks."""
    for (page, begins), why in NOT_RUN.items():
        assert why and sum(block.startswith(begins) for block in blocks(page)) == 1, begins
    site = (REPOSITORY / "mkdocs.yml").read_text()
    how_tos = site.partition("- How to:")[2].partition("- Explained:")[0]
    for page in ["first_model", *re.findall(r"(\w+)\.md", how_tos)]:
        run = [block for block in blocks(page) if not reason(page, block)]
        assert not run or f'run_page("{page}"' in Path(__file__).read_text(), page
