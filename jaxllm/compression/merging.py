"""What is done with the adapters of a tree: weighted, switched, merged, taken off."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxllm.compression.lora import LoraTensor, adapter_names, layered
from jaxllm.core.einsum import Leaf, unwrapped
from jaxllm.core.errors import ConfigError
from jaxllm.core.registry import unknown_name

__all__ = ["merge", "remove", "select", "unmerge"]

Params = dict[str, Any]


def select(params: Params, weights: str | Mapping[str, Any]) -> Params:
    """Sets what every adapter counts; programs compiled for the tree stay good.

    Args:
      params: A tree with adapters.
      weights: What those named count, numbers or float scalars: 1 is all of it. All
        others are switched off. One name alone counts 1; `{}` leaves the base model.

    Returns:
      The tree with those strengths.

    Raises:
      ConfigError: An adapter has another name.
    """
    chosen = {weights: 1.0} if isinstance(weights, str) else weights
    names = adapter_names(params)
    for name in chosen:
        if name not in names:
            raise unknown_name("adapter", name, names)

    def put(weight: Any) -> Any:
        if not isinstance(weight, LoraTensor):
            return weight
        value = jnp.asarray(chosen.get(weight.name, 0.0), jnp.float32)
        strength = jnp.broadcast_to(value, weight.strength.shape)
        return dataclasses.replace(weight, base=put(weight.base), strength=strength)

    return jax.tree.map(put, params, is_leaf=_is_leaf)


def remove(params: Params, name: str | None = None) -> Params:
    """Takes adapters off.

    Args:
      params: A tree with adapters.
      name: Which; all when None.

    Returns:
      The tree without them; the weights inside are the same arrays.

    Raises:
      ConfigError: No adapter has that name.
    """
    names = adapter_names(params)
    if name is not None and name not in names:
        raise unknown_name("adapter", name, names)

    def bare(weight: Any) -> Any:
        if not isinstance(weight, LoraTensor):
            return weight
        if name is None or weight.name == name:
            return bare(weight.base)
        return dataclasses.replace(weight, base=bare(weight.base))

    return jax.tree.map(bare, params, is_leaf=_is_leaf)


def merge(params: Params, dtype: Any = None) -> Params:
    """Adds every adapter, at its strength, to the weight that it is around.

    Args:
      params: A tree with adapters.
      dtype: Dtype of the merged weights, quantized ones included; that of the weight
        inside when None.

    Returns:
      A tree without adapters, as fast as the base model.

    Raises:
      ConfigError: A weight inside is quantized and no dtype is given.
    """

    def merged(weight: Any) -> Any:
        if not isinstance(weight, LoraTensor):
            return weight
        inside = unwrapped(weight)
        if isinstance(inside, Leaf) and dtype is None:
            raise ConfigError(
                f"cannot merge: an adapter is around {type(inside).__name__}, expected "
                "a plain array. Give the dtype of the merged weights, or keep the "
                "adapter."
            )
        return weight.dequantize(inside.dtype if dtype is None else dtype)

    return jax.tree.map(merged, params, is_leaf=_is_leaf)


def unmerge(params: Params, adapters: Params) -> Params:
    """Takes adapters out of the weights that `merge` added them to.

    The weights are rounded twice on the way, so they return to within an ulp or two of
    their dtype. Who has room keeps the tree that was merged instead: that is exact.

    Args:
      params: What `merge` returned.
      adapters: The adapters alone, `core.partition.split(params, in_adapter)[0]` of
        the tree before.

    Returns:
      The tree with adapters around weights.
    """

    def parted(adapter: Any, weight: Any) -> Any:
        if adapter is None:
            return weight
        total = sum(part.difference() for part in layered(adapter))
        inside = (weight.astype(jnp.float32) - total).astype(weight.dtype)
        for part in layered(adapter)[::-1]:
            inside = dataclasses.replace(part, base=inside)
        return inside

    def stops(x: Any) -> bool:
        return x is None or isinstance(x, LoraTensor)

    return jax.tree.map(parted, adapters, params, is_leaf=stops)


def _is_leaf(x: Any) -> bool:
    return isinstance(x, Leaf)
