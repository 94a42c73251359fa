"""The learning-rate schedule and the optimizer, an optax chain."""

import jax
import optax
from ml_collections import ConfigDict

from jaxdp.step.muon import muon


def get_schedule(config: ConfigDict) -> optax.Schedule:
    """Returns step -> learning rate: a linear warm-up, then optimizer.schedule.

    Steps count from 0. Step t of a warm-up of W steps has (t + 1) / (W + 1) of the peak, step W has
    the peak, and the last step has final_fraction of it. "wsd" is warm-up, stable, decay (Hu et al.
    2024): constant, then a linear decay over the last decay_fraction of all steps.

    Examples:
      >>> from jaxdp.configs import default
      >>> schedule = get_schedule(default.get_config())
      >>> [round(float(schedule(step)), 6) for step in (0, 50, 100, 999)]
      [1e-05, 0.000505, 0.001, 0.0001]
    """
    c, steps = config.optimizer, config.num_train_steps
    peak, final = c.learning_rate, c.learning_rate * c.final_fraction
    rest = max(steps - 1 - c.warmup_steps, 1)
    if c.schedule == "cosine":
        after = optax.cosine_decay_schedule(peak, rest, c.final_fraction)
    elif c.schedule == "linear":
        after = optax.linear_schedule(peak, final, rest)
    elif c.schedule == "wsd":
        decay = min(round(steps * c.decay_fraction), rest)
        after = optax.linear_schedule(peak, final, decay, rest - decay)
    else:
        after = optax.constant_schedule(peak)
    if c.warmup_steps == 0:
        return after
    warmup = optax.linear_schedule(peak / (c.warmup_steps + 1), peak, c.warmup_steps)
    return optax.join_schedules([warmup, after], [c.warmup_steps])


def get_optimizer(config: ConfigDict, schedule: optax.Schedule) -> optax.GradientTransformation:
    """Returns the optimizer of optimizer.name, with decoupled weight decay.

    It doesn't clip: `train_step.clip` does so before, by the norm over all devices' slices.
    """
    c = config.optimizer
    decay = {"weight_decay": c.weight_decay}
    if c.name == "adamw":
        return optax.adamw(schedule, c.b1, c.b2, mask=decay_mask, **decay)
    if c.name == "lion":
        return optax.lion(schedule, c.b1, c.b2, mask=decay_mask, **decay)
    if c.name == "sgd":
        return optax.chain(
            optax.trace(c.b1, nesterov=True) if c.b1 else optax.identity(),
            optax.add_decayed_weights(c.weight_decay, decay_mask),
            optax.scale_by_learning_rate(schedule),
        )
    return muon(schedule, c.b1, c.b2, c.weight_decay, decay_mask)


def describe(config: ConfigDict) -> str:
    """Says how the learning rate runs, and what else is done to the updates.

    Examples:
      >>> from jaxdp.configs import default
      >>> describe(default.get_config())
      'adamw, 0.001 after 100 steps of warm-up, cosine to 0.0001, weight decay 0.1, clipped at 1'
    """
    c = config.optimizer
    warmup = f" after {c.warmup_steps:,} steps of warm-up" if c.warmup_steps else ""
    final = f"{c.learning_rate * c.final_fraction:.3g}"
    shape = {
        "cosine": f"cosine to {final}",
        "linear": f"linear to {final}",
        "wsd": f"constant, and linear to {final} over the last {c.decay_fraction:.0%} of the steps",
        "constant": "constant",
    }[c.schedule]
    decay = f"weight decay {c.weight_decay:g}" if c.weight_decay else "no weight decay"
    clip = f"clipped at {c.clip_norm:g}" if c.clip_norm else "not clipped"
    return f"{c.name}, {c.learning_rate:g}{warmup}, {shape}, {decay}, {clip}"


def decay_mask(params):
    """Returns True for matrices and embeddings, which decay; False for biases and norm scales."""
    return jax.tree.map_with_path(lambda path, _: path[-1].key in ("kernel", "embedding"), params)
