"""What the tests of bad input share: the harm, and the property."""

import collections
import contextlib
import importlib
import io
import json
import os
import shutil
import sys
from pathlib import Path

import jax
import pytest
from absl import flags
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from jaxdp.common import cli, stopping
from jaxdp.common.choices import RANGES
from jaxdp.common.config import flatten
from jaxdp.common.errors import ConfigError
from jaxdp.configs import default
from jaxdp.run import loop

KEYS = flatten(default.get_config())
TRIED: collections.Counter = collections.Counter()
OURS: set[str] = set()  # Names of flags of the commands.


def tries(count: int):
    """The same examples in every run; a fixture's folder serves all examples of a test."""
    return settings(
        derandomize=True,
        deadline=None,
        database=None,
        max_examples=count,
        suppress_health_check=list(HealthCheck),
    )


class Reached(Exception):
    """All checks are passed; what would follow is compilation."""


def contents(folder: Path) -> dict:
    """What a folder holds, links not followed; locks and the folder's absence count as nothing."""
    return {
        str(p.relative_to(folder)): os.readlink(p)
        if p.is_symlink()
        else p.read_bytes()
        if p.is_file()
        else None
        for p in folder.rglob("*")
        if p.name != "lock"
    }


def assert_clear(message: str) -> None:
    """One line of a sane length that has a way out after a colon."""
    assert "\n" not in message and "Traceback" not in message, message
    assert ": " in message and 20 < len(message) < 1500, message


def refusal(kind: str, function, *args) -> str | None:
    """Runs a function on a bad input: how it refuses, or None where it makes something of it."""
    TRIED[kind] += 1
    try:
        function(*args)
    except Reached:
        return None
    except ConfigError as error:
        message = " ".join(str(error).split())
        assert_clear(message)
        return message
    return None


@contextlib.contextmanager
def only_flags_of(module: str):
    """Imports a command anew with only its own flags: the commands have some of the same name."""
    absl, before = flags.FLAGS, {}
    for of, found in absl.flags_by_module_dict().items():
        OURS.update(flag.name for flag in found if of.startswith("jaxdp"))
    for name in OURS & set(absl):
        before[name] = absl[name]
        delattr(absl, name)
    kept, loaded = set(absl), sys.modules.pop(module, None)
    sys.modules.pop("config_config", None)  # Else that of the call before shows through.
    try:
        yield importlib.import_module(module)
    finally:
        for name in set(absl) - kept:
            delattr(absl, name)
        absl.unparse_flags()
        for name, flag in before.items():
            absl[name] = flag
        if loaded:
            sys.modules[module] = loaded


def run_command(kind: str, name: str, *argv: str) -> tuple[int, str]:
    """Runs a command in this process; returns its status and what it says on stdout.

    What it says on stderr must be nothing, or one line with the status of wrong input.
    """
    TRIED[kind] += 1
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, only_flags_of(f"jaxdp.{name}") as module:
        patch.setattr(sys, "argv", [name, *argv])
        patch.setattr(cli, "prepare_jax", lambda: None)
        patch.setattr(stopping, "Listener", lambda request: contextlib.ExitStack())
        check = None if name == "generate" else cli.check_overrides
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                status = cli.run(module.main, check)
        except Reached:
            status = 0
    said = err.getvalue()
    if status == cli.WRONG_INPUT:
        assert said.startswith("jaxdp: ") and said.count("\n") == 1, said
        assert_clear(said.strip())
    else:
        assert status in (0, cli.FAULT), status
    return status, out.getvalue()


def train(config, workdir):
    return loop.train(config, workdir, devices=jax.local_devices()[:1])


def renewed(workdir: Path, trained: Path) -> Path:
    shutil.rmtree(workdir, ignore_errors=True)
    return Path(shutil.copytree(trained, workdir))


def set_anywhere(values: dict, key: str, value) -> None:
    *groups, name = key.split(".")
    for group in groups:
        if not isinstance(values.get(group), dict):
            values[group] = {}
        values = values[group]
    values[name] = value


SURROGATE = "a\udcffb"
ARGUMENTS = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=20)
NUMBERS = st.one_of(
    st.integers(),
    st.sampled_from([10**30, -(10**30), 2**31, 2**63, -1, 0, 2**31 - 1, 1e308, 1e-320]),
    st.sampled_from([float("nan"), float("inf"), -float("inf"), -0.0]),
    st.floats(),
    st.builds(lambda: 10**5000),  # Python doesn't print it, nor could a list of examples.
    st.sampled_from([border for borders in RANGES.values() for border in borders]),
)
IDS = st.sampled_from([-1, 0, 1, 255, 256, 300, 10**6, 2**24, 2**31, 2**32 - 1, 2**32, 2**64])


HARMS = ["truncate", "flip", "delete", "append", "empty", "random", "folder", "link", "loop"]


def harm(path: Path, how: str, where: float, noise: bytes) -> None:
    """Harms a file, or leaves it as it was where there is nothing to harm."""
    data = path.read_bytes()
    at = int(where * max(len(data) - 1, 0))
    flipped = data[:at] + bytes(b ^ (1 << at % 8) for b in data[at : at + 1]) + data[at + 1 :]
    # Half at most is left, and what is added is no space: JSON wouldn't be harmed.
    changed = {"truncate": data[: at // 2], "flip": flipped, "append": data + noise + b"!"}
    changed |= {"empty": b"", "random": noise}
    path.unlink()
    if how in changed:
        path.write_bytes(changed[how])
    else:
        plant(path, how)


def plant(path: Path, kind: str) -> None:
    """Puts what is no file in a file's place, or nothing."""
    if kind == "folder":
        path.mkdir()
    elif kind == "link":
        path.symlink_to("/no/such/file")
    elif kind == "loop":
        path.symlink_to(path)


HARM = {
    "how": st.sampled_from(HARMS),
    "where": st.floats(0, 1),
    "noise": st.binary(min_size=1, max_size=40),
}

JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=6,
)


def paths_in(value, path=()):
    """The paths to all values in a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in items:
        yield (*path, key)
        if isinstance(inner, dict | list):
            yield from paths_in(inner, (*path, key))


def replace_in(text: str, number: int, new) -> str:
    """Replaces one of the values in a JSON text."""
    value = json.loads(text)
    paths = list(paths_in(value))
    *groups, key = paths[number % len(paths)]
    inner = value
    for group in groups:
        inner = inner[group]
    inner[key] = new
    return json.dumps(value)
