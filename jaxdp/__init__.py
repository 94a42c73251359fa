"""jaxdp: data-parallel training of Flax transformer language models.

Functions for notebooks and programs. Each is imported on first use, because JAX takes seconds:

    train_model(config, workdir)       trains, or resumes the run in the workdir
    evaluate_model(workdir)            evaluates a checkpoint on the validation split
    generate_text(workdir, prompts)    continues prompts
    export_model(workdir, output)      writes a folder that Hugging Face's transformers opens
    model_keys(spec)                   the config's keys for a model of Hugging Face's
    plan_run(config)                   predicts the memory and time of a run
    read_metrics(workdir)              reads the logged metrics, a dictionary per step

Mistakes of the user raise ConfigError; other reasons to stop raise RunError.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxdp.common.errors import ConfigError, RunError
    from jaxdp.estimate.plan import plan as plan_run
    from jaxdp.huggingface.load import model_keys
    from jaxdp.huggingface.save import export as export_model
    from jaxdp.run.evaluation import evaluate_checkpoint as evaluate_model
    from jaxdp.run.loop import train as train_model
    from jaxdp.workdir.generation import generate as generate_text
    from jaxdp.workdir.metrics import read_jsonl as read_metrics

__version__ = "0.1.0"

# No function has the name of a command's module, such as `jaxdp.train`.
_FUNCTIONS = {
    "train_model": "jaxdp.run.loop.train",
    "evaluate_model": "jaxdp.run.evaluation.evaluate_checkpoint",
    "generate_text": "jaxdp.workdir.generation.generate",
    "export_model": "jaxdp.huggingface.save.export",
    "model_keys": "jaxdp.huggingface.load.model_keys",
    "plan_run": "jaxdp.estimate.plan.plan",
    "read_metrics": "jaxdp.workdir.metrics.read_jsonl",
    "ConfigError": "jaxdp.common.errors.ConfigError",
    "RunError": "jaxdp.common.errors.RunError",
}

__all__ = [
    "ConfigError",
    "RunError",
    "evaluate_model",
    "export_model",
    "generate_text",
    "model_keys",
    "plan_run",
    "read_metrics",
    "train_model",
]


def __getattr__(name: str) -> Any:
    """Imports a name of `__all__` on first use."""
    if name not in _FUNCTIONS:
        raise AttributeError(f"module 'jaxdp' has no attribute {name!r}")
    module, _, function = _FUNCTIONS[name].rpartition(".")
    globals()[name] = found = getattr(importlib.import_module(module), function)
    return found


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
