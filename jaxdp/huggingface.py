"""Weights to and from the folders of Hugging Face's transformers: config.json and safetensors.

Shapes: S context, D model width, I inputs, O outputs of a linear layer.
"""

import dataclasses
import json
import math
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import huggingface_hub
import ml_dtypes  # noqa: F401  NumPy knows bfloat16 by it, in which many weights are.
import numpy as np
from flax import traverse_util
from safetensors import SafetensorError, safe_open

from jaxdp import families
from jaxdp.config import ConfigError, shown
from jaxdp.disk import first_line
from jaxdp.families import FAMILIES
from jaxdp.model import ModelConfig, Transformer, parameter_shapes

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
PREFIX = "hf:"
# What a folder may hold besides: masks and tables that are computed, other heads, ties.
LEFT_OUT = re.compile(
    r"\.attn\.(masked_)?bias$|\.rotary_emb\.inv_freq$|\.position_ids$|\.pooler\.|"
    r"^cls\.seq_relationship\.|\.token_type_embeddings\.weight$|\.decoder\.(weight|bias)$"
)
TYPES = ("F32", "F16", "BF16")
# What is trained here has no segments; BERT's two are alike then.
TOKEN_TYPES = 2
# Of `ModelConfig`, what changes neither weights nor what is computed with them.
FREE = ("dropout", "dtype", "remat", "scan_layers")


def to_tensors(
    params: Any, model: ModelConfig, name: str, pad_id: int | None
) -> dict[str, np.ndarray]:
    """The weights of a model as transformers has them.

    Args:
      params: of `Transformer`.
      model: its config.
      name: of its family.
      pad_id: the id of the padding token, if there is one.

    Returns:
      Arrays by name. Biases that the family has and the model lacks are zeros.
    """
    family, shapes = FAMILIES[name], _flat_shapes(model, name)
    flat = _unstacked(traverse_util.flatten_dict(params, sep="/"))
    tensors = {}
    for theirs, ours, transposed in _rules(family, shapes):
        parts = [flat.get(path, np.zeros(shapes[path].shape, np.float32)) for path in ours]
        matrices = [
            np.asarray(part).reshape(_as_matrix(path, part.shape))
            for path, part in zip(ours, parts, strict=True)
        ]
        joined = np.concatenate(matrices, axis=-1)
        if ours == ["position_embed/embedding"]:
            joined = np.pad(joined, ((families.offset(name, pad_id), 0), (0, 0)))
        tensors[theirs] = np.ascontiguousarray(joined.T if transposed else joined)
    if family.token_types:
        tensors[family.token_types] = np.zeros((TOKEN_TYPES, model.embed_dim), np.float32)
    return tensors


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
        if vocab_size and model.vocab_size != theirs:
            raise ConfigError(
                f"init_from={self.spec!r} has a vocabulary of {theirs} tokens, and tokenizer and "
                f"model.vocab_multiple give {model.vocab_size}: use tokenizer={self.spec!r}, and a "
                "model.vocab_multiple by which that becomes as large"
            )

    def read(self, model: ModelConfig) -> Any:
        """Reads the weights.

        Args:
          model: of the shape that `check` wants.

        Returns:
          Parameters of `Transformer`, float32, on the host. BERT's first segment is in the table of
          positions; a context shorter than the folder's has its first positions.

        Raises:
          ConfigError: the folder is damaged, or has weights of another kind.
        """
        family, shapes = FAMILIES[self.name], _flat_shapes(model, self.name)
        tensors, flat = _Tensors(self), {}
        for theirs, ours, transposed in _rules(family, shapes):
            wanted = [_as_matrix(path, shapes[path].shape) for path in ours]
            shape = (*wanted[0][:-1], sum(one[-1] for one in wanted))
            array = tensors.take(theirs)
            if ours == ["position_embed/embedding"]:
                first = families.offset(self.name, self.pad_id)
                array = array[first : first + model.seq_len]
                if family.token_types:
                    array = array + tensors.take(family.token_types)[0]
            array = array.T if transposed else array
            if array.shape != shape:
                raise self.damaged(f"{theirs} has the shape {array.shape}, not {shape}")
            ends = np.cumsum([one[-1] for one in wanted])[:-1]
            for path, part in zip(ours, np.split(array, ends, axis=-1), strict=True):
                flat[path] = part.reshape(shapes[path].shape)
        tensors.check_rest(tied="lm_head.weight" if model.tied_head else "")
        return traverse_util.unflatten_dict(_stacked(flat) if model.scan_layers else flat, sep="/")

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
            patterns = [CONFIG, "model*.safetensors", INDEX]
            path = Path(huggingface_hub.snapshot_download(where, allow_patterns=patterns))
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


