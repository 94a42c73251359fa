"""Whether a stopped and resumed run is the uninterrupted one to the bit on a GPU, for `gpu.py`."""

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np
from gpu_models import Variant, batch_size, batches, environment, model_config, some, this, vocab
from jax.flatten_util import ravel_pytree

from jaxdp.common import cli
from jaxdp.data.batch import with_process
from jaxdp.parallel.replicas import Replicas
from jaxdp.step.program import Program
from jaxdp.step.setup import make_setup
from jaxdp.step.state import create_state
from jaxdp.workdir.checkpoints import Checkpoints

HALF, ALL = 10, 20  # Steps when a run is saved, and at its end.
FLAG = "--xla_gpu_deterministic_ops=true"
MODES = {"as it is": Variant(), FLAG: Variant(xla_flags=FLAG)}


def run(folder: str, names: list[str]) -> None:
    """Trains a 6-layer model for 20 steps, once for each name, in a process of its own.

    Args:
      folder: where the checkpoint is, and the final parameters go, a vector NAME.npy each.
      names: "saved" saves a checkpoint after 10 steps, "resumed" starts from it; other names do
        neither.
    """
    cli.prepare_jax()
    config = model_config({"model.num_layers": 6}, batch_size(16))
    config.optimizer.warmup_steps = 2
    replicas, setup = Replicas(jax.local_devices()[:1]), make_setup(config, vocab(), 1)
    program, given = Program(setup, replicas), batches(config, vocab())
    hosts = [[with_process(next(given), busy=0.0)] for _ in range(ALL)]
    for name in names:
        first, state = 0, create_state(setup, replicas)
        # Only the runs that save or restore open the folder; others may run at the same time.
        if name == "resumed":
            with Checkpoints(Path(folder), setup, replicas) as checkpoints:
                restored = checkpoints.restore(state)
            assert restored is not None
            first, _, state = restored
            assert first == HALF
        for done in range(first, ALL):
            state, _ = program(done, state, replicas.shard_steps(hosts[done]))
            if name == "saved" and done + 1 == HALF:
                with Checkpoints(Path(folder), setup, replicas) as checkpoints:
                    checkpoints.save(HALF, state, {})
                    failure = checkpoints.finish(state)
                assert not failure, failure
        np.save(f"{folder}/{name}.npy", np.asarray(ravel_pytree(state.params)[0]))


def part() -> Iterator[str]:
    """Yields a table: does a resumed run end with the parameters of an uninterrupted one?"""
    yield "GPT-2 124M with 6 of its layers, 16 sequences a step, 20 steps; the parameters against"
    yield "those of an uninterrupted run. Compiled anew: with an empty compilation cache, as on"
    yield 'another machine. What the flag costs: "deterministic" under "Other settings".\n'
    yield "| | resumed after step 10 | once more | once more, compiled anew |\n|---|---|---|---|"
    with tempfile.TemporaryDirectory() as folder:
        modes = some(MODES)
        jobs = [(Path(folder) / f"{i}", variant) for i, (_, variant) in enumerate(modes)]
        first = [(*job, names) for job in jobs for names in (["saved"], ["anew"])]
        _together(first)
        _together([(*job, ["resumed", "again"]) for job in jobs])
        for (label, _), (place, _) in zip(modes, jobs, strict=True):
            expected = np.load(place / "saved.npy")
            cells = [
                _compared(place / f"{name}.npy", expected) for name in ("resumed", "again", "anew")
            ]
            yield f"| {label} | {' | '.join(cells)} |"


def _together(jobs: list[tuple[Path, Variant, list[str]]]) -> None:
    """Runs processes at the same time; one that fails leaves no file."""

    def start(job: tuple[Path, Variant, list[str]]) -> None:
        folder, variant, names = job
        folder.mkdir(exist_ok=True)
        environ = environment(variant)
        if names == ["anew"]:
            environ["JAX_COMPILATION_CACHE_DIR"] = str(folder / "programs")
        task = {"task": "run", "folder": str(folder), "names": names}
        subprocess.run(this(task), env=environ, stdout=sys.stderr, check=False)

    with ThreadPoolExecutor(len(jobs)) as pool:
        list(pool.map(start, jobs))


def _compared(file: Path, expected: np.ndarray) -> str:
    """Says whether a vector in a file has the bits of another one."""
    if not file.exists():
        return "failed"
    found = np.load(file)
    if found.tobytes() == expected.tobytes():
        return "the same bits"
    return f"differs by {np.linalg.norm(found - expected) / np.linalg.norm(expected):.1e}"
