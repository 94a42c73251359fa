"""Loads weights from folders of Hugging Face's transformers, for a run to start from."""

import dataclasses
import functools
import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import huggingface_hub
import ml_dtypes  # noqa: F401  Registers bfloat16, in which many weights are stored, with NumPy.
import numpy as np
from safetensors import SafetensorError, safe_open

from jaxdp.common import paths
from jaxdp.common.errors import ConfigError, shown
from jaxdp.common.files import first_line
from jaxdp.huggingface import families, tensors
from jaxdp.huggingface.families import FAMILIES
from jaxdp.model.architecture import ModelConfig

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
PREFIX = "hf:"
# Further tensors that a folder may hold: computed masks and tables, other heads, tied copies.
LEFT_OUT = re.compile(
    r"\.attn\.(masked_)?bias$|\.rotary_emb\.inv_freq$|\.position_ids$|\.pooler\.|"
    r"^cls\.seq_relationship\.|\.decoder\.bias$"
)
TIED = re.compile(r"^lm_head\.weight$|\.decoder\.weight$")
TYPES = ("F32", "F16", "BF16")
# Fields of `ModelConfig` that change neither the weights nor the function they compute.
FREE = ("dropout", "attention_dropout", "dtype", "remat", "scan_layers")


@dataclasses.dataclass(frozen=True)
class Folder:
    """A folder with a model, as transformers' save_pretrained writes it.

    Attributes:
      spec: the user's name for it, hf:FOLDER or hf:NAME.
      path: the local folder.
      name: the family's name.
      fields: the folder's values for fields of `ModelConfig`.
      pad_id: id of the padding token, from config.json.
    """

    spec: str
    path: Path
    name: str
    fields: Mapping[str, Any]
    pad_id: int | None

    @property
    def vocab_size(self) -> int:
        """The number of rows of the embedding; tokenizers may have fewer tokens."""
        return self.fields["vocab_size"]

    def check(self, model: ModelConfig, vocab_size: bool = True) -> None:
        """Checks that a model has the folder's architecture; its context may be shorter.

        Args:
          model: config of the model.
          vocab_size: whether to compare vocabularies and tensors, too.

        Raises:
          ConfigError: they differ; names all keys that do.
        """
        differing = []
        for field, theirs in self.fields.items():
            ours = getattr(model, field)
            fits = ours <= theirs if field == "seq_len" else ours == theirs
            if field != "vocab_size" and field not in FREE and not fits:
                differing.append(_difference(field, ours, theirs))
        if differing:
            raise ConfigError(f"init_from={self.spec!r} is another model: {', '.join(differing)}")
        theirs = self.vocab_size
        if not vocab_size:
            return
        if model.vocab_size != theirs:
            raise ConfigError(
                f"init_from={self.spec!r} has a vocabulary of {theirs} tokens, and tokenizer and "
                f"model.vocab_multiple give {model.vocab_size}: use tokenizer={self.spec!r}"
            )
        self._open(model)

    def read(self, model: ModelConfig) -> Any:
        """Reads the weights.

        Args:
          model: config of a model that `check` accepts.

        Returns:
          Parameters of `Transformer`, float32, on the host; see `tensors.to_params`.

        Raises:
          ConfigError: the folder is damaged, or holds other weights.
        """
        found = self._open(model)
        params = tensors.to_params(found.read, model, self.name, self.pad_id)
        for name in found.names():
            table = params["embed"]["embedding"]
            if model.tied_head and TIED.search(name) and (found.read(name) != table).any():
                raise self.unusable(f"{name} is not the embedding, though tie_word_embeddings")
        return params

    def _open(self, model: ModelConfig) -> "_Tensors":
        """Opens the tensors and checks their names, dtypes and shapes; reads none of them."""
        rows = families.offset(self.name, self.pad_id) + self.fields["seq_len"]
        found, wanted = _Tensors(self), tensors.shapes(model, self.name, rows)
        for name, shape in wanted.items():
            found.check(name, shape)
        for name in found.names():
            if name not in wanted and not (LEFT_OUT.search(name) or TIED.search(name)):
                raise self.unusable(f"{name} does not belong to this model")
        return found

    def unusable(self, reason: str, way_out: str = "") -> ConfigError:
        """Returns the error for a folder that can't be used."""
        names = ", ".join(family.architecture for family in FAMILIES.values())
        way_out = way_out or f"give a folder that transformers saved, of {names}"
        return ConfigError(f"init_from={self.spec!r} can't be used ({reason}): {way_out}")


