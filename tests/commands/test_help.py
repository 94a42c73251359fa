"""What a user sees before anything runs: the list of commands, --help, and mistakes in --config."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from jaxdp import __version__
from jaxdp.common import cli, config_file, usage
from jaxdp.common.errors import ConfigError
from support.texts import REPOSITORY


def run(*arguments, **options):
    """Runs `python ...`; returns its status, what it printed, and what it said on stderr."""
    command = [sys.executable, *arguments]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, **options)
    return done.returncode, done.stdout, done.stderr


def python(code):
    """What a fresh interpreter prints."""
    status, out, err = run("-c", code)
    assert (status, err) == (0, "")
    return out.strip()


def flags_of(name):
    """The names that a command's file defines flags by."""
    import ast

    tree = ast.parse((REPOSITORY / "jaxdp" / f"{name}.py").read_text())
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    return [ast.literal_eval(x.args[0]) for x in calls if ".DEFINE_" in ast.unparse(x.func)]


def test_the_commands_are_the_modules_on_top():
    modules = {path.stem for path in REPOSITORY.glob("jaxdp/*.py")}
    assert set(usage.COMMANDS) == modules - {"__init__", "__main__"}


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]])
def test_jaxdp_lists_the_commands(arguments):
    status, out, err = run("-m", "jaxdp", *arguments)
    assert (status, err) == (0, "")
    lines = [line.split() for line in out.splitlines()]
    for name in usage.COMMANDS:
        [line] = [words for words in lines if words[:1] == [name]]
        assert len(line) > 4
    assert "jaxdp train --config=configs/quickstart.py" in out


def test_jaxdp_says_its_version():
    assert run("-m", "jaxdp", "--version") == (0, f"jaxdp {__version__}\n", "")


@pytest.mark.parametrize(
    ("name", "says"), [("trian", "did you mean train?"), ("zzz", "choose one of train, evaluate,")]
)
def test_an_unknown_command_is_refused_in_a_line(name, says):
    status, out, err = run("-m", "jaxdp", name, "--help")
    assert (status, out) == (2, "") and err.count("\n") == 1
    assert err.startswith(f"jaxdp: '{name}' is no command: ") and says in err


def test_the_installed_command_is_the_same():
    import tomllib

    scripts = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["scripts"]
    module, _, function = scripts["jaxdp"].partition(":")
    out = python(f"import sys, {module} as m; sys.argv[1:] = ['--version']; m.{function}()")
    assert out == f"jaxdp {__version__}"


@pytest.mark.parametrize("name", usage.COMMANDS)
def test_help_says_what_a_command_does_and_all_its_flags(name):
    status, out, err = run("-m", f"jaxdp.{name}", "--help")
    assert (status, err) == (0, "")
    assert out.startswith(f"usage: jaxdp {name} ")
    assert usage.described(REPOSITORY / "jaxdp" / f"{name}.py")[0] in out
    assert f"python -m jaxdp.{name}" in out
    for flag in flags_of(name):
        row = out[out.index(f"\n  --{flag}") :].split("\n")[1]
        assert len(row.split()) > 2, row
    assert ("configs/default.py explains every key" in out) == ("config" in flags_of(name))
    assert "verbosity" not in out
    assert run("-m", "jaxdp", name, "-h") == (0, out, "")


@pytest.mark.parametrize("arguments", [["jaxdp"], ["jaxdp.train", "--help"]])
def test_help_ends_without_a_word_when_its_reader_has_gone(arguments):
    """As `head -1` does."""
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write) as closed:
        done = subprocess.run(
            [sys.executable, "-m", *arguments],
            cwd=REPOSITORY,
            stdout=closed,
            stderr=subprocess.PIPE,
        )
    assert (done.returncode, done.stderr) == (0, b"")


def test_help_tells_defaults():
    out = run("-m", "jaxdp.generate", "--help")[1]
    assert "Tokens to add to each prompt. Default: 200." in " ".join(out.split())


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help", "--config=configs/nothere.py"],
        ["--config=configs/nothere.py", "--config.seed=1", "-h"],
        ["--config.sed=1", "--no_such_flag", "--helpfull"],
        ["--config=configs/quickstart.py", "--workdir=x", "--help"],
    ],
)
def test_help_is_given_whatever_else_is_on_the_line(arguments):
    status, out, err = run("-m", "jaxdp.train", *arguments)
    assert (status, err) == (0, "") and out.startswith("usage: jaxdp train ")
    assert ("--verbosity" in out) == ("--helpfull" in arguments)


