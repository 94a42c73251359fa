"""Chats as text: a chat template, in Jinja as transformers', and which parts are to be learnt."""

import itertools
import json
from collections.abc import Iterable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict
from tokenizers import Tokenizer

from jaxdp.common.errors import ConfigError, shown
from jaxdp.data import encoding, special_tokens
from jaxdp.data import tokenizer as tokenizers
from jaxdp.data.example import Example
from jaxdp.data.layout import BEGINS, LEARNT

DAY = datetime(2024, 7, 26)  # Llama 3's templates have it where they aren't told the date.
PROBE = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]

Messages = list[dict[str, Any]]
Parts = list[tuple[str, bool]]  # Texts that follow each other, and whether each is to be learnt.


class Template:
    """A chat template, with the names of a tokenizer's special tokens for it."""

    def __init__(self, source: str, tokenizer: Tokenizer, now: datetime = DAY):
        """Compiles a template; raises ConfigError where it is none.

        Args:
          source: the template, in Jinja.
          tokenizer: has the names of the special tokens.
          now: what it writes if it writes the date. Texts to train on have a fixed one: the same
            data give the same tokens on every day, also where a cache has to be made again.
        """
        from jinja2 import TemplateError
        from jinja2.ext import loopcontrols
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        ids = special_tokens.begin_id(tokenizer), special_tokens.end_id(tokenizer)
        names = ["" if i is None else tokenizer.id_to_token(i) for i in ids]
        # As transformers makes it: templates rely on how blocks are trimmed, and on the functions.
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals |= {
            "raise_exception": _refuse,
            "strftime_now": now.strftime,
            "bos_token": names[0],
            "eos_token": names[1],
        }
        self.source, self.tokenizer = source, tokenizer
        try:
            self._compiled = environment.from_string(source)
        except TemplateError as error:
            raise ConfigError(
                f"data.chat_template can't be read ({shown(error, as_text=str)}): give a chat "
                "template in Jinja"
            ) from None

    def render(self, messages: Messages, asking: bool) -> str:
        """Returns the text of a chat; `asking`: up to where the assistant is to answer.

        Raises:
          ConfigError: the template refuses the messages.
        """
        try:
            return self._compiled.render(
                messages=messages, add_generation_prompt=asking, tools=None, documents=None
            )
        except Exception as error:  # What a template calls can raise anything.
            raise ConfigError(
                f"the chat template refuses {shown(messages)} ({shown(error, as_text=str)}): "
                "correct the messages, or give another data.chat_template"
            ) from None

    def parts(self, messages: Messages) -> list[Parts]:
        """Cuts a chat into the assistant's turns, which are to be learnt, and what is between.

        Some templates write a turn in another way once others follow it (Qwen3's leaves out what
        was thought). Then each turn becomes an example of its own, with what precedes it.
        """
        turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        borders = [
            (self.render(messages[:i], True), self.render(messages[: i + 1], False)) for i in turns
        ]
        whole = self.render(messages, False)
        joined = all(whole.startswith(text) for pair in borders for text in pair)
        examples = [(whole, borders)] if joined else [(pair[1], [pair]) for pair in borders]
        if any(not answered.startswith(asked) for asked, answered in borders):
            raise ConfigError(
                f"the chat template writes {shown(messages)} so that its turns can't be told "
                "apart: give another data.chat_template"
            )
        return [_cut(text, pairs) for text, pairs in examples]

    def stop_ids(self) -> set[int]:
        """Returns the tokens at which an answer is over: the end of a document or of a turn."""
        asked, answered = self.render(PROBE[:1], True), self.render(PROBE, False)
        after = answered.removeprefix(asked).partition("b")[2]
        [ids] = encoding.encode(self.tokenizer, [after], special=True)
        special = {self.tokenizer.token_to_id(n) for n in special_tokens.names(self.tokenizer)}
        end = special_tokens.end_id(self.tokenizer)
        return {int(i) for i in ids[:1] if int(i) in special} | (
            {end} if end is not None else set()
        )


def _cut(text: str, borders: list[tuple[str, str]]) -> Parts:
    parts, at = [], 0
    for asked, answered in borders:
        parts += [(text[at : len(asked)], False), (text[len(asked) : len(answered)], True)]
        at = len(answered)
    return [(part, learnt) for part, learnt in [*parts, (text[at:], False)] if part]


def _to_json(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _refuse(message: str) -> None:
    raise ValueError(message)


def encode_chats(
    template: Template, examples: Iterable[Example], done: int = 0
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Encodes a stream of chats; names of special tokens are tokens, which templates consist of.

    The first `done` chats, or turns of chats that have to be separate, are skipped.

    Yields:
      Token ids of a chat, [n] int64, and the marks of the tokens, [n] uint8: `LEARNT`, `BEGINS`.
    """
    cut = itertools.chain.from_iterable(template.parts(e.messages or []) for e in examples)
    rest = itertools.islice(cut, done, None)
    while some := list(itertools.islice(rest, 500)):
        texts = [text for parts in some for text, _ in parts]
        ids = iter(encoding.encode(template.tokenizer, texts, special=True))
        for parts in some:
            found = [(next(ids), learnt) for _, learnt in parts]
            marks = [np.full(len(part), LEARNT * learnt, np.uint8) for part, learnt in found]
            tokens, marked = np.concatenate([p for p, _ in found]), np.concatenate(marks)
            marked[:1] = BEGINS  # Nothing precedes it, so it can't be learnt.
            yield tokens, marked


def source_of(config: ConfigDict) -> str:
    """Returns the text of the chat template of a config's data.

    data.chat_template names the file that holds it; by default the tokenizer has one.

    Raises:
      ConfigError: there is none.
    """
    if path := config.data.chat_template:
        try:
            return Path(path).expanduser().read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(
                f"data.chat_template={shown(path)} can't be read ({shown(error, as_text=str)}): "
                "give a file with a chat template in Jinja"
            ) from None
    if found := tokenizers.chat_template(config.tokenizer):
        return found
    raise ConfigError(
        f"data.messages_key={shown(config.data.messages_key)} needs a chat template, and tokenizer="
        f"{shown(config.tokenizer)} has none: give one as a file, data.chat_template=FILE.jinja"
    )
