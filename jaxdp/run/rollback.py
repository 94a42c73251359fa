"""Rolling a diverged run back to a good checkpoint, or giving up with a diagnosis."""

import functools
import json
import time

from jaxdp.common.errors import ConfigError, RunError
from jaxdp.common.files import write_atomically
from jaxdp.parallel import processes
from jaxdp.parallel.replicas import free
from jaxdp.run import divergence, report
from jaxdp.run.divergence import Trouble
from jaxdp.run.session import Run
from jaxdp.step.state import State, abstract_state
from jaxdp.workdir import integrity


def roll_back(run: Run, state: State) -> tuple[int, State]:
    """Restores the last good checkpoint, and skips the data since then.

    The result depends on the training alone: rounds dispatched after the trouble are dropped, and
    only checkpoints that checkpoint.every asked for count. Others depend on when the run was
    interrupted, or need not be kept until then.

    Args:
      run: the run, which has found trouble.
      state: its present state, which is deleted.

    Returns:
      The step to go on from, and the state, its step set to it.

    Raises:
      RunError: divergence.max_rollbacks is used up; says what is known of the cause.
    """
    began = time.perf_counter()
    trouble, c = run.judge.trouble, run.config.divergence
    assert trouble is not None
    if run.judge.rollbacks == c.max_rollbacks:
        raise _diagnosis(run, trouble, state)
    run.watchdog.beat("going back", trouble.end, slow=True)
    run.log.forget()
    free(state)  # With two states in memory, going back would take more than training.
    is_good = functools.partial(integrity.is_good, every=run.config.checkpoint.every)
    found = run.checkpoints.restore(abstract_state(run.setup), is_good)
    step, extra, state = found or (0, {}, run.first_state())
    run.load_evaluations(step, extra)  # Later ones are dropped, but for the best.
    run.judge.roll_back()
    run.saved = None  # What is to be saved of trouble.end is another state.
    run.display.line(
        f"step {trouble.step}: {trouble.reason}. Back to the parameters of step {step}; the "
        f"data up to step {trouble.end} is skipped (roll-back {run.judge.rollbacks} of at most "
        f"{c.max_rollbacks}).",
        "bold yellow",
    )
    state = run.program.at_step(state, trouble.end)
    run.log.throughput.pause(time.perf_counter() - began)
    return trouble.end, state


def _diagnosis(run: Run, trouble: Trouble, state: State) -> RunError:
    """Shows and writes what is known of a step that the run can't get past; returns the error."""
    run.watchdog.beat("looking for the cause", trouble.end, slow=True)
    found = divergence.diagnose(run.setup, run.replicas, trouble, state)
    run.display.table("Diverged", report.diagnosis(found))
    path = run.workdir / "diagnosis.json"
    where = str(path)
    if processes.is_main():
        # JSON has neither infinity nor NaN, which matter most here: they become strings.
        values = json.loads(json.dumps(found), parse_constant=str)
        try:
            write_atomically(path, json.dumps(values, indent=2) + "\n")
        except ConfigError as error:
            where = f"the table above ({error})"
    return RunError(
        f"diverged at step {trouble.step}: {trouble.reason}, after {run.judge.rollbacks} "
        f"roll-backs; {where} names the data and the norms of each layer: lower "
        "optimizer.learning_rate, or raise divergence.max_rollbacks, and run again to go on "
        "from the newest checkpoint"
    )
