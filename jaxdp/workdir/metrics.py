"""Where a run's figures go: `metrics.jsonl`, TensorBoard, wandb; and how fast it goes."""

import json
import math
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from jaxdp.common.files import PatientFile, reason, write_whole

# tensorboardX imports PyTorch, where there is one, for things of PyTorch only: it takes seconds.
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

# Dense bf16 peak per device, FLOP/s, as the makers' data sheets give it (V100, T4: fp16).
PEAK_FLOPS = {
    "H200": 989e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "A10G": 70e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
    "V100": 125e12,
    "T4": 65e12,
}


class MetricsWriter:
    """Writes what is logged at a step: one JSON object per line, and TensorBoard events.

    What a full disk doesn't take is kept, and written when there is room.
    When a run goes on from a checkpoint, what was logged after that step is dropped first, so that
    each step stands in the file once, as if the run had never stopped.
    """

    def __init__(self, workdir: Path, config: ConfigDict, start_step: int, active: bool = True):
        """Opens the files for a run that has done `start_step` steps; does nothing if inactive."""
        self._active, self._wandb = active, None
        self._record: dict[str, Any] = {}
        if active:
            _drop_after(workdir / JSONL, start_step)
            self._jsonl = PatientFile(workdir / JSONL)
            register_writer_factory(_PatientFiles.SCHEME, _PatientFiles())
            logdir = f"{_PatientFiles.SCHEME}:{workdir / 'tensorboard'}"
            self._tensorboard = SummaryWriter(logdir, purge_step=start_step + 1)
            if config.wandb_project:
                self._wandb = _start_wandb(workdir, config)

    def write(self, step: int, values: Mapping[str, float | None]) -> None:
        """Logs values at a step; all that is logged at one step becomes one line of the file."""
        if not self._active:
            return
        if step != self._record.get("step"):
            self.flush()
        self._record |= {"step": step, **values}
        given = {name: x for name, x in values.items() if _finite(x) is not None}
        for name, value in given.items():
            self._tensorboard.add_scalar(name, value, step)
        if self._wandb:
            self._wandb.log(given, step=step)

    def flush(self) -> None:
        """Writes the line of the last step."""
        if self._record:
            self._jsonl.write((to_json(self._record) + "\n").encode())
            self._record = {}

    def finish(self) -> str:
        """Writes what is left; returns nothing, or what can't be written and why."""
        if not self._active:
            return ""
        self.flush()
        self._jsonl.flush()
        if self._jsonl.error is None:
            return ""
        lines = self._jsonl.waiting()
        return f"{lines} lines of {JSONL} could not be written ({reason(self._jsonl.error)})"

    def write_text(self, step: int, name: str, text: str) -> None:
        """Shows a text in TensorBoard."""
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
    """Lets TensorBoard's events wait; else its thread would die, and a full queue block the run.

    tensorboardX chooses who opens a file by what its path has before the first colon.
    """

    SCHEME = "jaxdp"

    def open(self, path: str) -> PatientFile:
        return PatientFile(Path(path.removeprefix(f"{self.SCHEME}:")))

    def directory_check(self, path: str) -> None:
        """The file makes its folder."""


def to_json(record: Mapping[str, float | None]) -> str:
    """A line of metrics.jsonl; JSON has no infinity, so what isn't finite is null.

    Examples:
      >>> to_json({"step": 10, "train/loss": math.inf})
      '{"step": 10, "train/loss": null}'
    """
    return json.dumps({name: _finite(value) for name, value in record.items()})


def read_jsonl(workdir: str | Path) -> list[dict[str, Any]]:
    """Reads a run's metrics.jsonl; a line that was cut off, or is damaged, is left out."""
    lines = (Path(workdir) / JSONL).read_bytes().split(b"\n")
    return [record for line in lines if (record := _parse(line))]


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line.decode())
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) and type(record.get("step")) is int else None


def _drop_after(path: Path, step: int) -> None:
    """Leaves out what comes after a step, was cut off, or is damaged."""
    if not path.exists():
        return
    lines = path.read_bytes().splitlines(keepends=True)
    kept = [x for x in lines if x.endswith(b"\n") and (r := _parse(x)) and r["step"] <= step]
    if kept == lines[: len(kept)]:
        os.truncate(path, sum(map(len, kept)))  # On a full disk there is room for this.
    else:
        write_whole(path, b"".join(kept).decode())


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _start_wandb(workdir: Path, config: ConfigDict):
    import wandb

    return wandb.init(
        project=config.wandb_project,
        dir=workdir,
        config=config.to_dict(),
        id=workdir.resolve().name,
        resume="allow",
    )


def load_balance(metrics: Mapping[str, Any], index: int, positions: int) -> dict[str, float]:
    """How equally a step's work was spread.

    Args:
      metrics: of `train_step.train_step`, on the host.
      index: which of its steps.
      positions: tokens that a device's batch has room for.

    Returns:
      Real tokens on the devices that have fewest and most, the share of positions without one, and
      the process that was busy longest between two steps (with its data, not its devices), in ms.
    """
    tokens, busy = metrics["tokens"][index], metrics["busy"][index]
    per_process = len(busy) // jax.process_count()
    return {
        "balance/tokens_min": round(float(tokens.min())),
        "balance/tokens_max": round(float(tokens.max())),
        "balance/padding": 1 - float(tokens.sum()) / (positions * len(tokens)),
        "balance/slowest_process": int(busy.argmax()) // per_process,
        "balance/slowest_ms": 1e3 * float(busy.max()),
    }


class Throughput:
    """Speed since it was last asked for, by the clock on the wall.

    Waiting for data and for checkpoints counts; what `pause` is told of does not.
    """

    def __init__(self, flops_per_token: int, device_count: int):
        """Takes the model's FLOPs per token and how many devices share the work."""
        self._flops_per_token = flops_per_token
        self._peak = peak_flops(jax.local_devices()[0]) * device_count
        self.start()

    def start(self, steps: int = 0) -> None:
        """Begins to measure; the next -`steps` steps don't count, they were done before."""
        self._since = time.perf_counter()
        self._steps, self._tokens, self._data_wait = steps, 0, 0.0

    def add(self, tokens: int, data_wait: float) -> None:
        """Counts a step: its tokens, and the seconds it waited for its batch."""
        self._steps += 1
        if self._steps > 0:
            self._tokens += tokens
            self._data_wait += data_wait

    def pause(self, seconds: float) -> None:
        """Takes time out that was spent on something else than training."""
        self._since += seconds

    def read(self) -> dict[str, float | None]:
        """Figures over the steps since the last call.

        All are None if there was no step; mfu is None on unknown hardware.
        """
        if self._steps <= 0:
            return dict.fromkeys(("tokens_per_second", "step_time_ms", "data_wait_ms", "mfu"))
        seconds = time.perf_counter() - self._since
        rate = self._tokens / seconds
        figures = {
            "tokens_per_second": rate,
            "step_time_ms": 1e3 * seconds / self._steps,
            "data_wait_ms": 1e3 * self._data_wait / self._steps,
            "mfu": rate * self._flops_per_token / self._peak if self._peak else None,
        }
        self.start()
        return figures


def peak_flops(device: jax.Device) -> float:
    """A device's peak in FLOP/s; 0 where it isn't known (CPUs)."""
    kind = device.device_kind
    return next((peak for name, peak in PEAK_FLOPS.items() if name in kind), 0.0)
