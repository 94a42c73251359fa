"""The documentation: it builds, its commands exist, its examples and its tables are right."""

import ast
import doctest
import html
import importlib
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from jaxdp.common.config import flatten
from jaxdp.configs import default
from support.texts import REPOSITORY

README = (REPOSITORY / "README.md").read_text()
PAGES = [REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md"]
PAGES += [*sorted(REPOSITORY.glob("docs/*.md")), REPOSITORY / "benchmarks" / "RESULTS.md"]
TEXT = {page.name: page.read_text() for page in PAGES}
MODULES = sorted(p for p in REPOSITORY.glob("jaxdp/**/*.py") if p.parent.name != "configs")
KEYS = flatten(default.get_config())
OTHER_PROGRAMS = "pytest|pip|venv|mkdocs"
DEFINES = r"\.DEFINE_|\.add_argument$"


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The site, built without a network; a warning is an error."""
    pytest.importorskip("mkdocs", reason="needs the extra docs: pip install -e '.[docs]'")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-d", str(folder)]
    nowhere = dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"), "http://127.0.0.1:9")
    done = subprocess.run(
        command, cwd=REPOSITORY, env=os.environ | nowhere, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def text_of(page: Path) -> str:
    """What a page shows, in a line."""
    return " ".join(html.unescape(re.sub(r"<[^>]+>", " ", page.read_text())).split())


def test_every_key_of_the_config_is_in_the_reference(site):
    rows = re.findall(r"<tr>(.*?)</tr>", (site / "config" / "index.html").read_text(), re.DOTALL)
    cells = [re.findall(r"<td[^>]*>(.*?)</td>", row, re.DOTALL) for row in rows]
    plain = [[html.unescape(re.sub("<[^>]+>", "", c)) for c in row] for row in cells if row]
    found = {key: (value, limits, comment) for key, value, limits, comment in plain}
    assert found.keys() == KEYS.keys()
    for key, (value, limits, comment) in found.items():
        assert value == repr(KEYS[key])
        assert limits and len(comment) > 10, key
    assert found["seq_len"][1] == "from 2" and found["optimizer.b1"][1] == "0 to 0.999999"
    assert "'adamw', 'lion'" in found["optimizer.name"][1]


def test_the_site_has_every_module_and_page(site):
    for path in MODULES:
        if path.name != "__init__.py":
            name = path.relative_to(REPOSITORY / "jaxdp").with_suffix("")
            assert (site / "reference" / name / "index.html").is_file(), name
    for page in REPOSITORY.glob("docs/*.md"):
        link = f'href="{page.stem}/"'
        assert link in (site / "index.html").read_text(), f"{page.name} is not in the navigation"


def test_every_flag_is_documented(site):
    shown = text_of(site / "commands" / "index.html")
    for module in commands():
        for flag in flags(module):
            assert f"--{flag} " in shown, (module, flag)


def test_pages_load_nothing_from_elsewhere(site):
    for page in site.rglob("*.html"):
        tags = re.findall(r"<(?:script|img|iframe|link)\b[^>]*>", page.read_text())
        loaded = [link for tag in tags for link in re.findall(r'(?:src|href)="?([^\s">]+)', tag)]
        assert loaded and not [link for link in loaded if "//" in link], page
        # With this, the theme would ask GitHub for the number of stars.
        assert 'data-md-component="source"' not in page.read_text()


def examples() -> list[str]:
    paths = [path for path in MODULES if ">>> " in path.read_text()]
    return [".".join(path.relative_to(REPOSITORY).with_suffix("").parts) for path in paths]


@pytest.mark.parametrize("module", examples())
def test_examples_in_docstrings(module):
    tried = doctest.testmod(importlib.import_module(module))
    assert tried.attempted and not tried.failed


def commands() -> list[str]:
    """The modules that define flags."""
    return [f"jaxdp.{path.stem}" for path in MODULES if ".DEFINE_" in path.read_text()]


def flags(module: str) -> set[str]:
    """The names of a program's flags, by its source; `module` may be the path of a script too."""
    path = REPOSITORY / (module if module.endswith(".py") else f"{module.replace('.', '/')}.py")
    calls = [call for call in ast.walk(ast.parse(path.read_text())) if isinstance(call, ast.Call)]
    defined = [call for call in calls if re.search(DEFINES, ast.unparse(call.func))]
    return {ast.literal_eval(call.args[0]).removeprefix("--") for call in defined}


def shell_commands(text: str) -> list[str]:
    """What a page tells to type, each in a line: of its shell blocks, and of its inline code."""
    blocks = re.findall(r"```(?:bash|console|sh)\n(.*?)```", text, re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [*lines, *re.findall(r"`([^`\n]*\bpython[^`\n]*)`", text)]


def split(line: str) -> list[str]:
    """The words of a line, as a shell takes them; its quotes may end in another line."""
    try:
        return shlex.split(line, comments=True)
    except ValueError:
        return line.split()


def programs() -> list[tuple[str, str, list[str]]]:
    """(page, program, its arguments) of each `python -m MODULE` and `python FILE.py`."""
    found = []
    for page, text in TEXT.items():
        for line in shell_commands(text):
            words = split(line)
            for i, word in enumerate(words):
                if re.fullmatch(r"([\w.-]+/)*python3?", word):
                    rest = words[i + 1 :]
                    rest = rest[rest[:1] == ["-m"] :]
                    if rest and not re.fullmatch(OTHER_PROGRAMS, rest[0]):
                        end = next((j for j, w in enumerate(rest) if w in ("&&", ";", "&")), None)
                        found.append((page, rest[0], rest[1:end]))
    return found


@pytest.mark.parametrize(("page", "program", "arguments"), programs())
def test_commands_in_the_documentation_exist(page, program, arguments):
    known = flags(program)
    for argument in arguments:
        if argument.startswith("--config."):
            key, _, _ = argument.removeprefix("--config.").partition("=")
            assert "config" in known and (key in KEYS or key == "KEY"), argument
        elif argument.startswith("--"):
            name, _, value = argument.removeprefix("--").partition("=")
            assert name in known or name.removeprefix("no") in known, argument
            if name == "config" and re.fullmatch(r"[\w/]+\.py", value):
                assert (REPOSITORY / value).is_file(), argument


def test_commands_are_found_in_the_documentation():
    """So that the test above has something to do."""
    documented = {program for _, program, _ in programs()}
    assert {"jaxdp.train", "jaxdp.evaluate", "benchmarks/nanogpt.py"} <= documented
    assert len(programs()) > 20


@pytest.mark.parametrize("page", TEXT)
def test_keys_in_the_documentation_exist(page):
    groups = "|".join(sorted({key.partition(".")[0] for key in KEYS if "." in key}))
    for group, name in re.findall(rf"`({groups})\.(\w+)[^`]*`", TEXT[page]):
        is_key, is_file = f"{group}.{name}" in KEYS, name in ("py", "safetensors")
        assert is_key or is_file or hasattr(importlib.import_module(f"jaxdp.{group}"), name), name


def test_the_lines_of_the_troubleshooting_page_are_said():
    """Each is a text in the code; "…" stands for what the code puts in, or leaves out."""
    said = {text_in(node) for path in MODULES for node in ast.walk(ast.parse(path.read_text()))}
    said -= {""}
    lines = re.findall(r"(?m)^\| `([^`]+)` \|", TEXT["troubleshooting.md"])
    assert len(lines) > 20
    for line in lines:
        parts = [re.escape(part) for part in line.split("…")]
        pattern = re.compile(".*".join(parts), re.DOTALL)
        assert any(pattern.search(text) for text in said), line


def text_in(node: ast.AST) -> str:
    """The text of a literal, also of an f-string, whose fields are left out; else ""."""
    if isinstance(node, ast.JoinedStr):
        return "".join(text_in(value) for value in node.values)
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""


def test_pictures_are_small_and_load_nothing():
    pictures = {path.name: path.read_text() for path in REPOSITORY.glob("docs/*.svg")}
    assert pictures.keys() == {"terminal.svg", "curves.svg", "sync.svg"}
    for name, text in pictures.items():
        assert len(text) < 300_000, name
        links = re.findall(r"""href=["']([^"']*)|url\(([^)]*)""", text)
        assert all("".join(link).startswith("#") for link in links), name
        assert "@font-face" not in text and "@import" not in text, name


def test_ci_runs_the_readmes_test_command():
    """Split over lines, but the same, with all that tests can use."""
    ci = (REPOSITORY / ".ci" / "run").read_text()
    [command] = [x for x in README.splitlines() if x.startswith("python3 -m venv .venv &&")]
    for part in command.split(" && "):
        assert part.replace("[dev]", "[dev,docs,style,compare,plan-gpu,datasets]") in ci


def test_notebooks_open_in_colab():
    for path in REPOSITORY.glob("colab/*.ipynb"):
        first = "".join(json.loads(path.read_text())["cells"][0]["source"])
        at = f"colab.research.google.com/github/jaxdp/jaxdp/blob/main/colab/{path.name}"
        assert f"badge.svg)](https://{at})" in first


@pytest.mark.parametrize(
    "path", sorted(REPOSITORY.glob("colab/*.ipynb")), ids=lambda path: path.stem
)
def test_what_notebooks_use_of_jaxdp_exists(path):
    """They run as a drill only, and what they import may have moved since."""
    cells = [c for c in json.loads(path.read_text())["cells"] if c["cell_type"] == "code"]
    code = "\n".join(line for cell in cells for line in "".join(cell["source"]).splitlines())
    nodes = [*ast.walk(ast.parse(re.sub(r"(?m)^( *)[%!].*", r"\1pass", code)))]
    imported = {"jaxdp": importlib.import_module("jaxdp")}
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] == "jaxdp":
            module = importlib.import_module(node.module)
            for name in [alias.name for alias in node.names]:
                found = getattr(module, name, None)
                imported[name] = found or importlib.import_module(f"{node.module}.{name}")
    assert len(imported) > 2
    for node in nodes:
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            used = imported.get(node.value.id)
            assert used is None or hasattr(used, node.attr), f"{node.value.id}.{node.attr}"
