"""How near `jaxdp plan --hours` comes: the time that it predicts, and the loss of other sizes.

    python benchmarks/budgets.py --config=configs/quickstart.py --workdir=runs/budgets --minutes=5

For each number of minutes, the plan's proposal is trained; with --sizes, so are models of about a
half and twice its parameters, which the same rules propose for 4 times as many and a quarter of the
tokens for each parameter. Each size's speed is timed before. Printed are the seconds that the plan
gives to the steps and evaluations, those of the whole command, start included, and the last
validation loss.
"""

import functools
import subprocess
import sys
import time
from pathlib import Path

from absl import flags
from ml_collections import config_flags

from jaxdp.common import cli
from jaxdp.data.cache import open_cache
from jaxdp.estimate import assumptions, scaling
from jaxdp.estimate.budget import TOKENS_PER_PARAMETER, USED, Budget, Proposal, propose
from jaxdp.estimate.plan import vocabulary
from jaxdp.estimate.timing import timed
from jaxdp.parallel import cpu
from jaxdp.workdir.metrics import last_loss

CONFIG = config_flags.DEFINE_config_file("config", None, "Python file with get_config().")
WORKDIR = flags.DEFINE_string("workdir", None, "Folder for a workdir of each run.", required=True)
MINUTES = flags.DEFINE_list("minutes", ["5", "10", "20"], "Minutes of each budget.")
SIZES = flags.DEFINE_boolean("sizes", False, "Also train models of half and twice the size.")

COLUMNS = [
    "minutes",
    "model",
    "parameters",
    "tokens",
    "learning_rate",
    "planned_s",
    "measured_s",
    "loss",
]


def main() -> int:
    """Prints a table."""
    import jax

    config = cli.config_of_flag(CONFIG)
    cli.prepare_jax()
    cpu.be_two_devices()
    vocab, cache = vocabulary(config, None, cli.warn), open_cache(config, cli.warn)
    text, devices = (cache.train.size, cache.validation.size), jax.local_devices()
    guess, (room, _) = scaling.measure_rate(config), assumptions.room_of(None, None)
    measure = functools.partial(timed, vocab=vocab, devices=devices, room=room, report=cli.warn)
    print(f"| {' | '.join(COLUMNS)} |\n{'|---' * len(COLUMNS)}|")
    for minutes in map(float, MINUTES.value):
        for factor in (1.0, 4.0, 0.25) if SIZES.value else (1.0,):
            ratio = factor * TOKENS_PER_PARAMETER
            budget = Budget(minutes / 60, vocab, devices, *text, ratio)
            found = propose(config, budget, guess, measure)
            seconds, loss = trained(found, Path(WORKDIR.value) / f"{minutes:g}-{ratio:g}")
            c = found.config
            print(
                f"| {minutes:g} | {c.model.num_layers} x {c.model.embed_dim} | "
                f"{found.parameters:,} | {found.tokens:,} | {c.optimizer.learning_rate:g} | "
                f"{60 * minutes * USED:.0f} | {seconds:.0f} | {loss:.4f} |",
                flush=True,
            )
    return 0


def trained(proposal: Proposal, workdir: Path) -> tuple[float, float]:
    """Trains a proposal; returns the command's seconds, and the last validation loss."""
    name = config_flags.get_config_filename(flags.FLAGS["config"])
    given = config_flags.get_override_values(flags.FLAGS["config"]) | proposal.keys
    keys = [f"--config.{key}={value}" for key, value in given.items()]
    command = (sys.executable, "-m", "jaxdp.train", f"--config={name}", f"--workdir={workdir}")
    began = time.perf_counter()
    done = subprocess.run((*command, *keys), capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stdout + done.stderr)
    return time.perf_counter() - began, last_loss(workdir)


if __name__ == "__main__":
    sys.exit(cli.run(main, cli.check_config))