def test_a_command_says_the_version():
    for arguments in (["--version"], ["--config=configs/nothere.py", "--version"]):
        assert run("-m", "jaxdp.train", *arguments) == (0, f"jaxdp {__version__}\n", "")


@pytest.mark.parametrize("name", usage.COMMANDS)
def test_help_and_mistakes_in_flags_import_no_jax(name):
    for argument in ("--help", "--no_such_flag"):
        *_, err = run("-X", "importtime", "-m", f"jaxdp.{name}", argument)
        imported = {line.split("|")[-1].strip() for line in err.splitlines() if "|" in line}
        assert "absl.flags" in imported
        assert not imported & {"jax", "tensorflow", "flax", "orbax"}


def test_hyphens_are_underscores_in_a_flags_name():
    status, _, err = run("-m", "jaxdp.generate", "--workdir=x", "--prompt=x", "--num-tokens=0")
    assert status == 2 and "--num_tokens=0" in err and err.count("\n") == 1


# A wrong --config.


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("configs/quikstart.py", "no such file; did you mean configs/quickstart.py?"),
        ("quickstart", "no such file; did you mean configs/quickstart.py?"),
        ("confgs/quickstart.py", "no such file; did you mean configs/quickstart.py?"),
        ("configs/gpt.py:350M", "no such file; did you mean configs/gpt2.py:350M?"),
        ("configs/nothere.py", "no such file; the nearest is configs/"),
        ("configs/nothere.py:SIZE", "no such file; the nearest is configs/"),
        ("configs", "no such file, but a folder; the nearest is configs/"),
        ("/", "no such file, but a folder; the nearest is configs/"),
        ("", "no such file; the nearest is configs/"),
    ],
)
def test_a_config_that_is_no_file_is_told_with_the_nearest(given, says, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    with pytest.raises(ConfigError) as error:
        cli.check_config([f"--config={given}", "--config.seed=1"])
    assert str(error.value).startswith(f"--config={given!r}: {says}")


@pytest.mark.parametrize("name", ["train", "plan"])
@pytest.mark.parametrize("override", [[], ["--config.seed=1"]])
def test_the_commands_tell_it_in_a_line(name, override):
    status, out, err = run("-m", f"jaxdp.{name}", "--config=configs/quikstart.py", *override)
    assert (status, out) == (2, "") and err.count("\n") == 1
    assert err.startswith("jaxdp: --config='configs/quikstart.py': no such file; did you mean ")


def test_it_is_told_of_a_flagfile_too(tmp_path):
    (tmp_path / "flags").write_text("--config=configs/quikstart.py\n")
    _, _, err = run("-m", "jaxdp.plan", f"--flagfile={tmp_path / 'flags'}")
    assert "no such file; did you mean configs/quickstart.py?" in err and err.count("\n") == 1


def test_the_nearest_config_is_found_in_the_folder_that_was_given(tmp_path):
    (tmp_path / "large.py").write_text("def get_config(): ...")
    (tmp_path / "larges.py").write_text("print('no config')")
    with pytest.raises(ConfigError, match=rf"did you mean {tmp_path}/large\.py\?"):
        config_file.check(str(tmp_path / "larg.py"))
    with pytest.raises(ConfigError, match=rf"did you mean {tmp_path}/large\.py:9\?"):
        config_file.check(f"{tmp_path}/lrge.py:9")


def test_the_shipped_configs_are_found_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as error:
        config_file.check("configs/quikstart.py")
    assert Path(str(error.value).split("did you mean ")[1].rstrip("?")).is_file()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--config={}/none.py"], "can't be read (it has no get_config()): "),
        (["--config={}/none.py", "--config.seed=1"], "can't be read (it has no get_config()): "),
        (["--config.seed=1"], "--config is missing: "),
        (["--workdir=x"], "--config is missing: "),
        (["--config.seed=1", "--config=configs/quickstart.py"], "comes before --config: "),
        (["--config", "configs/quikstart.py"], "did you mean configs/quickstart.py?"),
    ],
)
def test_other_mistakes_with_config_are_a_line(arguments, says, tmp_path):
    (tmp_path / "none.py").write_text("x = 1")
    arguments = [argument.format(tmp_path) for argument in arguments]
    status, out, err = run("-m", "jaxdp.plan", *arguments)
    assert (status, out) == (2, "") and err.count("\n") == 1
    assert err.startswith("jaxdp: ") and says in err


def test_evaluate_wants_no_config_file():
    status, _, err = run("-m", "jaxdp.evaluate", "--config=configs/quickstart.py", "--workdir=x")
    assert status == 2 and err.count("\n") == 1
    assert "change its keys with --config.KEY=VALUE" in err
