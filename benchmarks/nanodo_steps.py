"""nanodo's step, timed on demand; `nanogpt.py` starts this with a Python that can run nanodo.

Takes one JSON argument: nanodo (its checkout), tokens (a file of uint16), devices, and the settings
of `steps.peer_settings`. `turns.serve` describes what it prints. nanodo's own `Trainer` does the
step and fetches metrics a step behind, in float32 and without its internal metrics. Batches are cut
from an array in memory. nanodo has no dropout.
"""

import json
import sys

import jax
import numpy as np
import turns

settings = json.loads(sys.argv[1])
jax.config.update("jax_num_cpu_devices", settings["devices"])
sys.path.insert(0, settings["nanodo"])
from jax.sharding import Mesh  # noqa: E402
from nanodo import model_factory, train  # noqa: E402
from nanodo.configs import default  # noqa: E402


def config():
    """Returns nanodo's config for the same model and optimizer as the other contestants."""
    c, model = default.get_config(), settings["model"]
    c.batch_size = settings["batch_size"]
    c.model.update({"D": model["n_embd"], "H": model["n_head"], "L": model["block_size"]})
    c.model.update({"N": model["n_layer"], "F": 4 * model["n_embd"], "dtype": "float32"})
    c.opt.peak_learning_rate = settings["learning_rate"]
    c.opt.weight_decay = settings["weight_decay"]
    c.opt.clip_by_global_norm = settings["grad_clip"]
    c.log_internal_metrics = False
    return c


def main():
    """Trains as many steps as each line of stdin says."""
    c, draw = config(), np.random.default_rng(0)
    tokens = (
        np.fromfile(settings["tokens"], np.uint16).astype(np.int32) + 1
    )  # nanodo's padding is 0.
    model, get_loss = model_factory.get_model_and_loss(c, settings["model"]["vocab_size"] + 1)
    mesh = Mesh(np.array(jax.devices()), ("data",))
    shardings, state = train._init_train_state(c, model, rng=jax.random.PRNGKey(0), mesh=mesh)
    trainer, done = train.Trainer(c, state, mesh, shardings, get_loss), 0

    def batch():
        starts = draw.integers(len(tokens) - c.model.L, size=c.batch_size)
        return tokens[starts[:, None] + np.arange(c.model.L)]

    def step():
        nonlocal done
        metrics, done = trainer.do_step(done, batch()), done + 1
        return metrics

    with mesh:
        turns.serve(turns.a_step_behind(step, jax.device_get))


turns.run(main)
