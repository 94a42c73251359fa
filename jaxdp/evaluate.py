"""Evaluates a checkpoint of a run, on its own data or on other data.

    jaxdp evaluate --workdir=DIR [--step=newest|best|N] [--config.KEY=VALUE ...]
    jaxdp evaluate --workdir=DIR [--step=newest|best|N] --tasks=NAME,NAME [--tasks_folder=FOLDER]

`python -m jaxdp.evaluate` is the same. It prints a line for the validation split and for each of
the run's eval_sets, and then all figures as JSON, like a line of metrics.jsonl. On the same devices
they equal what the run logged at that step, bit for bit. The workdir is not changed, and its run
may be under way.

With --tasks, it scores the model on tasks of lm-evaluation-harness instead, such as hellaswag (pip
install 'jaxdp[tasks]'), and adds a line to WORKDIR/tasks.jsonl.

Exit status: 0; 2 a flag, the workdir or the data is wrong; anything else is a fault.
"""

import json
import sys
from pathlib import Path

from absl import flags
from ml_collections import config_flags

from jaxdp.common import cli, config_file, paths
from jaxdp.common import config as configs
from jaxdp.common.errors import ConfigError, check_step, shown
from jaxdp.common.terminal import Display
from jaxdp.configs import default

WORKDIR = flags.DEFINE_string("workdir", None, "Folder of a training run.")
STEP = flags.DEFINE_string("step", "newest", "Checkpoint: newest, best, or a number of steps.")
TASKS = flags.DEFINE_list("tasks", [], "Tasks of lm-evaluation-harness, with commas between them.")
FOLDER = flags.DEFINE_string("tasks_folder", None, "Folder of more tasks, as YAML files.")


def define_config(argv: list[str]) -> None:
    """Defines --config; checks its keys first, because ml_collections reads them at once."""
    for value in config_file.given(argv):
        raise ConfigError(
            f"--config={shown(value)} is not accepted here, as the run has its own config: change "
            "its keys with --config.KEY=VALUE"
        )
    cli.check_overrides(argv)
    config_flags.DEFINE_config_dict(
        "config",
        default.get_config(),
        "Keys to change, such as --config.data.path=FILE.txt.",
        sys_argv=argv,
    )


def main() -> int:
    """Evaluates a checkpoint and prints the result; returns the exit status."""
    if not WORKDIR.value:
        raise ConfigError("--workdir is missing: give the folder of a training run")
    check_step(STEP.value)
    workdir = paths.local("--workdir", WORKDIR.value)
    # Imported here, so that --help and mistakes in flags don't wait seconds for JAX.
    from jaxdp.parallel import cpu
    from jaxdp.run import preflight, report
    from jaxdp.run.evaluation import completed, evaluate_valid, figures
    from jaxdp.step.setup import same_on_two_devices
    from jaxdp.workdir.metrics import to_json

    overrides = config_flags.get_override_values(flags.FLAGS["config"])
    cli.prepare_jax()
    if TASKS.value:
        return evaluate_tasks(workdir, overrides)
    if FOLDER.value:
        raise ConfigError("--tasks_folder has tasks, and --tasks names none: give both, or neither")
    saved = configs.load(workdir / "config.json")
    config = completed(saved, overrides)
    cpu.prepare(config, two_devices=same_on_two_devices(config))
    preflight.check_devices()
    step, found = evaluate_valid(workdir, config, saved, STEP.value, say=cli.warn)
    for name, evaluation in found.items():
        print(report.evaluated(step, evaluation, name))
    print(to_json({"step": step, **figures(found)}))
    return 0


def evaluate_tasks(workdir: Path, overrides: dict) -> int:
    """Scores a checkpoint on tasks and prints the result; returns the exit status."""
    from jaxdp.huggingface import tasks

    if overrides:
        raise ConfigError(
            f"--config.{next(iter(overrides))} has no meaning with --tasks: leave one of them out"
        )
    line = tasks.evaluate_tasks(workdir, TASKS.value, STEP.value, FOLDER.value, cli.warn)
    Display().table(f"After step {line['step']:,}", tasks.rows(line))
    print(json.dumps(line))
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main, define_config))
