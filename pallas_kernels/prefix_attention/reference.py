"""The oracle of `prefix_attention`.

Letters: B rows, T queries, N query heads, K kv heads, P keys of the prefix, H head dim.
"""

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels.attention_rows import first_visible
from pallas_kernels.masked_attention import masked_attention_reference
from pallas_kernels.operands import Keys, Logits

__all__ = ["prefix_attention_reference"]


def prefix_attention_reference(
    q_BTNH: Array,
    keys: Keys,
    position_BT: Array | None = None,
    window: Array | int | None = None,
    *,
    logits: Logits = Logits(),  # noqa: B008
) -> tuple[Array, Array]:
    """Returns output and log-sum-exp by one softmax; arguments as for the op.

    The rows are queries of one row, so the keys are multiplied once.
    """
    B, T, N, H = q_BTNH.shape

    def pick(x: Array) -> Array:
        if x.ndim == 4:
            x = jax.lax.dynamic_index_in_dim(x, keys.layer, 0, keepdims=False)
        return x[None]

    k_1KPH, v_1KPH = pick(keys.k), pick(keys.v)
    P = k_1KPH.shape[2]
    index_P = jnp.arange(P)
    first_BT = first_visible(position_BT, window, (B, T))
    length = P if keys.length is None else keys.length
    visible_BTP = (index_P >= first_BT[..., None]) & (index_P < length)
    out, lse = masked_attention_reference(
        q_BTNH.reshape(1, B * T, N, H),
        k_1KPH,
        v_1KPH,
        visible_BTP.reshape(1, B * T, P),
        logits,
    )
    return out.reshape(B, T, N, H), lse.reshape(B, T, N)
