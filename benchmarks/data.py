"""Compares the speed of the data pipeline alone with grain, where grain is installed.

    pip install grain
    python benchmarks/data.py --config=configs/quickstart.py

All read the same token cache and make batches of the same shapes, in shuffled order: inputs,
targets and weights [batch, seq_len] for one process. Each contestant is a process of its own, with
its default threads and buffers. They take turns of more batches than the 500 that grain buffers, so
that other load on the machine affects all of them alike. Between its turns a contestant is stopped,
so that it can't fill buffers in another's time. A ratio is the median over turns of the ratios
within a turn; "per core" is per second of CPU time, summed over threads.
"""

import importlib.util
import itertools
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import numpy as np
from absl import flags
from ml_collections import config_flags

from jaxdp.common import cli
from jaxdp.data.cache import TokenCache, open_cache
from jaxdp.data.feed import Feed

CONFIG = config_flags.DEFINE_config_file("config", None, "Python file with get_config().")
TURN = flags.DEFINE_integer("batches", 2000, "Number of batches in a turn.")
TURNS = flags.DEFINE_integer("turns", 15, "Number of turns.")
SERVE = flags.DEFINE_string("serve", "", "Be this contestant (internal).")


class Contestant:
    """A process that makes batches in its turn, and is stopped otherwise."""

    def __init__(self, name: str):
        """Starts the process, and waits until it is warm."""
        arguments = [sys.executable, *sys.argv, f"--serve={name}"]
        self._process = subprocess.Popen(
            arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        while (line := self._process.stdout.readline()) != "ready\n":
            if not line:
                raise SystemExit(f"{name} has ended with {self._process.wait()}")
        self._process.send_signal(signal.SIGSTOP)

    def __call__(self) -> tuple[float, float]:
        """Runs one turn; returns its seconds and CPU seconds."""
        self._process.send_signal(signal.SIGCONT)
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        seconds, cpu = map(float, self._process.stdout.readline().split())
        self._process.send_signal(signal.SIGSTOP)
        return seconds, cpu

    def end(self) -> None:
        """Ends the process."""
        self._process.kill()
        self._process.wait()


def main() -> int:
    """Times all contestants, and prints a table."""
    config = cli.given_config(CONFIG)
    config.num_train_steps = 10**9
    if SERVE.value:
        return serve(config, SERVE.value)
    names = ["stream", "documents"]
    if importlib.util.find_spec("grain"):
        names.insert(1, "grain")
    else:
        print("grain is not installed: pip install grain")
    open_cache(config)
    contestants = {name: Contestant(name) for name in names}
    times = {name: [] for name in contestants}
    for _ in range(TURNS.value):
        for name, contestant in contestants.items():
            times[name].append(contestant())
    for contestant in contestants.values():
        contestant.end()
    tokens = TURN.value * config.global_batch_size * config.seq_len
    first = np.array(times["stream"])
    print(f"batches of {config.global_batch_size} x {config.seq_len}")
    print("| | tokens/s | tokens/s per core | speed / stream | per core / stream |")
    print("|---|---|---|---|---|")
    for name, pairs in times.items():
        seconds = np.array(pairs)
        speed = [f"{value:,.0f}" for value in tokens / np.median(seconds, axis=0)]
        ratio = [f"{value:.3f}" for value in np.median(first / seconds, axis=0)]
        print(f"| {name} | {' | '.join([*speed, *ratio])} |")
    return 0


def serve(config, name: str) -> int:
    """Runs a turn for each line of stdin, and prints its seconds and CPU seconds."""
    batches = grains(config) if name == "grain" else ours(config, name)
    take(batches, 2 * TURN.value)
    print("ready", flush=True)
    for _ in sys.stdin:
        print(*take(batches, TURN.value), flush=True)
    return 0


def take(batches: Iterator, count: int) -> tuple[float, float]:
    """Takes `count` batches; returns seconds, and CPU seconds of all threads."""
    began, cpu = time.perf_counter(), time.process_time()
    for batch in itertools.islice(batches, count):
        assert batch["weights"].dtype == np.float32
    return time.perf_counter() - began, time.process_time() - cpu


def ours(config, packing: str) -> Iterator:
    """Returns the batches of a run with the given data.packing."""
    config = config.copy_and_resolve_references()
    config.data.packing = packing
    return Feed(config, open_cache(config)).train(0)


def grains(config) -> Iterator:
    """Returns the same windows from grain: a shuffled, repeated source, mapped and batched."""
    import grain

    cache: TokenCache = open_cache(config)
    length = config.seq_len

    class Windows(grain.sources.RandomAccessDataSource):
        def __len__(self):
            return (len(cache.train) - 1) // length

        def __getitem__(self, index):
            window = cache.train[index * length : index * length + length + 1].astype(np.int32)
            weights = np.ones(length, np.float32)
            return {"inputs": window[:-1], "targets": window[1:], "weights": weights}

    dataset = grain.MapDataset.source(Windows()).shuffle(seed=config.seed).repeat()
    return iter(dataset.batch(config.global_batch_size).to_iter_dataset())


if __name__ == "__main__":
    sys.exit(cli.run(main))
