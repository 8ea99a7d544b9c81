"""The attention block: project, rotate, attend over segments, project back.

Letters: B rows, T tokens, D width, N query heads, K kv heads, H head dim.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax import Array

from jaxllm.attention.masks import Mask
from jaxllm.attention.ring import ring_attention, ring_size
from jaxllm.attention.rope import apply_rope
from jaxllm.attention.segments import Segment, attend
from jaxllm.core.sharding import ShardingRules, constrain
from jaxllm.layers.linear import Linear
from jaxllm.layers.norms import Norm, NormConfig

__all__ = ["Attention", "AttentionConfig", "LayerContext"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionConfig:
    """The shape of attention.

    Attributes:
      num_heads: N.
      num_kv_heads: K, divides N; 1 is multi-query, N multi-head attention.
      head_dim: H.
      qkv_bias: Whether query, key and value projections have a bias.
      output_bias: Whether the output projection has one.
      qk_norm: Normalisation of every query and key head before rotation, if any.
      scale: Multiplies the logits; `H ** -0.5` when None.
      softcap: c of `c * tanh(logits / c)`, if any.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    qkv_bias: bool = False
    output_bias: bool = False
    qk_norm: NormConfig | None = None
    scale: float | None = None
    softcap: float | None = None


@dataclasses.dataclass(frozen=True)
class LayerContext:
    """What one layer knows of the forward, beside its parameters.

    Attributes:
      positions_BT: int32 absolute positions.
      valid_BT: Which of the new tokens are real; all when None.
      mask: Rule among the new tokens.
      rope: cos and sin `[B, T, 1, R/2]`, or None.
      window: How far back the layer sees, in positions.
      segments: Cached keys and values.
      rules: Sharding of activations.
    """

    positions_BT: Array
    valid_BT: Array | None
    mask: Mask
    rope: tuple[Array, Array] | None
    window: Array | int
    segments: tuple[Segment, ...]
    rules: ShardingRules | None = None


class Attention(nnx.Module):
    """Multi-head, grouped-query or multi-query attention.

    Numbers of heads are read from the weights, so a layer whose heads were pruned
    runs with the same module.

    Source: GQA (arXiv 2305.13245); MQA (arXiv 1911.02150).
    """

    def __init__(self, config: AttentionConfig, width: int, *, rngs: nnx.Rngs):
        self.config = config
        heads = config.num_heads * config.head_dim
        kv_heads = config.num_kv_heads * config.head_dim
        bias = config.qkv_bias
        self.query = Linear((width, heads), ("embed", "heads"), bias=bias, rngs=rngs)
        self.key = Linear(
            (width, kv_heads), ("embed", "kv_heads"), bias=bias, rngs=rngs
        )
        self.value = Linear(
            (width, kv_heads), ("embed", "kv_heads"), bias=bias, rngs=rngs
        )
        self.output = Linear(
            (heads, width), ("heads", "embed"), bias=config.output_bias, rngs=rngs
        )
        norm = config.qk_norm
        self.query_norm = None if norm is None else Norm(norm, config.head_dim)
        self.key_norm = None if norm is None else Norm(norm, config.head_dim)

    def __call__(
        self, x_BTD: Array, context: LayerContext
    ) -> tuple[Array, tuple[Array, Array]]:
        """Attends from the new tokens to the cached and the new ones.

        Args:
          x_BTD: Normalised activations.
          context: Positions, masks and cached segments.

        Returns:
          `[B, T, D]`, and the new keys and values, each `[B, K, T, H]`.
        """
        config, rules = self.config, context.rules
        B, T, _ = x_BTD.shape
        q_BTNH = self.query(x_BTD).reshape(B, T, -1, config.head_dim)
        k_BTKH = self.key(x_BTD).reshape(B, T, -1, config.head_dim)
        v_BTKH = self.value(x_BTD).reshape(B, T, -1, config.head_dim)
        if self.query_norm is not None and self.key_norm is not None:
            q_BTNH, k_BTKH = self.query_norm(q_BTNH), self.key_norm(k_BTKH)
        if context.rope is not None:
            q_BTNH = apply_rope(q_BTNH, *context.rope)
            k_BTKH = apply_rope(k_BTKH, *context.rope)
        q_BTNH = constrain(q_BTNH, ("batch", "tokens", "heads", None), rules)
        k_BKTH = k_BTKH.transpose(0, 2, 1, 3)
        v_BKTH = v_BTKH.transpose(0, 2, 1, 3)
        kv_axes = ("batch", "kv_heads", "tokens", None)
        k_BKTH = constrain(k_BKTH, kv_axes, rules)
        v_BKTH = constrain(v_BKTH, kv_axes, rules)
        scale = config.head_dim**-0.5 if config.scale is None else config.scale
        options = {"scale": scale, "softcap": config.softcap, "rules": rules}
        options["window"] = context.window
        pair = (k_BKTH, v_BKTH)
        if not context.segments and ring_size(T, context.mask, rules) > 1:
            o_BTNH = self._ring(q_BTNH, pair, context, options)
        else:
            o_BTNH = self._attend(q_BTNH, pair, context, options)
        return self.output(o_BTNH.reshape(B, T, -1).astype(x_BTD.dtype)), pair

    def _attend(
        self,
        q_BTNH: Array,
        pair: tuple[Array, Array],
        context: LayerContext,
        options: dict[str, Any],
    ) -> Array:
        """Attends to the cached segments and the new keys."""
        k_BKTH, v_BKTH = pair
        new = Segment(
            k_UKSH=k_BKTH,
            v_UKSH=v_BKTH,
            position_US=context.positions_BT,
            valid_US=context.valid_BT,
            mask=context.mask,
        )
        segments = (*context.segments, new)
        return attend(q_BTNH, context.positions_BT, segments, **options)

    def _ring(
        self,
        q_BTNH: Array,
        pair: tuple[Array, Array],
        context: LayerContext,
        options: dict[str, Any],
    ) -> Array:
        """Attends among the new tokens, which lie on several devices."""
        positions_BT = context.positions_BT
        if context.mask.kind == "packed":
            document_BT = context.mask.arrays[0]
        elif context.valid_BT is None:
            document_BT = jnp.zeros_like(positions_BT)
        else:
            document_BT = jnp.where(context.valid_BT, 0, -1)
        return ring_attention(q_BTNH, *pair, positions_BT, document_BT, **options)
