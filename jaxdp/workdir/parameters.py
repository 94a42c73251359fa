"""Reading only the parameters of a checkpoint, for use outside of training."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from jaxdp.common.errors import ConfigError, RunError
from jaxdp.common.files import first_line
from jaxdp.workdir import integrity
from jaxdp.workdir.checkpoints import folder_of
from jaxdp.workdir.reading import ending_reads, is_damage, patiently


def load_params(
    workdir: Path,
    params: Any,
    expected: dict[str, Any] | None = None,
    report: Callable[[str], None] = print,
    *,
    which: str = "newest",
    check: Callable[[int, dict], Any] = lambda step, extra: None,
) -> tuple[Any, int]:
    """Reads only a checkpoint's parameters, or their EMA if it has one, to one device.

    Args:
      workdir: the folder of a run.
      params: a pytree of arrays, or of their shapes and dtypes.
      expected: {key: value} that the JSON saved with them must hold, unless it lacks the key.
      report: called with a line of text about a damaged checkpoint.
      which: "newest" that is intact, "best" by validation loss, or a number of steps.
      check: called with (step, JSON saved with it); raises ConfigError if it is of another run.

    Returns:
      The parameters, and their step.

    Raises:
      ConfigError: there is no such checkpoint, or it is of another model or tokenizer.
      RunError: the checkpoint, or all of them if `which` is "newest", are damaged; or can't be
        read for another reason.
    """
    folder = folder_of(workdir)
    if not folder.is_dir():
        raise ConfigError(f"{folder} does not exist: give the --workdir of a training run")
    steps = patiently(lambda: integrity.steps_of(folder), str(folder), report)
    if not steps:
        raise ConfigError(f"{folder} holds no checkpoint: train first, with the same --workdir")
    if which != "newest":
        steps = [integrity.step_of(folder, steps, which)]
    other, damage = None, []
    for step in steps:
        read = functools.partial(_read_params, folder / str(step), params)
        try:
            found, extra = patiently(read, f"checkpoint {step}", report)
            check(step, extra)
        except ConfigError:
            raise
        except Exception as error:  # Orbax and TensorStore raise whatever they like.
            if not is_damage(error):
                raise
            if not (folder / str(step)).is_dir():  # A run under way has just removed it.
                return load_params(workdir, params, expected, report, which=which, check=check)
            other = error if isinstance(error, integrity.OtherModelError) else other
            damage.append(f"Checkpoint {step} is damaged ({first_line(error)}).")
            continue
        for key, value in (expected or {}).items():
            if extra.get(key, value) != value:
                raise ConfigError(
                    f"{workdir}: the {key} is not the one that checkpoint {step} was trained "
                    f"with: restore {key}.json from a copy"
                )
        for line in damage:
            report(f"{line} Checkpoint {step} is used instead.")
        return found, step
    if other is not None:
        raise ConfigError(
            f"{workdir} holds the files of different runs ({other}): restore config.json and "
            "tokenizer.json from a copy"
        )
    if which != "newest":
        raise RunError(f"{damage[0]} Restore it from a copy, or choose another: see {folder}")
    raise integrity.all_damaged(folder, steps)


def _read_params(folder: Path, params: Any) -> tuple[Any, dict]:
    """Reads parameters, or their EMA, and the JSON; if they are damaged, raises any exception."""
    extra = integrity.read_extra(folder)
    name = "ema" if integrity.has_field(extra, "ema") else "params"
    integrity.check_arrays(folder, {"params": params}, extra, "params/")
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    target = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), {name: params}
    )
    restore = ocp.args.PyTreeRestore(
        target,
        restore_args=ocp.checkpoint_utils.construct_restore_args(target),
        partial_restore=True,
    )
    reader = ocp.Checkpointer(ocp.CompositeCheckpointHandler())
    with ending_reads(), reader as checkpointer:
        state = checkpointer.restore(folder, args=ocp.args.Composite(state=restore)).state
    integrity.check_fingerprints({name: state[name]}, extra[integrity.FINGERPRINTS])
    return state[name], extra
