"""Shows whether memory stays flat over a long run, and files stay few.

    python benchmarks/endurance.py --steps=20000 --devices=2 --workdir=runs/endurance

Trains a small model for many steps, with evaluations and checkpoints. Prints 20 times the host's
resident memory, the devices' memory (bytes of all live arrays) and the threads; then the files.
"""

import argparse
import os
import threading
from pathlib import Path

import jax

from jaxdp.configs import quickstart
from jaxdp.run import loop


def resident_mb() -> float:
    """Returns the resident memory of this process in MB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def main() -> None:
    """Trains, and prints memory, threads, and files."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--devices", type=int, default=2, help="forced CPU devices, without a GPU")
    parser.add_argument("--workdir", type=Path, required=True, help="a new folder")
    arguments = parser.parse_args()
    jax.config.update("jax_num_cpu_devices", arguments.devices)
    config = quickstart.get_config()
    config.num_train_steps = arguments.steps
    config.global_batch_size, config.seq_len = 4 * arguments.devices, 32
    config.model.update({"num_layers": 1, "num_heads": 2, "embed_dim": 32})
    config.log_every, config.eval_every, config.checkpoint.every = 20, 500, 250
    config.eval_max_batches = 4
    asked, rows = 0, []

    def sample() -> bool:
        nonlocal asked
        if asked % (2 * arguments.steps // 20) == 0:  # Twice a step; evaluations ask a little, too.
            arrays = sum(x.nbytes for x in jax.live_arrays()) / 1e6
            rows.append((asked // 2, resident_mb(), arrays, threading.active_count()))
        asked += 1
        return False

    loop.train(config, arguments.workdir, stop_requested=sample)
    print(f"{'step':>8} {'host MB':>9} {'arrays MB':>10} {'threads':>8}")
    for step, host, arrays, threads in rows:
        print(f"{step:>8,} {host:>9.1f} {arrays:>10.2f} {threads:>8}")
    files = [path for path in arguments.workdir.rglob("*") if path.is_file()]
    print(f"{len(files)} files, {sum(path.stat().st_size for path in files) / 1e6:.1f} MB")
    for path in sorted(arguments.workdir.iterdir()):
        held = [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]
        size = sum(p.stat().st_size for p in held)
        print(f"  {path.name:<16} {len(held):>4} files {size / 1e6:>8.2f} MB")


if __name__ == "__main__":
    main()
