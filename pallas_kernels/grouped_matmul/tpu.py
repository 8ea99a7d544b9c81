"""`grouped_matmul` for TPUs: blocks of rows, each times its group's matrix.

Letters: M rows, D contracted axis, F output axis, E groups.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels.grouped_matmul.blocks import Blocks
from pallas_kernels.quant_matmul.indexed import Tiles, indexed_matmul, least_rows
from pallas_kernels.quant_matmul.layout import IntWeight

__all__ = ["grouped_matmul_tpu"]


def grouped_matmul_tpu(
    x_MD: Array,
    w_EDF: Array | IntWeight,
    group_sizes_E: Array,
    x_scale_M: Array | None,
    layer: Array | int | None,
    *,
    out_dtype: Any,
    block: Mapping[str, int],
    interpret: Any,
) -> Array:
    """Returns the product; arguments as for `grouped_matmul`.

    Args:
      x_MD: Rows sorted by group.
      w_EDF: E matrices, stacked by layer where one is given. Zero points are not read.
      group_sizes_E: Rows of each group.
      x_scale_M: A scale for each row, or None.
      layer: Which layer of a stacked weight, or None.
      out_dtype: Dtype of the result.
      block: Rows, features and depth of a tile, cut to what the layout allows; fewer
        rows where groups have fewer on average.
      interpret: Handed to `pallas_call`.
    """
    M, E = x_MD.shape[0], group_sizes_E.shape[0]
    least = least_rows(x_MD.dtype)
    average = 1 << (-(-M // E) - 1).bit_length()
    size = max(min(block["rows"], average) // least, 1) * least
    blocks = Blocks.of(group_sizes_E, M, size)
    index_B = blocks.group_B
    if layer is not None:  # experts of all layers in a row, none is copied
        w_EDF = jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), w_EDF)
        index_B = index_B + jnp.asarray(layer, jnp.int32) * E
    values, scale, _ = w_EDF if isinstance(w_EDF, IntWeight) else (w_EDF, None, None)
    y_RF = indexed_matmul(
        blocks.gather(x_MD),
        values,
        scale,
        None if x_scale_M is None else blocks.gather(x_scale_M),
        Tiles(index_B, blocks.used),
        out_dtype=out_dtype,
        block=block,
        interpret=interpret,
    )
    return blocks.scatter(y_RF)
