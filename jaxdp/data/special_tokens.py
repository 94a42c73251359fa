"""Special tokens: what begins and ends a document, what masks, what stands for unknown text.

A tokenizer's post-processor says which tokens are put before and after a text. In a run's
tokenizer.json it says what the training has put there, so that nothing else has to be kept.
"""

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, processors

from jaxdp.common.errors import ConfigError, shown

END_OF_TEXT = "<|endoftext|>"
# Names of the token that ends a document in well-known tokenizers; the first one found is used.
END_NAMES = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "[SEP]")
MASK_NAMES = ("[MASK]", "<mask>", "<|mask|>")
AUTO = "auto"  # The value of data.bos and data.eos that leaves the choice to the tokenizer.
SETTINGS = "tokenizer_config.json"


def names(tokenizer: Tokenizer) -> set[str]:
    """Returns the names of a tokenizer's special tokens."""
    return {t.content for t in tokenizer.get_added_tokens_decoder().values() if t.special}


def begin_id(tokenizer: Tokenizer) -> int | None:
    """Returns the id of the token that begins a document; None where there is none."""
    before, _ = _around(tokenizer)
    return before[0] if len(before) == 1 else None


def end_id(tokenizer: Tokenizer) -> int | None:
    """Returns the id of the token that ends a document; None where there is none, as in "char".

    An ordinary token is none, whatever its name: to Gemma, </s> is a tag of HTML.
    """
    _, after = _around(tokenizer)
    return after[0] if len(after) == 1 else _special(tokenizer, END_NAMES)


def mask_id(tokenizer: Tokenizer) -> int | None:
    """Returns the id of the mask token; None where there is none."""
    ids = (tokenizer.token_to_id(name) for name in MASK_NAMES)
    return next((i for i in ids if i is not None), None)


def unknown_id(tokenizer: Tokenizer) -> int | None:
    """Returns the id of the token for text that the vocabulary lacks; None where there is none."""
    name = getattr(tokenizer.model, "unk_token", None)
    if name is not None:
        return tokenizer.token_to_id(name)
    return json.loads(tokenizer.to_str())["model"].get("unk_id")  # A unigram model's.


def named(tokenizer: Tokenizer, number: int | None) -> str:
    """Returns the name of a token, or "nothing" for None."""
    return "nothing" if number is None else str(tokenizer.id_to_token(number))


def _special(tokenizer: Tokenizer, candidates: Iterable[str]) -> int | None:
    special = names(tokenizer)
    return next((tokenizer.token_to_id(name) for name in candidates if name in special), None)


def _around(tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """Returns the ids that a tokenizer's post-processor puts before and after a text."""
    if tokenizer.post_processor is None:
        return [], []
    added = tokenizer.num_special_tokens_to_add(False)
    if not added:
        return [], []
    for probe in ("a", "1", ".", *sorted(tokenizer.get_vocab())[:100]):
        plain = tokenizer.encode(probe, add_special_tokens=False).ids
        ids = tokenizer.encode(probe, add_special_tokens=True).ids
        ends = range(len(plain), added + len(plain) + 1)
        found = [end for end in ends if plain and ids[end - len(plain) : end] == plain]
        if len(found) == 1:  # None if it gives no tokens, several if it is one of those added.
            return ids[: found[0] - len(plain)], ids[found[0] :]
    return [], []


def choose(tokenizer: Tokenizer, settings: Mapping[str, Any], bos: str, eos: str) -> None:
    """Decides which tokens begin and end a document, and sets the post-processor accordingly.

    The end is data.eos, or the eos_token of the tokenizer's settings, or what its post-processor
    puts last, or a special token with a well-known name. The beginning is data.bos, or what its
    post-processor puts first, unless its settings say otherwise.

    Args:
      tokenizer: changed in place.
      settings: its tokenizer_config.json, {} where there is none.
      bos: data.bos: "auto", a token's name, or "" for none.
      eos: data.eos: "auto" or a token's name.

    Raises:
      ConfigError: the tokenizer has no token of a given name.
    """
    before, after = _around(tokenizer)
    end = _given(tokenizer, "data.eos", eos)
    if eos == AUTO:
        end = _setting(tokenizer, settings, "eos_token")
        end = end_id(tokenizer) if end is None else end
    begin = _given(tokenizer, "data.bos", bos) if bos else None
    if bos == AUTO:
        begin = before[0] if len(before) == 1 else None
        if "add_bos_token" in settings:
            asked = bool(settings["add_bos_token"])
            begin = _setting(tokenizer, settings, "bos_token") if asked else None
        if begin == end:  # It ends the document before.
            begin = None
    if begin == begin_id(tokenizer) and end == end_id(tokenizer) and len(before) < 2 > len(after):
        return
    tokenizer.post_processor = template(tokenizer, begin, end)


def template(tokenizer: Tokenizer, begin: int | None, end: int | None) -> Any:
    """Returns a post-processor that puts a token before and one after a text; None: neither."""
    known = {"BEGIN": begin, "END": end}
    tokens = [
        {"id": name, "ids": [number], "tokens": [tokenizer.id_to_token(number)]}
        for name, number in known.items()
        if number is not None
    ]
    if not tokens:
        return None
    parts = ["BEGIN"] * (begin is not None) + ["$A"] + ["END"] * (end is not None)
    return processors.TemplateProcessing(single=" ".join(parts), special_tokens=tokens)


def _given(tokenizer: Tokenizer, key: str, name: str) -> int | None:
    if name == AUTO:
        return None
    number = tokenizer.token_to_id(name)
    if number is None:
        known = ", ".join(sorted(names(tokenizer))[:10]) or "none"
        raise ConfigError(
            f"{key}={shown(name)} is no token of the tokenizer: use 'auto' or one of its tokens "
            f"(its special ones: {known})"
        )
    return number


def _setting(tokenizer: Tokenizer, settings: Mapping[str, Any], role: str) -> int | None:
    """Returns the id of the token that tokenizer_config.json names for a role, if there is one."""
    name = setting(settings, role)
    return None if name is None else tokenizer.token_to_id(name)


def setting(settings: Mapping[str, Any], role: str) -> str | None:
    """Returns the name that a tokenizer_config.json gives the token of a role, if it does.

    Args:
      settings: the content of the file.
      role: "bos_token" or "eos_token".
    """
    name = settings.get(role)
    name = name.get("content") if isinstance(name, dict) else name
    return name if isinstance(name, str) else None


def settings_of(path: Path) -> dict[str, Any]:
    """Reads a tokenizer_config.json; {} where there is none.

    Raises:
      ConfigError: the file is no JSON object.
    """
    if not os.path.isfile(path):
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise TypeError("no JSON object")
        return found
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise ConfigError(
            f"tokenizer: {path} can't be read ({shown(error, as_text=str)}): correct it, or "
            "remove it"
        ) from None
