"""Generates pages of the documentation from the source, while mkdocs builds the site (hooks).

`index.md` is the README up to its tree, which is the page `tree.md`. `config.md` comes from
configs/default.py and jaxdp/common/choices.py, `functions.md` from what `import jaxdp` offers,
`reference/` from the docstrings of every module, the flags in `commands.md` from the source of the
commands, the table in `metrics.md` from jaxdp/workdir/metrics.py. COPIES are files elsewhere in the
repository.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File

import jaxdp
from jaxdp.common.choices import CHOICES, MAX_INT32, RANGES
from jaxdp.common.config import flatten
from jaxdp.configs import default
from jaxdp.workdir.metrics import METRICS

ROOT = Path(__file__).parent.parent
COPIES = {
    "tree.md": "README.md",
    "index.md": "README.md",
    "benchmarks.md": "benchmarks/RESULTS.md",
    "changes.md": "CHANGELOG.md",
}
TREE = "\n## Where things are\n"  # The title of the README's section that is a page of its own.
WIDE = "---\nhide: [toc]\n---\n\n"
ANCHOR_OF_TREE = "#where-things-are"
FUNCTIONS = """# Functions

What `import jaxdp` offers, each when it is used ([an example](commands.md#in-a-notebook)).
"""
INTRODUCTION = """# Config

Every key of a run. Set keys in a config file, a Python file whose `get_config()` starts from
[configs/default.py](../configs/default.py), or on the command line as `--config.KEY=VALUE`. Other
keys and values are refused before anything is compiled.
"""
PLACE_OF_METRICS = (
    "<!-- the table of metrics -->\n"  # The line of metrics.md that the table replaces.
)
LINK = re.compile(r"\]\((?!\w+:|#)([^)#\s]+)(#[^)\s]*)?\)")
IMAGE_LINK = re.compile(r"\[!\[([^]]*)\]\(https?:[^)]*\)\]")


def modules(wing: str = "**") -> list[str]:
    """Returns the names of modules, such as "jaxdp.data.cache", in jaxdp/ or one of its folders."""
    paths = sorted(p for p in ROOT.glob(f"jaxdp/{wing}/*.py") if "configs" not in p.parts)
    return [_module(path) for path in paths if path.stem != "__init__"]


def wings() -> list[str]:
    """Returns "." for jaxdp/ itself, then its folders in the order of the README's tree."""
    found = re.findall(r"^├── (\w+)/", (ROOT / "README.md").read_text(), re.MULTILINE)
    return [".", *(folder for folder in found if any(ROOT.glob(f"jaxdp/{folder}/*.py")))]


def on_config(config):
    """Adds to the navigation the pages that mkdocs.yml doesn't name, and one for each module."""
    sections = {title: pages for section in config.nav for title, pages in section.items()}
    named = {page for pages in sections.values() for page in map(_page_of, pages)}
    sections["Explained"] += sorted({path.name for path in ROOT.glob("docs/*.md")} - named)
    [commands, *folders] = [
        [_index(wing), *({_stem(m): _page(m)} for m in modules(wing))] for wing in wings()
    ]
    folders = [{wing: pages} for wing, pages in zip(wings()[1:], folders, strict=True)]
    sections["Reference"].append({"Modules": [*commands, *folders]})
    return config


def _page_of(entry: str | dict[str, str]) -> str:
    """Returns the page of an entry of the navigation, with or without a title."""
    return entry if isinstance(entry, str) else next(iter(entry.values()))


def on_files(files, config):
    """Adds the generated pages to the site."""
    made = {page: (ROOT / path).read_text() for page, path in COPIES.items()}
    made["index.md"], _, made["tree.md"] = made["index.md"].partition(TREE)
    made["tree.md"] = f"{WIDE}# {TREE[4:]}{made['tree.md'].partition(chr(10) + '## ')[0]}"
    made["config.md"] = config_page()
    made["functions.md"] = FUNCTIONS + "".join(map(function_section, jaxdp.__all__))
    made |= {_index(wing): wing_page(wing) for wing in wings()}
    made |= {_page(module): f"# {module}\n\n::: {module}\n" for module in modules()}
    for path, text in made.items():
        files.append(File.generated(config, path, content=text))
    return files


def function_section(name: str) -> str:
    """Returns a function or an error that `import jaxdp` offers, as Markdown for mkdocstrings."""
    found = getattr(jaxdp, name)
    path = f"{found.__module__}.{found.__name__}"
    return f"\n## {name}\n\n::: {path}\n    options: {{heading_level: 3}}\n"


def wing_page(wing: str) -> str:
    """Returns the page of a folder: its docstring, and the first line of each module in it."""
    package = "jaxdp" if wing == "." else f"jaxdp.{wing}"
    rows = [(f"{_stem(module)}.md", module, module) for module in modules(wing)]
    if wing == ".":
        rows += [(f"{w}/index.md", f"jaxdp.{w}", f"jaxdp.{w}.__init__") for w in wings()[1:]]
    text = f"# {package}\n\n::: {package}\n    options: {{filters: ['!^_']}}\n\n| | |\n|---|---|\n"
    for page, name, source in rows:
        first, *_ = ast.get_docstring(ast.parse(_source(source))).splitlines()
        text += f"| [{name}]({page}) | {first} |\n"
    return text


def on_page_markdown(markdown, page, config, files):
    """Adds the flags and the metrics to their pages, and mends links to files outside docs/.

    Such links lead to a page of the site where there is one, else to the repository. Badges become
    plain links, because pages load nothing from other hosts.
    """
    name = page.file.src_uri
    if name.startswith("reference/"):
        return markdown
    if name == "commands.md":
        markdown += "".join(map(flags_section, modules()))
    if name == "metrics.md":
        rows = [f"| `{metric}` | {text} |\n" for metric, text in METRICS.items()]
        markdown = markdown.replace(PLACE_OF_METRICS, f"| metric | |\n|---|---|\n{''.join(rows)}")
    folder = (ROOT / COPIES.get(name, f"docs/{name}")).parent

    def on_site(match):
        path = (folder / match[1]).resolve()
        if not path.exists():
            raise PluginError(f"{name}: {match[1]} does not exist")
        if f"{path.name}{match[2]}" == f"README.md{ANCHOR_OF_TREE}":
            return "](tree.md)"
        target = _target(path.relative_to(ROOT).as_posix(), name)
        if target is None:
            kind = "tree" if path.is_dir() else "blob"
            target = f"{config.extra['repository']}/{kind}/main/{path.relative_to(ROOT)}"
        return f"]({target}{match[2] or ''})"

    return LINK.sub(on_site, IMAGE_LINK.sub(r"[\1]", markdown))


def _target(path: str, page: str) -> str | None:
    """Returns the page that shows a file; None if it is `page`, or no page shows the file."""
    shown = {file: copy for copy, file in COPIES.items()} | {"configs/default.py": "config.md"}
    shown |= {f"{module.replace('.', '/')}.py": _page(module) for module in modules()}
    found = shown.get(path, path.removeprefix("docs/") if path.startswith("docs/") else None)
    return None if found == page else found


def flags_section(module: str) -> str:
    """Returns a command's docstring and table of flags as Markdown; "" for other modules."""
    tree = ast.parse(_source(module))
    rows = [
        f"| `--{name}` | {f'`{value}`' if value not in (None, '') else ''} | {escaped(text)} |\n"
        for name, value, text in flags(tree)
    ]
    if not rows:
        return ""
    title = f"\n## {module.replace('.', ' ')}\n\n{ast.get_docstring(tree)}\n"
    return f"{title}\n| flag | default | |\n|---|---|---|\n{''.join(rows)}"


def flags(tree: ast.Module) -> Iterator[tuple[str, Any, str]]:
    """Yields (name, default, help) of each flag that a module defines."""
    for call in ast.walk(tree):
        if isinstance(call, ast.Call) and ".DEFINE_" in ast.unparse(call.func):
            name, value, *rest = map(_constant, call.args[:4])
            text = [x for x in rest if isinstance(x, str)]  # DEFINE_enum has its choices before.
            # DEFINE_alias(name, original) has no help.
            yield (name, value, text[0]) if text else (name, None, f"The same as --{value}.")


def _constant(node: ast.expr) -> Any:
    """Evaluates a literal, or a constant of another module; returns None for anything else."""
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
    """Returns the config reference: default, allowed values and comment of each key."""
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
    """Returns {key or group: comment}, from the lines above it and the end of its line."""
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
    """Escapes a comment, so that Markdown shows it literally."""
    return re.sub(r"([*\[\]<|_`])", r"\\\1", comment)


def allowed(key: str, value: object) -> str:
    """Returns the values that jaxdp/common/choices.py allows for a key, or else its type."""
    if key in CHOICES:
        return ", ".join(f"`{choice!r}`" for choice in CHOICES[key])
    if key in RANGES:
        low, high = (f"{x:,}" if isinstance(x, int) else f"{x:g}" for x in RANGES[key])
        return f"from {low}" if RANGES[key][1] == MAX_INT32 else f"{low} to {high}"
    return {bool: "`True`, `False`", str: "text"}[type(value)]


def _source(module: str) -> str:
    return (ROOT / module.replace(".", "/")).with_suffix(".py").read_text()


def _stem(module: str) -> str:
    return module.rpartition(".")[2]


def _index(wing: str) -> str:
    return f"reference/{wing}/index.md".replace("/./", "/")


def _module(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def _page(module: str) -> str:
    return f"reference/{module.removeprefix('jaxdp.').replace('.', '/')}.md"
