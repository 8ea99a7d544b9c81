"""Which parameters of a model are quantized, and the map over all of them."""

import dataclasses
from collections.abc import Sequence
from typing import Any, Protocol

import jax
from jax import Array

from jaxllm.core.einsum import Leaf

__all__ = ["Quantizer", "input_axis", "quantize_params"]


class Quantizer(Protocol):
    """A way to quantize one weight; a frozen dataclass of options."""

    def quantize(
        self, weight: Array, statistics: Any = None, *, input_axis: int = -2
    ) -> Leaf:
        """Returns the leaf that stands for a weight `[*stack, in, out]`."""


def input_axis(path: Sequence[Any]) -> int | None:
    """Returns the axis that products with a parameter contract.

    Args:
      path: Where the parameter stands in a tree, such as
        `("layers", 3, "mlp", "up", "kernel")`; only the last name counts.

    Returns:
      -2 for a kernel `[in, out]`; -1 for the embedding table `[V, D]`, whose rows are
      looked up and which may be the output head; None for what is never quantized:
      norms, biases, learned positions.
    """
    return {"kernel": -2, "table": -1}.get(path[-1])


def quantize_params(params: dict[str, Any], quantizer: Quantizer) -> dict[str, Any]:
    """Quantizes every kernel and the embedding table of a model.

    Args:
      params: The tree of a model; arrays, or shapes under `jax.eval_shape`.
      quantizer: A method of `quantization.METHODS`, built.

    Returns:
      A tree of the same form, stacks included, with leaves in place of those arrays.
      What is a leaf already stays; of a wrapper, such as an adapter, what is inside is
      quantized.
    """

    def inside(weight: Any, axis: int) -> Any:
        if not isinstance(weight, Leaf):
            return quantizer.quantize(weight, None, input_axis=axis)
        if not hasattr(weight, "base"):
            return weight
        return dataclasses.replace(
            weight,  # type: ignore[type-var]
            base=inside(weight.base, axis),
        )

    def quantized(path: tuple[Any, ...], weight: Any) -> Any:
        names = [getattr(key, "key", None) for key in path]
        axis = input_axis(names)
        return weight if axis is None else inside(weight, axis)

    return jax.tree_util.tree_map_with_path(
        quantized, params, is_leaf=lambda x: isinstance(x, Leaf)
    )
