"""The training step: one optimizer step, or a round of several, as a pure function.

Shapes: N devices, b sequences per device, L length.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax

from jaxdp.model.target import target
from jaxdp.parallel.replicas import AXIS
from jaxdp.step.ema import updated
from jaxdp.step.objective import Batch, Objective
from jaxdp.step.setup import Setup
from jaxdp.step.state import State
from jaxdp.sync import reductions
from jaxdp.sync.method import Sync


def step_of(setup: Setup, method: Sync | None = None) -> Callable:
    """Returns the training step of a setup, (state, batch) -> (state, metrics); see `train_step`.

    Args:
      setup: the run's setup.
      method: the sync method, if not the setup's own.
    """
    return functools.partial(
        train_step,
        method=method or setup.method,
        schedule=setup.schedule,
        objective=setup.objective,
        clip_norm=setup.config.optimizer.clip_norm,
    )


def train_step(
    state: State,
    batch: Batch,
    *,
    method: Sync,
    schedule: optax.Schedule,
    objective: Objective,
    clip_norm: float = 0.0,
) -> tuple[State, dict[str, jax.Array]]:
    """Runs one optimizer step, or a round of several; call it under an axis named 'batch'.

    Loss and gradient are weighted means over all tokens in the global batch. Random numbers depend
    only on seed, step and the sequence's number in the global batch. So neither depends on the
    number of devices and micro-batches.

    Args:
      state: equal on all devices, except for `state.per_device_fields`.
      batch: this device's inputs and targets [steps, b, L] int32, weights [steps, b, L] float32;
        segments and positions [steps, b, L] int32 where documents are kept apart; busy [steps, b]
        float32: for how many seconds this process was busy with its last step.
      method: the sync method.
      schedule: step -> learning rate, for the metrics only.
      objective: the loss to differentiate.
      clip_norm: gradients with a larger norm are scaled down to it; 0: no clipping.

    Returns:
      The new state, and float32 metrics of each step. [steps]: loss (nats per token), grad_norm
      (before clipping; a mean over devices where each has its own), learning_rate, skipped (0 where
      the update was made; more where loss or gradient were not finite, so that parameters and
      moments stayed unchanged), and drift where replicas train alone. [steps, N], by device: tokens
      (without padding) and busy.
    """

    def step(state, batch):
        (loss, weight), sums = objective.gradient_sums(state, batch, method.accumulate)
        figures = {
            "loss": loss,
            "tokens": reductions.per_device(weight, AXIS),
            "busy": reductions.per_device(batch["busy"].max(), AXIS),
        }
        grads, figures, residual = method.mean(sums, figures, state.residual)
        figures["grad_norm"] = method.norm(grads)
        if clip_norm:
            grads = clip(grads, figures["grad_norm"], clip_norm)
        figures["learning_rate"] = jnp.asarray(schedule(state.step), jnp.float32)
        # An update that isn't finite would spoil the parameters for good, so it is skipped.
        good = jnp.isfinite(figures["loss"]) & jnp.isfinite(figures["grad_norm"])
        figures["skipped"] = jnp.where(good, 0.0, 1.0)
        updated = method.update(state.replace(residual=residual), grads)
        skipped = at_step(state, state.step + 1)
        return _choose(good, updated, skipped), figures

    steps, ema, state = len(batch["inputs"]), state.ema, state.replace(ema=())
    after, parts, sent, done = method.begin(state), [], (), 0
    for number, count in enumerate(stretches(steps, method)):
        sent = method.exchange(number, state, after, sent) if number else ()
        if count:
            part = jax.tree.map(lambda x, i=done, n=count: x[i : i + n], batch)
            found = _repeat(step, after, part)
            if number:  # Nothing reads what is under way before these steps are made.
                sent, found = lax.optimization_barrier((sent, found))
            after, of_part = found
            parts.append(of_part)
        done += count
    figures = jax.tree.map(lambda *xs: jnp.concatenate(xs), *parts)
    rates = figures.pop("learning_rate")
    after, figures = method.synchronise(state, after, figures, sent)
    if method.ema_decay:
        part = method.ema_slice(after.params)
        after = after.replace(ema=updated(ema, part, method.ema_decay, state.step, steps))
    figures["loss"] /= jnp.maximum(figures["tokens"].sum(1), 1)
    return after, figures | {"learning_rate": rates}


def stretches(steps: int, method: Sync) -> list[int]:
    """Cuts a round into the steps before the first exchange of a method, and those beside each.

    Examples:
      >>> from jaxdp.configs import default
      >>> config = default.get_config()
      >>> stretches(10, Sync(config, AXIS))
      [10]
    """
    delay, count = min(method.delay, steps - 1), method.exchanges
    return [steps - delay, *(delay // count + (i < delay % count) for i in range(count))]


def _repeat(step: Callable, state: State, batch: Batch) -> tuple[State, dict[str, jax.Array]]:
    """Makes a step with each batch [steps, ...]; returns the state, and figures [steps, ...]."""
    if len(batch["inputs"]) > 1:
        return lax.scan(step, state, batch)
    state, figures = step(state, jax.tree.map(lambda x: x[0], batch))
    return state, jax.tree.map(lambda x: x[None], figures)


def _choose(first: jax.Array, one: State, other: State) -> State:
    """Picks `one` if `first`, else `other`; `one` was computed from `other` and reuses its memory.

    The new parameters are computed from the old moments, so they have to come before the new
    moments overwrite the old ones. For GPUs, XLA makes one kernel of both, and copies only the
    moments of Muon's matrices (0.4% of what a step moves). For CPUs it would copy all moments
    instead of waiting, unless they depend on the new parameters. A harmless dependency is made
    there: on whether one of the parameters' first elements is NaN.
    """

    def pick(first, one, other):
        return jax.tree.map(lambda x, y: jnp.where(first, x, y), one, other)

    if target().platform == "gpu":
        return pick(first, one, other)
    params = pick(first, one.params, other.params)
    sample = sum(x[(0,) * x.ndim] for x in jax.tree.leaves(params))
    return pick(first | jnp.isnan(sample), one, other).replace(params=params)


def at_step(state: State, step: Any) -> State:
    """Moves a state to another step of the run and of the schedule.

    Parameters and moments stay, and so does the count of updates for Adam's bias correction.
    """

    def of_schedule(path, _):
        return path[-1].tuple_name == "ScaleByScheduleState"

    opt_state = optax.tree.set(state.opt_state, of_schedule, count=step)
    return state.replace(step=step, opt_state=opt_state)


def clip(grads: Any, norm: jax.Array, limit: float) -> Any:
    """Scales a gradient with this norm down to the norm `limit`, if it is larger."""
    scale = limit / jnp.maximum(norm, limit)
    return jax.tree.map(lambda x: x * scale, grads)
