"""Which stored tensor, or piece of one, every parameter of a model comes from.

Everything that can be wrong between a file and a configuration is found here, from
the header alone: nothing is read, allocated or compiled before.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxllm.checkpoints.files import quote
from jaxllm.checkpoints.safetensors import LazyTensor
from jaxllm.core.errors import CheckpointError
from jaxllm.models import DecoderConfig, Model
from jaxllm.models.families import Family, TensorRule

__all__ = ["StoredArray", "TreePath", "match_tensors", "tree_paths"]

TreePath = tuple[str | int, ...]

_LOAD = "cannot load weights"
_HEAD = ("head", "kernel")
# Keys of config.json that set the size of an axis with a logical name.
_KEYS = {
    "embed": ("hidden_size", "n_embd"),
    "heads": ("num_attention_heads", "n_head"),
    "kv_heads": ("num_key_value_heads", "num_attention_heads", "n_head"),
    "ffn": ("intermediate_size", "n_inner", "n_embd"),
    "vocab": ("vocab_size",),
}
_UNNAMED_KEYS = {
    "positions": ("max_position_embeddings", "n_positions"),
    "query_norm": ("head_dim",),
    "key_norm": ("head_dim",),
}


@dataclass(frozen=True)
class StoredArray:
    """One of our arrays as it lies in a file.

    Attributes:
      tensor: The stored tensor.
      transpose: Whether it is `[out, in]`; our array is `[in, out]`.
      part: `(start, stop)` along the tensor's output axis; all of it when None.
    """

    tensor: LazyTensor
    transpose: bool = False
    part: tuple[int, int] | None = None

    def view(self) -> np.ndarray:
        """Returns the array in the stored orientation; nothing is copied."""
        stored = self.tensor.read()
        if self.part is None:
            return stored
        part = slice(*self.part)
        return stored[part] if self.transpose else stored[..., part]


def tree_paths(path: TreePath, stacks: Sequence[int]) -> list[TreePath]:
    """Returns the paths of the arrays that one array of a tree is stacked from.

    Args:
      path: Where the array stands, `("stacks", 1, "mlp", "up", "kernel")`.
      stacks: Layers of each stack.

    Returns:
      One path a layer, `("layers", 4, "mlp", "up", "kernel")`, or the path itself
      outside the stacks.
    """
    if path[0] != "stacks":
        return [path]
    index = int(path[1])
    first = sum(stacks[:index])
    return [("layers", first + i, *path[2:]) for i in range(stacks[index])]


def match_tensors(
    tensors: Mapping[str, LazyTensor],
    family: Family,
    model: Model,
    shapes: Mapping[TreePath, tuple[int, ...]],
    hf_config: Mapping[str, Any],
) -> dict[TreePath, StoredArray]:
    """Finds the stored form of every parameter.

    Args:
      tensors: The tensors of a checkpoint.
      family: What names them.
      model: The model to be loaded.
      shapes: Shape of every array by path, layers counted singly (`tree_paths`).
      hf_config: Content of `config.json`, so that messages name its keys.

    Returns:
      Where each array lies.

    Raises:
      CheckpointError: A tensor is missing, or belongs to no parameter and is none of
        those that other software leaves behind, or has another shape or kind of
        dtype than the configuration says. The message names the file, the tensor and
        the key to check.
    """
    rules = family.rules(model.config)
    found = _find(tensors, family, rules, model.config)
    _refuse_unexpected(tensors, family, found, model.config)
    widths: dict[str, int] = {}
    for rule in rules:
        if rule.part is not None:
            widths[rule.source] = max(widths.get(rule.source, 0), rule.part[1])
    stored = {}
    for rule in rules:
        tensor = found[rule.path]
        wanted = _stored_shape(rule, shapes[rule.path], widths.get(rule.source))
        if tensor.shape != wanted:
            key = _key_to_check(rule, tensor.shape, wanted, model, hf_config)
            raise CheckpointError(
                f"{_LOAD}: {tensor.path.name}: {quote(tensor.name)} has shape "
                f"{tensor.shape}, expected {wanted}. Check {key} in config.json."
            )
        if not jnp.issubdtype(tensor.dtype, jnp.floating):
            raise CheckpointError(
                f"{_LOAD}: {tensor.path.name}: {quote(tensor.name)} has dtype "
                f"{tensor.dtype}, expected floating numbers. Use the checkpoint that "
                "is not quantized."
            )
        stored[rule.path] = StoredArray(tensor, rule.transpose, rule.part)
    if stored.keys() != shapes.keys():
        difference = sorted(map(str, stored.keys() ^ shapes.keys()))
        raise AssertionError(f"the rules of {family.name} miss {difference[:5]}")
    return stored


def _find(
    tensors: Mapping[str, LazyTensor],
    family: Family,
    rules: Sequence[TensorRule],
    config: DecoderConfig,
) -> dict[TreePath, LazyTensor]:
    found, missing = {}, []
    for rule in rules:
        names = [name for name in family.sources(rule) if name in tensors]
        if names:
            found[rule.path] = tensors[names[0]]
        elif rule.source not in missing:
            missing.append(rule.source)
    if not missing:
        return found
    where = _directory_of(tensors)
    if [rule.path for rule in rules if rule.source in missing] == [_HEAD]:
        raise CheckpointError(
            f"{_LOAD}: {where}: {quote(missing[0])} is missing, expected it because "
            "the output head is not tied to the embeddings. Check tie_word_embeddings "
            "in config.json."
        )
    raise CheckpointError(
        f"{_LOAD}: {where}: {len(missing)} of {len({r.source for r in rules})} tensors "
        f"are missing, the first is {quote(missing[0])}, expected all of a "
        f"{family.name} model with {config.num_layers} layers. Check that config.json "
        "belongs to these weights."
    )


def _refuse_unexpected(
    tensors: Mapping[str, LazyTensor],
    family: Family,
    found: Mapping[TreePath, LazyTensor],
    config: DecoderConfig,
) -> None:
    ignored, used = re.compile(family.ignored), {t.name for t in found.values()}
    unexpected = [
        name
        for name in tensors
        if name not in used
        and not ignored.search(name)
        # A tied head is often stored a second time; any other is used.
        and not name.endswith("lm_head.weight")
    ]
    if unexpected:
        raise CheckpointError(
            f"{_LOAD}: {_directory_of(tensors)}: {len(unexpected)} tensors belong to "
            f"no parameter, the first is {quote(unexpected[0])}, expected those of a "
            f"{family.name} model with {config.num_layers} layers. Check that "
            "config.json belongs to these weights."
        )


def _directory_of(tensors: Mapping[str, LazyTensor]) -> Path | str:
    for tensor in tensors.values():
        return tensor.path.parent
    return "model.safetensors"


def _stored_shape(
    rule: TensorRule, shape: tuple[int, ...], width: int | None
) -> tuple[int, ...]:
    stored = list(shape[::-1] if rule.transpose else shape)
    if width is not None:
        stored[0 if rule.transpose else -1] = width
    return tuple(stored)


def _key_to_check(
    rule: TensorRule,
    shape: tuple[int, ...],
    wanted: tuple[int, ...],
    model: Model,
    hf_config: Mapping[str, Any],
) -> str:
    """Returns the key of `config.json` that sets the first axis that differs."""
    is_layer = rule.path[0] == "layers"
    names: Any = model.axes["layer"] if is_layer else model.axes
    for name in rule.path[2:] if is_layer else rule.path:
        names = names[name]
    names = names[::-1] if rule.transpose else names
    differing = [
        name
        for name, size, other in zip(names, shape, wanted, strict=False)
        if size != other
    ]
    keys = _KEYS["embed"]
    if differing and differing[0] is not None:
        keys = _KEYS[differing[0]]
    else:
        for name in rule.path:
            keys = _UNNAMED_KEYS.get(str(name), keys)
    return next((key for key in keys if key in hf_config), keys[0])
