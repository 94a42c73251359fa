"""The summary of a run, shown when it ends."""

from jaxdp.run import report
from jaxdp.run.result import Result
from jaxdp.run.session import Run


def summarise(run: Run, result: Result) -> None:
    """Shows a sample of text, the results, and where the files are."""
    run.watchdog.beat("summarising", result.step, slow=True)
    run.display.stop()
    if result.finished:
        text = run.sample(result.step, run.program.eval_params(result.state))
        if text:
            run.display.text("Sample", text)
    rows = report.summary(run.config, run.workdir, result, run.display.seconds())
    rows |= report.synchronisation(run.program, run.log.drift, run.replicas.device_count)
    if result.finished and result.step < run.config.num_train_steps:
        rows["stopped early"] = run.stopping.reason()
    if run.judge.skipped or run.judge.rollbacks:
        rows["diverged"] = (
            f"{run.judge.skipped:,} updates skipped, {run.judge.rollbacks} roll-backs"
        )
    title = "Finished" if result.finished else "Stopped as asked; run again to go on"
    run.display.table(title, rows)
