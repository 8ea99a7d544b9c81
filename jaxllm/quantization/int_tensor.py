"""Int8 weights with a scale for each output channel, rounded to nearest.

Letters: B rows, T tokens, D and F the axes of a weight, V vocabulary.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jaxllm.core.einsum import contract
from jaxllm.core.errors import ConfigError
from jaxllm.core.pytree import pytree_dataclass, static

__all__ = ["Int8", "IntTensor"]

_LARGEST = 127  # of int8; -128 stays unused, so that the grid is symmetric


@pytree_dataclass
class IntTensor:
    """A weight as int8 values times float32 scales.

    The axis that a channel's scale is shared over, the one that products contract,
    has size 1 in `scale`; nothing else says which it is, so a slice of a stack is
    itself an `IntTensor`.

    Attributes:
      values: int8 `[*stack, in, out]`, or `[V, D]` for an embedding table.
      scale: float32 `[*stack, 1, out]`, or `[V, 1]` for an embedding table.
      activation_bits: 0 multiplies activations as they are: exact but for float
        rounding. 8 rounds each row of activations to int8 and multiplies integers,
        which costs accuracy and is what a CPU is fast at.
    """

    values: Array
    scale: Array
    activation_bits: int = static(default=0)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight."""
        return self.values.shape

    @property
    def nbytes(self) -> int:
        """Bytes of values and scales."""
        return sum(
            math.prod(x.shape) * jnp.dtype(x.dtype).itemsize
            for x in (self.values, self.scale)
        )

    def einsum(self, eq: str, x: Array, out_dtype: Any) -> Array:
        """Contracts activations with the weight.

        Args:
          eq: Equation such as `"btd,df->btf"` or `"btd,vd->btv"`.
          x: Floating activations.
          out_dtype: Dtype of the result.

        Returns:
          The contraction. A scale is applied to the product, in float32; where it
          varies along a contracted axis it is applied to the weight.

        Source: LLM.int8 (arXiv 2208.07339), section 2.1, for the form with rounded
          activations: a scale for each row of `x` and each column of the weight.
        """
        operands, result = eq.split("->")
        x_axes, w_axes = operands.split(",")
        contracted = [i for i, axis in enumerate(w_axes) if axis not in result]
        if any(self.scale.shape[i] != 1 for i in contracted):
            return contract(eq, x, self.dequantize(x.dtype), out_dtype)
        scale = _aligned(self.scale, w_axes, result)
        if not self.activation_bits:
            product = contract(eq, x, self.values.astype(x.dtype), jnp.float32)
            return (product * scale).astype(out_dtype)
        summed = tuple(i for i, axis in enumerate(x_axes) if axis not in result)
        largest = jnp.max(jnp.abs(x), axis=summed, keepdims=True)
        rounded, x_scale = _round(x, largest)
        product = contract(eq, rounded, self.values, jnp.float32)
        product = product * _aligned(x_scale, x_axes, result)
        return (product * scale).astype(out_dtype)

    def dequantize(self, dtype: Any) -> Array:
        """Returns the weight as an array; the product is rounded once, to `dtype`."""
        return (self.values.astype(jnp.float32) * self.scale).astype(dtype)

    def take(self, ids: Array, dtype: Any) -> Array:
        """Returns rows of a table `[V, D]`, equal to those of `dequantize(dtype)`.

        Args:
          ids: Integers of any shape; one outside `[0, V)` reads the nearest row.
          dtype: Dtype of the result.

        Returns:
          `[*ids.shape, D]`.
        """
        ids = jnp.clip(ids, 0, self.values.shape[0] - 1)  # a negative id would wrap
        # Clipping reads the one row of a scale [1, D] for every id.
        scale = self.scale.at[ids].get(mode="clip")
        return (self.values[ids].astype(jnp.float32) * scale).astype(dtype)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Int8:
    """Int8 for each output channel, symmetric, rounded to nearest; needs no data.

    Attributes:
      activations: 0 keeps activations as they are, 8 rounds them to int8 as well.

    Source: LLM.int8 (arXiv 2208.07339), section 2.1, without its outlier part.
    """

    activations: int = 0

    def __post_init__(self) -> None:
        if self.activations not in (0, 8):
            raise ConfigError(
                f"cannot quantize: int8 has activations={self.activations}, expected "
                "0 or 8. Leave it out to keep activations as they are."
            )

    def quantize(
        self, weight: Array, statistics: Any = None, *, input_axis: int = -2
    ) -> IntTensor:
        """Rounds a weight.

        Args:
          weight: Floating `[*stack, in, out]`, or `[V, D]`.
          statistics: Of the inputs, from calibration; not used.
          input_axis: The axis that products contract: -2 for `[in, out]`, -1 for an
            embedding table that is also the output head.

        Returns:
          The leaf. No element is off by more than half its channel's scale. A channel
          that is not finite stays so: its scale is not finite.
        """
        del statistics
        values, scale = _quantize(weight, input_axis)
        return IntTensor(values, scale, self.activations)


# Compiled even for one weight: a quotient rounds otherwise than op by op, and the
# same weight has to give the same leaf whether it is quantized alone or in a tree.
@functools.partial(jax.jit, static_argnums=1)
def _quantize(weight: Array, input_axis: int) -> tuple[Array, Array]:
    largest = jnp.max(jnp.abs(weight), axis=input_axis, keepdims=True)
    # The two passes would share one float32 copy of a bfloat16 weight.
    weight, largest = jax.lax.optimization_barrier((weight, largest))
    return _round(weight, largest)


def _round(x: Array, largest: Array) -> tuple[Array, Array]:
    """Returns int8 values and their float32 scale, shaped like `largest`."""
    x, scale = x.astype(jnp.float32), largest.astype(jnp.float32) / _LARGEST
    # Also when a quotient of tiny numbers underflows to zero.
    scale = jnp.where(scale == 0, 1.0, scale)
    rounded = jnp.clip(jnp.round(x / scale), -_LARGEST, _LARGEST)
    return rounded.astype(jnp.int8), scale


def _aligned(scale: Array, axes: str, result: str) -> Array:
    """Drops the axes of `scale` that are summed and lays it out like `result`."""
    summed = [i for i, axis in enumerate(axes) if axis not in result]
    kept = [axis for axis in axes if axis in result]
    order = sorted(range(len(kept)), key=lambda i: result.index(kept[i]))
    ordered = jnp.squeeze(scale, summed).transpose(order)
    missing = [i for i, axis in enumerate(result) if axis not in axes]
    return jnp.expand_dims(ordered, missing)
