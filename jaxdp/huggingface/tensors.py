"""Converts the model's parameters to the tensors of Hugging Face's transformers, and back.

Shapes: D model width, I inputs, O outputs of a linear layer.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from flax import traverse_util

from jaxdp.huggingface import families
from jaxdp.huggingface.families import FAMILIES
from jaxdp.huggingface.family import Family
from jaxdp.model.architecture import ModelConfig
from jaxdp.model.transformer import Transformer, parameter_shapes

# Our models have no segment embeddings, so both of BERT's are zero.
TOKEN_TYPES = 2
POSITIONS = "position_embed/embedding"


def to_tensors(
    params: Any, model: ModelConfig, name: str, pad_id: int | None
) -> dict[str, np.ndarray]:
    """Converts a model's parameters to transformers' tensors.

    Args:
      params: parameters of `Transformer`.
      model: the model's config.
      name: the family's name.
      pad_id: id of the padding token, if there is one.

    Returns:
      Arrays by tensor name. Biases that the family has and the model lacks are zeros.
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
        if ours == [POSITIONS]:
            joined = np.pad(joined, ((families.offset(name, pad_id), 0), (0, 0)))
        tensors[theirs] = np.ascontiguousarray(joined.T if transposed else joined)
    if family.token_types:
        tensors[family.token_types] = np.zeros((TOKEN_TYPES, model.embed_dim), np.float32)
    return tensors


def to_params(
    read: Callable[[str], np.ndarray], model: ModelConfig, name: str, pad_id: int | None
) -> Any:
    """Converts transformers' tensors to a model's parameters, the inverse of `to_tensors`.

    Args:
      read: tensor name -> float32 array with the shape in `shapes`.
      model: the model's config.
      name: the family's name.
      pad_id: id of the padding token, if there is one.

    Returns:
      Parameters of `Transformer`. BERT's first segment embedding is added to the position
      embeddings. A context shorter than the table of positions takes the table's first rows.
    """
    family, ours_shapes = FAMILIES[name], _flat_shapes(model, name)
    flat = {}
    for theirs, ours, transposed in _rules(family, ours_shapes):
        array = read(theirs)
        if ours == [POSITIONS]:
            array = array[families.offset(name, pad_id) :][: model.seq_len]
            if family.token_types:
                array = array + read(family.token_types)[0]
        array = array.T if transposed else array
        ends = np.cumsum([_as_matrix(path, ours_shapes[path].shape)[-1] for path in ours])[:-1]
        for path, part in zip(ours, np.split(array, ends, axis=-1), strict=True):
            flat[path] = part.reshape(ours_shapes[path].shape)
    return traverse_util.unflatten_dict(_stacked(flat) if model.scan_layers else flat, sep="/")


def shapes(model: ModelConfig, name: str, rows: int) -> dict[str, tuple[int | None, ...]]:
    """Returns the shapes of a model's tensors, by name; None stands for any size.

    Args:
      model: the model's config.
      name: the family's name.
      rows: number of rows of the table of positions.
    """
    family, ours_shapes = FAMILIES[name], _flat_shapes(model, name)
    found: dict[str, tuple[int | None, ...]] = {}
    for theirs, ours, transposed in _rules(family, ours_shapes):
        parts = [_as_matrix(path, ours_shapes[path].shape) for path in ours]
        shape = (*parts[0][:-1], sum(part[-1] for part in parts))
        found[theirs] = shape[::-1] if transposed else shape
        if ours == [POSITIONS]:
            found[theirs] = (rows, model.embed_dim)
    if family.token_types:
        found[family.token_types] = (None, model.embed_dim)
    return found


def _flat_shapes(model: ModelConfig, name: str) -> dict[str, Any]:
    """Returns parameter shapes by path, unscanned, with biases unless the family may lack them."""
    bias = model.bias or FAMILIES[name].has_biases
    full = dataclasses.replace(model, bias=bias, scan_layers=False)
    return traverse_util.flatten_dict(parameter_shapes(Transformer(full)), sep="/")


def _rules(family: Family, shapes: Mapping[str, Any]) -> Iterator[tuple[str, list[str], bool]]:
    """Yields a tensor's name, the paths of its parameters, and whether it is [O, I]."""
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
                # GPT-2's layers, unlike its head, are [I, O].
                transposed = leaf == "kernel" and not theirs.rpartition(".")[2].startswith("c_")
                tensor = f"{theirs}.{'bias' if leaf == 'bias' else 'weight'}"
                yield tensor, [f"{one}/{leaf}" for one in ours], transposed
    if family.head_bias:
        yield family.head_bias, ["head_bias"], False


def _as_matrix(path: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Returns the shape with attention heads merged: [I, O] of a kernel, [O] of a bias."""
    if path.endswith("embedding"):
        return shape
    if not path.endswith("kernel"):
        return (math.prod(shape),)
    inputs = math.prod(shape[:-1]) if path.endswith("out/kernel") else shape[0]
    return inputs, math.prod(shape) // inputs


def _unstacked(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Splits scanned layers into single ones: layers/... becomes layer_0/..., layer_1/..., ..."""
    found: dict[str, Any] = {}
    for path, array in flat.items():
        if path.startswith("layers/"):
            found |= {path.replace("layers", f"layer_{i}", 1): x for i, x in enumerate(array)}
        else:
            found[path] = array
    return found


def _stacked(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Stacks single layers for nn.scan, the inverse of `_unstacked`."""
    found: dict[str, Any] = {}
    layers: dict[str, list] = {}
    for path, array in flat.items():
        if path.startswith("layer_"):
            layers.setdefault(path.replace(path.split("/")[0], "layers", 1), []).append(array)
        else:
            found[path] = array
    return found | {path: np.stack(arrays) for path, arrays in layers.items()}
