"""Speed of the data pipeline alone, side by side with grain where it is installed.

    pip install grain
    python benchmarks/data.py --config=configs/quickstart.py

All read the same token cache and make the same shapes, in shuffled order: inputs, targets and
weights [batch, seq_len] for one process. They take turns, some batches each, so that what else the
machine does hits all of them alike; a ratio is the median over turns of the speeds within one. A
core is one second of this process's CPU time, of all its threads. grain runs in this process, with
its default threads, as our pipeline does.
"""

import importlib.util
import itertools
import sys
import time
from collections.abc import Iterator

import numpy as np
from absl import flags
from ml_collections import config_flags

from jaxdp import command
from jaxdp.data.cache import TokenCache, open_cache
from jaxdp.data.feed import Feed

CONFIG = config_flags.DEFINE_config_file("config", None, "Python file with get_config().")
TURN = flags.DEFINE_integer("batches", 500, "Batches in a turn.")
TURNS = flags.DEFINE_integer("turns", 15, "Turns.")


def main() -> int:
    """Times, prints a table."""
    config = command.given_config(CONFIG)
    config.num_train_steps = 10**9
    contestants = {"jaxdp": ours(config, "stream")}
    if importlib.util.find_spec("grain"):
        contestants["grain"] = grains(config)
    else:
        print("grain is not installed: pip install grain")
    contestants["jaxdp, documents apart"] = ours(config, "documents")
    for batches in contestants.values():
        take(batches, 20)
    times = {name: [] for name in contestants}
    for _ in range(TURNS.value):
        for name, batches in contestants.items():
            times[name].append(take(batches, TURN.value))
    tokens = TURN.value * config.global_batch_size * config.seq_len
    first = np.array(times["jaxdp"])
    print(f"batches of {config.global_batch_size} x {config.seq_len}")
    print("| | tokens/s | tokens/s per core | speed / jaxdp | per core / jaxdp |")
    print("|---|---|---|---|---|")
    for name, pairs in times.items():
        seconds = np.array(pairs)
        speed = [f"{value:,.0f}" for value in tokens / np.median(seconds, axis=0)]
        ratio = [f"{value:.2f}" for value in np.median(first / seconds, axis=0)]
        print(f"| {name} | {' | '.join([*speed, *ratio])} |")
    return 0


def take(batches: Iterator, count: int) -> tuple[float, float]:
    """Seconds, and CPU seconds of all threads, that so many batches take."""
    began, cpu = time.perf_counter(), time.process_time()
    for batch in itertools.islice(batches, count):
        assert batch["weights"].dtype == np.float32
    return time.perf_counter() - began, time.process_time() - cpu


def ours(config, packing: str) -> Iterator:
    """The batches of a run."""
    config = config.copy_and_resolve_references()
    config.data.packing = packing
    return Feed(config, open_cache(config)).train(0)


def grains(config) -> Iterator:
    """The same windows by grain: a map over a shuffled, repeated source, batched."""
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
    sys.exit(command.run(main))
