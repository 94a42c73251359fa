"""Evaluation sets: named texts to evaluate on besides the validation split (config.eval_sets)."""

import contextlib
import re
from collections.abc import Callable, Container, Iterator

from ml_collections import ConfigDict

from jaxdp.common.errors import ConfigError, shown
from jaxdp.data import chat, sources
from jaxdp.data.cache import TokenCache, open_cache
from jaxdp.data.feed import Feed

NAME = r"[A-Za-z0-9_.-]{1,40}"


def parse(text: str) -> dict[str, str]:
    """Parses config.eval_sets, such as "code=text:GLOB,wiki=tfds:NAME"; a path may contain commas.

    Returns:
      {name: path}.

    Raises:
      ConfigError: a set has no name or no path, or two sets have the same name.
    """
    sets: dict[str, str] = {}
    for part in re.split(rf",(?={NAME}=)", text) if text else []:
        name, equals, path = part.partition("=")
        if not equals or not path or not re.fullmatch(NAME, name):
            raise ConfigError(
                f"eval_sets={shown(text)} has {shown(part)}, which is no set: write them as "
                "NAME=PATH,NAME=PATH, with names of letters, digits, '_', '.' and '-'"
            )
        if name in sets:
            raise ConfigError(
                f"eval_sets={shown(text)} has two sets named {name!r}: give one another name"
            )
        sets[name] = path
    return sets


def check(config: ConfigDict) -> None:
    """Checks that all evaluation sets exist; raises ConfigError where one is wrong or missing."""
    for name in parse(config.eval_sets):
        with named(config, name):
            sources.get_sources(config_of(config, name))


def open_set(
    config: ConfigDict, name: str, cache: TokenCache, report: Callable[[str], None]
) -> Feed:
    """Opens an evaluation set, tokenised with the run's tokenizer into a cache of its own.

    Args:
      config: the run's config.
      name: the name of the set.
      cache: the token cache of the run's data.
      report: called with a line before anything that takes time.

    Raises:
      ConfigError: the set can't be read, or has a character that the tokenizer doesn't know.
    """
    own = config_of(config, name)
    chat.take_tokenizer(own, cache.folder)
    return Feed(own, open_cache(own, report, train=False))


@contextlib.contextmanager
def named(config: ConfigDict, name: str) -> Iterator[None]:
    """Adds the name of an evaluation set to a ConfigError raised in the block."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"eval_sets: {name}={shown(_path(config, name))}: {error}") from None


def _path(config: ConfigDict, name: str) -> str:
    return parse(config.eval_sets)[name]


def config_of(config: ConfigDict, name: str) -> ConfigDict:
    """Returns the run's config with a set as its validation split; of files, all of their text."""
    own = ConfigDict(config.to_dict())
    own.data.path, own.data.eval_fraction = _path(config, name), 1.0
    return of_kind(own)


def of_kind(config: ConfigDict, given: Container[str] = ()) -> ConfigDict:
    """Returns a config without the keys that don't concern the kind of data that data.path names.

    They are about the data of a run, which can be of another kind.

    Args:
      config: left as it is.
      given: keys such as "data.packing" that are meant for this data, and kept.
    """
    kinds = sources.kinds(config.data.path)
    drop = {} if "text" in kinds else {"separator": ""}
    if kinds == {"text"}:
        drop = {"prompt_key": "", "messages_key": ""}
        # It would leave of each file one sequence.
        if config.data.packing == "padded" and not config.data.separator:
            drop["packing"] = "stream"
    own = ConfigDict(config.to_dict())
    own.data.update({key: value for key, value in drop.items() if f"data.{key}" not in given})
    return own
