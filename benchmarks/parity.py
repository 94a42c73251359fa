"""Compares validation loss with nanoGPT's: its character model for CPUs, the same recipe.

    python benchmarks/parity.py --nanogpt=nanoGPT --torch_python=torch-venv/bin/python \
        --config.data.path=tinyshakespeare.txt

nanoGPT trains as its README says: 2,000 steps of 12 x 64 tokens, AdamW, cosine from 1e-3 to 1e-4.
jaxdp uses the same learning rate. It trains in its own order of the data and, by
`random_windows.py`, on windows at random places, as nanoGPT does. All are evaluated on the full
validation split, in consecutive windows of the context's length; nanoGPT itself estimates its loss
on random windows.
"""

import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import nanogpt_copy
from absl import flags
from ml_collections import config_flags

from jaxdp.common import cli
from jaxdp.configs import shakespeare_char_cpu
from jaxdp.workdir.metrics import last_loss

CONFIG = config_flags.DEFINE_config_dict("config", shakespeare_char_cpu.get_config())
NANOGPT = flags.DEFINE_string("nanogpt", None, "A checkout of nanoGPT; it is not changed.")
TORCH_PYTHON = flags.DEFINE_string("torch_python", None, "A Python that has PyTorch.")
SEEDS = flags.DEFINE_integer("seeds", 3, "Number of seeds: 0, 1, ...")
LEARNING_RATE = 1e-3

EVALUATE = """
import numpy as np, torch
from model import GPT, GPTConfig
saved = torch.load("out-shakespeare-char/ckpt.pt", weights_only=False)
model = GPT(GPTConfig(**saved["model_args"]))
model.load_state_dict(saved["model"])
model.eval()
tokens = np.fromfile("data/shakespeare_char/val.bin", np.uint16).astype(np.int64)
size, total = model.config.block_size, 0.0
with torch.no_grad():
    for begin in range(0, len(tokens) - 1, size):
        part = torch.from_numpy(tokens[begin : begin + size + 1])[None]
        total += model(part[:, :-1], part[:, 1:])[1].item() * (part.numel() - 1)
print("loss", total / (len(tokens) - 1))
"""


def ours(folder: Path, seed: int, train: tuple[str, ...] = ("-m", "jaxdp.train")) -> float:
    """Trains with jaxdp's command; returns the validation loss, nats per token."""
    given = [x for x in sys.argv[1:] if x.startswith("--config.")]
    changes = (f"--config.seed={seed}", f"--config.optimizer.learning_rate={LEARNING_RATE}")
    config = "--config=" + shakespeare_char_cpu.__file__
    workdir = folder / f"{Path(train[-1]).stem}{seed}"
    command = (sys.executable, *train, config, f"--workdir={workdir}", *given, *changes)
    subprocess.run(command, stdout=sys.stderr, check=True)
    return last_loss(workdir)


def at_random_places(folder: Path, seed: int) -> float:
    """Trains with `random_windows.py`; returns the validation loss, nats per token."""
    return ours(folder, seed, (str(Path(__file__).with_name("random_windows.py")),))


def theirs(folder: Path, seed: int) -> float:
    """Trains with nanoGPT's train.py; returns the validation loss, nats per token."""
    config, copy = CONFIG.value, folder / f"nanoGPT{seed}"
    arguments = nanogpt_copy.make(NANOGPT.value, copy, config)
    script = copy / "train.py"
    text = script.read_text()
    assert "manual_seed(1337" in text
    script.write_text(text.replace("manual_seed(1337", f"manual_seed({1337 + seed}"))
    steps = config.num_train_steps
    # It evaluates and saves once, at the end.
    settings = {
        "compile": False,
        "max_iters": steps,
        "lr_decay_iters": steps,
        "eval_interval": steps,
        "eval_iters": 20,
        "log_interval": 100,
        "always_save_checkpoint": True,
        "learning_rate": LEARNING_RATE,
    }
    train = [TORCH_PYTHON.value, *arguments, *(f"--{k}={v}" for k, v in settings.items())]
    subprocess.run(train, cwd=copy, stdout=sys.stderr, check=True)
    found = subprocess.run(
        [TORCH_PYTHON.value, "-c", EVALUATE],
        cwd=copy,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return float(found.stdout.split()[-1])


def main() -> int:
    """Trains all with each seed, and prints a table."""
    programs = {
        "jaxdp": ours,
        "jaxdp, windows at random places": at_random_places,
        "nanoGPT": theirs,
    }
    with tempfile.TemporaryDirectory() as name:
        found = {
            title: [train(Path(name), seed) for seed in range(SEEDS.value)]
            for title, train in programs.items()
        }
    seeds = [f"seed {seed}" for seed in range(SEEDS.value)]
    print(f"| | {' | '.join(seeds)} | mean |\n|---{'|---' * len(seeds)}|---|")
    for title, losses in found.items():
        cells = [f"{loss:.4f}" for loss in [*losses, statistics.mean(losses)]]
        print(f"| {title} | {' | '.join(cells)} |")
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main, cli.check_overrides))
