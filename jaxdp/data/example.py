"""What a source of text yields: examples, or pieces of long documents."""

import re
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

_SPACE = re.compile(r"(?<=\S) (?=\S)")


class Example(NamedTuple):
    """A document in two parts, or a piece of a long one.

    Attributes:
      prompt: what comes before the text; "" without data.prompt_key.
      text: the text, or a piece of it.
      ends: whether the document ends here; otherwise the next example continues it.
      messages: the messages of a chat, whose contents are the text; None for other documents.
    """

    prompt: str
    text: str
    ends: bool = True
    messages: list[dict[str, Any]] | None = None


def whole(examples: Iterable[Example]) -> Iterator[Example]:
    """Yields examples with their pieces joined."""
    begun: list[Example] = []
    for example in examples:
        begun.append(example)
        if example.ends:
            yield Example(begun[0].prompt, "".join(piece.text for piece in begun))
            begun = []


def texts(examples: Iterable[Example | None]) -> Iterator[str]:
    """Yields the texts of examples, each with its prompt before it; skipped ones are None.

    Long documents come in pieces, cut at a single space where there is one, so that no word and no
    run of spaces is cut.
    """
    rest = ""
    for example in filter(None, examples):
        text, rest = rest + example.prompt + example.text, ""
        if not example.ends:
            spaces = list(_SPACE.finditer(text, max(len(text) - 1_000, 0)))
            cut = spaces[-1].start() if spaces else len(text)
            text, rest = text[:cut], text[cut:]
        if text:
            yield text
