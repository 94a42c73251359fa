import re

import pytest
from conftest import REPOSITORY

README = (REPOSITORY / "README.md").read_text()


def test_ci_runs_the_readmes_test_command():
    """Split over lines, but the same: a virtual environment, the pinned set, pytest."""
    ci = (REPOSITORY / ".ci" / "run").read_text()
    [command] = [x for x in README.splitlines() if x.startswith("python3 -m venv .venv &&")]
    for part in command.split(" && "):
        assert part in ci


@pytest.mark.parametrize("name", sorted(set(re.findall(r"`([a-z0-9_]+\.py)`", README))))
def test_files_named_in_the_readme_exist(name):
    assert [*REPOSITORY.glob(f"configs/{name}"), *REPOSITORY.glob(f"jaxdp/{name}")], name


def test_every_module_and_config_is_in_the_readme():
    for path in [*REPOSITORY.glob("jaxdp/*.py"), *REPOSITORY.glob("configs/*.py")]:
        if path.name != "__init__.py":
            assert re.search(rf"\b{path.name}\b", README), path.name


def test_commands_in_the_readme_name_tests_that_exist():
    for files, words in re.findall(r'`pytest ([a-z/_. ]+)(?:-k "?([a-z_ ]+)"?)?`', README):
        names = "".join((REPOSITORY / f).read_text() for f in files.split())
        for word in (words or "").split(" or "):
            assert word.strip() in names
