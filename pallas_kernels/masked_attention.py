"""Attention under a mask given as a matrix: the arithmetic of every reference.

Letters: B rows, T queries, N query heads, K kv heads, G = N/K, S keys, H head dim.
"""

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels.operands import Logits

__all__ = ["masked_attention_reference"]


def masked_attention_reference(
    q_BTNH: Array,
    k_BKSH: Array,
    v_BKSH: Array,
    visible_BTS: Array,
    logits: Logits,
) -> tuple[Array, Array]:
    """Attends by one softmax over logits that are written out.

    Operands of the two products have the dtype of the keys; everything between them
    is float32, and the products of float32 operands are exact to float32.

    Args:
      q_BTNH: Queries; head n reads kv head n // G.
      k_BKSH: Keys.
      v_BKSH: Values.
      visible_BTS: Whether a query sees a key. Keys and values that nobody of a row
        sees may be NaN.
      logits: How logits are made.

    Returns:
      Output `[B, T, N, H]` and log-sum-exp `[B, T, N]`, float32; 0 and -inf where a
      query sees no key.
    """
    B, T, N, H = q_BTNH.shape
    K = k_BKSH.shape[1]
    q = q_BTNH.astype(k_BKSH.dtype).reshape(B, T, K, N // K, H)
    raw = _product("btkgh,bksh->bkgts", q, k_BKSH) * logits.factor(H)
    if logits.softcap is not None:
        raw = logits.softcap * jnp.tanh(raw / logits.softcap)
    visible = visible_BTS[:, None, None]
    raw = jnp.where(visible, raw, -jnp.inf)
    top = jnp.max(raw, axis=-1, keepdims=True, initial=-1e30)  # S may be 0
    weight = jnp.exp(raw - top)
    total = jnp.sum(weight, axis=-1)
    used_BS = visible_BTS.any(axis=1)
    v = jnp.where(used_BS[:, None, :, None], v_BKSH, 0)  # 0 times NaN is NaN
    out = _product("bkgts,bksh->bkgth", weight.astype(v.dtype), v)
    seen = total != 0
    safe = jnp.where(seen, total, 1.0)
    out = jnp.where(seen[..., None], out / safe[..., None], 0.0)
    lse = jnp.where(seen, top[..., 0] + jnp.log(safe), -jnp.inf)
    return (
        out.transpose(0, 3, 1, 2, 4).reshape(B, T, N, H),
        lse.transpose(0, 3, 1, 2).reshape(B, T, N),
    )


def _product(eq: str, x: Array, y: Array) -> Array:
    exact = jax.lax.Precision.HIGHEST if y.dtype == jnp.float32 else None
    return jnp.einsum(eq, x, y, preferred_element_type=jnp.float32, precision=exact)
