"""jaxdp: data-parallel training of Flax transformer language models.

What a notebook or a program needs; each is imported when it is first used, as JAX takes seconds:

    train_model(config, workdir)       trains, or goes on where the workdir's run has stopped
    evaluate_model(workdir)            the loss of a checkpoint on the validation split
    generate_text(workdir, prompts)    continues texts
    export_model(workdir, output)      writes a folder that Hugging Face's transformers opens
    plan_run(config)                   what memory and time a run will take
    read_metrics(workdir)              what a run has logged, a dictionary for each step

Mistakes of the user raise ConfigError, and what stops a run by no mistake RunError.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxdp.common.errors import ConfigError, RunError
    from jaxdp.estimate.plan import plan as plan_run
    from jaxdp.huggingface.save import export as export_model
    from jaxdp.run.evaluation import evaluate_checkpoint as evaluate_model
    from jaxdp.run.loop import train as train_model
    from jaxdp.workdir.generation import generate as generate_text
    from jaxdp.workdir.metrics import read_jsonl as read_metrics

__version__ = "0.1.0"

# Their names are apart from the modules' of the commands: `jaxdp.train` is one.
_FUNCTIONS = {
    "train_model": "jaxdp.run.loop.train",
    "evaluate_model": "jaxdp.run.evaluation.evaluate_checkpoint",
    "generate_text": "jaxdp.workdir.generation.generate",
    "export_model": "jaxdp.huggingface.save.export",
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
    "plan_run",
    "read_metrics",
    "train_model",
]


def __getattr__(name: str) -> Any:
    """Imports a function of `__all__` when it is first used."""
    if name not in _FUNCTIONS:
        raise AttributeError(f"module 'jaxdp' has no attribute {name!r}")
    module, _, function = _FUNCTIONS[name].rpartition(".")
    globals()[name] = found = getattr(importlib.import_module(module), function)
    return found


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
