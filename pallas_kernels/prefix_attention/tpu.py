"""`prefix_attention` on a TPU: the interval kernel with one user of the keys.

Splash attention, which jax ships, could serve with a full mask and the queries of all
rows as one sequence. The interval kernel reads a layer of a stacked prefix in place,
takes a length and a window that are known at run time only, and leaves blocks behind
the length unread.

Letters: B rows, T queries, N query heads, H head dim, P keys of the prefix.
"""

from collections.abc import Mapping

import jax.numpy as jnp
from jax import Array

from pallas_kernels.attention_rows import attend_rows, first_visible
from pallas_kernels.operands import Keys, Logits

__all__ = ["prefix_attention"]


def prefix_attention(
    q_BTNH: Array,
    keys: Keys,
    position_BT: Array | None,
    window: Array | int | None,
    *,
    rule: tuple[Logits, str],
    block: Mapping[str, int] | None,
) -> tuple[Array, Array]:
    """Returns output and log-sum-exp; arguments as for the op and `attend_rows`."""
    B, T, N, H = q_BTNH.shape
    P = keys.k.shape[-2]
    k, v = (x[..., None, :, :, :] for x in (keys.k, keys.v))
    one_user = Keys(k, v, layer=keys.layer)
    length = jnp.clip(P if keys.length is None else keys.length, 0, P)
    first_1R = first_visible(position_BT, window, (B, T)).reshape(1, B * T)
    stop_1R = jnp.broadcast_to(length, (1, B * T))
    out, lse = attend_rows(
        "prefix_attention",
        q_BTNH.reshape(1, B * T, N, H),
        one_user,
        (first_1R, stop_1R),
        None,
        rule,
        block,
    )
    return out.reshape(B, T, N, H), lse.reshape(B, T, N)
