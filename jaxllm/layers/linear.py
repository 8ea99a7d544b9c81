"""A projection with an optional bias."""

from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax import Array

from jaxllm.core.einsum import dense, einsum
from jaxllm.layers.parameters import constant, matrix, weight

__all__ = ["Linear"]


class Linear(nnx.Module):
    """`x @ kernel + bias`, with `kernel` `[in, out]`."""

    def __init__(
        self,
        sizes: tuple[int, int],
        axes: tuple[str | None, str | None],
        *,
        bias: bool = False,
        rngs: nnx.Rngs,
    ):
        self.kernel = matrix(rngs, sizes, axes)
        self.bias = constant(0.0, sizes[1:], axes[1:]) if bias else None

    def __call__(self, x: Array, out_dtype: Any = None) -> Array:
        """Maps `[B, T, in]` to `[B, T, out]`, in the dtype of `x` unless told."""
        wide = einsum("bti,io->bto", x, weight(self.kernel), out_dtype=jnp.float32)
        if self.bias is not None:
            wide = wide + dense(weight(self.bias), jnp.float32)
        return wide.astype(x.dtype if out_dtype is None else out_dtype)