def read(spec: str, model: ModelConfig) -> Any:
    """The parameters that "hf:FOLDER" or "hf:NAME" stands for; see `Folder.read`."""
    return open_folder(spec).read(model)


class _Tensors:
    """The tensors of a folder, each read when it is taken."""

    def __init__(self, folder: Folder):
        """Opens all files."""
        self._folder = folder
        self._base = FAMILIES[folder.name].base
        self._files: dict[Path, Any] = {}
        self._left = dict(self._find())

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

    def take(self, name: str) -> np.ndarray:
        """Reads one."""
        if name not in self._left:
            raise self._folder.damaged(f"{name} is missing")
        file, key = self._left.pop(name)
        kind = file.get_slice(key).get_dtype()
        if kind not in TYPES:
            raise self._folder.damaged(f"{name} is of the type {kind}, none of {', '.join(TYPES)}")
        return file.get_tensor(key).astype(np.float32)

    def check_rest(self, tied: str) -> None:
        """Refuses what would go unused and changes what is computed."""
        for name in self._left:
            if name != tied and not LEFT_OUT.search(name):
                raise self._folder.damaged(f"{name} belongs to no such model")


def _difference(field: str, ours: Any, theirs: Any) -> str:
    if field == "causal":
        names = {True: "causal", False: "masked"}
        return f"objective={names[ours]!r} (there {names[theirs]!r})"
    key = field if field == "seq_len" else f"model.{field}"
    return f"{key}={ours!r} (there {'at most ' if key == 'seq_len' else ''}{theirs!r})"


def _flat_shapes(model: ModelConfig, name: str) -> dict[str, Any]:
    """By path, of the parameters that the family has: layers one by one, with their biases."""
    bias = model.bias or "bias" not in FAMILIES[name].keys
    full = dataclasses.replace(model, bias=bias, scan_layers=False)
    return traverse_util.flatten_dict(parameter_shapes(Transformer(full)), sep="/")


def _rules(
    family: families.Family, shapes: Mapping[str, Any]
) -> Iterator[tuple[str, list[str], bool]]:
    """Yields the name of a tensor, the paths of what it holds, whether it is [O, I]."""
    modules: list[tuple[str, tuple[str, ...]]]
    modules = [(theirs, (ours,)) for theirs, ours in family.modules.items()]
    count = sum(path.endswith("/mlp/up/kernel") for path in shapes)
    for i in range(count):
        layer = family.layers.format(i)
        modules += [
            (f"{layer}.{theirs}", tuple(f"layer_{i}/{one}" for one in ours))
            for theirs, ours in family.layer.items()
        ]
    for theirs, ours in modules:
        for leaf in ("embedding", "kernel", "scale", "bias"):
            if f"{ours[0]}/{leaf}" in shapes:
                # GPT-2's layers, as opposed to its head, are [I, O].
                transposed = leaf == "kernel" and not theirs.rpartition(".")[2].startswith("c_")
                tensor = f"{theirs}.{'bias' if leaf == 'bias' else 'weight'}"
                yield tensor, [f"{one}/{leaf}" for one in ours], transposed
    if family.head_bias:
        yield family.head_bias, ["head_bias"], False


def _as_matrix(path: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape without heads: [I, O] of a kernel, [O] of a bias."""
    if path.endswith("embedding"):
        return shape
    if not path.endswith("kernel"):
        return (math.prod(shape),)
    inputs = math.prod(shape[:-1]) if path.endswith("out/kernel") else shape[0]
    return inputs, math.prod(shape) // inputs


def _unstacked(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Scanned layers one by one."""
    found: dict[str, Any] = {}
    for path, array in flat.items():
        if path.startswith("layers/"):
            found |= {path.replace("layers", f"layer_{i}", 1): x for i, x in enumerate(array)}
        else:
            found[path] = array
    return found


def _stacked(flat: Mapping[str, Any]) -> dict[str, Any]:
    """What `_unstacked` undoes."""
    found: dict[str, Any] = {}
    layers: dict[str, list] = {}
    for path, array in flat.items():
        if path.startswith("layer_"):
            layers.setdefault(path.replace(path.split("/")[0], "layers", 1), []).append(array)
        else:
            found[path] = array
    return found | {path: np.stack(arrays) for path, arrays in layers.items()}
