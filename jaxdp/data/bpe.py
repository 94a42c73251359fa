"""Trains byte-level BPE tokenizers (Sennrich et al. 2016), as GPT-2's."""

import contextlib
import itertools
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from jaxdp.common.errors import ConfigError, RunError, shown
from jaxdp.common.files import temporary_file

# The time that training takes grows with the square of the length of a word, and some texts are
# one word of millions of letters: DNA, base64, logs. So longer words are cut.
LONGEST_WORD = 256
LOOK = 0.5  # Seconds between two calls of `while_waiting`.
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
    """Trains a tokenizer, in a process of its own: the library hears no signal while it trains.

    Args:
      size: tokens of its vocabulary.
      specials: names of its special tokens.
      texts: what to train it on.
      while_waiting: called about every half second; what it raises ends the training.

    Raises:
      RunError: that process ended before it was done, for lack of memory, for example.
    """
    job = {"size": size, "specials": specials}
    with temporary_file() as result, temporary_file() as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", __name__],
            stdin=subprocess.PIPE,
            stdout=result,
            stderr=errors,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            start_new_session=True,  # Ctrl-C is for this process, which then ends that one.
        )
        try:
            assert process.stdin is not None
            with process.stdin as pipe, contextlib.suppress(BrokenPipeError):
                said = time.monotonic()
                for line in itertools.chain([job], short_words(texts)):
                    pipe.write(json.dumps(line).encode() + b"\n")
                    if time.monotonic() > said + LOOK:
                        said = time.monotonic()
                        while_waiting()
            while _is_running(process):
                while_waiting()
        finally:
            process.kill()
            process.wait()
        for file in (result, errors):
            file.seek(0)
        if process.returncode:
            lines = errors.read().decode(errors="replace").strip().splitlines()
            why = lines[-1] if lines else f"status {process.returncode}"
            raise RunError(f"the tokenizer could not be trained ({why})")
        return Tokenizer.from_str(result.read().decode())


def _is_running(process: subprocess.Popen) -> bool:
    """Returns whether a process still runs, after `LOOK` seconds at most."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(LOOK)
    return process.returncode is None


def _work() -> None:
    """Trains by what `train` writes to stdin, a JSON value a line; prints the tokenizer."""
    lines = map(json.loads, sys.stdin.buffer)
    job = next(lines)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=job["size"],
        special_tokens=job["specials"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(lines, trainer)
    sys.stdout.buffer.write(tokenizer.to_str().encode())


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


if __name__ == "__main__":
    _work()
