"""Attention written out in numpy, and inputs whose unused slots are poison.

Letters: B rows, T queries, N query heads, K kv heads, H head dim, S keys, Z keys of a
page.
"""

import dataclasses

import jax.numpy as jnp
import numpy as np

from pallas_kernels.operands import Keys, PagedKeys

# Absolute, of float32 outputs, by the dtype of the keys (queries and weights too).
TOLERANCE = {"float32": 1e-5, "bfloat16": 5e-3}


def normal(seed, *shape, dtype="float32"):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def dense(seed, rows, kv_heads, keys, head_dim, *, layers=2, dtype="float32"):
    """Stacked keys `[L, B, K, S, H]` of full length."""
    shape = (layers, rows, kv_heads, keys, head_dim)
    k, v = (normal(seed + i, *shape, dtype=dtype) for i in range(2))
    return Keys(k, v, jnp.full((rows,), keys, jnp.int32), layer=jnp.int32(layers - 1))


def poisoned(keys, length_B):
    """The keys with NaN in every slot at or past each row's length."""
    length_B = jnp.asarray(length_B, jnp.int32)
    tail = jnp.arange(keys.k.shape[-2]) >= length_B[:, None]
    tail = tail[:, None, :, None]
    k, v = (jnp.where(tail, jnp.nan, x).astype(x.dtype) for x in (keys.k, keys.v))
    return dataclasses.replace(keys, k=k, v=v, length=length_B)


def in_pages(keys, page, seed=0):
    """Dense keys as pages in shuffled order; the table's unused entries are garbage."""
    L, B, K, S, H = keys.k.shape
    per_row = -(-S // page)
    order = np.random.default_rng(seed).permutation(B * per_row + 1)[: B * per_row]
    table = order.reshape(B, per_row)

    def pool(x):
        wide = jnp.pad(
            x, [(0, 0)] * 3 + [(0, per_row * page - S), (0, 0)], constant_values=np.nan
        )
        pages = wide.reshape(L, B, K, per_row, page, H).transpose(0, 1, 3, 2, 4, 5)
        empty = jnp.full((L, B * per_row + 1, K, page, H), np.nan, x.dtype)
        return empty.at[:, table.reshape(-1)].set(pages.reshape(L, -1, K, page, H))

    used = np.arange(per_row) * page < np.asarray(keys.length)[:, None]
    garbage = np.where(np.arange(B)[:, None] % 2, -7, 10**6)
    pages = jnp.asarray(np.where(used, table, garbage), jnp.int32)
    return PagedKeys(pool(keys.k), pool(keys.v), keys.length, pages, keys.layer)


def attention(q_BTNH, k_BKSH, v_BKSH, visible_BTS, *, softcap=None):
    """Output and log-sum-exp in float64, query by query, over the visible keys only."""
    q, k, v = (np.asarray(x, np.float64) for x in (q_BTNH, k_BKSH, v_BKSH))
    B, T, N, H = q.shape
    group = N // k.shape[1]
    out, lse = np.zeros((B, T, N, H)), np.full((B, T, N), -np.inf)
    for b, t, n in np.ndindex(B, T, N):
        seen = np.asarray(visible_BTS[b, t])
        if not seen.any():
            continue
        logits = k[b, n // group, seen] @ q[b, t, n] / np.sqrt(H)
        if softcap is not None:
            logits = softcap * np.tanh(logits / softcap)
        weight = np.exp(logits - logits.max())
        out[b, t, n] = weight @ v[b, n // group, seen] / weight.sum()
        lse[b, t, n] = logits.max() + np.log(weight.sum())
    return out, lse


def visible(shape, length_B, *, position_BT=None, window=None, causal=False):
    """Who sees whom, bool of a shape `[B, T, S]`."""
    key = np.arange(shape[2])
    seen = np.broadcast_to(key < np.asarray(length_B)[:, None, None], shape).copy()
    if position_BT is not None:
        distance = np.asarray(position_BT)[:, :, None] - key
        if causal:
            seen &= distance >= 0
        if window is not None:
            seen &= distance < window
    return seen


def assert_same(found, wanted, dtype="float32"):
    """Compares (output, log-sum-exp) pairs; -inf has to meet -inf, and no NaN."""
    for x, y in zip(found, wanted, strict=True):
        assert x.dtype == jnp.float32
        np.testing.assert_allclose(x, y, rtol=0, atol=TOLERANCE[dtype])
