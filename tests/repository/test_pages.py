"""What README, CONTRIBUTING, CHANGELOG and docs/ say about files, functions and tests is true."""

import argparse
import ast
import re
import shlex
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
README = (REPOSITORY / "README.md").read_text()
FOLDERS = "jaxdp|configs|tests|docs|benchmarks|colab|launch"
PAGES = [REPOSITORY / f"{name}.md" for name in ("README", "CONTRIBUTING", "CHANGELOG")]
PAGES += sorted([*REPOSITORY.glob("docs/*.md"), *REPOSITORY.glob("benchmarks/*.md")])
# What comparison.md has read of others lies in their repositories.
TEXT = {
    path.relative_to(REPOSITORY).as_posix(): path.read_text().partition("\n## Sources")[0]
    for path in [*PAGES, REPOSITORY / "docs" / "hooks.py"]
}
SOURCES = [*REPOSITORY.glob("jaxdp/**/*.py"), *REPOSITORY.glob("configs/*.py")]
SOURCES += [*REPOSITORY.glob("benchmarks/*.py"), *REPOSITORY.glob("launch/*")]
TEXT |= {path.relative_to(REPOSITORY).as_posix(): path.read_text() for path in SOURCES}
IN_THE_CACHE = ("jaxdp/xla", "jaxdp/tokens")  # Below ~/.cache.


def tree() -> list[tuple[str, str]]:
    """(path, description) of each line of the README's tree; a folder's path ends in "/"."""
    [drawing] = re.findall(r"^```\n(jaxdp/.*?)^```", README, re.MULTILINE | re.DOTALL)
    found, parts = [], []
    for branches, name, text in re.findall(r"^([│├└─ ]*)(\S+) +(.*)", drawing, re.MULTILINE):
        parts[len(branches) // 4 :] = [name]
        found.append(("".join(parts), text))
    return found


def wings() -> list[str]:
    """The folders of jaxdp/ in the order of the tree."""
    return [path[6:-1] for path, _ in tree() if re.fullmatch(r"jaxdp/\w+/", path)] + ["configs"]


def test_the_tree_has_each_file_and_folder_once():
    paths = [path for path, _ in tree()]
    assert len(paths) == len(set(paths))
    for path in paths:
        there = REPOSITORY / path
        assert there.is_dir() if path.endswith("/") else there.exists(), path
    files = {path for path in REPOSITORY.glob("jaxdp/**/*.py") if "configs" not in path.parts}
    files -= set(REPOSITORY.glob("jaxdp/*/__init__.py"))
    expected = {path.relative_to(REPOSITORY).as_posix() for path in files} | {"jaxdp/configs"}
    folders = {path.parent for path in files}
    folders |= {path.parent for path in REPOSITORY.glob("tests/*/*.py") if not mirrors(path)}
    expected |= {f"{folder.relative_to(REPOSITORY)}/" for folder in folders}
    assert expected <= {*paths}, expected - {*paths}
    assert {path for path in paths if path.startswith("jaxdp/")} <= expected


def mirrors(path: Path) -> bool:
    """Whether a test lies in a folder that jaxdp/ has, too."""
    return (REPOSITORY / "jaxdp" / path.parent.name).is_dir()


def test_each_line_of_the_tree_says_something_else():
    texts = [text for _, text in tree()]
    assert all(len(text) > 3 for text in texts)
    assert len(texts) == len(set(texts))


def test_folders_import_those_below_them_in_the_tree():
    above = {path.stem for path in REPOSITORY.glob("jaxdp/*.py")}
    for wing in wings():
        for path in REPOSITORY.glob(f"jaxdp/{wing}/*.py"):
            used = {name.split(".")[1] for name in imported(path) if "." in name}
            assert not used & above, f"{path} imports {used & above}"
        above.add(wing)


def imported(path: Path) -> set[str]:
    """What a file imports from jaxdp, such as "jaxdp.data.cache"."""
    nodes = [*ast.walk(ast.parse(path.read_text()))]
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    for node in nodes:
        if isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in names if re.match(r"jaxdp\b", name)}


def test_the_readme_names_every_config():
    for path in REPOSITORY.glob("configs/*.py"):
        assert re.search(rf"\b{path.name}\b", README), path.name


