"""The three doors to a weight: `einsum`, `take`, `grouped_matmul`.

A weight is an array `[*stack, in, out]` or a *leaf*: a registered dataclass which
knows how to multiply itself (`Leaf`). A model calls these doors and nothing else, so
it never knows that a weight is quantized, adapted or sharded.

Products accumulate in float32. On a CPU a product of one bfloat16 row takes a scalar
path that is over ten times slower than the same product of two rows; such a row is
padded there, and only there.
"""

import math
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax import Array

__all__ = [
    "Leaf",
    "Weight",
    "contract",
    "dense",
    "einsum",
    "grouped_matmul",
    "grouped_matmul_reference",
    "take",
    "unwrapped",
]


@runtime_checkable
class Leaf(Protocol):
    """A weight that multiplies itself; `jaxllm.quantization` holds the kinds.

    No static field of a leaf mentions a shape or a number of layers, so that scan
    and vmap slice it as they slice an array. A wrapper around another weight, such as
    an adapter, is a dataclass that holds it in a field `base`.
    """

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the array that the leaf stands for."""

    @property
    def nbytes(self) -> int:
        """The bytes that the leaf holds."""

    def einsum(self, eq: str, x: Array, out_dtype: Any) -> Array:
        """Returns `einsum(eq, x, self)` in `out_dtype`."""

    def dequantize(self, dtype: Any) -> Array:
        """Returns the array that the leaf stands for."""


Weight = Array | Leaf

_FEW = 64
"""Most rows that a CPU multiplies from the weight's side."""


def dense(w: Weight, dtype: Any) -> Array:
    """Returns a weight as a plain array of the given dtype."""
    return w.astype(dtype) if isinstance(w, jax.Array) else w.dequantize(dtype)


def unwrapped(w: Any) -> Any:
    """Returns the weight inside all wrappers: an array, or a leaf that has no base."""
    while isinstance(w, Leaf) and hasattr(w, "base"):
        w = w.base
    return w


def einsum(eq: str, x: Array, w: Weight, *, out_dtype: Any = None) -> Array:
    """Contracts activations with a weight.

    Args:
      eq: Equation such as `"btd,df->btf"`; the first operand is `x`.
      x: Activations; their dtype is the dtype of the product's operands.
      w: Array or leaf.
      out_dtype: Dtype of the result; that of `x` when None.

    Returns:
      The contraction, accumulated in float32.
    """
    out_dtype = x.dtype if out_dtype is None else out_dtype
    if isinstance(w, jax.Array):
        return contract(eq, x, w.astype(x.dtype), out_dtype)
    return w.einsum(eq, x, out_dtype)


def contract(eq: str, x: Array, w: Array, out_dtype: Any) -> Array:
    """Contracts two arrays of one dtype; integers accumulate in int32.

    Args:
      eq: Einsum equation with two operands.
      x: Left operand. On a CPU a single row (the product of the axes that `w` lacks
        is 1) of a narrow dtype is padded to two, and a few rows of float32 against
        an `[out, in]` weight are multiplied from the other side, which takes
        two-thirds of the time.
      w: Right operand, of the dtype of `x`.
      out_dtype: Dtype of the result.

    Returns:
      The contraction in `out_dtype`.
    """
    wide = jnp.int32 if jnp.issubdtype(x.dtype, jnp.integer) else jnp.float32
    if x.dtype == jnp.float64:
        wide = jnp.float64

    def product(a: Array, b: Array) -> Array:
        return jnp.einsum(eq, a, b, preferred_element_type=wide)

    row_axes = _row_axes(eq)
    rows = math.prod(x.shape[axis] for axis, _ in row_axes)
    if rows == 1 and row_axes and x.dtype.itemsize < 4:
        x_axis, out_axis = row_axes[-1]

        def on_cpu(a: Array, b: Array) -> Array:
            pad = [(0, int(axis == x_axis)) for axis in range(a.ndim)]
            two = product(jnp.pad(a, pad), b)
            return jax.lax.slice_in_dim(two, 0, 1, axis=out_axis)

    elif 1 < rows <= _FEW and x.dtype == jnp.float32 and _is_output_major(eq):
        operands, result = eq.split("->")
        x_axes, w_axes = operands.split(",")
        weight_first = [a for a in w_axes + x_axes if a in result]

        def on_cpu(a: Array, b: Array) -> Array:
            swapped = f"{w_axes},{x_axes}->{''.join(weight_first)}"
            y = jnp.einsum(swapped, b, a, preferred_element_type=wide)
            return y.transpose([weight_first.index(axis) for axis in result])

    else:
        return product(x, w).astype(out_dtype)
    return jax.lax.platform_dependent(x, w, cpu=on_cpu, default=product).astype(
        out_dtype
    )


def _is_output_major(eq: str) -> bool:
    """Whether the weight is `[out, in]` like a tied head, and nothing is batched."""
    operands, result = eq.split("->")
    x_axes, w_axes = operands.split(",")
    return w_axes[-1] not in result and not set(w_axes) & set(x_axes) & set(result)


def _row_axes(eq: str) -> list[tuple[int, int]]:
    """Returns (axis in x, axis in the result) of every axis that only x has."""
    operands, result = eq.split("->")
    x_axes, w_axes = operands.split(",")
    return [
        (i, result.index(a))
        for i, a in enumerate(x_axes)
        if a not in w_axes and a in result
    ]


