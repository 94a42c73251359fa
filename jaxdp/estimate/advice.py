"""Which way to synchronise some devices over some links: what changes the results least."""

from typing import Any, NamedTuple

from ml_collections import ConfigDict

from jaxdp.common.terminal import in_bytes
from jaxdp.estimate import scaling
from jaxdp.estimate.scaling import Network
from jaxdp.sync import methods
from jaxdp.sync.traffic import sent_per_step

# What to try, the smallest change of the results first: the mean gradient, the same rounded, and
# replicas that train alone for some steps, whose means are rounded. The momentum is the best that
# was measured for as many steps (docs/synchronisation.md).
WAYS: tuple[dict[str, Any], ...] = (
    {"method": "gradient_mean", "dtype": "float32"},
    {"method": "gradient_mean", "dtype": "int8"},
    {"method": "gradient_mean", "dtype": "int4"},
    {"method": "diloco", "every": 3, "dtype": "int4", "outer_momentum": 0.3},
    {"method": "diloco", "every": 6, "dtype": "ternary", "outer_momentum": 0.3},
    {"method": "diloco", "every": 27, "dtype": "int2", "outer_momentum": 0.7},
    {"method": "diloco", "every": 250, "dtype": "int2", "outer_momentum": 0.7},
)
OFF = {"islands": 0, "fragments": 1, "delay": 0, "after": 0}  # Unless a way has them.
ENOUGH = 0.9  # The share of the time in which devices should compute.


class Way(NamedTuple):
    """A way to synchronise.

    Attributes:
      keys: {key of sync: value}.
      others: {key: value} of what else has to change: keys of sync that don't go with these, and
        intervals, to multiples of sync.every.
      efficiency: compute / (compute + communication).
      sent: bytes that a device sends to other islands, or to all devices, per optimizer step.
    """

    keys: dict[str, Any]
    others: dict[str, int]
    efficiency: float
    sent: float

    @property
    def flags(self) -> str:
        """The keys as flags of a command."""
        keys = {f"sync.{key}": value for key, value in self.keys.items()} | self.others
        return " ".join(f"--config.{key}={value}" for key, value in keys.items())


def ways(
    config: ConfigDict, vocab: int, devices: int, hosts: int, rate: float, network: Network
) -> list[Way]:
    """Predicts the efficiency of each of WAYS.

    Args:
      config: a valid config; its keys of sync are replaced.
      vocab: vocabulary size.
      devices: devices that share config.global_batch_size.
      hosts: machines that they are in; an island each, if there are several devices in each.
      rate: FLOP/s of a device.
      network: the devices' links.
    """
    compute = scaling.compute_seconds(config, vocab, devices, rate)
    params, opt_state = scaling.shapes(config, vocab)
    found = []
    for way in WAYS:
        keys = dict(way)
        if way["method"] == "diloco" and 1 < hosts < devices:
            keys["islands"] = hosts
        off = {key: x for key, x in OFF.items() if key not in keys}
        other = config.copy_and_resolve_references()
        other.sync.update(off | keys)
        sent = methods.traffic(other, params, opt_state, devices, hosts)
        waiting = scaling.communication(sent, devices, network)
        outside = [c for c in sent if not c.inside]
        efficiency = compute / (compute + waiting)
        others = {f"sync.{key}": x for key, x in off.items() if config.sync[key] != x}
        others |= _intervals(config, way.get("every", 1))
        found.append(Way(keys, others, efficiency, sent_per_step(outside, devices)))
    return found


def _intervals(config: ConfigDict, every: int) -> dict[str, int]:
    """Returns the intervals that are no multiples of this many steps, each as the next one."""
    intervals = {"eval_every": config.eval_every, "checkpoint.every": config.checkpoint.every}
    return {key: -(-value // every) * every for key, value in intervals.items() if value % every}


def best(found: list[Way]) -> Way | None:
    """Returns the first way that is efficient enough; None if none is."""
    return next((way for way in found if way.efficiency >= ENOUGH), None)


def rows(found: list[Way]) -> dict[str, str]:
    """Returns the ways as rows of a table, and the advice as the last."""
    table = {}
    for way in found:
        every = f"every {way.keys['every']}" if "every" in way.keys else ""
        islands = "islands" * ("islands" in way.keys)
        name = ", ".join(filter(None, [way.keys["method"], every, way.keys["dtype"], islands]))
        table[name] = f"{way.efficiency:.1%}, a device sends {in_bytes(round(way.sent))} a step"
        if "islands" in way.keys:
            table[name] += " to other machines"
    chosen = best(found)
    table["advice"] = (
        f"{chosen.flags} (of those above {ENOUGH:.0%}, it changes the results least)"
        if chosen
        else f"none reaches {ENOUGH:.0%}: take a larger batch, a smaller model, or faster links"
    )
    return table
