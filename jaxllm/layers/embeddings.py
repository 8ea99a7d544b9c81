"""Token embeddings, learned positions and the output head.

Letters: B rows, T tokens, V vocabulary, D width, P positions.
"""

import jax.numpy as jnp
from flax import nnx
from jax import Array

from jaxllm.core.einsum import Weight, einsum, take
from jaxllm.layers.parameters import matrix, weight

__all__ = ["Embedder", "Head"]


class Embedder(nnx.Module):
    """Looks up tokens, scales them, and adds learned positions where a model has them.

    Attributes:
      scale: Multiplies the looked-up rows; sqrt(D) for Gemma.
    """

    def __init__(
        self,
        vocabulary: int,
        width: int,
        *,
        positions: int,
        scale: float,
        rngs: nnx.Rngs,
    ):
        self.scale = scale
        self.table = matrix(rngs, (vocabulary, width), ("vocab", "embed"))
        self.positions = (
            matrix(rngs, (positions, width), (None, "embed")) if positions else None
        )

    def __call__(
        self, tokens_BT: Array, positions_BT: Array, dtype: jnp.dtype
    ) -> Array:
        """Returns `[B, T, D]` in `dtype`."""
        x_BTD = take(weight(self.table), tokens_BT, dtype=dtype)
        if self.scale != 1.0:
            x_BTD = x_BTD * jnp.asarray(self.scale, dtype)
        if self.positions is not None:
            x_BTD = x_BTD + take(weight(self.positions), positions_BT, dtype=dtype)
        return x_BTD


class Head(nnx.Module):
    """Projects to the vocabulary with a matrix `[D, V]` of its own."""

    def __init__(self, vocabulary: int, width: int, *, rngs: nnx.Rngs):
        self.kernel = matrix(rngs, (width, vocabulary), ("embed", "vocab"))

    def __call__(self, x_BTD: Array) -> Array:
        """Returns float32 logits `[B, T, V]`."""
        return einsum("btd,dv->btv", x_BTD, weight(self.kernel), out_dtype=jnp.float32)


def tied_logits(x_BTD: Array, table: Weight) -> Array:
    """Returns float32 logits `[B, T, V]` from the embedding table `[V, D]`."""
    return einsum("btd,vd->btv", x_BTD, table, out_dtype=jnp.float32)
