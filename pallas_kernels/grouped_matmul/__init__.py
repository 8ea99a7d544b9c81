"""Products of groups of rows with a matrix each: the experts of a mixture.

On a TPU, `jax.lax.ragged_dot` is already a grouped kernel for one layer's floating
matrices, so that is what runs for them. The kernel here is for
what it lacks: integer weights, which it would have to dequantize for all experts, and
layers read out of their stack, which it would copy first. Elsewhere `ragged_dot`
multiplies all rows by every matrix, so blocks of rows are multiplied one after the
other, each by its own matrix; a few rows so read no more matrices than their own.

Letters: M rows, D contracted axis, F output axis, E groups, G groups of a scale, L
layers.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels import dispatch
from pallas_kernels.grouped_matmul.reference import (
    grouped_matmul_blocked,
    grouped_matmul_ragged,
    grouped_matmul_reference,
)
from pallas_kernels.grouped_matmul.shapes import Shape, block_key
from pallas_kernels.grouped_matmul.tpu import grouped_matmul_tpu
from pallas_kernels.quant_matmul import shapes as matrices
from pallas_kernels.quant_matmul.layout import IntWeight, packed_rows
from pallas_kernels.quant_matmul.reference import result_dtype

__all__ = [
    "grouped_matmul",
    "grouped_matmul_blocked",
    "grouped_matmul_ragged",
    "grouped_matmul_reference",
]

_BLOCK = {"rows": 128, "features": 512, "depth": 1024}
_BITS = {"int8": 8, "uint8": 4, "int4": 0}


def grouped_matmul(
    x_MD: Array,
    w_EDF: Array | IntWeight,
    group_sizes_E: Array,
    x_scale_M: Array | None = None,
    *,
    layer: Array | int | None = None,
    out_dtype: Any = None,
    implementation: str | None = None,
    block: Mapping[str, int] | None = None,
) -> Array:
    """Multiplies consecutive groups of rows by a matrix each.

    Args:
      x_MD: bfloat16 or float32 rows sorted by group; int8 ones for integer weights.
      w_EDF: Floating, or an `IntWeight` whose fields begin with the axis E; with an
        axis L before it where `layer` is given.
      group_sizes_E: int32, rows of each group, 0 too. Rows past their sum give zeros,
        and what the sum exceeds M by counts for nothing.
      x_scale_M: Floating, multiplies each row of the product.
      layer: Which layer of stacked matrices; one outside `[0, L)` is the nearest.
      out_dtype: Dtype of the result; that of `x_MD` when None, float32 for int8.
      implementation: As for `dispatch.choose`; "reference" is the product with every
        matrix, and None takes a better form of XLA's. The kernel has no gradient.
      block: Rows, features and depth of a tile; fewer rows for small groups.

    Returns:
      `[M, F]`, accumulated in float32 or int32.

    Raises:
      ValueError: The shapes do not belong together, or the named implementation
        cannot run them.
      NotImplementedError: The named implementation does not exist here.

    Source: MegaBlocks (arXiv 2211.15841) section 5.1.
    """
    if layer is not None:  # a negative index would wrap
        layers = jax.tree.leaves(w_EDF)[0].shape[0]
        layer = jnp.clip(layer, 0, layers - 1)
    shape = _shape(x_MD, w_EDF, group_sizes_E, x_scale_M, layer)
    chosen = dispatch.choose("grouped_matmul", implementation, shape)
    floating = None if isinstance(w_EDF, IntWeight) or layer is not None else w_EDF
    if floating is not None and x_scale_M is None and _of_xla(implementation):
        return grouped_matmul_ragged(x_MD, floating, group_sizes_E, out_dtype=out_dtype)
    if chosen == "reference":
        form = grouped_matmul_reference if implementation else grouped_matmul_blocked
        return form(
            x_MD, w_EDF, group_sizes_E, x_scale_M, layer=layer, out_dtype=out_dtype
        )
    sizes = dispatch.blocks("grouped_matmul", block_key(shape), _BLOCK)
    return grouped_matmul_tpu(
        x_MD,
        w_EDF,
        group_sizes_E,
        x_scale_M,
        layer,
        out_dtype=result_dtype(x_MD, out_dtype),
        block={**sizes, **(block or {})},
        interpret=dispatch.interpret_mode(chosen),
    )


def _of_xla(implementation: str | None) -> bool:
    """Whether XLA has a grouped kernel here, and a call may take it."""
    return implementation in (None, "tpu") and dispatch.target().platform == "tpu"


def _shape(
    x_MD: Array,
    w_EDF: Array | IntWeight,
    group_sizes_E: Array,
    x_scale_M: Array | None,
    layer: Array | int | None,
) -> Shape:
    """Returns the call's shape.

    Raises:
      ValueError: The operands do not belong together.
    """
    values, scale, zero = w_EDF if isinstance(w_EDF, IntWeight) else (w_EDF, None, None)
    rank, (M, D), (E,) = 3 if layer is None else 4, x_MD.shape, group_sizes_E.shape
    bits = 16 if scale is None else _BITS.get(values.dtype.name)
    integers = jnp.issubdtype(x_MD.dtype, jnp.integer)
    if bits is None or (bits == 16 and integers):
        raise ValueError(
            f"grouped_matmul: weights {values.dtype} and rows {x_MD.dtype}, expected "
            "int8, int4, or uint8 of pack_int4, with a scale, or floating weights and "
            "rows."
        )
    rows = packed_rows(D) if bits == 4 else D
    if values.ndim != rank or values.shape[-3:-1] != (E, rows):
        raise ValueError(
            f"grouped_matmul: weights {values.shape} for rows {x_MD.shape} in {E} "
            f"groups with layer={layer}, expected {rank} axes and {(E, rows)} before "
            "the last."
        )
    groups = 1 if scale is None else scale.shape[-2]
    if scale is not None:
        expected = (*values.shape[:-2], groups, values.shape[-1])
        alike = zero is None or zero.shape == scale.shape
        if scale.shape != expected or not groups or D % groups or not alike:
            raise ValueError(
                f"grouped_matmul: scale {scale.shape} for weights {values.shape}, "
                f"expected {expected} with a divisor of {D} before the last axis, and "
                "zero points of the same shape."
            )
    if x_scale_M is not None and x_scale_M.shape != (M,):
        raise ValueError(
            f"grouped_matmul: x_scale {x_scale_M.shape}, expected one for each of {M} "
            "rows."
        )
    matrix = matrices.Shape(
        rows=M,
        depth=D,
        features=values.shape[-1],
        groups=groups,
        bits=bits,
        dtype=x_MD.dtype.name,
        zeros=zero is not None,
        layers=0 if layer is None else values.shape[0],
    )
    return Shape(experts=E, matrix=matrix)
