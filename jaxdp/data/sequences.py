"""Cuts tokens into the sequences of a batch: inputs, targets, weights, segments and positions.

Shapes: P rows of this process, L sequence length.
"""

import dataclasses
import functools

import numpy as np

from jaxdp.data.batch import Batch, token_keys
from jaxdp.data.layout import BEGINS, LEARNT


@dataclasses.dataclass(frozen=True)
class Part:
    """The training sequences of one source.

    Attributes:
      first: the start of its first sequence, in the units of `take`.
      count: sequences in an epoch.
      max_offset: how far the start of the first sequence may be shifted.
    """

    first: int
    count: int
    max_offset: int


@dataclasses.dataclass(frozen=True)
class Windows:
    """Windows of L + 1 tokens over concatenated documents; neighbours share their border token.

    With an `end`, documents are kept apart: a token attends to, and is predicted from, its own
    document only. Every sequence is still full. A document that spans two windows starts again in
    the second, with positions from 0, because positions have to stay below L; without an `end`,
    too, nearly every sequence begins in the middle of a document.

    Attributes:
      tokens: [tokens] integers, at least 2 of them.
      seq_len: L.
      objective: "causal" (targets are the next tokens) or "masked" (the tokens themselves).
      end: id of the token that ends a document; None: documents are not kept apart.
      marks: of chats, [tokens] uint8: which tokens are targets, and which begin a chat; see
        `layout`. None: all tokens are targets, and `end` says where documents end.
      borders: the tokens at which the sources end; by default all tokens are one source.
      shares: for each source, its number of training sequences in a cycle of `sum(shares)`.
    """

    tokens: np.ndarray
    seq_len: int
    objective: str
    end: int | None = None
    marks: np.ndarray | None = None
    borders: tuple[int, ...] = ()
    shares: tuple[int, ...] = (1,)

    @property
    def stride(self) -> int:
        """Tokens between the starts of neighbouring windows."""
        return self.seq_len

    @functools.cached_property
    def parts(self) -> list[Part]:
        """The training windows of each source, side by side; their offset changes each epoch."""
        borders, parts = self.borders or (len(self.tokens),), []
        for first, end in zip((0, *borders[:-1]), borders, strict=True):
            ahead = end - first - 1
            count = max(ahead // self.seq_len - 1, 1)
            parts.append(Part(first, count, ahead - count * self.seq_len))
        return parts

    @property
    def total(self) -> int:
        """Sequences in one exact pass; the last one may be padded."""
        return -(-(len(self.tokens) - 1) // self.seq_len)

    @property
    def keys(self) -> dict[str, type]:
        """The keys that `take` returns, with their dtypes."""
        return token_keys(self.objective, "stream" if self.end is None else "documents")

    def begin(self, starts: np.ndarray) -> np.ndarray:
        """Returns the tokens [P] at which sequences begin, here the starts themselves."""
        return starts

    def take(self, starts: np.ndarray) -> Batch:
        """Returns the sequences that begin at the given tokens.

        Args:
          starts: [P] int64; positions past the last token are padded with weight 0.

        Returns:
          inputs, targets [P, L] int32, weights [P, L] float32; with an `end` also segments and
          positions [P, L] int32, counted from 0.
        """
        places = starts[:, None] + np.arange(self.seq_len + 1)
        last = len(self.tokens) - 1
        beyond = places[-1:, -1:].max() > last
        window = self.tokens[np.minimum(places, last) if beyond else places].astype(np.int32)
        inputs, targets = split(window, self.objective)
        weights = np.ones(inputs.shape, np.float32)
        if beyond:
            weights *= places[:, 1:] <= last
        batch = {"inputs": inputs, "targets": targets, "weights": weights}
        if self.marks is not None:
            marks = self.marks[np.minimum(places, last)]
            weights *= marks[:, 1:] & LEARNT
            return batch if self.end is None else batch | segments(marks[:, :-1] & BEGINS != 0)
        if self.end is None:
            return batch
        if self.objective == "causal":
            weights *= inputs != self.end  # The next token belongs to another document.
        return batch | documents(inputs, self.end)


@dataclasses.dataclass(frozen=True)
class Examples:
    """Padded sequences of one example each; only the text after its prompt is predicted.

    An example that is too long is truncated; it is left out if nothing remains to predict.

    Attributes:
      tokens: [tokens] integers, all examples in a row.
      index: [examples, 2] integers: the tokens where each example begins and its prompt ends.
      seq_len: L.
      objective: "causal" or "masked".
      marks: of chats, as in `Windows`: which of the tokens after the prompt are targets.
      borders: the tokens at which the sources end; by default all tokens are one source.
      shares: for each source, its number of training sequences in a cycle of `sum(shares)`.
    """

    tokens: np.ndarray
    index: np.ndarray
    seq_len: int
    objective: str
    marks: np.ndarray | None = None
    borders: tuple[int, ...] = ()
    shares: tuple[int, ...] = (1,)
    stride = 1

    @functools.cached_property
    def _places(self) -> np.ndarray:
        """For each example its start, its first target, and its end, [examples, 3] int64."""
        start, text = np.asarray(self.index, np.int64).T
        end = np.append(start[1:], len(self.tokens))
        return np.stack([start, np.maximum(text, start + self._ahead), end], axis=1)

    @functools.cached_property
    def kept(self) -> np.ndarray:
        """The start, first target and end of examples that have a target, [examples, 3] int64."""
        start, first, end = self._places.T
        return self._places[first < np.minimum(end, start + self.seq_len + self._ahead)]

    @property
    def _ahead(self) -> int:
        """Tokens by which targets are ahead of inputs."""
        return int(self.objective == "causal")

    @property
    def cut(self) -> int:
        """Number of examples that are too long for a sequence."""
        start, _, end = self._places.T
        return int((end - start > self.seq_len + self._ahead).sum())

    @functools.cached_property
    def parts(self) -> list[Part]:
        """The training examples of each source: all that are kept."""
        borders = self.borders or (len(self.tokens),)
        ends = np.searchsorted(self.kept[:, 0], borders).tolist()
        return [Part(a, b - a, 0) for a, b in zip((0, *ends[:-1]), ends, strict=True)]

    @property
    def total(self) -> int:
        """Sequences in one exact pass."""
        return len(self.kept)

    @property
    def keys(self) -> dict[str, type]:
        """The keys that `take` returns, with their dtypes."""
        return token_keys(self.objective, "padded")

    def begin(self, numbers: np.ndarray) -> np.ndarray:
        """Returns the tokens [P] at which examples begin."""
        return self.kept[numbers, 0]

    def take(self, numbers: np.ndarray) -> Batch:
        """Returns examples by their numbers.

        Args:
          numbers: [P] int64; numbers past the last example give rows of weight 0.

        Returns:
          inputs, targets [P, L] int32, weights [P, L] float32. For "masked" also segments [P, L]
          int32, 1 for padding, to hide it from attention; causal attention never sees it.
        """
        start, first, end = self.kept[np.minimum(numbers, self.total - 1)].T[:, :, None]
        inputs = start + np.arange(self.seq_len)
        targets = inputs + self._ahead
        last = len(self.tokens) - 1
        weights = (first <= targets) & (targets < end) & (numbers < self.total)[:, None]
        if self.marks is not None:
            weights = weights & (self.marks[np.minimum(targets, last)] & LEARNT != 0)
        batch = {
            "inputs": np.where(inputs < end, self.tokens[np.minimum(inputs, last)], 0),
            "targets": np.where(targets < end, self.tokens[np.minimum(targets, last)], 0),
            "weights": weights,
            "segments": inputs >= end,
        }
        return {key: batch[key].astype(dtype) for key, dtype in self.keys.items()}


Sequences = Windows | Examples


def split(window: np.ndarray, objective: str) -> tuple[np.ndarray, np.ndarray]:
    """Splits windows [P, L + 1] into inputs and targets, [P, L] each.

    Examples:
      >>> [x.tolist() for x in split(np.array([[5, 6, 7, 8]]), "causal")]
      [[[5, 6, 7]], [[6, 7, 8]]]
    """
    if objective == "masked":
        return window[:, 1:], window[:, 1:]
    return window[:, :-1], window[:, 1:]


def documents(inputs: np.ndarray, end: int) -> Batch:
    """Returns the document of each token within its sequence, and its position in the document.

    Examples:
      >>> found = documents(np.array([[5, 6, 0, 7, 8]]), end=0)
      >>> found["segments"].tolist(), found["positions"].tolist()
      ([[0, 0, 0, 1, 1]], [[0, 1, 2, 0, 1]])

    Args:
      inputs: [P, L] int32.
      end: id of the token that ends a document and belongs to it.

    Returns:
      segments and positions [P, L] int32, each counted from 0.
    """
    first = np.zeros(inputs.shape, bool)
    first[:, 1:] = inputs[:, :-1] == end
    return segments(first)


def segments(first: np.ndarray) -> Batch:
    """Returns `documents` of sequences from [P, L] bool: whether a token begins a document."""
    index = np.arange(first.shape[1], dtype=np.int32)
    first = np.where(index == 0, False, first)
    begun = np.maximum.accumulate(np.where(first, index, 0), axis=1, dtype=np.int32)
    return {"segments": first.cumsum(1, dtype=np.int32), "positions": index - begun}
