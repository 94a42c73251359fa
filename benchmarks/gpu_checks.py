"""Checks that results in bfloat16 are right on a GPU, for `gpu.py`."""

import re
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
from gpu_models import REHEARSE, some

from jaxdp.common import cli
from jaxdp.configs import default
from jaxdp.data.batch import Batch
from jaxdp.model import attention
from jaxdp.parallel.replicas import Replicas
from jaxdp.step.setup import Setup, make_setup
from jaxdp.step.state import State, create_state

ROWS, LENGTH, VOCAB = 48, 256, 128
# Limits of relative errors. bfloat16 rounds to 2^-9, or 0.2%; a sum of rounded terms stays near
# that if it is computed in float32, and doesn't if it is computed in bfloat16.
AGAINST_FLOAT32, AGAINST_MICRO_BATCHES = 0.01, 0.005
# Groups of parameters, by pattern of their path. The biases of keys are in none: their gradient is
# zero, because the softmax ignores what is added to all scores.
GROUPS = {
    "token embedding": "^embed/",
    "position embedding": "^position_embed",
    "output layer": "^head/",
    "dense kernels": "^layer.*/kernel",
    "dense biases": "(query|value|out|up|down)/bias",
    "norms": "_norm",
}


def part() -> Iterator[str]:
    """Yields the tables of both checks."""
    cli.prepare_jax()
    yield from gradient_rows()
    yield ""
    yield from attention_rows()


def text(rows: int) -> Batch:
    """Returns a batch of real text, [rows, 256]: the README and the docs, a token for each byte."""
    root = Path(__file__).parent.parent
    files = [root / "README.md", *sorted(root.glob("docs/*.md"))]
    found = np.frombuffer(b"".join(file.read_bytes() for file in files), np.uint8)
    found = found[found < VOCAB][: rows * LENGTH + 1].astype(np.int32)
    inputs, targets = (x.reshape(rows, LENGTH) for x in (found[:-1], found[1:]))
    return {"inputs": inputs, "targets": targets, "weights": np.ones(inputs.shape, np.float32)}


def setup_of(dtype: str, tied_head: bool, rows: int) -> Setup:
    """Returns the setup of a small model with biases."""
    config = default.get_config()
    config.update({"seq_len": LENGTH, "global_batch_size": rows})
    config.model.update({"num_layers": 1 if REHEARSE.value else 2, "num_heads": 2, "embed_dim": 64})
    config.model.update({"dtype": dtype, "tied_head": tied_head, "bias": True})
    return make_setup(config, VOCAB, 1)


def gradients(setup: Setup, replicas: Replicas, state: State, parts: int) -> dict[str, np.ndarray]:
    """Computes the gradient on real text, split into micro-batches, by path of the parameters."""
    state, batch = state.replace(apply_fn=setup.model.apply), text(setup.sizes.global_)

    def of_device(state, batch):
        return setup.objective.gradients(state, batch, grad_accum_steps=parts)[0]

    # Otherwise a GPU may use TF32 for float32.
    precision = "highest" if setup.config.model.dtype == "float32" else "default"
    with jax.default_matmul_precision(precision):
        found = replicas.pmap(of_device)(state, replicas.shard(batch))
    leaves = jax.tree_util.tree_leaves_with_path(found)
    return {jax.tree_util.keystr(p, simple=True, separator="/"): np.asarray(x) for p, x in leaves}


def relative(found: np.ndarray, expected: np.ndarray) -> float:
    """Returns the norm of the difference over the norm of what is expected."""
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def gradient_rows() -> Iterator[str]:
    """Yields the errors of gradients in bfloat16 by group of parameters."""
    rows = 2 if REHEARSE.value else ROWS
    yield f"Gradients in bfloat16 on real text, {rows} sequences of {LENGTH}: the largest relative"
    yield f"error of a group's parameters. Right: at most {AGAINST_FLOAT32:.1%} against float32 and"
    yield f"{AGAINST_MICRO_BATCHES:.1%} between one micro-batch and {rows}.\n"
    yield f"| head | parameters | against float32 | 1 against {rows} micro-batches | |"
    yield "|---|---|---|---|---|"
    for tied in some((True, False)):
        precise, rounded = (setup_of(dtype, tied, rows) for dtype in ("float32", "bfloat16"))
        replicas = Replicas(jax.local_devices()[:1])
        state = create_state(precise, replicas)
        exact = gradients(precise, replicas, state, 1)
        whole, parts = (gradients(rounded, replicas, state, count) for count in (1, rows))
        for name, pattern in GROUPS.items():
            paths = [path for path in exact if re.search(pattern, path)]
            if paths:
                error = max(relative(whole[path], exact[path]) for path in paths)
                change = max(relative(whole[path], parts[path]) for path in paths)
                right = error <= AGAINST_FLOAT32 and change <= AGAINST_MICRO_BATCHES
                head, verdict = "tied" if tied else "untied", "right" if right else "**wrong**"
                yield f"| {head} | {name} | {error:.2%} | {change:.2%} | {verdict} |"


def attention_rows() -> Iterator[str]:
    """Yields the errors of attention in bfloat16 against XLA's in float32."""
    yield "Attention in bfloat16 against XLA's in float32:\n"
    yield "| heads x width, length | kernel | largest relative error of results and gradients | |"
    yield "|---|---|---|---|"
    for heads, width in some(((12, 64), (16, 128))):
        shape = (1, 64, 2, 8) if REHEARSE.value else (4, 1024, heads, width)
        keys = jax.random.split(jax.random.key(0), 4)
        rounded = [jax.random.normal(key, shape, "bfloat16") for key in keys]
        with jax.default_matmul_precision("highest"):
            expected = attended(*[x.astype("float32") for x in rounded])
        found = attended(*rounded)
        error = max(relative(a, b) for a, b in zip(found, expected, strict=True))
        kernel = attention.kernel("bfloat16", shape[-1], masked=False)
        verdict = "right" if error < AGAINST_FLOAT32 else "**wrong**"
        yield f"| {shape[2]} x {shape[3]}, {shape[1]} | {kernel} | {error:.2%} | {verdict} |"


@jax.jit
def _attended(query, key, value, weights):
    def loss(query, key, value):
        out = attention.attend(query, key, value, causal=True)
        return (out * weights).astype("float32").sum(), out

    (_, out), found = jax.value_and_grad(loss, (0, 1, 2), has_aux=True)(query, key, value)
    return out, *found


def attended(*arrays: jax.Array) -> list[np.ndarray]:
    """Computes attention, and the gradients of a weighted sum of it, as float32."""
    return [np.asarray(x, np.float32) for x in _attended(*arrays)]
