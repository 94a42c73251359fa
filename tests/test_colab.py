import re

import nbclient
import nbformat
import pytest
from conftest import REPOSITORY

from jaxdp import config as configs
from jaxdp.configs import quickstart

PATH = REPOSITORY / "colab" / "quickstart.ipynb"
ON_COLAB = "https://colab.research.google.com/github/jaxdp/jaxdp/blob/main/colab/quickstart.ipynb"
SMALL = """
WORKDIR = "run"
NUM_DEVICES = {num_devices}
OVERRIDES = {{
    "data.path": {text!r},
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
    "sample.num_tokens": 0,
}}
PROMPTS = ["1 is", "2"]
NUM_TOKENS = 20
"""


@pytest.fixture
def notebook():
    return nbformat.read(PATH, as_version=4)


def code_cells(notebook) -> dict:
    """The code cells by their names, which are their ids."""
    return {cell.id: cell for cell in notebook.cells if cell.cell_type == "code"}


def parameters(notebook):
    """The cell that papermill and this test replace."""
    [cell] = [c for c in notebook.cells if "parameters" in c.metadata.get("tags", [])]
    return cell


def stdout(cell) -> str:
    return "".join(o.text for o in cell.outputs if o.get("name") == "stdout")


def has_image(cell) -> bool:
    return any("image/png" in output.get("data", {}) for output in cell.outputs)


def test_is_stored_clean_and_defines_nothing(notebook):
    nbformat.validate(notebook)
    assert ON_COLAB in notebook.cells[0].source
    for cell in code_cells(notebook).values():
        assert cell.outputs == [] and cell.execution_count is None
        assert not re.search(r"^\s*(async def|def|class)\b", cell.source, re.MULTILINE)


@pytest.mark.parametrize("num_devices", [1, 2, 4, 8])
def test_what_it_trains_by_default_is_valid(notebook, num_devices):
    values: dict = {}
    exec(parameters(notebook).source, values)
    config = quickstart.get_config()
    config.update_from_flattened_dict(values["OVERRIDES"])
    configs.validate(config)
    configs.batch_sizes(config, 1, num_devices)


@pytest.mark.slow
@pytest.mark.parametrize("num_devices", [1, 4])
def test_runs_from_top_to_bottom(notebook, tmp_path, text_file, monkeypatch, num_devices):
    # So that the kernel, started elsewhere, finds jaxdp here and has nothing to install.
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.delenv("JAX_NUM_CPU_DEVICES")  # The notebook asks for eight itself.
    parameters(notebook).source = SMALL.format(text=str(text_file), num_devices=num_devices)
    folder = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(notebook, timeout=300, resources=folder).execute()

    cells = code_cells(notebook)
    assert cells["install"].outputs == []
    assert "8 devices" in stdout(cells["devices"])
    assert "Finished" in stdout(cells["train"])
    assert (tmp_path / "run" / "metrics.jsonl").exists()
    assert has_image(cells["plot"]) and has_image(cells["agreement"])
    differences = re.findall(r"largest relative difference (\S+)", stdout(cells["agreement"]))
    exact, shortcut = map(float, differences)
    assert 0 < exact < 1e-5  # Rounding; in parts, so the sums are rounded differently.
    assert shortcut > 1e-2
    assert stdout(cells["sample"]).startswith("1 is") and "\n2" in stdout(cells["sample"])
