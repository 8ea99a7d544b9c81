"""Layers in stacks: neighbours of equal shape behind one leading axis.

Stack sizes are chosen when a model is loaded; files on disk know nothing of them.

Letters: L layers.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxllm.core.errors import ConfigError

__all__ = ["default_stacks", "join_layers", "restack", "stack_size"]

Params = dict[str, Any]


def stack_size(stack: Params) -> int:
    """Returns how many layers a stack holds."""
    return jax.tree.leaves(stack)[0].shape[0]


def default_stacks(layers: int, platform: str | None = None) -> tuple[int, ...]:
    """Returns stacks of one layer on a CPU, one stack of all elsewhere."""
    platform = jax.default_backend() if platform is None else platform
    return (1,) * layers if platform == "cpu" else (layers,)


def restack(params: Params, sizes: Sequence[int]) -> Params:
    """Regroups layers into stacks of the given sizes.

    Args:
      params: A tree with `stacks`.
      sizes: Layers of each new stack; they sum to L.

    Returns:
      The same parameters; layers that stand in one stack must have equal shapes and
      leaf types.

    Raises:
      ConfigError: The sizes do not sum to L, or layers of one stack differ.
    """
    layers = [
        jax.tree.map(lambda x, i=i: _slice(x, i), stack)
        for stack in params["stacks"]
        for i in range(stack_size(stack))
    ]
    if sum(sizes) != len(layers) or any(size < 1 for size in sizes):
        raise ConfigError(
            f"cannot restack: sizes {tuple(sizes)} sum to {sum(sizes)}, expected "
            f"{len(layers)} layers. Choose sizes that sum to it."
        )
    stacks, first = [], 0
    for size in sizes:
        stacks.append(join_layers(layers[first : first + size]))
        first += size
    return {**params, "stacks": tuple(stacks)}


def _slice(x: Any, i: int) -> Any:
    if isinstance(x, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(x.shape[1:], x.dtype)
    return x.reshape(x.shape[1:]) if x.shape[0] == 1 else x[i]


def join_layers(layers: list[Params]) -> Params:
    """Returns one stack of layers that have no leading axis.

    Raises:
      ConfigError: They differ in shapes or leaf types.
    """
    kinds = {
        (jax.tree.structure(t), tuple(x.shape for x in jax.tree.leaves(t)))
        for t in layers
    }
    if len(kinds) > 1:
        raise ConfigError(
            "cannot stack: layers differ in shapes or leaf types, expected equal "
            "ones. Put them into different stacks."
        )

    def join(*xs: Any) -> Any:
        if isinstance(xs[0], jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct((len(xs), *xs[0].shape), xs[0].dtype)
        return xs[0][None] if len(xs) == 1 else jnp.stack(xs)

    return jax.tree.map(join, *layers)
