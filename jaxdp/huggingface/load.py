"""Folders of Hugging Face's transformers, whose weights a run can begin with."""

import dataclasses
import functools
import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import huggingface_hub
import ml_dtypes  # noqa: F401  NumPy knows bfloat16 by it, in which many weights are.
import numpy as np
from safetensors import SafetensorError, safe_open

from jaxdp.common.errors import ConfigError, shown
from jaxdp.common.files import first_line
from jaxdp.huggingface import families, tensors
from jaxdp.huggingface.families import FAMILIES
from jaxdp.model.transformer import ModelConfig

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
PREFIX = "hf:"
# What a folder may hold besides: masks and tables that are computed, other heads, ties.
LEFT_OUT = re.compile(
    r"\.attn\.(masked_)?bias$|\.rotary_emb\.inv_freq$|\.position_ids$|\.pooler\.|"
    r"^cls\.seq_relationship\.|\.decoder\.bias$"
)
TIED = re.compile(r"^lm_head\.weight$|\.decoder\.weight$")
TYPES = ("F32", "F16", "BF16")
# Of `ModelConfig`, what changes neither weights nor what is computed with them.
FREE = ("dropout", "dtype", "remat", "scan_layers")


@dataclasses.dataclass(frozen=True)
class Folder:
    """A folder of transformers with a model.

    Attributes:
      spec: what the user calls it.
      path: where it is.
      name: of the family.
      fields: of `ModelConfig`, as the folder has them.
      pad_id: the id of the padding token, by config.json.
    """

    spec: str
    path: Path
    name: str
    fields: Mapping[str, Any]
    pad_id: int | None

    def check(self, model: ModelConfig, vocab_size: bool = True) -> None:
        """Refuses a model of another shape; the context may be shorter than the folder's.

        Args:
          model: to compare with.
          vocab_size: whether its vocabulary is known, too.

        Raises:
          ConfigError: names all keys that differ.
        """
        differing = []
        for field, theirs in self.fields.items():
            ours = getattr(model, field)
            fits = ours <= theirs if field == "seq_len" else ours == theirs
            if field != "vocab_size" and field not in FREE and not fits:
                differing.append(_difference(field, ours, theirs))
        if differing:
            raise ConfigError(f"init_from={self.spec!r} is another model: {', '.join(differing)}")
        theirs = self.fields["vocab_size"]
        if not vocab_size:
            return
        if model.vocab_size != theirs:
            raise ConfigError(
                f"init_from={self.spec!r} has a vocabulary of {theirs} tokens, and tokenizer and "
                f"model.vocab_multiple give {model.vocab_size}: use tokenizer={self.spec!r}, and a "
                "model.vocab_multiple by which that becomes as large"
            )
        self._open(model)

    def read(self, model: ModelConfig) -> Any:
        """Reads the weights.

        Args:
          model: of the shape that `check` wants.

        Returns:
          Parameters of `Transformer`, float32, on the host; see `tensors.to_params`.

        Raises:
          ConfigError: the folder is damaged, or has weights of another kind.
        """
        found = self._open(model)
        params = tensors.to_params(found.read, model, self.name, self.pad_id)
        for name in found.names():
            table = params["embed"]["embedding"]
            if model.tied_head and TIED.search(name) and (found.read(name) != table).any():
                raise self.damaged(f"{name} is not the embedding, though tie_word_embeddings")
        return params

    def _open(self, model: ModelConfig) -> "_Tensors":
        """The tensors, none of them read, but of the right names, types and shapes."""
        rows = families.offset(self.name, self.pad_id) + self.fields["seq_len"]
        found, wanted = _Tensors(self), tensors.shapes(model, self.name, rows)
        for name, shape in wanted.items():
            found.check(name, shape)
        for name in found.names():
            if name not in wanted and not (LEFT_OUT.search(name) or TIED.search(name)):
                raise self.damaged(f"{name} belongs to no such model")
        return found

    def damaged(self, reason: str) -> ConfigError:
        """The error for what can't be used."""
        return ConfigError(
            f"init_from={self.spec!r} can't be used ({reason}): give what save_pretrained of "
            f"transformers has written, of {', '.join(f.architecture for f in FAMILIES.values())}"
        )


