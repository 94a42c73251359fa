"""The metrics that a run logs, and their files: `metrics.jsonl`, TensorBoard, wandb."""

import json
import math
import os
import re
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from jaxdp.common.errors import ConfigError
from jaxdp.common.files import PatientFile, reason, write_atomically
from jaxdp.workdir.wandb_run import WandbRun

# tensorboardX imports PyTorch if it is installed, which takes seconds, and isn't needed here.
_hidden = "torch" not in sys.modules
if _hidden:
    sys.modules["torch"] = None  # type: ignore[assignment]
try:
    from tensorboardX import SummaryWriter
    from tensorboardX.record_writer import register_writer_factory
finally:
    if _hidden:
        del sys.modules["torch"]

JSONL = "metrics.jsonl"

# Every metric that a run logs, and its meaning; docs/metrics.md shows this table.
METRICS = {
    "step": "optimizer steps done",
    "wall_time": "when the step was logged: seconds since 1970, as in TensorBoard's events; a run "
    "that was resumed has its pauses in it",
    "train/loss": "mean over all tokens since the last line, nats; steps whose loss isn't finite "
    "are left out",
    "train/grad_norm": "norm of the global gradient of this step, before clipping; where each "
    "device has a gradient of its own, the mean of their norms",
    "train/learning_rate": "learning rate of this step",
    "train/skipped": "updates skipped so far, because loss or gradient wasn't finite",
    "train/drift": "where replicas train independently: root mean square of their distance from "
    "their mean, relative to its norm, just before they synchronised; in diloco with Muon, that of "
    "hidden matrices",
    "eval/loss": "mean over all tokens of the validation split, nats; for each set of `eval_sets` "
    "it is `eval/NAME/loss`, and the same holds for the next two",
    "eval/perplexity": "exp(eval/loss)",
    "eval/bits_per_byte": "the same loss in bits per byte of text, comparable between tokenizers",
    "tokens_per_second": "tokens of all devices per second of wall-clock time since the last "
    "line, evaluations left out",
    "step_time_ms": "milliseconds per optimizer step since the last line",
    "data_wait_ms": "milliseconds of each step spent waiting for its batch",
    "mfu": "model FLOPs per second (6 per parameter and token, and attention's) as a share of the "
    "devices' bfloat16 peak; null where the peak isn't known",
    "balance/tokens_min": "tokens that count in the loss, on the device with the fewest",
    "balance/tokens_max": "tokens that count in the loss, on the device with the most",
    "balance/padding": "share of the positions that don't count in the loss",
    "balance/slowest_process": "the process that was busy longest between two steps, "
    "fetching data and logging",
    "balance/slowest_ms": "how long it was busy, milliseconds",
}


def _warn(text: str) -> None:
    print(f"jaxdp: {text}", file=sys.stderr)


class MetricsWriter:
    """Writes the metrics of each step: one JSON object per line, and TensorBoard events.

    While the disk is full, lines are kept in memory, and written once there is room.
    When a run resumes from a checkpoint, lines after its step are dropped first, so that each step
    is in the file once, as if the run had never stopped.
    """

    def __init__(
        self,
        workdir: Path,
        config: ConfigDict,
        start_step: int,
        active: bool = True,
        line: Mapping[str, float | None] | None = None,
        say: Callable[[str], None] = _warn,
    ):
        """Opens the files for a run that has done `start_step` steps; does nothing if inactive.

        Args:
          workdir: the folder of the run.
          config: a config with the keys of configs/default.py.
          start_step: lines after this step are dropped.
          active: whether to write at all.
          line: replaces the line of start_step, which is to be continued; see `line`.
          say: called with a line of text about damaged lines, a file that was removed, or wandb.
        """
        self._active, self._say = active, say
        self._wandb: WandbRun | None = None
        self._record: dict[str, Any] = {}
        if active:
            kept = start_step if line is None else start_step - 1
            _drop_after(workdir / JSONL, kept, say)
            self._jsonl = PatientFile(workdir / JSONL)
            register_writer_factory(_PatientFiles.SCHEME, _PatientFiles())
            logdir = f"{_PatientFiles.SCHEME}:{workdir / 'tensorboard'}"
            self._tensorboard = SummaryWriter(logdir, purge_step=kept + 1)
            if config.wandb_project:
                self._wandb = WandbRun(workdir, config, say)
        if line:
            self.write(start_step, line)

    def write(self, step: int, values: Mapping[str, float | None]) -> None:
        """Logs values at a step; all values of one step become one line of the file."""
        if not self._active:
            return
        unknown = {re.sub("^eval/[^/]+/", "eval/", name) for name in values} - METRICS.keys()
        assert not unknown, f"not in METRICS: {unknown}"
        if step != self._record.get("step"):
            self.flush()
        now = round(time.time(), 3)
        self._record = {"step": step, "wall_time": now} | self._record | dict(values)
        # TensorBoard and wandb have clocks of their own.
        given = {k: x for k, x in values.items() if _finite(x) is not None and k != "wall_time"}
        for name, value in given.items():
            self._tensorboard.add_scalar(name, value, step)
        if self._wandb:
            self._wandb.log(given, step)

    def line(self, step: int) -> dict[str, float | None]:
        """Returns the values of a step whose line isn't written yet; writes those of earlier steps.

        A checkpoint saves them if more values of its step are to come.
        """
        if step != self._record.get("step"):
            self.flush()
        return {name: _finite(x) for name, x in self._record.items() if name != "step"}

    def flush(self) -> None:
        """Writes the line of the last step."""
        if self._record:
            self._jsonl.write((to_json(self._record) + "\n").encode())
            self._record = {}
            if self._jsonl.renewed:
                self._jsonl.renewed = False
                self._say(f"{JSONL} was removed under the run; it is begun again.")

    def finish(self) -> str:
        """Writes what is left; returns what can't be written and why, or an empty string."""
        if not self._active:
            return ""
        self.flush()
        self._jsonl.flush()
        if self._jsonl.error is None:
            return ""
        lines = self._jsonl.waiting()
        return f"{lines} lines of {JSONL} could not be written ({reason(self._jsonl.error)})"

    def write_text(self, step: int, name: str, text: str) -> None:
        """Logs a text to TensorBoard."""
        if self._active:
            self._tensorboard.add_text(name, f"```\n{text}\n```", step)

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, *_: object) -> None:
        """Flushes and closes everything."""
        if self._active:
            self.flush()
            self._jsonl.close()
            self._tensorboard.close()
        if self._wandb:
            self._wandb.finish()


