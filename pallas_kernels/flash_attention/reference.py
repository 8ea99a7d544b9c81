"""The oracle of `flash_attention`.

Letters: B rows, T queries, N query heads, K kv heads, H head dim, S keys.
"""

import jax.numpy as jnp
from jax import Array

from pallas_kernels.attention_rows import first_visible
from pallas_kernels.decode_attention.reference import dense_keys
from pallas_kernels.masked_attention import masked_attention_reference
from pallas_kernels.operands import Keys, Logits

__all__ = ["flash_attention_reference"]


def flash_attention_reference(
    q_BTNH: Array,
    keys: Keys,
    position_BT: Array | None = None,
    window: Array | int | None = None,
    segment_BT: Array | None = None,
    *,
    logits: Logits = Logits(),  # noqa: B008
) -> tuple[Array, Array]:
    """Returns output and log-sum-exp by one softmax; arguments as for the op."""
    B, T = q_BTNH.shape[:2]
    k_BKSH, v_BKSH = dense_keys(keys)
    S = k_BKSH.shape[2]
    index_S = jnp.arange(S)
    first_BT = first_visible(position_BT, window, (B, T))
    length_B = jnp.full((B,), S) if keys.length is None else keys.length
    visible_BTS = (index_S >= first_BT[..., None]) & (index_S < length_B[:, None, None])
    if position_BT is not None:
        visible_BTS &= index_S <= position_BT[..., None]
    if segment_BT is not None and keys.segment is not None:
        visible_BTS &= segment_BT[..., None] == keys.segment[:, None, :]
        visible_BTS &= segment_BT[..., None] >= 0
    return masked_attention_reference(q_BTNH, k_BKSH, v_BKSH, visible_BTS, logits)
