"""Scores a trained model on tasks of lm-evaluation-harness (lm_eval), by the model's export.

lm_eval is EleutherAI's library by which published models are compared (Gao et al. 2021).
"""

import importlib.metadata
import importlib.util
import json
import logging
import math
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from jaxdp.common import files
from jaxdp.common.errors import ConfigError, shown
from jaxdp.huggingface import save
from jaxdp.workdir import finished

NAME = "tasks.jsonl"  # The file of the workdir that gets a line of results.
ROWS = 8  # Sequences that are computed at a time.
NEEDED = ("lm_eval", "accelerate", "torch", "transformers")


def evaluate_tasks(
    workdir: str | Path,
    names: Sequence[str],
    which: str = "newest",
    folder: str | Path | None = None,
    report: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Scores a checkpoint on tasks, and adds the results to WORKDIR/tasks.jsonl.

    The tasks' data come from the Hugging Face hub, unless they are in files that a task names.

    Args:
      workdir: the run's folder.
      names: of tasks, or of groups of them.
      which: "newest", "best" or a number of steps.
      folder: a folder of more tasks, as YAML files.
      report: called with a line of text on each damaged checkpoint.

    Returns:
      The line: the step, lm_eval's version, and "TASK/METRIC" for each of a task's metrics, with
      "TASK/METRIC_stderr" where it has a standard error.

    Raises:
      ConfigError: a package or a task is missing, the data can't be loaded, or the model has no
        tasks.
      RunError: the checkpoint is damaged.
    """
    if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        raise ConfigError(f"--tasks needs {', '.join(missing)}: pip install 'jaxdp[tasks]'")
    # They take seconds to import, and need PyTorch.
    import lm_eval
    import torch
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    if folder is not None and not Path(folder).is_dir():
        raise ConfigError(
            f"--tasks_folder={shown(str(folder))} is no folder: give one of YAML files"
        )
    objective = finished.open_workdir(workdir).config.objective
    if objective != "causal":
        raise ConfigError(
            f"--tasks are for causal models, and this one is {objective}: leave it out"
        )
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    manager = TaskManager(include_path=folder)
    for name in names:
        if not manager.match_tasks([name]):
            raise ConfigError(
                f"--tasks={shown(name)} is no task of lm_eval: `lm-eval ls tasks` lists them, and "
                "--tasks_folder=FOLDER adds your own"
            )
    with tempfile.TemporaryDirectory() as place:
        step = save.export(workdir, f"{place}/model", which, report)
        words = _tokenizer(f"{place}/model")
        first = words.bos_token_id if words.bos_token_id is not None else words.pad_token_id
        model = HFLM(
            f"{place}/model",
            tokenizer=words,
            prefix_token_id=first,
            device="cuda" if torch.cuda.is_available() else "cpu",
            dtype="float32",
            batch_size=ROWS,
        )
        try:
            found = lm_eval.simple_evaluate(
                model, tasks=list(names), task_manager=manager, log_samples=False
            )
        except OSError as error:
            raise ConfigError(
                f"--tasks={','.join(names)}: the data can't be loaded ({files.first_line(error)}): "
                "check the network, or HF_HOME if they were downloaded before"
            ) from None
    line = {
        "step": step,
        "lm_eval": importlib.metadata.version("lm_eval"),
        **scores(found["results"]),
    }
    with open(Path(workdir) / NAME, "a") as file:
        file.write(json.dumps(line) + "\n")
    return line


def scores(results: dict[str, dict[str, Any]]) -> dict[str, float | None]:
    """Returns lm_eval's results as {"TASK/METRIC": value}; None for NaN and infinity.

    Examples:
      >>> scores({"copa": {"alias": "copa", "acc,none": 0.5, "acc_stderr,none": 0.1}})
      {'copa/acc': 0.5, 'copa/acc_stderr': 0.1}
    """
    return {
        f"{task}/{metric.removesuffix(',none')}": value if math.isfinite(value) else None
        for task, found in results.items()
        for metric, value in found.items()
        if "," in metric and isinstance(value, float)
    }


def rows(line: dict[str, Any]) -> dict[str, str]:
    """Returns the rows of a table: the result of `evaluate_tasks`, with standard errors aside."""
    found = {}
    for name, value in line.items():
        if "/" in name and "_stderr" not in name and value is not None:
            metric, comma, way = name.partition(",")
            error = line.get(f"{metric}_stderr{comma}{way}")
            found[name] = f"{value:.4f}" + (f" ± {error:.4f}" if error is not None else "")
    return found


def _tokenizer(folder: str) -> Any:
    """Loads an exported tokenizer; one that has no token to pad or to begin with gets a line break.

    lm_eval would add a token, which the model doesn't know.
    """
    from transformers import AutoTokenizer

    words = AutoTokenizer.from_pretrained(folder)
    if words.pad_token is None:
        known = words.get_vocab()
        words.pad_token = words.eos_token or (
            "\n" if "\n" in known else min(known, key=lambda x: known[x])
        )
    return words