def take(w: Weight, ids: Array, *, dtype: Any) -> Array:
    """Looks up rows of an embedding table.

    Args:
      w: `[V, D]` array or leaf; a leaf with a `take` of its own is asked for it,
        any other is dequantized.
      ids: Integer array of any shape; a value outside `[0, V)` reads the nearest row.
      dtype: Dtype of the result.

    Returns:
      `[*ids.shape, D]`.
    """
    if not isinstance(w, jax.Array):
        if hasattr(w, "take"):
            return w.take(ids, dtype)
        w = w.dequantize(dtype)
    if w.dtype != jnp.bfloat16:
        return _rows(w, ids).astype(dtype)
    rows = jax.lax.platform_dependent(w, ids, cpu=_rows_of_bits, default=_rows)
    return rows.astype(dtype)


def _rows(w: Array, ids: Array) -> Array:
    return w.at[ids].get(mode="clip", wrap_negative_indices=False)


@jax.custom_jvp
def _rows_of_bits(w: Array, ids: Array) -> Array:
    # XLA:CPU widens a bfloat16 gather to float32, the whole table with it: in a loop
    # twice the table of temporaries, against once for its bits.
    cast = jax.lax.bitcast_convert_type
    return cast(_rows(cast(w, jnp.uint16), ids), w.dtype)


@_rows_of_bits.defjvp
def _rows_of_bits_tangent(primals: Any, tangents: Any) -> tuple[Array, Array]:
    # Bits have no gradient, the numbers that they stand for have.
    return _rows_of_bits(*primals), _rows(tangents[0], primals[1])


def grouped_matmul_reference(x_MD: Array, w_EDF: Weight, group_sizes_E: Array) -> Array:
    """Multiplies each row by its group's matrix, with every matrix computed."""
    group_M = _group_of_row(group_sizes_E, x_MD.shape[0])
    y_EMF = jnp.einsum(
        "md,edf->emf",
        x_MD,
        dense(w_EDF, x_MD.dtype),
        preferred_element_type=jnp.float32,
    )
    one_hot_ME = jax.nn.one_hot(group_M, group_sizes_E.shape[0], dtype=jnp.float32)
    return jnp.einsum("me,emf->mf", one_hot_ME, y_EMF).astype(x_MD.dtype)


def grouped_matmul(x_MD: Array, w_EDF: Weight, group_sizes_E: Array) -> Array:
    """Multiplies consecutive groups of rows by a matrix each (experts).

    Args:
      x_MD: Rows sorted by group, M of them.
      w_EDF: E matrices, an array or a leaf; a leaf with a `grouped_matmul` of its own
        is asked for it, any other is dequantized.
      group_sizes_E: int32, rows of each group. Rows past their sum give zeros.

    Returns:
      `[M, F]` in the dtype of `x_MD`.

    Source: MegaBlocks (arXiv 2211.15841), section 5.1, for the blocks of the CPU
      form; the TPU form is `jax.lax.ragged_dot`, which is dense on other platforms.
    """
    if not isinstance(w_EDF, jax.Array):
        if hasattr(w_EDF, "grouped_matmul"):
            return w_EDF.grouped_matmul(x_MD, group_sizes_E)
        w_EDF = w_EDF.dequantize(x_MD.dtype)
    w_EDF = w_EDF.astype(x_MD.dtype)
    group_sizes_E = group_sizes_E.astype(jnp.int32)
    y_MF = jax.lax.platform_dependent(
        x_MD, w_EDF, group_sizes_E, tpu=_ragged, default=_blocked
    )
    inside_M = jnp.arange(x_MD.shape[0]) < group_sizes_E.sum()
    return jnp.where(inside_M[:, None], y_MF, 0).astype(x_MD.dtype)


def _ragged(x_MD: Array, w_EDF: Array, group_sizes_E: Array) -> Array:
    return jax.lax.ragged_dot(
        x_MD, w_EDF, group_sizes_E, preferred_element_type=jnp.float32
    )


def _blocked(x_MD: Array, w_EDF: Array, group_sizes_E: Array) -> Array:
    """Pads every group to whole blocks and multiplies block by block."""
    rows, groups = x_MD.shape[0], w_EDF.shape[0]
    block = max(2, min(32, 1 << (max(1, rows // groups) - 1).bit_length()))
    blocks = -(-rows // block) + groups
    blocks_E = -(-group_sizes_E // block)
    first_block_E = jnp.cumsum(blocks_E) - blocks_E
    first_row_E = jnp.cumsum(group_sizes_E) - group_sizes_E
    group_M = _group_of_row(group_sizes_E, rows)
    group_M = jnp.minimum(group_M, groups - 1)
    slot_M = first_block_E[group_M] * block + jnp.arange(rows) - first_row_E[group_M]
    padded = jnp.zeros((blocks * block, x_MD.shape[1]), x_MD.dtype)
    padded = padded.at[slot_M].set(x_MD, mode="drop").reshape(blocks, block, -1)
    group_of_block = jnp.searchsorted(
        jnp.cumsum(blocks_E), jnp.arange(blocks), side="right"
    )
    group_of_block = jnp.minimum(group_of_block, groups - 1)

    def multiply(xs: tuple[Array, Array]) -> Array:
        x_CD, group = xs
        w_DF = jax.lax.dynamic_index_in_dim(w_EDF, group, keepdims=False)
        return jnp.dot(x_CD, w_DF, preferred_element_type=jnp.float32)

    y = jax.lax.map(multiply, (padded, group_of_block))
    return y.reshape(blocks * block, -1).at[slot_M].get(mode="fill", fill_value=0)


def _group_of_row(group_sizes_E: Array, rows: int) -> Array:
    return jnp.searchsorted(jnp.cumsum(group_sizes_E), jnp.arange(rows), side="right")
