"""Trains byte-level BPE tokenizers (Sennrich et al. 2016), as GPT-2's."""

import itertools
import re
import threading
from collections.abc import Callable, Iterable, Iterator

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from jaxdp.common.errors import ConfigError, shown

# The time that training takes grows with the square of the length of a word, and some texts are
# one word of millions of letters: DNA, base64, logs. So longer words are cut.
LONGEST_WORD = 256
_LONG_WORD = re.compile(
    "|".join(
        rf"{kind}{{{LONGEST_WORD + 1},}}" for kind in (r"[^\W\d_]", r"\d", r"\s", r"[^\w\s]", "_")
    )
)
_LONG_SPACE = re.compile(rf"\s{{{LONGEST_WORD + 1}}}")


def size_of(spec: str) -> int:
    """Returns SIZE of a tokenizer "train:bpe:SIZE"; raises ConfigError for anything else."""
    kind, _, size = spec.removeprefix("train:").partition(":")
    if kind != "bpe" or not size.isdecimal() or len(size) > 7 or int(size) < 258:
        raise ConfigError(
            f"tokenizer={shown(spec)} can't be trained: write train:bpe:SIZE with SIZE from 258 "
            "(256 bytes and two special tokens) to 9999999"
        )
    return int(size)


def train(
    size: int,
    specials: list[str],
    texts: Iterable[str],
    while_waiting: Callable[[], None] = lambda: None,
) -> Tokenizer:
    """Trains a tokenizer.

    Args:
      size: tokens of its vocabulary.
      specials: names of its special tokens.
      texts: what to train it on.
      while_waiting: called about every half second; what it raises ends the training.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raised: list[BaseException] = []
    ended = threading.Event()

    def work() -> None:
        try:
            wanted = itertools.takewhile(lambda _: not ended.is_set(), short_words(texts))
            tokenizer.train_from_iterator(wanted, trainer)
        except BaseException as error:
            raised.append(error)

    # In a thread of its own, because the library hears no signal while it trains. A daemon: a
    # process that is asked to stop doesn't wait for it.
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        while thread.is_alive():
            thread.join(0.5)
            while_waiting()
    finally:
        ended.set()
    if raised:
        raise raised[0]
    return tokenizer


def short_words(texts: Iterable[str]) -> Iterator[str]:
    """Yields the texts, cut within words that are too long."""
    for text in texts:
        longest = max(map(len, text.split()), default=0)
        if longest <= LONGEST_WORD and not _LONG_SPACE.search(text):
            yield text
            continue
        at = 0
        for word in _LONG_WORD.finditer(text):
            for end in range(word.start() + LONGEST_WORD, word.end(), LONGEST_WORD):
                yield text[at:end]
                at = end
        yield text[at:]
