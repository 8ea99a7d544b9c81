"""The oracle of `codebook_matmul`, and the form that XLA runs where no kernel does.

Letters: M rows, D contracted axis, F output axis.
"""

from typing import Any

import jax.numpy as jnp
from jax import Array

from pallas_kernels.codebook_matmul.layout import CodebookWeight, of_layer, values
from pallas_kernels.quant_matmul.layout import IntWeight
from pallas_kernels.quant_matmul.reference import quant_matmul_reference

__all__ = ["codebook_matmul_reference"]


def codebook_matmul_reference(
    x_MD: Array,
    weight: CodebookWeight,
    x_scale_M: Array | None = None,
    *,
    packed: bool = False,
    layer: Array | int | None = None,
    out_dtype: Any = None,
) -> Array:
    """Looks the weight up, then multiplies; arguments as for `codebook_matmul`.

    What is rounded where is said at `quant_matmul_reference`: the entries take the
    place of its integers.
    """
    weight = of_layer(weight, layer)
    found_DF = values(weight, x_MD.shape[1], packed)
    if jnp.issubdtype(x_MD.dtype, jnp.integer):
        found_DF = found_DF.astype(jnp.int8)
    scale = weight.scale
    if scale is None:
        scale = jnp.ones((1, found_DF.shape[1]), jnp.float32)
    return quant_matmul_reference(
        x_MD, IntWeight(found_DF, scale), x_scale_M, out_dtype=out_dtype
    )
