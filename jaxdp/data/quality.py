"""Is a text what it seems, and does its tokenizer know it? What a run warns about in its header."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict
from tokenizers import Tokenizer

from jaxdp.data import encoding, files, special_tokens
from jaxdp.data.example import texts
from jaxdp.data.layout import SPLITS
from jaxdp.data.records import is_json_lines
from jaxdp.data.sources import Source, TextSource, ValidationOnly

SAMPLE = 300_000  # Characters at the beginning of each source.
TOLERATED = 0.01  # The share of unknown, replaced or lost text from which a run warns.


def look_at(
    config: ConfigDict, sources: Sequence[Source], tokenizer: Tokenizer
) -> tuple[float, list[str]]:
    """Looks at the beginning of each source.

    Args:
      config: a valid config.
      sources: the corpora that data.path names.
      tokenizer: the tokenizer that they are to be encoded with.

    Returns:
      The share of the characters that don't come back when the tokens are decoded, and warnings.
    """
    begun = "".join(text for source in sources for text in _beginning(source))
    ids = encoding.encode(tokenizer, [begun], special=config.data.special_tokens)[0]
    back = Counter(tokenizer.decode(ids.tolist(), skip_special_tokens=False))
    lost = sum((Counter(begun) - back).values()) / max(len(begun), 1)
    notes = []
    if is_json_lines(begun):
        notes.append(
            "the text looks like JSON lines, and the model learns their markup, too; jsonl: "
            "before the path takes the texts in them"
        )
    if not config.data.special_tokens:
        notes += _named(begun, tokenizer)
    separator, raw = config.data.separator, list(_as_it_is(sources))
    if separator and raw and not any(separator in text for text in raw):
        notes.append(
            f"data.separator={separator!r} is not in the first {SAMPLE:,} characters of the text; "
            "if it is nowhere, each file is one document"
        )
    return lost, notes


def _beginning(source: Source) -> Iterator[str]:
    """Yields a source's texts up to SAMPLE characters."""
    return _first(text for split in SPLITS for text in texts(source.examples(split)))


def _as_it_is(sources: Sequence[Source]) -> Iterator[str]:
    """Yields the beginning of the files of each source of text, with separators."""
    for source in sources:
        source = source.source if isinstance(source, ValidationOnly) else source
        if isinstance(source, TextSource):
            pieces = (piece for path in source.paths for piece in files.text(path))
            yield "".join(_first(pieces))


def _first(pieces: Iterable[str]) -> Iterator[str]:
    room = SAMPLE
    for text in pieces:
        yield text[:room]
        room -= len(text)
        if room <= 0:
            return


def _named(text: str, tokenizer: Tokenizer) -> list[str]:
    """Warns of names of special tokens in a text, which are plain text there."""
    counts = {name: text.count(name) for name in special_tokens.names(tokenizer)}
    name, count = max(counts.items(), key=lambda item: item[1], default=("", 0))
    if not count:
        return []
    return [
        f"the text has the name of the special token {name} as plain text, {count:,} times at its "
        f"beginning; data.special_tokens=True makes it that token, and data.separator={name!r} "
        "cuts a text file into documents there"
    ]


def warnings(meta: Mapping[str, Any], tokenizer: Tokenizer) -> list[str]:
    """Returns what a run has to say about its text, from the metadata of a token cache."""
    found = list(meta["notes"])
    tokens, unknown, characters, replaced, skipped = (
        sum(meta[split][key] for split in SPLITS)
        for key in ("tokens", "unknown", "characters", "replaced", "skipped")
    )
    if unknown > TOLERATED * tokens:
        name = special_tokens.named(tokenizer, special_tokens.unknown_id(tokenizer))
        found.append(
            f"{unknown / tokens:.1%} of the tokens are {name}, which stands for text that the "
            "tokenizer doesn't know: another tokenizer fits this text better"
        )
    elif meta["lost"] > TOLERATED:
        found.append(
            f"the tokenizer changes the text: {meta['lost']:.1%} of its characters don't come back"
        )
    if replaced > TOLERATED * characters:
        found.append(
            f"{replaced / characters:.1%} of the characters are U+FFFD: the text was decoded "
            "wrongly before it came here"
        )
    if skipped:
        found.append(f"{skipped:,} records without a text are skipped (data.skip_missing)")
    return found


def is_lossy(meta: Mapping[str, Any]) -> bool:
    """Returns whether the tokens lack so much of the text that bits per byte mean nothing."""
    part = meta["validation"]
    return meta["lost"] > TOLERATED or part["unknown"] > TOLERATED * part["tokens"]
