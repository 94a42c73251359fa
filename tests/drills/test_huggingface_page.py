"""The lines of docs/huggingface.md, run as they are printed."""

import os
import re
import shlex
import subprocess
import sys

import pytest

from support.bad_input import train
from support.texts import REPOSITORY, TEXT

WHY = "transformers, which .[compare] installs, opens what is exported"
pytest.importorskip("transformers", reason=WHY)
pytest.importorskip("torch", reason=WHY)

PAGE = (REPOSITORY / "docs" / "huggingface.md").read_text()


def blocks(title):
    """(language, text) of a section's blocks of code."""
    section = PAGE.partition(f"\n## {title}\n")[2].partition("\n## ")[0]
    return re.findall(r"^```(\w+)\n(.*?)^```", section, re.MULTILINE | re.DOTALL)


def test_a_run_is_exported_opened_and_fine_tuned(short, tmp_path):
    short.tokenizer, short.seq_len = "byte", 32
    train(short, tmp_path / "runs" / "mine")
    (tmp_path / "configs").symlink_to(REPOSITORY / "configs")
    (tmp_path / "FILE.txt").write_text(TEXT)
    # The commands' "python" is the one of the test, and finds this checkout.
    environ = os.environ | {"PYTHONPATH": str(REPOSITORY), "HF_HUB_OFFLINE": "1"}
    said = []
    for language, text in [*blocks("Export"), *blocks("Import")]:
        python = shlex.quote(sys.executable)
        line = f"{python} -c {shlex.quote(text)}" if language == "python" else text
        line = re.sub("^python", python, line)
        done = subprocess.run(
            ["bash", "-ec", line], cwd=tmp_path, env=environ, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        said.append(done.stdout)
    exported, opened, tuned = said
    assert exported == "mine: the model after step 2\n"
    assert "Once upon a time" in opened
    assert "Starting from the weights of hf:mine." in tuned
    assert "evaluation at step " in tuned
