"""Compares the loss of every step with nanoGPT's, from the same weights on the same batches.

    python benchmarks/same_steps.py --nanogpt=nanoGPT --torch_python=torch-venv/bin/python \
        --config.data.path=tinyshakespeare.txt --config.optimizer.learning_rate=1e-3

Trains nanoGPT's character model for CPUs in float32, with its own model and optimizer in PyTorch
and with our step. Only rounding differs. The difference grows from step to step, and faster at
higher learning rates.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags
from ml_collections import ConfigDict, config_flags
from steps import peer_settings

from jaxdp.common import cli
from jaxdp.configs import shakespeare_char_cpu
from jaxdp.data.cache import open_cache
from jaxdp.parallel.replicas import Replicas
from jaxdp.step.optimizer import get_schedule
from jaxdp.step.program import Program
from jaxdp.step.setup import make_setup
from jaxdp.step.state import create_state

CONFIG = config_flags.DEFINE_config_dict("config", shakespeare_char_cpu.get_config())
NANOGPT = flags.DEFINE_string("nanogpt", None, "A checkout of nanoGPT; it is not changed.")
TORCH_PYTHON = flags.DEFINE_string("torch_python", None, "A Python that has PyTorch.")
STEPS = flags.DEFINE_integer("steps", 300, "Number of steps.")

THEIRS = """
import json, sys, numpy as np, torch
from model import GPT, GPTConfig
folder, model, decay, betas, clip = json.loads(sys.argv[1])
given = np.load(folder + "/given.npz")
torch.manual_seed(1337)
model, losses = GPT(GPTConfig(**model)), []
np.savez(folder + "/weights.npz", **{k: v.numpy() for k, v in model.state_dict().items()})
optimizer = model.configure_optimizers(decay, 0.0, betas, "cpu")
for rate, inputs, targets in zip(given["rates"], given["inputs"], given["targets"]):
    for group in optimizer.param_groups:
        group["lr"] = float(rate)
    loss = model(torch.from_numpy(inputs), torch.from_numpy(targets))[1]
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    losses.append(loss.item())
np.save(folder + "/losses.npy", losses)
"""


def as_ours(weights: dict[str, np.ndarray], config: ConfigDict) -> dict[str, Any]:
    """Renames nanoGPT's weights to ours, and transposes its matrices, which are [out, in]."""
    width, heads = config.model.embed_dim, config.model.num_heads
    split = (heads, width // heads)

    def scale(name):
        return {"scale": weights[f"{name}.weight"]}

    def kernel(matrix, shape):
        return {"kernel": matrix.T.reshape(shape)}

    params = {
        "embed": {"embedding": weights["transformer.wte.weight"]},
        "position_embed": {"embedding": weights["transformer.wpe.weight"]},
        "final_norm": scale("transformer.ln_f"),
    }
    for layer in range(config.model.num_layers):
        name = f"transformer.h.{layer}"
        three = np.split(weights[f"{name}.attn.c_attn.weight"], 3)
        attention = {
            part: kernel(matrix, (width, *split))
            for part, matrix in zip(("query", "key", "value"), three, strict=True)
        }
        attention["out"] = kernel(weights[f"{name}.attn.c_proj.weight"], (*split, width))
        params[f"layer_{layer}"] = {
            "attention_norm": scale(f"{name}.ln_1"),
            "attention": attention,
            "mlp_norm": scale(f"{name}.ln_2"),
            "mlp": {
                "up": kernel(weights[f"{name}.mlp.c_fc.weight"], (width, -1)),
                "down": kernel(weights[f"{name}.mlp.c_proj.weight"], (-1, width)),
            },
        }
    return params


def ours(config: ConfigDict, vocab_size: int, params: Any, batches: list) -> list[float]:
    """Trains on the batches with our step; returns the loss of each step."""
    replicas = Replicas()
    setup = make_setup(config, vocab_size, replicas.device_count)
    program = Program(setup, replicas)
    state = create_state(setup, replicas, lambda: params)
    losses = []
    for step, batch in enumerate(batches):
        state, metrics = program(step, state, replicas.shard_steps([batch]))
        losses.append(float(jax.device_get(metrics["loss"])[0]))
    return losses


def main() -> int:
    """Trains both, and prints a table."""
    config = CONFIG.value
    cache, rng = open_cache(config), np.random.default_rng(0)
    shape = (STEPS.value, config.global_batch_size)
    begins = rng.integers(0, len(cache.train) - config.seq_len, shape)
    windows = np.asarray(cache.train)[begins[..., None] + np.arange(config.seq_len + 1)]
    rates = [float(get_schedule(config)(step)) for step in range(STEPS.value)]
    whole = {"inputs": windows[..., :-1], "targets": windows[..., 1:]}
    with tempfile.TemporaryDirectory() as folder:
        given = {name: x.astype(np.int64) for name, x in whole.items()}
        np.savez(Path(folder) / "given.npz", rates=rates, **given)
        settings = peer_settings(config, cache.vocab_size)
        c = config.optimizer
        text = json.dumps([folder, settings["model"], c.weight_decay, [c.b1, c.b2], c.clip_norm])
        train = [TORCH_PYTHON.value, "-c", THEIRS, text]
        subprocess.run(train, cwd=NANOGPT.value, stdout=sys.stderr, check=True)
        theirs = np.load(Path(folder) / "losses.npy")
        params = as_ours(dict(np.load(Path(folder) / "weights.npz")), config)
    rest = {name: np.zeros(config.global_batch_size, np.float32) for name in ("busy",)}
    rest["weights"] = np.ones((config.global_batch_size, config.seq_len), np.float32)
    batches = [
        rest | {name: x[step].astype(np.int32) for name, x in whole.items()}
        for step in range(STEPS.value)
    ]
    found = np.array(ours(config, cache.vocab_size, params, batches))
    print("| step | nanoGPT | jaxdp | difference |\n|---|---|---|---|")
    for step in np.unique(np.geomspace(1, STEPS.value, 9).astype(int)):
        a, b = theirs[step - 1], found[step - 1]
        print(f"| {step} | {a:.6f} | {b:.6f} | {b - a:+.6f} |")
    print(f"\nThe largest difference: {np.abs(found - theirs).max():.6f}")
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main, cli.check_overrides))
