"""TensorFlow beside PyTorch in one process, and TFDS where it can't be imported."""

import os
import subprocess
import sys
from importlib.util import find_spec

import pytest

from support.texts import REPOSITORY

JAXDP = "from jaxdp.data.tensorflow import tf; assert int(tf.constant(1) + 1) == 2"
TRANSFORMERS = """
from importlib.util import find_spec
from transformers import pipeline
if find_spec("triton"):  # In PyTorch's usual build for Linux.
    import triton
import torch; assert int(torch.ones(2).sum()) == 2
"""


def check_python(*parts: str) -> None:
    """Runs Python in a process of its own."""
    process = subprocess.run(
        [sys.executable, "-c", "\n".join(parts)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert process.returncode == 0, process.stderr


def test_no_other_library_sees_its_symbols():
    check_python(JAXDP, "import ctypes; assert not hasattr(ctypes.CDLL(None), 'TF_NewTensor')")


@pytest.mark.skipif(
    not (find_spec("torch") and find_spec("transformers")),
    reason="needs PyTorch and transformers",
)
@pytest.mark.parametrize("order", [(JAXDP, TRANSFORMERS), (TRANSFORMERS, JAXDP)], ids=range(2))
def test_it_lives_in_one_process_with_transformers(order):
    """Triton, which PyTorch brings, has an LLVM of its own, as TensorFlow has."""
    check_python(*order)


def test_the_true_cause_is_shown_where_tfds_cannot_be_imported(
    fresh_command, tmp_path, monkeypatch
):
    """Such as a protobuf too old for tensorflow_metadata; TFDS itself logs it and goes on."""
    cause = "gencode 6.31.1 runtime 5.29.6"
    (tmp_path / "tensorflow_metadata.py").write_text(f"raise RuntimeError({cause!r})")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{REPOSITORY}")
    workdir = f"--workdir={tmp_path}/run"
    process = fresh_command("train", "--config=configs/quickstart.py", workdir, check=2)
    [line] = process.stderr.splitlines()
    assert f"tensorflow_datasets, which can't be imported (RuntimeError: {cause}): " in line
