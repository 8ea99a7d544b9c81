"""The oracle of `decode_attention`.

Letters: B rows, T queries, K kv heads, H head dim, S slots, C pages of a table, Z keys
of a page.
"""

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels.attention_rows import first_visible
from pallas_kernels.masked_attention import masked_attention_reference
from pallas_kernels.operands import Keys, Logits, NodeKeys, PagedKeys

__all__ = ["decode_attention_reference", "dense_keys"]


def decode_attention_reference(
    q_BTNH: Array,
    keys: Keys | PagedKeys | NodeKeys,
    position_BT: Array | None = None,
    window: Array | int | None = None,
    *,
    logits: Logits = Logits(),  # noqa: B008
) -> tuple[Array, Array]:
    """Returns output and log-sum-exp by one softmax; arguments as for the op."""
    if isinstance(keys, NodeKeys):
        return masked_attention_reference(q_BTNH, keys.k, keys.v, keys.visible, logits)
    B, T = q_BTNH.shape[:2]
    k_BKSH, v_BKSH = dense_keys(keys)
    S = k_BKSH.shape[2]
    index_S = jnp.arange(S)
    first_BT = first_visible(position_BT, window, (B, T))
    length_B = jnp.full((B,), S) if keys.length is None else keys.length
    visible_BTS = (index_S >= first_BT[..., None]) & (index_S < length_B[:, None, None])
    return masked_attention_reference(q_BTNH, k_BKSH, v_BKSH, visible_BTS, logits)


def dense_keys(keys: Keys | PagedKeys) -> tuple[Array, Array]:
    """Returns the keys and values of the layer, each row's in a row of its own."""

    def pick(x: Array) -> Array:
        if x.ndim == 5:
            x = jax.lax.dynamic_index_in_dim(x, keys.layer, 0, keepdims=False)
        if isinstance(keys, Keys):
            return x
        x_BCKZH = x[jnp.clip(keys.pages, 0, x.shape[0] - 1)]
        B, C, K, Z, H = x_BCKZH.shape
        return x_BCKZH.transpose(0, 2, 1, 3, 4).reshape(B, K, C * Z, H)

    return pick(keys.k), pick(keys.v)
