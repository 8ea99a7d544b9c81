"""Products with integer weights: int8 and packed int4, scaled by channel or by group.

On a TPU the weights are read as they are stored. Elsewhere the form in `reference`
runs: XLA dequantizes, except for int8 times int8, which it multiplies as integers.
jax ships no TPU kernel for this; XLA's own int8 products are the alternative that
`implementation="reference"` runs there.

Letters: M rows, D contracted axis, F output axis, G groups of a scale.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels import dispatch
from pallas_kernels.quant_matmul.layout import IntWeight, pack_int4, unpack_int4
from pallas_kernels.quant_matmul.layout import packed_rows as _packed_rows
from pallas_kernels.quant_matmul.reference import quant_matmul_reference, result_dtype
from pallas_kernels.quant_matmul.shapes import Shape, block_key
from pallas_kernels.quant_matmul.tpu import quant_matmul_tpu

__all__ = [
    "IntWeight",
    "pack_int4",
    "quant_matmul",
    "quant_matmul_reference",
    "unpack_int4",
]

_BLOCK = {"rows": 256, "features": 512, "depth": 1024}


def quant_matmul(
    x_MD: Array,
    weight: IntWeight,
    x_scale_M: Array | None = None,
    *,
    layer: Array | int | None = None,
    out_dtype: Any = None,
    implementation: str | None = None,
    block: Mapping[str, int] | None = None,
) -> Array:
    """Multiplies activations by an integer weight.

    Args:
      x_MD: bfloat16 or float32 activations; or int8 ones, which are multiplied as
        integers and summed exactly, in int32 over a group.
      weight: `IntWeight` of `[D, F]`; stacked `[L, ., F]` where `layer` is given.
      x_scale_M: Floating, multiplies each row of the product; the scale of a row that
        was rounded to int8.
      layer: Which layer of a stacked weight to multiply by, without copying it out of
        the stack; one outside `[0, L)` is the nearest.
      out_dtype: Dtype of the result; that of `x_MD` when None, float32 for int8.
      implementation: As for `dispatch.choose`.
      block: Rows, features and depth of a tile, under these names; the depth, and
        with it the order of a row's sum, does not depend on M by default.

    Returns:
      `[M, F]`, accumulated in float32 or int32.

    Raises:
      ValueError: The shapes do not belong together, or the named implementation
        cannot run them.
      NotImplementedError: The named implementation does not exist here.

    Source: LLM.int8 (arXiv 2208.07339) section 2.1 for scales of rows and channels;
      GPTQ (arXiv 2210.17323) section 4 for groups.
    """
    if layer is not None:  # a negative index would wrap
        layer = jnp.clip(layer, 0, weight.values.shape[0] - 1)
    shape = _shape(x_MD, weight, x_scale_M, layer)
    chosen = dispatch.choose("quant_matmul", implementation, shape)
    if chosen == "reference":
        return quant_matmul_reference(
            x_MD, weight, x_scale_M, layer=layer, out_dtype=out_dtype
        )
    out_dtype = result_dtype(x_MD, out_dtype)
    sizes = dispatch.blocks("quant_matmul", block_key(shape), _BLOCK)
    y_MF = quant_matmul_tpu(
        x_MD,
        weight,
        x_scale_M,
        layer,
        out_dtype=out_dtype if weight.zero is None else jnp.float32,
        block={**sizes, **(block or {})},
        interpret=dispatch.interpret_mode(chosen),
    )
    if weight.zero is None:
        return y_MF
    return (y_MF - _zeros(x_MD, weight, x_scale_M, layer)).astype(out_dtype)


def _zeros(
    x_MD: Array, weight: IntWeight, x_scale_M: Array | None, layer: Array | int | None
) -> Array:
    """Returns what the zero points take off the product, float32 `[M, F]`."""
    zero, scale = weight.zero, weight.scale
    assert zero is not None
    if layer is not None:
        zero = jax.lax.dynamic_index_in_dim(zero, layer, keepdims=False)
        scale = jax.lax.dynamic_index_in_dim(scale, layer, keepdims=False)
    shift_GF = zero.astype(jnp.float32) * scale.astype(jnp.float32)
    wide = jnp.int32 if jnp.issubdtype(x_MD.dtype, jnp.integer) else jnp.float32
    x_MGC = x_MD.astype(wide).reshape(x_MD.shape[0], shift_GF.shape[0], -1)
    total_MG = x_MGC.sum(-1).astype(jnp.float32)
    if x_scale_M is not None:
        total_MG = total_MG * x_scale_M.astype(jnp.float32)[:, None]
    return jnp.dot(total_MG, shift_GF, precision=jax.lax.Precision.HIGHEST)


def _shape(
    x_MD: Array, weight: IntWeight, x_scale_M: Array | None, layer: Array | int | None
) -> Shape:
    """Returns the call's shape.

    Raises:
      ValueError: The operands do not belong together.
    """
    values, scale, zero = weight
    rank, (M, D) = 2 if layer is None else 3, x_MD.shape
    if values.ndim != rank or scale.ndim != rank:
        raise ValueError(
            f"quant_matmul: values {values.shape} and scale {scale.shape} with "
            f"layer={layer}, expected {rank} axes each."
        )
    bits = {"int8": 8, "uint8": 4, "int4": 0}.get(values.dtype.name)
    if bits is None:
        raise ValueError(
            f"quant_matmul: values are {values.dtype}, expected int8, int4, or uint8 "
            "of pack_int4."
        )
    rows, groups = (_packed_rows(D) if bits == 4 else D), scale.shape[-2]
    if values.shape[-2] != rows or scale.shape[-1] != values.shape[-1]:
        raise ValueError(
            f"quant_matmul: values {values.shape} and scale {scale.shape} for "
            f"activations {x_MD.shape}, expected {rows} rows of values and one "
            "column of scales for each of values."
        )
    if not groups or D % groups or (zero is not None and zero.shape != scale.shape):
        raise ValueError(
            f"quant_matmul: scale {scale.shape}, zero "
            f"{None if zero is None else zero.shape} and {D} rows of a weight, "
            "expected a divisor of the rows, and as many zero points as scales."
        )
    if x_scale_M is not None and x_scale_M.shape != (M,):
        raise ValueError(
            f"quant_matmul: x_scale {x_scale_M.shape}, expected one for each of {M} "
            "rows."
        )
    return Shape(
        rows=M,
        depth=D,
        features=values.shape[-1],
        groups=groups,
        bits=bits,
        dtype=x_MD.dtype.name,
        zeros=zero is not None,
        layers=0 if layer is None else values.shape[0],
    )
