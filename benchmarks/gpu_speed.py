"""Speed of the training step on a GPU, for `gpu.py`: against nanoGPT, and with other settings."""

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
import steps
import turns
from absl import flags
from gpu_models import (
    DEFAULT,
    MODELS,
    REHEARSE,
    VARIANT_BATCH,
    VARIANTS,
    Variant,
    batch_size,
    batches,
    environment,
    model_config,
    peak_flops,
    some,
    this,
    tokens,
    vocab,
)
from ml_collections import ConfigDict
from turns import Contestant, OutOfMemory

from jaxdp.common import cli
from jaxdp.configs import shakespeare_char
from jaxdp.model import layers, norms
from jaxdp.model.architecture import ModelConfig
from jaxdp.model.flops import flops_per_token
from jaxdp.model.target import Target
from jaxdp.model.transformer import Transformer, num_parameters, parameter_shapes
from jaxdp.parallel.replicas import Replicas
from jaxdp.step import losses

CHARACTERS = 65  # In nanoGPT's Shakespeare.


def train(keys: dict[str, Any], batch: int) -> None:
    """Is our contestant, in a process of its own; `turns.serve` describes what it prints."""
    cli.prepare_jax()
    plain(os.environ.get("PLAIN", ""))
    config, device = model_config(keys, batch), jax.local_devices()[0]

    def peak() -> int:
        return (device.memory_stats() or {}).get("peak_bytes_in_use", 0)

    def serve() -> None:
        drawn = batches(config, vocab())
        turns.serve(steps.trainer(config, vocab(), Replicas([device]), drawn), peak)

    turns.run(serve)


def plain(part: str) -> None:
    """Leaves a part of the step to XLA: "norms", "loss" or "activations"; "": none."""
    if part == "norms":
        norms.tiling = lambda shape: None
    elif part:
        {"loss": losses, "activations": layers}[part].target = lambda: Target("cpu")


def ours(keys: dict[str, Any], batch: int, variant: Variant = DEFAULT) -> Contestant:
    """Starts our contestant."""
    task = {"task": "train", "keys": keys | {**variant.keys}, "batch": batch}
    return Contestant(*this(task), **environment(variant))


def theirs(config: ConfigDict, tokens_file: Path) -> Contestant:
    """Starts nanoGPT's contestant, compiled."""
    settings = steps.peer_settings(config, vocab()) | {
        "nanogpt": flags.FLAGS.nanogpt,
        "tokens": str(tokens_file),
        "device": "cpu" if REHEARSE.value else "cuda",
        "compile": True,
    }
    peer = str(Path(__file__).with_name("nanogpt_steps.py"))
    python = flags.FLAGS.torch_python or sys.executable
    return Contestant(python, peer, json.dumps(settings), **environment())


class Measured:
    """Contestants that have trained in turns.

    Attributes:
      ready: seconds from the start of a process until it was warm, by name.
      seconds: seconds per step in each turn, by name.
      peak: peak memory in bytes, by name.
      failed: why a contestant has no figures, by name.
    """

    def __init__(self, start: dict[str, Callable[[], Contestant]], count: int, rounds: int):
        """Starts all at the same time; when all are warm, `count` steps a turn, some rounds."""
        count, rounds = (1, 1) if REHEARSE.value else (count, rounds)
        self.ready: dict[str, float] = {}
        self.seconds: dict[str, list[float]] = {}
        self.peak: dict[str, float] = {}
        self.failed: dict[str, str] = {}
        self._running: dict[str, Contestant] = {}
        with ThreadPoolExecutor(len(start)) as pool:
            list(pool.map(lambda name: self._try(name, lambda: self._begin(name, start)), start))
        for _ in range(rounds):
            for name in list(self._running):
                self._try(name, lambda: self._turn(name, count))  # noqa: B023
        for contestant in self._running.values():
            contestant.end()

    def _begin(self, name: str, start: dict[str, Callable[[], Contestant]]) -> None:
        began = time.perf_counter()
        self._running[name] = start[name]()
        self.ready[name], self.seconds[name] = time.perf_counter() - began, []

    def _turn(self, name: str, count: int) -> None:
        self.seconds[name].append(self._running[name](count))
        self.peak[name] = self._running[name].peak

    def _try(self, name: str, function: Callable[[], None]) -> None:
        try:
            function()
        except OutOfMemory:
            self.failed[name] = "out of memory"
        except (SystemExit, OSError) as error:  # It has ended.
            self.failed[name] = f"failed, {str(error).rpartition(' has ')[2]}"
        if name in self.failed:
            self._running.pop(name, None)

    def ratio(self, name: str, other: str) -> float:
        """Returns how many times as fast `name` is as `other`, the median over turns."""
        return float(np.median(np.array(self.seconds[other]) / np.array(self.seconds[name])))


