"""From tokens to the sequences of a batch: inputs, targets, weights, and what belongs together.

Shapes: P rows of this process, L sequence length.
"""

import dataclasses

import numpy as np

Batch = dict[str, np.ndarray]


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
    """

    tokens: np.ndarray
    seq_len: int
    objective: str
    end: int | None = None

    @property
    def stride(self) -> int:
        """Tokens from one to the next."""
        return self.seq_len

    @property
    def per_epoch(self) -> int:
        """Sequences to train on: windows side by side, from a first one drawn per epoch."""
        return max((len(self.tokens) - 1) // self.seq_len - 1, 1)

    @property
    def slack(self) -> int:
        """Tokens by which the first one may be moved."""
        return len(self.tokens) - 1 - self.per_epoch * self.seq_len

    @property
    def total(self) -> int:
        """Sequences of one exact pass, the last of them filled up."""
        return -(-(len(self.tokens) - 1) // self.seq_len)

    @property
    def keys(self) -> dict[str, type]:
        """Of `take`, and their dtypes."""
        return keys(self.objective, "stream" if self.end is None else "documents")

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


def split(window: np.ndarray, objective: str) -> tuple[np.ndarray, np.ndarray]:
    """[P, L + 1] -> inputs and targets, [P, L] each."""
    if objective == "masked":
        return window[:, 1:], window[:, 1:]
    return window[:, :-1], window[:, 1:]


def documents(inputs: np.ndarray, end: int) -> Batch:
    """Which document of its sequence a token is of, and its place there.

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


def keys(objective: str, packing: str) -> dict[str, type]:
    """What a batch consists of, [P, L] each, and the dtypes."""
    del objective
    more: dict[str, type] = {}
    if packing == "documents":
        more = {"segments": np.int32, "positions": np.int32}
    return {"inputs": np.int32, "targets": np.int32, "weights": np.float32} | more