def open_folder(spec: str) -> Folder:
    """Opens the folder of "hf:FOLDER" or "hf:NAME"; downloads a name that is not in the cache.

    Raises:
      ConfigError: there is no such folder, or its family is unknown.
    """
    where = spec.removeprefix(PREFIX)
    path = Path(os.path.expanduser(where))
    if not where or not os.path.isdir(path):
        paths.check_hub(f"init_from={shown(spec)}")
        try:
            path = _downloaded(where)
        except Exception as error:  # From the network, the hub, or an impossible name.
            raise ConfigError(
                f"init_from={shown(spec)} can't be loaded ({first_line(error)}): give hf:FOLDER "
                "with a folder that exists, or hf:NAME with a model on the Hugging Face hub"
            ) from None
    unknown = Folder(spec, path, "", {}, None)
    try:
        values = json.loads((path / CONFIG).read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise TypeError("not a JSON object")
        name, fields = families.from_json(values)
    except FileNotFoundError:
        raise unknown.unusable(f"it has no {CONFIG}") from None
    except (ValueError, TypeError, ArithmeticError, RecursionError, OSError) as error:
        reason = str(error) if isinstance(error, ConfigError) else first_line(error)
        raise unknown.unusable(f"{CONFIG}: {reason}") from None
    return Folder(spec, path, name, fields, values.get("pad_token_id", 1))


def model_keys(spec: str) -> dict[str, Any]:
    """Returns the keys of a config, {"model.KEY": value}, for the model of a folder or a name.

    Also "objective" and "seq_len", the longest context of the model.

    Args:
      spec: "hf:FOLDER" or "hf:NAME", as for config.init_from.

    Raises:
      ConfigError: see `open_folder`.
    """
    fields = dict(open_folder(spec).fields)
    del fields["vocab_size"]  # The tokenizer decides it.
    first = {
        "objective": "causal" if fields.pop("causal") else "masked",
        "seq_len": fields.pop("seq_len"),
    }
    return first | {f"model.{key}": value for key, value in fields.items()}


@functools.cache
def _downloaded(name: str) -> Path:
    """Returns the local folder of a name on the hub; cached, as a start asks several times."""
    patterns = [CONFIG, "model*.safetensors", INDEX]
    return Path(huggingface_hub.snapshot_download(name, allow_patterns=patterns))


def read(spec: str, model: ModelConfig) -> Any:
    """Reads the parameters of "hf:FOLDER" or "hf:NAME"; see `Folder.read`."""
    return open_folder(spec).read(model)


class _Tensors:
    """The tensors of a folder, each read on request."""

    def __init__(self, folder: Folder):
        """Opens all files."""
        self._folder = folder
        self._base = FAMILIES[folder.name].base
        self._all = dict(self._find())

    def _find(self) -> Iterator[tuple[str, tuple[Any, str]]]:
        """Yields the family's name of each tensor, and its file and its name in there."""
        index = self._folder.path / INDEX
        names = {WEIGHTS}
        try:
            if index.exists():
                names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
            self._check_there(names)
            for name in sorted(names):
                file = safe_open(self._folder.path / name, framework="numpy")
                for key in file.keys():  # noqa: SIM118  It isn't a dict.
                    yield self._known(key), (file, key)
        except ConfigError:
            raise
        except (SafetensorError, ValueError, KeyError, AttributeError, TypeError, OSError) as error:
            raise self._folder.unusable(first_line(error)) from None

    def _check_there(self, names: set[str]) -> None:
        """Refuses a folder without one of the files of its weights."""
        path = self._folder.path
        missing = sorted(name for name in names if not (path / name).exists())
        if not missing:
            return
        shards, again = sorted(path.glob("model-*.safetensors")), "download or copy it again"
        if missing != [WEIGHTS]:
            reason = f"{missing[0]} is missing, one of {len(names)} files that {INDEX} lists"
            raise self._folder.unusable(reason, again)
        if shards:
            reason = f"{INDEX} is missing, which says what is in {shards[0].name}"
            raise self._folder.unusable(reason, again)
        raise self._folder.unusable(
            f"{WEIGHTS} is missing; other formats than safetensors are not read"
        )

    def _known(self, name: str) -> str:
        """Returns the family's name of a tensor: base models omit its base, old BERTs say gamma."""
        if not name.startswith((f"{self._base}.", "lm_head.", "cls.")):
            name = f"{self._base}.{name}"
        return re.sub("gamma$", "weight", re.sub("beta$", "bias", name))

    def names(self) -> list[str]:
        """Returns all tensors' names."""
        return list(self._all)

    def check(self, name: str, shape: tuple[int | None, ...]) -> None:
        """Raises ConfigError if a tensor is missing, or has another dtype or shape."""
        if name not in self._all:
            self._check_wrapper(name)
            raise self._folder.unusable(f"{name} is missing")
        file, key = self._all[name]
        header = file.get_slice(key)
        found, kind = tuple(header.get_shape()), header.get_dtype()
        if kind not in TYPES:
            raise self._folder.unusable(
                f"{name} has the dtype {kind}, not one of {', '.join(TYPES)}"
            )
        fits = [n in (m, None) for n, m in zip(shape, found, strict=False)]
        if len(found) != len(shape) or not all(fits):
            raise self._folder.unusable(f"{name} has the shape {found}, not {shape}")

    def _check_wrapper(self, name: str) -> None:
        """Refuses names with a prefix, such as torch.compile's _orig_mod."""
        for _, key in self._all.values():
            if key.endswith(f".{name}"):
                prefix = key.removesuffix(name)
                raise self._folder.unusable(
                    f"{name} is called {key}: a wrapper of the model, such as torch.compile's, was "
                    "saved in place of the model",
                    f"save the model inside the wrapper, or take {prefix} off all names",
                )

    def read(self, name: str) -> np.ndarray:
        """Reads a tensor, as float32."""
        file, key = self._all[name]
        return file.get_tensor(key).astype(np.float32)


def _difference(field: str, ours: Any, theirs: Any) -> str:
    if field == "causal":
        names = {True: "causal", False: "masked"}
        return f"objective={names[ours]!r} (there {names[theirs]!r})"
    key = field if field == "seq_len" else f"model.{field}"
    return f"{key}={ours!r} (there {'at most ' if key == 'seq_len' else ''}{theirs!r})"
