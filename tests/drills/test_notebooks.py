import re

import nbclient
import nbformat
import pytest

from jaxdp.configs import default, quickstart
from jaxdp.step import setup
from jaxdp.sync.methods import METHODS
from support.texts import REPOSITORY

ON_COLAB = "https://colab.research.google.com/github/jaxdp/jaxdp/blob/main/colab"
# The notebooks, and the config that each one's OVERRIDES are for.
CONFIGS = {
    "quickstart": quickstart.get_config,
    "synchronisation": default.get_config,
    "finetuning": default.get_config,
}
RECORDED = CONFIGS  # They keep what they showed.
SMALL_RUN = """
    "data.path": {text!r},
    "data.cache_dir": "tokens",
    "tokenizer": "char",
    "global_batch_size": 8,
    "seq_len": 16,
    "model.num_layers": 1,
    "model.num_heads": 2,
    "model.embed_dim": 16,
    "sample.num_tokens": 0,
"""
SMALL_QUICKSTART = (
    """
WORKDIR = "run"
NUM_DEVICES = {num_devices}
OVERRIDES = {{
    "num_train_steps": 6,
    "optimizer.warmup_steps": 2,
    "log_every": 1,
    "eval_every": 3,"""
    + SMALL_RUN
    + """}}
PROMPTS = ["1 is", "2"]
NUM_TOKENS = 20
"""
)
SMALL_SYNCHRONISATION = (
    """
WORKDIR = "runs"
NUM_DEVICES = {num_devices}
PROOF_STEPS = 8
STEPS = 20
EVERY = 2
OVERRIDES = {{
    "sync.check_every": 0,"""
    + SMALL_RUN
    + """}}
"""
)
SMALL_FINETUNING = (
    """
MODEL = "hf:nobody/has-this"
WORKDIR = "run"
NUM_DEVICES = {num_devices}
OVERRIDES = {{
    "num_train_steps": 6,
    "global_batch_size": 8,
    "seq_len": 16,
    "optimizer.learning_rate": 1e-3,
    "optimizer.warmup_steps": 0,
    "log_every": 1,
    "eval_every": 3,
    "eval_max_batches": 4,
    "checkpoint.every": 3,
    "sample.num_tokens": 0,
}}
STAND_IN = {{
    "num_train_steps": 6,
    "optimizer.warmup_steps": 2,
    "eval_max_batches": 4,"""
    + SMALL_RUN
    + """
    "tokenizer": "byte",
}}
PROMPTS = ["1 is", "2"]
NUM_TOKENS = 8  # transformers goes no further than the context.
"""
)


def read(name: str):
    return nbformat.read(REPOSITORY / "colab" / f"{name}.ipynb", as_version=4)


def code_cells(notebook) -> dict:
    """The code cells by their names, which are their ids."""
    return {cell.id: cell for cell in notebook.cells if cell.cell_type == "code"}


def parameters(notebook):
    """The cell that papermill and these tests replace."""
    [cell] = [c for c in notebook.cells if "parameters" in c.metadata.get("tags", [])]
    return cell


def values(notebook) -> dict:
    """What the cell of parameters sets."""
    found: dict = {}
    exec(parameters(notebook).source, found)
    return found


def stdout(cell) -> str:
    return "".join(o.text for o in cell.outputs if o.get("name") == "stdout")


def has_image(cell) -> bool:
    return any("image/png" in output.get("data", {}) for output in cell.outputs)


@pytest.fixture
def executed(tmp_path, text_file, monkeypatch):
    """Runs a notebook with small parameters from top to bottom; returns its code cells."""

    def run(name: str, small: str, num_devices: int) -> dict:
        # So that the kernel, started elsewhere, finds jaxdp here and has nothing to install.
        monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
        monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
        monkeypatch.delenv("JAX_NUM_CPU_DEVICES")  # The notebook asks for eight itself.
        notebook = read(name)
        parameters(notebook).source = small.format(text=str(text_file), num_devices=num_devices)
        folder = {"metadata": {"path": str(tmp_path)}}
        nbclient.NotebookClient(notebook, timeout=300, resources=folder).execute()
        cells = code_cells(notebook)
        assert cells["install"].outputs == []
        assert "8 devices" in stdout(cells["devices"])
        return cells

    return run


@pytest.mark.parametrize("name", CONFIGS)
def test_opens_in_colab_and_defines_nothing(name):
    notebook = read(name)
    nbformat.validate(notebook)
    assert f"{ON_COLAB}/{name}.ipynb" in notebook.cells[0].source
    for cell in code_cells(notebook).values():
        assert not re.search(r"^\s*(async def|def|class)\b", cell.source, re.MULTILINE)


