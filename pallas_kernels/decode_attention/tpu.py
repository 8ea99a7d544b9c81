"""`decode_attention` on a TPU: the interval kernel, from key 0 to each row's length.

jax ships kernels for paged decoding (`pallas.ops.tpu.paged_attention` and
`ragged_paged_attention`); neither returns the log-sum-exp that joining with new keys or
a shared prefix needs.

Letters: B rows, T queries, N query heads, H head dim.
"""

from collections.abc import Mapping

import jax.numpy as jnp
from jax import Array

from pallas_kernels.attention_rows import attend_rows, first_visible
from pallas_kernels.operands import Keys, Logits, PagedKeys

__all__ = ["decode_attention"]


def decode_attention(
    q_BTNH: Array,
    keys: Keys | PagedKeys,
    position_BT: Array | None,
    window: Array | int | None,
    *,
    rule: tuple[Logits, str],
    block: Mapping[str, int] | None,
) -> tuple[Array, Array]:
    """Returns output and log-sum-exp; arguments as for the op and `attend_rows`."""
    B, T = q_BTNH.shape[:2]
    slots = keys.k.shape[-2]
    if isinstance(keys, PagedKeys):
        slots *= keys.pages.shape[1]
    length_B = jnp.full((B,), slots) if keys.length is None else keys.length
    stop_BT = jnp.broadcast_to(jnp.clip(length_B, 0, slots)[:, None], (B, T))
    first_BT = first_visible(position_BT, window, (B, T))
    interval = (first_BT, stop_BT)
    return attend_rows("decode_attention", q_BTNH, keys, interval, None, rule, block)