def test_the_readme_is_short_apart_from_its_tree():
    assert len(README.splitlines()) - len(tree()) <= 120


@pytest.mark.parametrize("page", TEXT)
def test_paths_exist(page):
    """Whole paths anywhere; in pages, also the names of files, and what links lead to."""
    text, names = TEXT[page], set()
    for path in re.findall(rf"(?<![\w/.~-])(?:{FOLDERS})/[\w./*-]*[\w/*]", text):
        # In code, a path without a suffix may be another name.
        if "." in path or (page.endswith(".md") and path.rstrip("/") not in IN_THE_CACHE):
            assert any(REPOSITORY.glob(path.rstrip("/"))), path
    if page.endswith(".md"):
        names = set(re.findall(r"`([a-z]\w*\.(?:py|sh|md|yaml|ipynb))(?::\w+)?`", text))
        for link in re.findall(r"\]\((?!\w+:|#)([^)#\s]+)", text):
            assert (REPOSITORY / page).parent.joinpath(link).exists(), link
    for name in names:
        assert any(any(REPOSITORY.glob(f"{at}/**/{name}")) for at in FOLDERS.split("|")), name


@pytest.mark.parametrize("page", TEXT)
def test_functions_with_a_link_are_in_the_file(page):
    for module, name, path in re.findall(r"\[`(\w+)\.(\w+)[^`]*`\]\(([^)#]+\.py)\)", TEXT[page]):
        if name == "py":
            continue
        file = (REPOSITORY / page).parent / path
        assert file.stem == module
        assert re.search(rf"^(?:def|class) {name}\b", file.read_text(), re.MULTILINE), name


@pytest.mark.parametrize("page", TEXT)
def test_pytest_commands_find_tests(page):
    """Each file is there; each word of -k is in a name of one of them, and each file has a word."""
    for paths, words in pytest_commands(TEXT[page]):
        files = [file for path in paths for file in files_of(path)]
        assert len(files) >= len(paths), paths
        names = {file: names_in(file) for file in files}
        for word in words:
            assert any(word in found for found in names.values()), (paths, word)
        for file, found in names.items():
            assert not words or any(word in found for word in words), (file, words)


def test_the_commands_that_test_claims_stand_on_one_page():
    """But for one that prints a table of the page it stands on."""
    for page, text in TEXT.items():
        if page.startswith("docs/") and page.endswith(".md") and page != "docs/tests.md":
            named = [line for line in text.splitlines() if "pytest tests/" in line]
            assert all("| grep" in line for line in named), f"{page}: move it to docs/tests.md"


def test_pytest_commands_are_found():
    """So that the test above has something to do."""
    found = [command for text in TEXT.values() for command in pytest_commands(text)]
    assert len(found) > 40 and sum(bool(words) for _, words in found) > 20


def pytest_commands(text: str) -> list[tuple[list[str], list[str]]]:
    """(paths, words of -k) of each call of pytest in a shell block or in inline code."""
    blocks = re.findall(r"```(?:bash|console|sh)\n(.*?)```", text, re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    inline = re.findall(r"`([^`]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    parser = argparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("paths", nargs="*")
    for option in ("-k", "-m", "-n"):
        parser.add_argument(option, default="")
    found = []
    for line in [*lines, *inline]:
        if call := re.search(r"(?:^|/|-m |&& )pytest(?: (.*)|$)", " ".join(line.split())):
            words = shlex.split(re.split(r"&&|[|;]", call[1] or "")[0], comments=True)
            arguments, _ = parser.parse_known_args(words)
            keys = re.findall(r"\w+", arguments.k.lower())
            found.append((arguments.paths, [k for k in keys if k not in ("or", "and", "not")]))
    return found


def files_of(path: str) -> list[Path]:
    """The test files that a path names; none where there is no such path."""
    there = REPOSITORY / path
    return sorted(there.rglob("test_*.py")) if there.is_dir() else [there] * there.is_file()


def names_in(file: Path) -> str:
    """The names of a file and of its tests, in lower case: what -k looks at, parameters apart."""
    return " ".join([file.stem, *re.findall(r"def (test_\w+)", file.read_text())]).lower()
