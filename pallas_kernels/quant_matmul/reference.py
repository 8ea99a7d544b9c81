"""The oracle of `quant_matmul`, and the form that XLA runs where no kernel does.

Letters: M rows, D contracted axis, F output axis, G groups of a scale, C rows of a
group.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels.quant_matmul.layout import IntWeight, unpack_int4

__all__ = ["quant_matmul_reference"]


def quant_matmul_reference(
    x_MD: Array,
    weight: IntWeight,
    x_scale_M: Array | None = None,
    *,
    layer: Array | int | None = None,
    out_dtype: Any = None,
) -> Array:
    """Returns the product; arguments as for `quant_matmul`.

    Integers times integers are summed in int32, all of D or group by group, and are
    exact. Otherwise a scale per channel multiplies the product, and scales of groups
    multiply the weight, which is rounded to the dtype of `x_MD`.
    """
    out_dtype = result_dtype(x_MD, out_dtype)
    if layer is not None:
        weight = jax.tree.map(
            lambda a: jax.lax.dynamic_index_in_dim(a, layer, keepdims=False), weight
        )
    values, scale, zero = weight
    if values.dtype == jnp.uint8:
        values = unpack_int4(values, x_MD.shape[1])
    scale = scale.astype(jnp.float32)
    if jnp.issubdtype(x_MD.dtype, jnp.integer):
        y = _integers(x_MD, values, scale, zero)
    elif scale.shape[0] == 1 and zero is None:
        y = _dot(x_MD, values.astype(x_MD.dtype), jnp.float32) * scale
    else:
        y = _dot(x_MD, _dequantized(values, scale, zero, x_MD.dtype), jnp.float32)
    if x_scale_M is not None:
        y = y * x_scale_M.astype(jnp.float32)[:, None]
    return y.astype(out_dtype)


def result_dtype(x: Array, out_dtype: Any) -> Any:
    """Returns the dtype of a product: float32 for integers unless one is asked for."""
    if out_dtype is not None:
        return out_dtype
    return jnp.float32 if jnp.issubdtype(x.dtype, jnp.integer) else x.dtype


def _integers(x_MD: Array, values: Array, scale: Array, zero: Array | None) -> Array:
    groups, (rows, depth) = scale.shape[0], x_MD.shape
    x_GMC = x_MD.reshape(rows, groups, depth // groups).swapaxes(0, 1)
    zero = jnp.zeros_like(scale) if zero is None else zero.astype(jnp.float32)

    def add(y_MF: Array, group: tuple[Array, ...]) -> tuple[Array, None]:
        x_MC, w_CF, scale_F, zero_F = group
        exact = _dot(x_MC, w_CF, jnp.int32).astype(jnp.float32)
        total = x_MC.astype(jnp.int32).sum(1, keepdims=True).astype(jnp.float32)
        return y_MF + (exact - total * zero_F) * scale_F, None

    # One group at a time: all of them at once are G times the result.
    start = jnp.zeros((rows, values.shape[1]), jnp.float32)
    parts = (x_GMC, values.reshape(groups, depth // groups, -1), scale, zero)
    return jax.lax.scan(add, start, parts)[0]


def _dequantized(values: Array, scale: Array, zero: Array | None, dtype: Any) -> Array:
    depth, features = values.shape
    w_GCF = values.reshape(scale.shape[0], -1, features).astype(jnp.float32)
    if zero is not None:
        w_GCF = w_GCF - zero.astype(jnp.float32)[:, None]
    return (w_GCF * scale[:, None]).astype(dtype).reshape(depth, features)


def _dot(x: Array, w: Array, dtype: Any) -> Array:
    exact = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return jnp.dot(x, w, precision=exact, preferred_element_type=dtype)