def open_folder(spec: str) -> Folder:
    """Finds what "hf:FOLDER" or "hf:NAME" stands for; a name is downloaded if it has not been.

    Raises:
      ConfigError: there is none, or it is of no known family.
    """
    where = spec.removeprefix(PREFIX)
    path = Path(os.path.expanduser(where))
    if not where or not os.path.isdir(path):
        try:
            path = _downloaded(where)
        except Exception as error:  # Of the network, the hub, or a name that can be none.
            raise ConfigError(
                f"init_from={shown(spec)} can't be had ({first_line(error)}): give hf:FOLDER "
                "with a folder that is there, or hf:NAME with a model of the Hugging Face hub"
            ) from None
    unknown = Folder(spec, path, "", {}, None)
    try:
        values = json.loads((path / CONFIG).read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise TypeError("no JSON object")
        name, fields = families.from_json(values)
    except FileNotFoundError:
        raise unknown.damaged(f"it has no {CONFIG}") from None
    except (ValueError, TypeError, ArithmeticError, RecursionError, OSError) as error:
        said = str(error) if isinstance(error, ConfigError) else first_line(error)
        raise unknown.damaged(f"{CONFIG}: {said}") from None
    return Folder(spec, path, name, fields, values.get("pad_token_id", 1))


@functools.cache
def _downloaded(name: str) -> Path:
    """The folder of a name on the hub, which is asked once, though a start looks several times."""
    patterns = [CONFIG, "model*.safetensors", INDEX]
    return Path(huggingface_hub.snapshot_download(name, allow_patterns=patterns))


def read(spec: str, model: ModelConfig) -> Any:
    """The parameters that "hf:FOLDER" or "hf:NAME" stands for; see `Folder.read`."""
    return open_folder(spec).read(model)


class _Tensors:
    """The tensors of a folder, each read when it is taken."""

    def __init__(self, folder: Folder):
        """Opens all files."""
        self._folder = folder
        self._base = FAMILIES[folder.name].base
        self._all = dict(self._find())

    def _find(self) -> Iterator[tuple[str, tuple[Any, str]]]:
        """The files, and the names in them, by the name that the family has for it."""
        index = self._folder.path / INDEX
        try:
            if index.exists():
                names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
            else:
                names = {WEIGHTS}
            for name in sorted(names):
                file = safe_open(self._folder.path / name, framework="numpy")
                for key in file.keys():  # noqa: SIM118  It is no dict.
                    yield self._known(key), (file, key)
        except FileNotFoundError as error:
            raise self._folder.damaged(
                f"{Path(str(error.filename or WEIGHTS)).name} is missing; other formats than "
                "safetensors are not read"
            ) from None
        except (SafetensorError, ValueError, KeyError, AttributeError, TypeError, OSError) as error:
            raise self._folder.damaged(first_line(error)) from None

    def _known(self, name: str) -> str:
        """A name as the family has it: base models leave out its first part, old BERTs differ."""
        if not name.startswith((f"{self._base}.", "lm_head.", "cls.")):
            name = f"{self._base}.{name}"
        return re.sub("gamma$", "weight", re.sub("beta$", "bias", name))

    def names(self) -> list[str]:
        """Of all there are."""
        return list(self._all)

    def check(self, name: str, shape: tuple[int | None, ...]) -> None:
        """Refuses one that isn't there, or is no such array."""
        if name not in self._all:
            raise self._folder.damaged(f"{name} is missing")
        file, key = self._all[name]
        header = file.get_slice(key)
        found, kind = tuple(header.get_shape()), header.get_dtype()
        if kind not in TYPES:
            raise self._folder.damaged(f"{name} is of the type {kind}, none of {', '.join(TYPES)}")
        fits = [n in (m, None) for n, m in zip(shape, found, strict=False)]
        if len(found) != len(shape) or not all(fits):
            raise self._folder.damaged(f"{name} has the shape {found}, not {shape}")

    def read(self, name: str) -> np.ndarray:
        """One of them, float32."""
        file, key = self._all[name]
        return file.get_tensor(key).astype(np.float32)


def _difference(field: str, ours: Any, theirs: Any) -> str:
    if field == "causal":
        names = {True: "causal", False: "masked"}
        return f"objective={names[ours]!r} (there {names[theirs]!r})"
    key = field if field == "seq_len" else f"model.{field}"
    return f"{key}={ours!r} (there {'at most ' if key == 'seq_len' else ''}{theirs!r})"
