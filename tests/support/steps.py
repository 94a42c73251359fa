"""Small train steps and their batches."""

import dataclasses
import itertools

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxdp.parallel.replicas import AXIS, Replicas
from jaxdp.step.objective import Objective, plain
from jaxdp.step.program import Program
from jaxdp.step.setup import make_setup
from jaxdp.step.state import create_state

VOCAB, ROWS, LENGTH = 20, 8, 16
# Losses are near 3 and sums of 128 float32 terms differ in their last bits with the order.
LOSS_TOLERANCE = 2e-6
# Adam divides by the gradient's own size, so a parameter with a tiny gradient shows its rounding.
PARAMETER_TOLERANCE = 2e-4


def batches(steps, uneven=True):
    """Batches whose rows hold very different numbers of tokens, as padded ones do."""
    rng = np.random.default_rng(0)
    for _ in range(steps):
        tokens = rng.integers(0, VOCAB, (ROWS, LENGTH + 1), dtype=np.int32)
        lengths = rng.integers(1, LENGTH, ROWS) if uneven else np.full(ROWS, LENGTH)
        yield {
            "inputs": tokens[:, :-1],
            "targets": tokens[:, 1:],
            "weights": (np.arange(LENGTH) < lengths[:, None]).astype(np.float32),
            "busy": np.zeros(ROWS, np.float32),
        }


def start(config, devices, transform=plain, method=None):
    """A program, its devices and its first state; with another class of sync method, if given."""
    replicas = Replicas(jax.local_devices()[:devices])
    objective = Objective(config.seed, transform, config.loss_chunks)
    setup = make_setup(config, VOCAB, devices, mask_id=0)
    own = method(config, AXIS) if method else setup.method
    setup = dataclasses.replace(setup, objective=objective, method=own)
    return Program(setup, replicas), replicas, create_state(setup, replicas)


TRAINED = {}


def train(config, devices, accum=1, steps=4, transform=plain, **batch_options):
    """Figures of some steps, and the parameters after them; tests share runs that are equal."""
    config.grad_accum_steps = accum
    config.num_train_steps = max(steps, config.optimizer.warmup_steps + 1)
    data = (batches, *sorted(batch_options.items()))  # Tests replace the function.
    run = (config.to_json(sort_keys=True), devices, steps, transform, data)
    if run not in TRAINED:
        TRAINED[run] = _train(config, devices, steps, transform, batch_options)
    figures, params = TRAINED[run]
    return [dict(f) for f in figures], params


def _train(config, devices, steps, transform, batch_options):
    program, replicas, state = start(config, devices, transform)
    figures, waiting = [], batches(steps, **batch_options)
    while len(figures) < steps:
        part = list(itertools.islice(waiting, program.round_length(len(figures))))
        state, metrics = program(len(figures), state, replicas.shard_steps(part))
        metrics = jax.device_get(metrics)
        figures += [{k: v[i] for k, v in metrics.items()} for i in range(len(part))]
    return figures, jax.device_get(state.params)


def assert_same_run(one, other):
    for a, b in zip(one[0], other[0], strict=True):
        np.testing.assert_allclose(a["loss"], b["loss"], rtol=LOSS_TOLERANCE)
        np.testing.assert_allclose(a["grad_norm"], b["grad_norm"], rtol=1e-4)
        assert a["tokens"].sum() == b["tokens"].sum()
    for a, b in zip(*map(jax.tree.leaves, (one[1], other[1])), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=PARAMETER_TOLERANCE)


def choose(config, method, **keys):
    config.sync.update({"method": method, **keys})
    return config


def bits(tree):
    return b"".join(np.asarray(x).tobytes() for x in jax.tree.leaves(tree))


def corrupt(tree, path, device, replicas, change):
    """Makes a replicated tree in which one device holds a different leaf."""
    tree = replicas.replicate(tree)
    mesh = Mesh(np.array(replicas.devices), ("batch",))

    def spoil(found, leaf):
        if jax.tree_util.keystr(found, simple=True, separator="/") != path:
            return leaf
        copies = [np.array(s.data) for s in leaf.addressable_shards]
        copies[device] = change(copies[device])
        copies = [jax.device_put(c, d) for c, d in zip(copies, replicas.devices, strict=True)]
        sharding = NamedSharding(mesh, PartitionSpec())
        return jax.make_array_from_single_device_arrays(leaf.shape, sharding, copies)

    return jax.tree.map_with_path(spoil, tree)


def flip_lowest_bit(x):
    bits = x.view(np.uint32)
    bits.flat[1] ^= 1
    return x
