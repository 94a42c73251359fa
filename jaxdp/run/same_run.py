"""Whether a workdir holds the run that a config asks for."""

from ml_collections import ConfigDict

from jaxdp.common import config as configs
from jaxdp.common.choices import LEVELS
from jaxdp.common.errors import ConfigError, shown
from jaxdp.sync.method import Sync
from jaxdp.sync.methods import METHODS


def check(config: ConfigDict, saved: ConfigDict) -> None:
    """Refuses to resume a run whose config.json (`saved`) differs in keys that must not change.

    Raises:
      ConfigError: names the keys that differ where they must not.
    """
    new, old = configs.flatten(config), configs.flatten(saved)
    differing = [
        f"{key}={new.get(key)!r} (was {shown(old.get(key))})"
        for key in sorted(configs.identity(new | old))
        if key not in configs.NOT_IDENTITY and new.get(key) != old.get(key)
    ]
    # What compressed sums have lost is in the state.
    dtypes = [flat.get("sync.dtype", "float32") for flat in (new, old)]
    compressed = [str(dtype) in LEVELS for dtype in dtypes]
    if compressed[0] != compressed[1]:
        differing.append(f"sync.dtype={dtypes[0]!r} (was {shown(dtypes[1])})")
    # Devices have parameters of their own only with fragments or a delay, and what compressed sums
    # have lost is in as many parts as there are fragments.
    streams = [(flat.get("sync.fragments", 1), flat.get("sync.delay", 0)) for flat in (new, old)]
    if streams[0][0] != streams[1][0]:
        differing.append(f"sync.fragments={streams[0][0]!r} (was {shown(streams[1][0])})")
    elif streams[0][0] == 1 and bool(streams[0][1]) != bool(streams[1][1]):
        differing.append(f"sync.delay={streams[0][1]!r} (was {shown(streams[1][1])})")
    # No other method can go on from the state of a method with an outer optimizer, or from what
    # compressed sums have lost.
    names = [flat.get("sync.method", "gradient_mean") for flat in (new, old)]
    own = any(METHODS.get(str(name), Sync).has_outer for name in names)
    if names[0] != names[1] and (own or all(compressed)):
        differing.append(f"sync.method={names[0]!r} (was {shown(names[1])})")
    # An EMA must cover a run from its beginning to its end.
    decays = [flat.get("ema.decay", 0.0) for flat in (new, old)]
    if bool(decays[0]) != bool(decays[1]):
        differing.append(f"ema.decay={decays[0]!r} (was {shown(decays[1])})")
    # Without momentum, SGD has no state.
    rates = [flat.get("optimizer.b1", 0.9) for flat in (new, old)]
    if new.get("optimizer.name") == "sgd" and bool(rates[0]) != bool(rates[1]):
        differing.append(f"optimizer.b1={rates[0]!r} (was {shown(rates[1])})")
    if differing:
        raise ConfigError(
            f"this workdir holds a different run: {', '.join(differing)}; "
            "use the old values, or another --workdir"
        )
