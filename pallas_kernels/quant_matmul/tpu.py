"""`quant_matmul` for TPUs: a layer's weights are read out of their stack.

Letters: M rows, D contracted axis, F output axis, G groups of a scale.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels.quant_matmul.indexed import (
    Plan,
    Tiles,
    indexed_matmul,
    least_rows,
    plan,
)
from pallas_kernels.quant_matmul.layout import IntWeight

__all__ = ["quant_matmul_tpu"]


def quant_matmul_tpu(
    x_MD: Array,
    weight: IntWeight,
    x_scale_M: Array | None,
    layer: Array | int | None,
    *,
    out_dtype: Any,
    block: Mapping[str, int],
    interpret: Any,
) -> Array:
    """Returns the product without its zero points; arguments as for `quant_matmul`.

    Args:
      x_MD: Activations.
      weight: Its zero points are not read.
      x_scale_M: A scale for each row, or None.
      layer: Which layer of a stacked weight, or None.
      out_dtype: Dtype of the result.
      block: Rows, features and depth of a tile, cut to what the layout allows.
      interpret: Handed to `pallas_call`.
    """
    if layer is None:
        weight, layer = jax.tree.map(lambda a: a[None], weight), 0
    M, D = x_MD.shape
    weight = _whole_tiles_of_scales(weight, layer, D, block["depth"])
    least = least_rows(x_MD.dtype)
    tile = min(max(block["rows"] // least, 1), -(-M // least)) * least
    tiles = -(-M // tile)
    x = jnp.pad(x_MD, ((0, tiles * tile - M), (0, 0)))
    if x_scale_M is not None:
        x_scale_M = jnp.pad(x_scale_M, (0, tiles * tile - M))
    return indexed_matmul(
        x,
        weight.values,
        weight.scale,
        x_scale_M,
        Tiles(jnp.full((tiles,), layer, jnp.int32), tiles),
        out_dtype=out_dtype,
        block=block,
        interpret=interpret,
    )[:M]


def _whole_tiles_of_scales(
    weight: IntWeight, layer: Array | int, depth: int, wanted: int
) -> IntWeight:
    """Takes scales that have to be padded out of their stack, lest all of it is."""
    groups = weight.scale.shape[1]
    cut = plan(depth, groups, weight.values.dtype == jnp.uint8, wanted)
    if not isinstance(cut, Plan) or not cut.missing(groups):
        return weight
    scale = jax.lax.dynamic_index_in_dim(weight.scale, layer, keepdims=True)
    return weight._replace(scale=scale)