@pytest.mark.parametrize("name", RECORDED)
def test_is_stored_as_it_ran(name):
    """Its pictures and texts are seen on GitHub, without what is of the machine it ran on."""
    cells = code_cells(read(name))
    assert next(iter(cells)) == "install" and cells["install"].outputs == []
    assert [cell.execution_count for cell in cells.values()] == [*range(1, len(cells) + 1)]
    assert has_image(cells["plot"]) and "8 devices" in stdout(cells["devices"])
    for cell in cells.values():
        for output in cell.outputs:
            assert output.get("name") != "stderr" and output.output_type != "error"
            shown = output.get("text", "") + output.get("data", {}).get("text/plain", "")
            assert not re.search(r"(^|[\s'\"=])/\w+/", shown), shown
    assert (REPOSITORY / "colab" / f"{name}.ipynb").stat().st_size < 300_000


@pytest.mark.parametrize("name", CONFIGS)
def test_installs_the_versions_that_are_tested(name):
    source = code_cells(read(name))["install"].source
    assert '-c {pins} "jaxdp{extra} @ git+https://github.com/jaxdp/jaxdp"' in source
    assert "/main/constraints.txt" in source and '"[cuda]"' in source


@pytest.mark.parametrize("num_devices", [1, 2, 4, 8])
@pytest.mark.parametrize("name", CONFIGS)
def test_what_it_trains_by_default_is_valid(name, num_devices):
    config = CONFIGS[name]()
    config.data.path = config.data.path or "reference.txt"
    config.update_from_flattened_dict(values(read(name))["OVERRIDES"])
    setup.validate(config)
    setup.batch_sizes(config, 1, num_devices)


@pytest.mark.parametrize("method", METHODS)
def test_what_it_compares_by_default_is_valid(method):
    """Evaluations fall on steps at which replicas agree, and batches can be split."""
    found = values(read("synchronisation"))
    config = default.get_config()
    config.update_from_flattened_dict(found["OVERRIDES"])
    config.num_train_steps = found["STEPS"]
    config.eval_every = config.checkpoint.every = found["STEPS"] // 10
    config.optimizer.warmup_steps = found["STEPS"] // 10
    config.sync.update({"method": method, "every": found["EVERY"]})
    setup.validate(config)
    setup.batch_sizes(config, 1, found["NUM_DEVICES"])


@pytest.mark.parametrize("num_devices", [1, 4])
def test_quickstart_runs_from_top_to_bottom(executed, tmp_path, num_devices):
    cells = executed("quickstart", SMALL_QUICKSTART, num_devices)
    assert "Finished" in stdout(cells["train"])
    assert (tmp_path / "run" / "metrics.jsonl").exists()
    assert has_image(cells["plot"]) and has_image(cells["agreement"])
    differences = re.findall(r"largest relative difference (\S+)", stdout(cells["agreement"]))
    exact, shortcut = map(float, differences)
    assert 0 < exact < 1e-5  # Rounding; in parts, so the sums are rounded differently.
    assert shortcut > 1e-2
    assert stdout(cells["sample"]).startswith("1 is") and "\n2" in stdout(cells["sample"])


def test_synchronisation_runs_from_top_to_bottom(executed):
    cells = executed("synchronisation", SMALL_SYNCHRONISATION, 2)
    said = stdout(cells["equality"])
    differences = {
        name.strip(): (float(difference), verdict)
        for name, difference, verdict in re.findall(r"(?m)^(.{32})(\S+)  (within|beyond)$", said)
    }
    # 8 steps, in each of which a number is rounded about 2 + 8 times: the notebook argues it.
    bound = 8 * (2 + 8) * 2**-24
    assert f"{bound:.1e}" in said
    for name in ("parameter_mean, every step", "sharded"):
        difference, verdict = differences.pop(name)
        assert 0 <= difference <= bound and verdict == "within"
    [(apart, verdict)] = differences.values()
    assert apart > 10 * bound and verdict == "beyond"

    hashes: dict = {"gradient_mean": [], "fixed_order": []}
    for method, digest in re.findall(r"(\w+) +on \d: +([0-9a-f]{32})", stdout(cells["bits"])):
        hashes[method].append(digest)
    assert [len(found) for found in hashes.values()] == [2, 2]
    assert len(set(hashes["fixed_order"])) == 1
    assert len(set(hashes["gradient_mean"])) > 1

    table = dict(line.split(maxsplit=1) for line in stdout(cells["compare"]).splitlines()[1:])
    assert list(table) == list(METHODS)
    assert has_image(cells["plot"]) and has_image(cells["drift"])


def test_finetuning_runs_from_top_to_bottom(executed, tmp_path, monkeypatch):
    """Offline, so with the stand-in."""
    pytest.importorskip("transformers", reason="needs the extra compare")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    cells = executed("finetuning", SMALL_FINETUNING, 2)
    assert "init_from='hf:nobody/has-this' can't be loaded" in stdout(cells["weights"])
    assert "hf:stand_in is of the family gpt2" in stdout(cells["weights"])
    assert "Starting from the weights of hf:stand_in" in stdout(cells["train"])
    assert has_image(cells["plot"])
    assert stdout(cells["sample"]).startswith("1 is") and "\n2" in stdout(cells["sample"])
    said = stdout(cells["export"])
    assert "config.json" in said and "model.safetensors" in said and "\n1 is" in said
    assert (tmp_path / "finetuned" / "model.safetensors").exists()
