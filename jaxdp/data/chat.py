"""Chats as text: a chat template, in Jinja as transformers', and which parts are to be learnt."""

import itertools
import json
from collections.abc import Iterable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict
from tokenizers import Tokenizer

from jaxdp.common.errors import ConfigError, shown
from jaxdp.data import encoding, special_tokens
from jaxdp.data import tokenizer as tokenizers
from jaxdp.data.example import Example
from jaxdp.data.layout import BEGINS, LEARNT

DAY = datetime(2024, 7, 26)  # Llama 3's templates have it where they aren't told the date.
SET_BOS = "{% set bos_token = "  # How a kept template begins, where settings name a bos_token.
PROBE = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]

Messages = list[dict[str, Any]]


class Chat(NamedTuple):
    """A chat as text.

    Attributes:
      text: all of it.
      answers: where what the assistant says begins, and where its turn is over: what is learnt.
    """

    text: str
    answers: list[tuple[int, int]]


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

    def chats(self, messages: Messages) -> list[Chat]:
        """Writes a chat, and finds the assistant's turns, which are to be learnt.

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
        return [Chat(text, [(len(a), len(b)) for a, b in pairs]) for text, pairs in examples]

    def prompt(self, messages: Messages) -> tuple[np.ndarray, str]:
        """Returns the tokens of a chat up to where the assistant is to answer, [n] int64.

        They are those that training has there, where an answer follows. At the end of a text, line
        breaks can be other tokens than before a word (GPT-2: one token for two), so that a word is
        put after them first. A space that would be part of that word is left to the answer: it is
        also returned, else "".
        """
        asked = self.render(messages, True)
        words = messages[-1]["content"].split() if asked[-1:].isspace() else []
        text = asked + "".join(words[:1])  # Any tokenizer that can encode the chat knows it.
        [(ids, places)] = encoding.encode_placed(self.tokenizer, [text], special=True)
        end = _first(text, places, len(asked))
        at = places[end - 1, 1] if end else 0
        left = asked[at:]
        if at <= len(asked) and (not left or left.isspace()):
            return ids[:end], left
        return encoding.encode(self.tokenizer, [asked], special=True)[0], ""

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


def _to_json(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _refuse(message: str) -> None:
    raise ValueError(message)


def encode_chats(
    template: Template, examples: Iterable[Example], done: int = 0
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Encodes a stream of chats; names of special tokens are tokens, which templates consist of.

    A chat is encoded as a whole, as `generate --chat` and transformers encode it: cut into turns,
    it could get other tokens, such as a "▁" more before each where a normaliser puts one. The
    first `done` chats, or turns of chats that have to be separate, are skipped.

    Yields:
      Token ids of a chat, [n] int64, and the marks of the tokens, [n] uint8: `LEARNT`, `BEGINS`.
    """
    chats = itertools.chain.from_iterable(template.chats(e.messages or []) for e in examples)
    rest = itertools.islice(chats, done, None)
    while some := list(itertools.islice(rest, 500)):
        texts = [chat.text for chat in some]
        encoded = encoding.encode_placed(template.tokenizer, texts, special=True)
        for chat, (ids, places) in zip(some, encoded, strict=True):
            yield ids, _marks(chat, places)


def _marks(chat: Chat, places: np.ndarray) -> np.ndarray:
    """Returns the marks of a chat's tokens, [n] uint8, whose places are [n, 2]."""
    marks = np.zeros(len(places), np.uint8)
    for begin, end in chat.answers:
        marks[_first(chat.text, places, begin) : _first(chat.text, places, end)] = LEARNT
    marks[:1] = BEGINS  # Nothing precedes it, so it can't be learnt.
    return marks


def _first(text: str, places: np.ndarray, border: int) -> int:
    """Returns the first token after a border, which is a place in the text.

    A token that straddles the border is where it begins, but for the spaces before a word: " yes"
    is what the assistant says although the template has written the space.
    """
    found = int(np.searchsorted(places[:, 0], border))
    if found:
        start, end = places[found - 1]
        before, after = text[start:border], text[border:end]
        return found - (before.isspace() and bool(after.strip()))
    return found


def source_of(config: ConfigDict) -> str:
    """Returns the text of the chat template of a config's data.

    data.chat_template names the file that holds it; by default the tokenizer has one. It begins
    with the name of `bos_token` where the tokenizer's settings give one, as transformers takes it
    from there, even if documents don't begin with it (add_bos_token). Of these settings, a run's
    folder and an export keep nothing else.

    Raises:
      ConfigError: there is none.
    """
    source = _given_source(config)
    kept = source.startswith(SET_BOS)
    if kept or config.data.bos != special_tokens.AUTO or "bos_token" not in source:
        return source
    name = special_tokens.setting(tokenizers.settings_for(config.tokenizer), "bos_token")
    if name is None:
        return source
    # A template leaves out one line break after a block.
    return f"{SET_BOS}{json.dumps(name, ensure_ascii=False)} %}}\n{source}"


def take_tokenizer(config: ConfigDict, folder: Path) -> None:
    """Sets a config, in place, to the tokenizer in the folder of a run or a token cache.

    And to the chat template there, if there is one, which may have changed where it came from.
    """
    config.tokenizer = str(folder / "tokenizer.json")
    take_template(config, folder)


def take_template(config: ConfigDict, folder: Path) -> None:
    """Sets data.chat_template, in place, to that in the folder of a run, if it has one."""
    if (folder / tokenizers.TEMPLATE).is_file():
        config.data.chat_template = str(folder / tokenizers.TEMPLATE)


def _given_source(config: ConfigDict) -> str:
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
