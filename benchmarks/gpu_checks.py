"""Checks that fast code gives right results on a GPU; `gpu.py` ends if it doesn't."""

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
from gpu_models import MODELS, REHEARSE, environment, model_config

from jaxdp.model import attention
from jaxdp.workdir.metrics import read_jsonl


def attention_errors() -> dict[str, float]:
    """Returns, by model, the largest relative error of bfloat16 attention and its gradients."""
    found = {}
    for name, (keys, batches) in MODELS.items():
        config = model_config(keys, batches[0])
        heads, length = config.model.num_heads, config.seq_len
        shape = (batches[0], length, heads, config.model.embed_dim // heads)
        exact = [jax.random.normal(key, shape) for key in jax.random.split(jax.random.key(0), 4)]
        rounded = [x.astype("bfloat16") for x in exact]
        kernel = attention.kernel("bfloat16", shape[-1], masked=False)
        with jax.default_matmul_precision("highest"):  # Else a GPU may use TF32 for float32.
            expected = attended(*[x.astype("float32") for x in rounded])
        pairs = zip(attended(*rounded), expected, strict=True)
        errors = (np.linalg.norm(a - b) / np.linalg.norm(b) for a, b in pairs)
        found[f"{name} ({kernel})"] = float(max(errors))
    return found


@jax.jit
def _attended(query, key, value, weights):
    def loss(query, key, value):
        out = attention.attend(query, key, value, causal=True)
        return (out * weights).astype("float32").sum(), out

    (_, out), gradients = jax.value_and_grad(loss, (0, 1, 2), has_aux=True)(query, key, value)
    return out, *gradients


def attended(*arrays: jax.Array) -> list[np.ndarray]:
    """Computes attention, and the gradients of a weighted sum of it, as float32."""
    return [np.asarray(x, np.float32) for x in _attended(*arrays)]


def attention_rows(errors: dict[str, float]) -> Iterator[str]:
    """Yields a table of errors; ends the benchmark if one exceeds the rounding to bfloat16."""
    yield "\n## Attention in bfloat16 against XLA's in float32\n"
    yield "| model (kernel) | largest relative error of results and gradients |\n|---|---|"
    for name, error in errors.items():
        yield f"| {name} | {error:.4f} |"
        if not error < 0.02:  # bfloat16 rounds to 2^-9; a few such errors add up.
            raise SystemExit(f"attention is wrong: {name}, relative error {error}")


def loss_rows() -> Iterator[str]:
    """Yields a table of losses in float32 and bfloat16; ends the benchmark if they differ."""
    count = 60 if REHEARSE.value else 400
    keys = [f"--config.num_train_steps={count}", f"--config.eval_every={count}"]
    keys += [f"--config.log_every={count // 20}", f"--config.checkpoint.every={count}"]
    if REHEARSE.value:
        keys += [f"--config.data.path={__file__}", "--config.tokenizer=char"]
        keys += ["--config.model.num_layers=1", "--config.model.embed_dim=16"]
        keys += ["--config.seq_len=16", "--config.sample.num_tokens=0"]
    curves = []
    for dtype in ("float32", "bfloat16"):
        with tempfile.TemporaryDirectory() as folder:
            arguments = [f"--workdir={folder}/run", f"--config.model.dtype={dtype}", *keys]
            arguments += [f"--config.data.cache_dir={folder}/tokens"]
            config = str(Path(__file__).parent.parent / "configs/quickstart.py")
            ours = [sys.executable, "-m", "jaxdp.train", f"--config={config}", *arguments]
            subprocess.run(ours, check=True, stdout=sys.stderr, env=environment())
            records = read_jsonl(Path(folder) / "run")
            curves.append({r["step"]: r["train/loss"] for r in records if "train/loss" in r})
    yield "\n## Losses of the quickstart\n"
    yield "| step | float32 | bfloat16 |\n|---|---|---|"
    for step in list(curves[0])[:: max(1, len(curves[0]) // 8)]:
        yield f"| {step} | {curves[0][step]:.4f} | {curves[1][step]:.4f} |"
    ends = [np.mean(list(curve.values())[-5:]) for curve in curves]
    if not abs(ends[1] - ends[0]) < 0.05:
        raise SystemExit(f"losses differ: float32 {ends[0]:.3f}, bfloat16 {ends[1]:.3f}")
