"""What contestants train: the step of a real run, and nanoGPT's settings for the same model."""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import turns
from ml_collections import ConfigDict

from jaxdp.data.batch import with_process
from jaxdp.parallel.replicas import Replicas, prefetch
from jaxdp.step.program import Program
from jaxdp.step.setup import make_setup
from jaxdp.step.state import create_state


def trainer(
    config: ConfigDict, vocab_size: int, replicas: Replicas, batches: Iterable[dict[str, Any]]
) -> Callable[[int], None]:
    """Returns a function that trains `count` steps, and fetches metrics one step behind.

    Args:
      config: a config with at least as many steps as will be trained.
      vocab_size: vocabulary size of the tokenizer.
      replicas: the devices.
      batches: training batches, as from `pipeline.train_batches`.
    """
    setup = make_setup(config, vocab_size, replicas.device_count)
    program, state = Program(setup, replicas), create_state(setup, replicas)
    hosts = ([with_process(batch, busy=0.0)] for batch in batches)
    rounds, done = prefetch(hosts, replicas.shard_steps), 0

    def step() -> Any:
        nonlocal state, done
        state, metrics = program(done, state, next(rounds))
        done += 1
        return metrics

    return turns.a_step_behind(step, jax.device_get)


def peer_settings(config: ConfigDict, vocab_size: int) -> dict[str, Any]:
    """Returns the settings of nanogpt_steps.py, without nanogpt, tokens, device and compile."""
    return {
        "batch_size": config.global_batch_size,
        "learning_rate": config.optimizer.learning_rate,
        "weight_decay": config.optimizer.weight_decay,
        "betas": [config.optimizer.b1, config.optimizer.b2],
        "grad_clip": config.optimizer.clip_norm,
        "model": {
            "block_size": config.seq_len,
            "vocab_size": vocab_size,
            "n_layer": config.model.num_layers,
            "n_head": config.model.num_heads,
            "n_embd": config.model.embed_dim,
            "dropout": config.model.dropout,
            "bias": config.model.bias,
        },
    }
