import re

import nbclient
import nbformat
import pytest
from conftest import REPOSITORY

PATH = REPOSITORY / "colab" / "quickstart.ipynb"
SMALL = """
WORKDIR = "run"
NUM_DEVICES = 4
OVERRIDES = {{
    "data.path": "{text}",
    "data.cache_dir": "tokens",
    "tokenizer": "char",
    "num_train_steps": 6,
    "global_batch_size": 8,
    "seq_len": 16,
    "optimizer.warmup_steps": 2,
    "log_every": 1,
    "eval_every": 3,
    "model.num_layers": 1,
    "model.num_heads": 2,
    "model.embed_dim": 16,
    "sample.prompt": "1",
    "sample.num_tokens": 5,
}}
PROMPTS = ["1 is", "2"]
NUM_TOKENS = 20
"""


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def test_is_stored_without_outputs_and_defines_nothing():
    for cell in code_cells(nbformat.read(PATH, as_version=4)):
        assert cell.outputs == [] and cell.execution_count is None
        assert not re.search(r"^\s*(def|class) ", cell.source, re.MULTILINE)


@pytest.mark.slow
def test_runs_from_top_to_bottom(tmp_path, text_file):
    notebook = nbformat.read(PATH, as_version=4)
    [cell] = [c for c in notebook.cells if "parameters" in c.metadata.get("tags", [])]
    cell.source = SMALL.format(text=text_file)
    nbclient.NotebookClient(
        notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}
    ).execute()
    outputs = [output for cell in code_cells(notebook) for output in cell.outputs]
    text = "".join(o.text for o in outputs if o.output_type == "stream" and o.name == "stdout")
    assert "Finished" in text and "\n1 is" in text
    assert (tmp_path / "run" / "metrics.jsonl").exists()
    assert sum("image/png" in o.get("data", {}) for o in outputs) == 2
    exact, shortcut = (float(x) for x in re.findall(r"largest relative difference (\S+)", text))
    # Float32 rounding in sums of 128 tokens; a mean of means is off by a good part of itself.
    assert exact < 1e-4 < 1e-2 < shortcut
