"""The wings of jaxdp/ import each other in one order, and tests/ has their folders."""

import ast
import functools
import tomllib
from pathlib import Path

import pytest

from support.texts import REPOSITORY

# From the top; a wing imports only wings below it.
ORDER = (
    "commands",
    "run",
    "estimate",
    "huggingface",
    "workdir",
    "step",
    "sync",
    "parallel",
    "data",
    "model",
    "common",
    "configs",
)
PACKAGE = REPOSITORY / "jaxdp"
MODULES = sorted({*PACKAGE.rglob("*.py"), *PACKAGE.glob("configs/*.py")})  # The latter is a link.
TESTS = sorted((REPOSITORY / "tests").rglob("*.py"))
FOLDERS = {*ORDER, "drills", "repository", "support"} - {"configs"}


def name(path: Path) -> str:
    """`jaxdp.common.cli` of jaxdp/common/cli.py, `jaxdp.common` of its `__init__.py`."""
    parts = path.relative_to(REPOSITORY).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


NAMES = {name(path): path for path in MODULES}


def wing(module: str) -> str:
    """The wing of a module: its folder, or else it is a command."""
    path = NAMES[module].relative_to(PACKAGE)
    return path.parts[0] if len(path.parts) > 1 else "commands"


@functools.cache
def imported(path: Path) -> set[str]:
    """All that a file imports, functions' imports too: `a.b` of `import a.b`, `from a import b`."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports have whole names here"
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return found


def modules_imported(module: str) -> set[str]:
    """The modules of jaxdp that one of them imports; packages only where they are more."""
    found = imported(NAMES[module]) & NAMES.keys()
    return {x for x in found if NAMES[x].name != "__init__.py"} - {module}


@pytest.mark.parametrize("module", [x for x in NAMES if "." in x])
def test_a_wing_imports_only_wings_below_it(module):
    rank = ORDER.index(wing(module))
    for other in modules_imported(module):
        beside = wing(other) == wing(module)
        assert beside or ORDER.index(wing(other)) > rank, f"{module} imports {other}"


def test_the_modules_of_a_wing_import_each_other_in_no_circle():
    waiting = {module: modules_imported(module) for module in NAMES}
    while ready := {module for module, others in waiting.items() if not others & waiting.keys()}:
        for module in ready:
            del waiting[module]
    assert not waiting, f"in or above a circle: {sorted(waiting)}"


@pytest.mark.parametrize("path", MODULES, ids=name)
def test_flags_live_in_the_commands_and_pmap_in_one_file(path):
    if wing(name(path)) != "commands" and path.name != "cli.py":
        assert not imported(path) & {"absl.flags", "absl.app"}
    if path != PACKAGE / "parallel" / "replicas.py":
        assert "jax.pmap" not in imported(path)
        nodes = ast.walk(ast.parse(path.read_text()))
        assert "jax.pmap" not in {ast.unparse(x) for x in nodes if isinstance(x, ast.Attribute)}


@pytest.mark.parametrize("path", TESTS, ids=lambda path: path.stem)
def test_no_test_imports_another(path):
    for other in imported(path):
        first = other.partition(".")[0]
        assert not first.startswith("test_") and first != "conftest", other


def private(name: str) -> bool:
    return name.startswith("_") and not name.endswith("__")


@pytest.mark.parametrize("path", TESTS, ids=lambda path: path.stem)
def test_no_test_uses_a_private_name(path):
    """Of jaxdp or of a library; what an object calls `self` is its own."""
    used = {part for name in imported(path) for part in name.split(".")} - {"__future__"}
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) != "self":
            used.add(node.attr)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("setattr"):
            texts = [x.value for x in node.args if isinstance(x, ast.Constant)]
            used |= {part for text in texts for part in str(text).split(".")}
    used -= {"_exit"}  # Of os, and public.
    assert not {name for name in used if private(name)}


def test_the_folders_of_the_tests_are_the_wings():
    folders = {path.parent.name for path in TESTS if path.parent.name != "tests"}
    assert folders == FOLDERS
    settings = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["tool"]["pytest"]
    by_default = {Path(path).name for path in settings["ini_options"]["testpaths"]}
    assert by_default == FOLDERS - {"drills", "support"}
    assert {wing(module) for module in NAMES} == set(ORDER)