HEADER = "| | ms/step | tokens/s | MFU | peak GiB | warm after s |"
RULE = "|---|---|---|---|---|---|"


def row(name: str, config: ConfigDict, measured: Measured, against: str | None = None) -> str:
    """Formats a row of a table: `HEADER`, and the speed as a multiple of `against`, if given."""
    columns = 6 + (against is not None)
    if name in measured.failed:
        return f"| {name} | {measured.failed[name]} {'| ' * (columns - 1)}|"
    seconds = float(np.median(measured.seconds[name]))
    rate = config.global_batch_size * config.seq_len / seconds
    model = ModelConfig.from_config(config, vocab())
    flops = flops_per_token(model, num_parameters(parameter_shapes(Transformer(model))))
    used = f"{rate * flops / peak_flops():.1%}" if peak_flops() else "unknown"
    cells = [name, f"{1e3 * seconds:.2f}", f"{rate:,.0f}", used]
    cells += [f"{measured.peak[name] / 2**30:.2f}", f"{measured.ready[name]:.0f}"]
    if against is not None:
        has = against not in measured.failed
        cells.append(f"{measured.ratio(name, against):.3f}" if has else "")
    return f"| {' | '.join(cells)} |"


def comparison(name: str, batch: int) -> Iterator[str]:
    """Yields the table of both contestants at one batch size, in turns."""
    config = model_config(MODELS[name], batch_size(batch))
    with tempfile.TemporaryDirectory() as folder:
        drawn = Path(folder) / "tokens.bin"
        tokens(10**6, vocab()).tofile(drawn)
        start = {"jaxdp": lambda: ours(MODELS[name], config.global_batch_size)}
        if flags.FLAGS.nanogpt:
            start["nanoGPT, torch.compile"] = lambda: theirs(config, drawn)
        measured = Measured(start, count=10, rounds=7)
    against = list(start)[-1]
    yield f"{HEADER} speed / {against} |"
    yield f"{RULE}---|"
    for contestant in start:
        yield row(contestant, config, measured, against)


def variants() -> Iterator[str]:
    """Yields a table of the step with other settings, each group in turns with the default."""
    yield f"124M, {VARIANT_BATCH} sequences a step.\n"
    yield f"{HEADER} speed / as it is |"
    yield f"{RULE}---|"
    batch, base = batch_size(VARIANT_BATCH), "as it is"
    for group in some(VARIANTS):
        chosen = {base: DEFAULT} | dict(some(group))
        start = {
            name: lambda variant=variant: ours({}, batch, variant)
            for name, variant in chosen.items()
        }
        measured = Measured(start, count=8, rounds=5)
        for name, variant in chosen.items():
            yield row(name, model_config(variant.keys, batch), measured, base)


def largest() -> Iterator[str]:
    """Yields the speed of 124M with 64 sequences, alone."""
    config = model_config({}, batch_size(64))
    measured = Measured({"64": lambda: ours({}, config.global_batch_size)}, count=10, rounds=3)
    yield HEADER
    yield RULE
    yield row("64", config, measured)


def characters() -> Iterator[str]:
    """Yields a table of shakespeare_char.py's model in both dtypes, in this process."""
    cli.prepare_jax()
    yield "| dtype | trace, compile and first step: s | ms/step | tokens/s |\n|---|---|---|---|"
    for dtype in ("bfloat16", "float32"):
        config = shakespeare_char.get_config()
        config.num_train_steps, config.model.dtype = 10**9, dtype
        if REHEARSE.value:
            config.update_from_flattened_dict(
                {"model.num_layers": 1, "model.num_heads": 2, "model.embed_dim": 32}
            )
            config.update({"seq_len": 32, "global_batch_size": 2})
        replicas = Replicas(jax.local_devices()[:1])
        trained = steps.trainer(config, CHARACTERS, replicas, batches(config, CHARACTERS))
        began = time.perf_counter()
        trained(1)
        first, found, count = time.perf_counter() - began, [], 1 if REHEARSE.value else 20
        trained(3)
        for _ in range(1 if REHEARSE.value else 5):
            began = time.perf_counter()
            trained(count)
            found.append((time.perf_counter() - began) / count)
        seconds = float(np.median(found))
        rate = config.global_batch_size * config.seq_len / seconds
        yield f"| {dtype} | {first:.1f} | {1e3 * seconds:.2f} | {rate:,.0f} |"
