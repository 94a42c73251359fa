import pwd
from pathlib import Path

import jax
import pytest

from jaxdp.common import cli, config_file, paths, pictures
from jaxdp.common.errors import ConfigError
from jaxdp.data.cache import open_cache
from jaxdp.run import loop
from jaxdp.workdir.generation import generate


@pytest.mark.parametrize("text", ["gs://bucket/runs/a", "s3://b", "hdfs://h:9/x", "file:///tmp/x"])
@pytest.mark.parametrize("kind", [str, Path])
def test_addresses_are_refused_before_anything_is_made(text, kind, config, tmp_path, monkeypatch):
    """Path("gs://bucket") would be a folder called gs: here."""
    monkeypatch.chdir(tmp_path)
    message = r"--workdir='\w+:/.*' is no path of this machine: "
    for use in (
        lambda: paths.local("--workdir", kind(text)),
        lambda: loop.train(config, kind(text)),
        lambda: generate(kind(text), ["a"]),
    ):
        with pytest.raises(ConfigError, match=message):
            use()
    config.data.cache_dir = text
    with pytest.raises(ConfigError, match=r"data\.cache_dir='\w+://.* is no path"):
        open_cache(config)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("text", ["runs/a", "/tmp/lr:3e-4", "a:b", "./~x", "runs/x://y"])
def test_other_names_are_paths(text):
    assert paths.local("--workdir", text) == Path(text)


def test_home_is_found_where_the_shell_does_not_look(monkeypatch):
    """Bash replaces ~ at the beginning of a word only."""
    monkeypatch.setenv("HOME", "/home/me")
    assert pictures.check("output", "~/a.png") == Path("/home/me/a.png")
    given = ["--config=~/gpt2.py:350M", "--config.data.path=~/a.txt", "--workdir=~/run", "~/x"]
    assert config_file.expanded(given) == ["--config=/home/me/gpt2.py:350M", *given[1:]]


@pytest.fixture
def homeless(monkeypatch, tmp_path):
    """A user without HOME and without an entry in /etc/passwd, as in some containers."""

    def unknown(_):
        raise KeyError

    for name in ("HOME", "XDG_CACHE_HOME", "HF_HOME", "HF_HUB_CACHE", "TFDS_DATA_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    monkeypatch.setattr(pwd, "getpwnam", unknown)
    monkeypatch.chdir(tmp_path)


def test_without_a_home_no_folder_is_called_tilde(homeless, config, tmp_path, capsys):
    for path in ("~/runs/a", "~"):
        with pytest.raises(ConfigError, match=r"--workdir: user .* has no home folder.*: set HOME"):
            paths.local("--workdir", path)
    with pytest.raises(ConfigError, match="there is no user 'nobody7'"):
        paths.local("--workdir", "~nobody7/a")
    for key, value in {
        "data.cache_dir": "",
        "data.path": "tfds:python_stdlib",
        "tokenizer": "hf:no/such",
    }.items():
        changed = config.copy_and_resolve_references()
        changed.update_from_flattened_dict({key: value})
        with pytest.raises(ConfigError, match=r"has no home folder.*: set HOME"):
            open_cache(changed)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def no_compilation_cache():
    before = jax.config.values["jax_compilation_cache_dir"]
    jax.config.update("jax_compilation_cache_dir", None)
    yield
    jax.config.update("jax_compilation_cache_dir", before)


def test_without_a_home_programs_are_not_kept(homeless, no_compilation_cache, tmp_path, capsys):
    cli.prepare_jax()
    assert jax.config.values["jax_compilation_cache_dir"] is None
    assert "compiled programs are not kept for the next start" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("given", "found"), [("cache", "cache"), ("", "home/.cache")])
def test_both_caches_are_where_xdg_says(
    given, found, config, tmp_path, monkeypatch, no_compilation_cache
):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / given) if given else "")
    config.data.cache_dir = ""
    assert open_cache(config).folder.parent == tmp_path / found / "jaxdp" / "tokens"
    cli.prepare_jax()
    programs = jax.config.values["jax_compilation_cache_dir"]
    assert programs == str(tmp_path / found / "jaxdp" / "xla")


def test_a_relative_xdg_folder_is_ignored(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", "cache")
    assert paths.cache_folder() == tmp_path / ".cache" / "jaxdp"
