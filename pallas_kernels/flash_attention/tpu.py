"""`flash_attention` on a TPU: the interval kernel, up to each query's own position.

jax ships splash attention, whose masks are fixed when it is traced. Prefill in chunks
continues each row at a position known at run time only, over keys in a stacked cache;
the interval kernel does both. Where rows start at 0, and where gradients are needed,
splash attention does what this op does.

Letters: B rows, T queries, N query heads, H head dim, S keys.
"""

from collections.abc import Mapping

import jax.numpy as jnp
from jax import Array

from pallas_kernels.attention_rows import attend_rows, first_visible
from pallas_kernels.operands import Keys, Logits

__all__ = ["flash_attention"]


def flash_attention(
    q_BTNH: Array,
    keys: Keys,
    position_BT: Array | None,
    window: Array | int | None,
    segment_BT: Array | None,
    *,
    rule: tuple[Logits, str],
    block: Mapping[str, int] | None,
) -> tuple[Array, Array]:
    """Returns output and log-sum-exp; arguments as for the op and `attend_rows`."""
    B, T = q_BTNH.shape[:2]
    S = keys.k.shape[-2]
    length_B = jnp.full((B,), S) if keys.length is None else jnp.clip(keys.length, 0, S)
    stop_BT = jnp.broadcast_to(length_B[:, None], (B, T))
    if position_BT is not None:
        stop_BT = jnp.clip(position_BT + 1, 0, stop_BT)
    if segment_BT is not None:
        stop_BT = jnp.where(segment_BT < 0, 0, stop_BT)
    interval = (first_visible(position_BT, window, (B, T)), stop_BT)
    return attend_rows(
        "flash_attention", q_BTNH, keys, interval, segment_BT, rule, block
    )