class _PatientFiles:
    """Keeps TensorBoard's events in memory while the disk is full.

    Otherwise its thread would die, and its full queue block the run. tensorboardX chooses who opens
    a file by the part of its path before the first colon.
    """

    SCHEME = "jaxdp"

    def open(self, path: str) -> PatientFile:
        return PatientFile(Path(path.removeprefix(f"{self.SCHEME}:")))

    def directory_check(self, path: str) -> None:
        """Does nothing: the file creates its folder."""


def to_json(record: Mapping[str, float | None]) -> str:
    """Formats a line of metrics.jsonl; values that aren't finite become null, as JSON has none.

    Examples:
      >>> to_json({"step": 10, "train/loss": math.inf})
      '{"step": 10, "train/loss": null}'
    """
    return json.dumps({name: _finite(value) for name, value in record.items()})


def read_jsonl(workdir: str | Path, report: Callable[[str], None] = _warn) -> list[dict[str, Any]]:
    """Reads a run's metrics.jsonl; leaves out lines that are damaged, and says which.

    Nothing is said of a last line that is cut off: the run may be writing it.

    Raises:
      ConfigError: there is no such file, or it can't be read.
    """
    path = Path(workdir) / JSONL
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise ConfigError(
            f"{path} can't be read ({error.strerror}): give the --workdir of a training run"
        ) from None
    _report_damaged(path, lines[:-1], report)
    return [record for line in lines if (record := _parse(line))]


def last_loss(workdir: str | Path) -> float:
    """Returns the last loss on the validation split in a run's metrics.jsonl, nats per token."""
    return [record["eval/loss"] for record in read_jsonl(workdir) if "eval/loss" in record][-1]


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line.decode())
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) and type(record.get("step")) is int else None


def _report_damaged(path: Path, lines: list[bytes], report: Callable[[str], None]) -> None:
    damaged = [str(i) for i, line in enumerate(lines, 1) if line.strip() and not _parse(line)]
    if damaged:
        more = f" and {len(damaged) - 8} more" if len(damaged) > 8 else ""
        are = "s {} are" if len(damaged) > 1 else " {} is"
        report(f"{path}: line{are.format(', '.join(damaged[:8]) + more)} damaged, and left out.")


def _drop_after(path: Path, step: int, report: Callable[[str], None]) -> None:
    """Removes the lines after a step, and those that are cut off or damaged; says which are."""
    if not path.exists():
        return
    lines = path.read_bytes().splitlines(keepends=True)
    whole = [x for x in lines if x.endswith(b"\n")]
    _report_damaged(path, whole, report)
    kept = [x for x in whole if (r := _parse(x)) and r["step"] <= step]
    if kept == lines[: len(kept)]:
        os.truncate(path, sum(map(len, kept)))  # Needs no room on a full disk.
    else:
        write_atomically(path, b"".join(kept).decode())


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
