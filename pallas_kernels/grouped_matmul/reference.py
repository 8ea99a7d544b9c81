"""The oracle of `grouped_matmul`, and the forms that XLA runs where no kernel does.

Letters: M rows, D contracted axis, F output axis, E groups, B blocks of C rows.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels.grouped_matmul.blocks import Blocks
from pallas_kernels.quant_matmul.layout import IntWeight
from pallas_kernels.quant_matmul.reference import quant_matmul_reference

__all__ = [
    "grouped_matmul_blocked",
    "grouped_matmul_ragged",
    "grouped_matmul_reference",
]

_LARGEST_BLOCK = 32


def grouped_matmul_reference(
    x_MD: Array,
    w_EDF: Array | IntWeight,
    group_sizes_E: Array,
    x_scale_M: Array | None = None,
    *,
    layer: Array | int | None = None,
    out_dtype: Any = None,
) -> Array:
    """Multiplies all rows by every matrix and picks; arguments as `grouped_matmul`."""
    w_EDF = _of_layer(w_EDF, layer)
    ends_E = jnp.cumsum(group_sizes_E)
    group_M = jnp.searchsorted(ends_E, jnp.arange(x_MD.shape[0]), side="right")

    def product(w_DF: Array | IntWeight) -> Array:
        return _product(x_MD, w_DF, x_scale_M, out_dtype)

    y_EMF = jax.vmap(product)(w_EDF)
    picked_EM = jnp.arange(y_EMF.shape[0])[:, None] == group_M
    return jnp.where(picked_EM[..., None], y_EMF, 0).sum(0, dtype=y_EMF.dtype)


def grouped_matmul_blocked(
    x_MD: Array,
    w_EDF: Array | IntWeight,
    group_sizes_E: Array,
    x_scale_M: Array | None = None,
    *,
    layer: Array | int | None = None,
    out_dtype: Any = None,
) -> Array:
    """Multiplies block by block; arguments as for `grouped_matmul`.

    Few rows meet few blocks, and so no more than their own matrices are read.
    """
    w_EDF = _of_layer(w_EDF, layer)
    M, E = x_MD.shape[0], group_sizes_E.shape[0]
    size = 1 << (max(1, M // E) - 1).bit_length()
    # One row of a narrow dtype takes a scalar path on a CPU.
    blocks = Blocks.of(group_sizes_E, M, max(2, min(_LARGEST_BLOCK, size)))
    x_BCD = blocks.gather(x_MD).reshape(blocks.count, blocks.size, -1)
    scale_BC = None
    if x_scale_M is not None:
        scale_BC = blocks.gather(x_scale_M).reshape(blocks.count, blocks.size)

    def multiply(block: tuple[Any, ...]) -> Array:
        x_CD, x_scale_C, group = block
        w_DF = jax.tree.map(
            lambda a: jax.lax.dynamic_index_in_dim(a, group, keepdims=False), w_EDF
        )
        return _product(x_CD, w_DF, x_scale_C, out_dtype)

    y_BCF = jax.lax.map(multiply, (x_BCD, scale_BC, blocks.group_B))
    return blocks.scatter(y_BCF.reshape(blocks.count * blocks.size, -1))


def grouped_matmul_ragged(
    x_MD: Array, w_EDF: Array, group_sizes_E: Array, *, out_dtype: Any = None
) -> Array:
    """Multiplies by `jax.lax.ragged_dot`, a grouped kernel of XLA's on a TPU."""
    exact = jax.lax.Precision.HIGHEST if x_MD.dtype == jnp.float32 else None
    y_MF = jax.lax.ragged_dot(
        x_MD,
        w_EDF.astype(x_MD.dtype),
        group_sizes_E,
        precision=exact,
        preferred_element_type=jnp.float32,
    )
    # What lies past the sum is not said to be 0 on every device.
    inside_M = jnp.arange(x_MD.shape[0]) < group_sizes_E.sum()
    return jnp.where(inside_M[:, None], y_MF, 0).astype(out_dtype or x_MD.dtype)


def _product(
    x: Array, w: Array | IntWeight, x_scale: Array | None, out_dtype: Any
) -> Array:
    if isinstance(w, IntWeight):
        return quant_matmul_reference(x, w, x_scale, out_dtype=out_dtype)
    exact = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    y = jnp.dot(
        x, w.astype(x.dtype), precision=exact, preferred_element_type=jnp.float32
    )
    return y.astype(out_dtype or x.dtype)


def _of_layer(w: Array | IntWeight, layer: Array | int | None) -> Array | IntWeight:
    if layer is None:
        return w
    return jax.tree.map(
        lambda a: jax.lax.dynamic_index_in_dim(a, layer, keepdims=False), w
    )
