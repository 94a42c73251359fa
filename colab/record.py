"""Runs the notebooks as they are, and keeps their outputs in them.

    python colab/record.py [NAME ...]
    python colab/record.py --python=python3.13 --pins=pip-freeze.txt [--folder=DIR] [NAME ...]

Without flags they run with this Python, which needs the extras dev and compare, and what they show
is written into them, so that it is seen on GitHub.

With flags they run as on Colab: in a new environment of that Python, with the versions that `pins`
names of PACKAGES, over which the first cell installs jaxdp from this checkout. NumPy, pandas and
matplotlib are imported before, as in Colab's sessions; so the first cell asks for a restart. The
notebooks are written into the folder, if there is one. https://github.com/googlecolab/backend-info
has the pins of Colab's images. That takes 5 GB of disk, or 9 GB with --torch, which is PyTorch for
the last cell of finetuning.ipynb.
"""

import argparse
import base64
import io
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

CHECKOUT = Path(__file__).resolve().parent.parent
NAMES = ("quickstart", "synchronisation", "finetuning")
# What Colab's images have, and the notebooks use or the installation of jaxdp changes.
PACKAGES = [
    *("datasets", "flax", "huggingface_hub", "ipykernel", "ipython", "jax", "jaxlib", "matplotlib"),
    *("nbconvert", "nbformat", "numpy", "optax", "orbax-checkpoint", "pandas", "protobuf", "rich"),
    *("scipy", "tensorflow", "tensorflow-datasets", "tokenizers", "transformers"),
]
PRELOADED = "import matplotlib.pyplot, numpy, pandas\n"
SOURCES = {  # Where the first cell finds jaxdp: here, rather than on GitHub.
    "git+https://github.com/jaxdp/jaxdp": f"file://{CHECKOUT}",
    "https://raw.githubusercontent.com/jaxdp/jaxdp/main": str(CHECKOUT),
}
MOST = 300_000  # Bytes of a notebook.


def main() -> None:
    """Does what the flags say."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(NAMES)}")
    parser.add_argument("--python", help="the Python of a new environment")
    parser.add_argument("--pins", type=Path, help="pip-freeze.txt of an image of Colab")
    parser.add_argument("--folder", type=Path, help="where the notebooks are written, as they ran")
    parser.add_argument("--torch", action="store_true", help="also install PyTorch")
    parser.add_argument("--inside", action="store_true", help="this Python is that of an image")
    flags = parser.parse_args()
    names = flags.names or NAMES
    if flags.inside or not flags.python:
        for name in names:
            run(name, flags.folder or CHECKOUT / "colab", as_on_colab=flags.inside)
        return
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([flags.python, "-m", "venv", f"{folder}/environment"], check=True)
        python, kept = f"{folder}/environment/bin/python", flags.folder or folder
        for name in names:
            install(python, flags.pins, Path(folder), flags.torch)
            subprocess.run([python, __file__, "--inside", f"--folder={kept}", name], check=True)


def install(python: str, pins: Path, folder: Path, torch: bool) -> None:
    """Brings an environment to the state of an image: with its pins, without jaxdp."""
    constraints = folder / "pins.txt"  # Without what is no release, and pip would refuse.
    constraints.write_text("\n".join(re.findall(r"(?m)^[\w.-]+==[\w.]+$", pins.read_text())))
    packages = [*PACKAGES, *["torch"] * torch]
    pip = [python, "-m", "pip"]
    subprocess.run([*pip, "uninstall", "-q", "-y", "jaxdp"], check=True)
    subprocess.run([*pip, "install", "-q", "-c", constraints, *packages], check=True)


def run(name: str, folder: Path, as_on_colab: bool) -> None:
    """Runs a notebook in an empty folder, and writes it with its outputs."""
    import nbformat  # The new environment has it, this Python perhaps not.

    began = time.monotonic()
    path = CHECKOUT / "colab" / f"{name}.ipynb"
    notebook = nbformat.read(path, as_version=4)
    metadata, cells = dict(notebook.metadata), {cell.id: cell for cell in notebook.cells}
    install, source = cells["install"], cells["install"].source
    if as_on_colab:
        install.source = PRELOADED + source
        for there, here in SOURCES.items():
            install.source = install.source.replace(there, here)
        first = nbformat.v4.new_notebook(cells=[install.copy()], metadata=metadata)
        with tempfile.TemporaryDirectory() as empty:  # Without a folder jaxdp to import.
            execute(first, empty, allow_errors=True)
        print(*[shown(out) for out in first.cells[0].outputs], sep="\n", file=sys.stderr)
    with tempfile.TemporaryDirectory() as empty:
        execute(notebook, empty)
        for cell in cells.values():
            clean(cell, empty)
    install.source, install.outputs, notebook.metadata = source, [], metadata
    text = nbformat.writes(notebook, indent=1) + "\n"
    (folder / path.name).write_text(text)
    assert len(text) < MOST, f"{path.name} has {len(text):,} bytes"
    print(f"{name}: {time.monotonic() - began:.0f} s, {len(text):,} bytes", file=sys.stderr)


def execute(notebook: Any, folder: str, allow_errors: bool = False) -> None:
    """Runs all cells in a new session, in a folder."""
    import nbclient

    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    nbclient.NotebookClient(
        notebook,
        timeout=None,
        record_timing=False,
        allow_errors=allow_errors,
        resources={"metadata": {"path": folder}},
    ).execute()


def shown(output: Any) -> str:
    """Returns an output of a cell as text."""
    return output.get("text") or f"{output.get('ename')}: {output.get('evalue')}"


def clean(cell: Any, folder: str) -> None:
    """Joins what a cell has printed, without stderr and paths of this machine; shrinks pictures."""
    kept: list[Any] = []
    for out in cell.get("outputs", []):
        if "image/png" in out.get("data", {}):
            out.data["image/png"] = shrunk(out.data["image/png"])
        if "text" in out:
            out.text = out.text.replace(f"{folder}/", "").replace(sys.executable, "python")
        if out.get("name") == "stdout" and kept and kept[-1].get("name") == "stdout":
            kept[-1].text += out.text
        elif out.get("name") != "stderr":
            kept.append(out)
    if cell.cell_type == "code":
        cell.outputs = kept


def shrunk(png: str) -> str:
    """Returns a picture, in base64, with at most 64 colours."""
    from PIL import Image  # matplotlib needs it, too.

    small = io.BytesIO()
    picture = Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB")
    picture.quantize(64).save(small, "PNG", optimize=True)
    return base64.b64encode(small.getvalue()).decode()


if __name__ == "__main__":
    main()
