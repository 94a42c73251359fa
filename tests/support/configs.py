"""Configs with other values."""

from ml_collections import ConfigDict


def changed(config, **changes) -> ConfigDict:
    """A copy with other values, of any type, or new keys; a__b stands for a.b."""
    values = config.to_dict()
    for name, value in changes.items():
        *groups, key = name.split("__")
        inner = values
        for group in groups:
            inner = inner[group]
        inner[key] = value
    return ConfigDict(values)


def with_key(config, key: str, value) -> ConfigDict:
    return changed(config, **{key.replace(".", "__"): value})
