"""What the site has besides the pages in this folder, made when it is built (mkdocs hooks).

`config.md` is made of configs/default.py and jaxdp/common/choices.py, `reference/` of the
docstrings of every module, the flags in `commands.md` of the commands' source. COPIES lie
elsewhere.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File

from jaxdp.common.choices import CHOICES, MOST, RANGES
from jaxdp.common.config import flatten
from jaxdp.configs import default

ROOT = Path(__file__).parent.parent
COPIES = {
    "index.md": "README.md",
    "benchmarks.md": "benchmarks/RESULTS.md",
    "changes.md": "CHANGELOG.md",
}
INTRODUCTION = """# Config

Every key of a run. It is set in a config file, a Python file whose `get_config()` starts from
[configs/default.py](../configs/default.py), or on the command line as `--config.KEY=VALUE`. What is
out of these limits is refused before anything is compiled (`pytest tests/common/test_config.py`).
"""
LINK = re.compile(r"\]\((?!\w+:|#)([^)#\s]+)(#[^)\s]*)?\)")
IMAGE_LINK = re.compile(r"\[!\[([^]]*)\]\(https?:[^)]*\)\]")


def modules() -> list[str]:
    """Every module's name, such as "jaxdp.data.cache"."""
    paths = sorted(p for p in ROOT.glob("jaxdp/**/*.py") if "configs" not in p.parts)
    return [_module(path) for path in paths if path.stem != "__init__"]


def on_config(config):
    """Completes the navigation: pages that mkdocs.yml doesn't name, and one for each module."""
    named = {x if isinstance(x, str) else next(iter(x.values())) for x in config.nav}
    others = {path.name for path in ROOT.glob("docs/*.md")} - named
    at = config.nav.index("config.md")
    config.nav[at:at] = sorted(others)
    config.nav.append({"Reference": [{m.removeprefix("jaxdp."): _page(m)} for m in modules()]})
    return config


def on_files(files, config):
    """Adds the pages that this folder doesn't hold."""
    made = {page: (ROOT / path).read_text() for page, path in COPIES.items()}
    made["config.md"] = config_page()
    made |= {_page(module): f"# {module}\n\n::: {module}\n" for module in modules()}
    for path, text in made.items():
        files.append(File.generated(config, path, content=text))
    return files


def on_page_markdown(markdown, page, config, files):
    """Adds the flags; lets links that leave docs/ lead to where the site or the repository has it.

    Badges become plain links, as a page is not to load anything from elsewhere.
    """
    name = page.file.src_uri
    if name == "commands.md":
        markdown += "".join(map(flags_section, modules()))
    folder = (ROOT / COPIES.get(name, f"docs/{name}")).parent

    def on_site(match):
        path = (folder / match[1]).resolve()
        if not path.exists():
            raise PluginError(f"{name}: {match[1]} does not exist")
        target = _target(path.relative_to(ROOT).as_posix(), name)
        if target is None:
            kind = "tree" if path.is_dir() else "blob"
            target = f"{config.extra['repository']}/{kind}/main/{path.relative_to(ROOT)}"
        return f"]({target}{match[2] or ''})"

    return LINK.sub(on_site, IMAGE_LINK.sub(r"[\1]", markdown))


def _target(path: str, page: str) -> str | None:
    """The page that shows a file of the repository; None where that is `page`, or there is none."""
    shown = {file: copy for copy, file in COPIES.items()} | {"configs/default.py": "config.md"}
    shown |= {f"{module.replace('.', '/')}.py": _page(module) for module in modules()}
    found = shown.get(path, path.removeprefix("docs/") if path.startswith("docs/") else None)
    return None if found == page else found


def flags_section(module: str) -> str:
    """What a command's docstring says, and its flags; nothing for other modules."""
    tree = ast.parse((ROOT / module.replace(".", "/")).with_suffix(".py").read_text())
    rows = [
        f"| `--{name}` | {f'`{value}`' if value not in (None, '') else ''} | {escaped(text)} |\n"
        for name, value, text in flags(tree)
    ]
    if not rows:
        return ""
    title = f"\n## python -m {module}\n\n{ast.get_docstring(tree)}\n"
    return f"{title}\n| flag | default | |\n|---|---|---|\n{''.join(rows)}"


def flags(tree: ast.Module) -> Iterator[tuple[str, Any, str]]:
    """(name, default, help) of each flag that a module defines; an alias has but two arguments."""
    for call in ast.walk(tree):
        if isinstance(call, ast.Call) and ".DEFINE_" in ast.unparse(call.func):
            name, value, *text = map(_constant, call.args[:3])
            yield (name, value, text[0]) if text else (name, None, f"The same as --{value}.")


def _constant(node: ast.expr) -> Any:
    """The value of a literal, or of a constant of another module; None for what is neither."""
    try:
        return ast.literal_eval(node)
    except ValueError:
        module, _, name = ast.unparse(node).partition(".")
    if not name.isupper():
        return None
    [path] = ROOT.glob(f"jaxdp/**/{module}.py")
    source = path.read_text()
    return ast.literal_eval(re.findall(rf"^{name} = (.+)$", source, re.MULTILINE)[0])


def config_page() -> str:
    """The config reference: of each key its default, what it may be, and its comment."""
    notes = comments((ROOT / "configs" / "default.py").read_text())
    values = flatten(default.get_config())
    groups: dict[str, list[str]] = {}
    for key in filter(values.__contains__, notes):
        cells = f"`{key}`", f"`{values[key]!r}`", allowed(key, values[key]), escaped(notes[key])
        groups.setdefault(key.rpartition(".")[0], []).append(f"| {' | '.join(cells)} |\n")
    text = INTRODUCTION
    for group, rows in groups.items():
        text += f"\n## {group or 'The run'}\n\n{escaped(notes.get(group, ''))}\n\n"
        text += f"| key | default | values | |\n|---|---|---|---|\n{''.join(rows)}"
    return text


def comments(source: str) -> dict[str, str]:
    """{key or group: its comment}, which stands on the lines above it, or behind it."""
    notes: dict[str, str] = {}
    above: list[str] = []
    for line in source.splitlines():
        if comment := re.match(r"\s+# (.*)", line):
            above.append(comment[1])
            continue
        if key := re.match(r"\s+c\.([\w.]+) = .*?(?:  # (.*))?$", line):
            notes[key[1]] = " ".join([*above, *filter(None, [key[2]])])
        above = []
    return notes


def escaped(comment: str) -> str:
    """Markdown that shows a comment as it is."""
    return re.sub(r"([*\[\]<|_`])", r"\\\1", comment)


def allowed(key: str, value: object) -> str:
    """What jaxdp/common/choices.py lets a key be, or else its type."""
    if key in CHOICES:
        return ", ".join(f"`{choice!r}`" for choice in CHOICES[key])
    if key in RANGES:
        low, high = (f"{x:,}" if isinstance(x, int) else f"{x:g}" for x in RANGES[key])
        return f"from {low}" if RANGES[key][1] == MOST else f"{low} to {high}"
    return {bool: "`True`, `False`", str: "text"}[type(value)]


def _module(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def _page(module: str) -> str:
    return f"reference/{module.removeprefix('jaxdp.').replace('.', '/')}.md"
