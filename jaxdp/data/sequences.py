"""From tokens to the sequences of a batch: inputs, targets, weights, and what belongs together.

Shapes: P rows of this process, L sequence length.
"""

import dataclasses
import functools

import numpy as np

from jaxdp.data.batch import Batch, token_keys


@dataclasses.dataclass(frozen=True)
class Part:
    """What one source gives to train on.

    Attributes:
      first: where its first sequence begins, as for `take`.
      count: sequences in an epoch.
      slack: by how much the first one may be moved.
    """

    first: int
    count: int
    slack: int


@dataclasses.dataclass(frozen=True)
class Windows:
    """Windows of L + 1 tokens of the documents in a row; neighbours share the border token.

    With an `end`, documents are kept apart: a token sees, and is predicted from, its own document
    only. Every sequence is still full, and a document that a border cuts begins anew behind it,
    its positions too: they have to stay below L, and a text without its beginning is what nearly
    every sequence is without an `end`.

    Attributes:
      tokens: [tokens] integers, at least 2 of them.
      seq_len: L.
      objective: "causal" (targets are the next tokens) or "masked" (the tokens themselves).
      end: id of the token that ends a document; None: all is one text.
      borders: at which tokens the sources end; by default there is one.
      shares: how many sequences of each source to train on, in a cycle of `sum(shares)`.
    """

    tokens: np.ndarray
    seq_len: int
    objective: str
    end: int | None = None
    borders: tuple[int, ...] = ()
    shares: tuple[int, ...] = (1,)

    @property
    def stride(self) -> int:
        """Tokens from one to the next."""
        return self.seq_len

    @functools.cached_property
    def parts(self) -> list[Part]:
        """Of each source windows side by side, from a first one drawn per epoch."""
        borders, parts = self.borders or (len(self.tokens),), []
        for first, end in zip((0, *borders[:-1]), borders, strict=True):
            ahead = end - first - 1
            count = max(ahead // self.seq_len - 1, 1)
            parts.append(Part(first, count, ahead - count * self.seq_len))
        return parts

    @property
    def total(self) -> int:
        """Sequences of one exact pass, the last of them filled up."""
        return -(-(len(self.tokens) - 1) // self.seq_len)

    @property
    def keys(self) -> dict[str, type]:
        """Of `take`, and their dtypes."""
        return token_keys(self.objective, "stream" if self.end is None else "documents")

    def begin(self, starts: np.ndarray) -> np.ndarray:
        """At which tokens [P] they begin."""
        return starts

    def take(self, starts: np.ndarray) -> Batch:
        """The sequences that begin at these tokens.

        Args:
          starts: [P] int64; what lies beyond the tokens is filled with weight 0.

        Returns:
          inputs, targets [P, L] int32, weights [P, L] float32; with an `end` segments and
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
        if self.end is None:
            return batch
        if self.objective == "causal":
            weights *= inputs != self.end  # What follows is of another document.
        return batch | documents(inputs, self.end)


@dataclasses.dataclass(frozen=True)
class Examples:
    """One example to a sequence, padded; what follows its prompt is to be predicted.

    A longer one loses its end, and one that then has nothing left to predict is left out.

    Attributes:
      tokens: [tokens] integers, the examples in a row.
      index: [examples, 2] integers: where each begins, and where what follows its prompt does.
      seq_len: L.
      objective: "causal" or "masked".
      borders: at which tokens the sources end; by default there is one.
      shares: as of `Windows`.
    """

    tokens: np.ndarray
    index: np.ndarray
    seq_len: int
    objective: str
    borders: tuple[int, ...] = ()
    shares: tuple[int, ...] = (1,)
    stride = 1

    @functools.cached_property
    def _places(self) -> np.ndarray:
        """[examples, 3] int64: where each begins, its targets begin, and it ends."""
        start, text = np.asarray(self.index, np.int64).T
        end = np.append(start[1:], len(self.tokens))
        return np.stack([start, np.maximum(text, start + self._ahead), end], axis=1)

    @functools.cached_property
    def kept(self) -> np.ndarray:
        """[examples with a target, 3] int64: where each begins, its targets begin, and it ends."""
        start, first, end = self._places.T
        return self._places[first < np.minimum(end, start + self.seq_len + self._ahead)]

    @property
    def _ahead(self) -> int:
        """By how much targets are ahead of inputs."""
        return int(self.objective == "causal")

    @property
    def cut(self) -> int:
        """How many are longer than a sequence."""
        start, _, end = self._places.T
        return int((end - start > self.seq_len + self._ahead).sum())

    @functools.cached_property
    def parts(self) -> list[Part]:
        """Of each source all examples."""
        borders = self.borders or (len(self.tokens),)
        ends = np.searchsorted(self.kept[:, 0], borders).tolist()
        return [Part(a, b - a, 0) for a, b in zip((0, *ends[:-1]), ends, strict=True)]

    @property
    def total(self) -> int:
        """Sequences of one exact pass."""
        return len(self.kept)

    @property
    def keys(self) -> dict[str, type]:
        """Of `take`, and their dtypes."""
        return token_keys(self.objective, "padded")

    def begin(self, numbers: np.ndarray) -> np.ndarray:
        """At which tokens [P] these examples begin."""
        return self.kept[numbers, 0]

    def take(self, numbers: np.ndarray) -> Batch:
        """The examples of these numbers.

        Args:
          numbers: [P] int64; those beyond the last are given weight 0.

        Returns:
          inputs, targets [P, L] int32, weights [P, L] float32; for "masked" segments [P, L] int32,
          1 for the padding: an earlier token does not see it anyway, but here each sees all.
        """
        start, first, end = self.kept[np.minimum(numbers, self.total - 1)].T[:, :, None]
        inputs = start + np.arange(self.seq_len)
        targets = inputs + self._ahead
        last = len(self.tokens) - 1
        weights = (first <= targets) & (targets < end) & (numbers < self.total)[:, None]
        batch = {
            "inputs": np.where(inputs < end, self.tokens[np.minimum(inputs, last)], 0),
            "targets": np.where(targets < end, self.tokens[np.minimum(targets, last)], 0),
            "weights": weights,
            "segments": inputs >= end,
        }
        return {key: batch[key].astype(dtype) for key, dtype in self.keys.items()}


Sequences = Windows | Examples


def split(window: np.ndarray, objective: str) -> tuple[np.ndarray, np.ndarray]:
    """[P, L + 1] -> inputs and targets, [P, L] each.

    Examples:
      >>> [x.tolist() for x in split(np.array([[5, 6, 7, 8]]), "causal")]
      [[[5, 6, 7]], [[6, 7, 8]]]
    """
    if objective == "masked":
        return window[:, 1:], window[:, 1:]
    return window[:, :-1], window[:, 1:]


def documents(inputs: np.ndarray, end: int) -> Batch:
    """Which document of its sequence a token is of, and its place there.

    Examples:
      >>> found = documents(np.array([[5, 6, 0, 7, 8]]), end=0)
      >>> found["segments"].tolist(), found["positions"].tolist()
      ([[0, 0, 0, 1, 1]], [[0, 1, 2, 0, 1]])

    Args:
      inputs: [P, L] int32.
      end: the id that ends a document, and is part of it.

    Returns:
      segments and positions [P, L] int32, each counted from 0.
    """
    first = np.zeros(inputs.shape, bool)
    first[:, 1:] = inputs[:, :-1] == end
    index = np.arange(inputs.shape[1], dtype=np.int32)
    begun = np.maximum.accumulate(np.where(first, index, 0), axis=1, dtype=np.int32)
    return {"segments": first.cumsum(1, dtype=np.int32), "positions": index - begun}
