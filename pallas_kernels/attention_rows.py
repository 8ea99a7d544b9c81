"""Calls of the interval kernel, from queries and keys as callers hold them.

Letters: B rows, T queries, N query heads, K kv heads, G = N/K, R = T*G, H head dim,
S keys, U users of the keys.
"""

from collections.abc import Mapping

import jax.numpy as jnp
from jax import Array

from pallas_kernels import dispatch
from pallas_kernels.interval_attention import (
    Blocks,
    Operands,
    Rule,
    interval_attention,
)
from pallas_kernels.operands import Keys, Logits, PagedKeys

__all__ = ["attend_rows", "first_visible"]


def first_visible(
    position_BT: Array | None, window: Array | int | None, shape: tuple[int, int]
) -> Array:
    """Returns the first key that each query's window leaves, int32 of a shape.

    Raises:
      ValueError: There is a window but no positions.
    """
    if window is None:
        return jnp.zeros(shape, jnp.int32)
    if position_BT is None:
        raise ValueError(
            "attention: a window without position_BT, expected the position of each "
            "query. Give the positions, or no window."
        )
    return jnp.maximum(position_BT - window + 1, 0).astype(jnp.int32)


def attend_rows(
    op: str,
    q_UTNH: Array,
    keys: Keys | PagedKeys,
    interval: tuple[Array, Array],
    segment_UT: Array | None,
    rule: tuple[Logits, str],
    block: Mapping[str, int] | None,
) -> tuple[Array, Array]:
    """Runs the kernel, all query heads of a kv head as rows of one product.

    Args:
      op: Names the op in tables and messages.
      q_UTNH: Queries.
      keys: Keys with U, stacked or not; their length is not read.
      interval: int32 `[U, T]`, the first key that a query sees and the key behind
        the last, at most S.
      segment_UT: Ids of packed queries.
      rule: How logits are made, and what `dispatch.choose` returned.
      block: Sizes by name that replace those of `default_blocks`.

    Returns:
      Output `[U, T, N, H]` and log-sum-exp `[U, T, N]`, float32.
    """
    U, T, N, H = q_UTNH.shape
    k, v = (x if x.ndim == 5 else x[None] for x in (keys.k, keys.v))
    K = k.shape[2]
    G = N // K

    def rows(x_UT: Array) -> Array:
        return jnp.repeat(x_UT, G, axis=1)

    q = q_UTNH.astype(k.dtype).reshape(U, T, K, G, H).transpose(0, 2, 1, 3, 4)
    operands = Operands(
        q_UKRH=q.reshape(U, K, T * G, H),
        k_LUKSH=k,
        v_LUKSH=v,
        layer=keys.layer,
        first_UR=rows(interval[0]),
        stop_UR=rows(interval[1]),
        pages_UC=keys.pages if isinstance(keys, PagedKeys) else None,
        segment_UR=None if segment_UT is None else rows(segment_UT),
        segment_US=keys.segment if isinstance(keys, Keys) else None,
    )
    logits, chosen = rule
    out, lse = interval_attention(
        operands,
        checked_blocks(op, operands, block),
        Rule(
            scale=logits.factor(H),
            softcap=logits.softcap,
            interpret=dispatch.interpret_mode(chosen),
        ),
    )
    out = out.reshape(U, K, T, G, H).transpose(0, 2, 1, 3, 4).reshape(U, T, N, H)
    lse = lse.reshape(U, K, T, G).transpose(0, 2, 1, 3).reshape(U, T, N)
    return out, lse


def checked_blocks(
    op: str, operands: Operands, block: Mapping[str, int] | None
) -> Blocks:
    """Returns the block sizes of a call: asked for, else measured, else by rule.

    Raises:
      ValueError: A size has no such name, or the kernel cannot be cut so.
    """
    _, K, R, H = operands.q_UKRH.shape
    S = operands.k_LUKSH.shape[3]
    dtype = operands.k_LUKSH.dtype
    known = dispatch.blocks(op, f"{dtype}:{H}", default_blocks(operands))
    unknown = set(block or {}) - set(known)
    if unknown:
        raise ValueError(
            f"{op}: block size {sorted(unknown)[0]!r}, expected one of "
            f"{', '.join(known)}."
        )
    sizes = Blocks(**{**known, **(block or {})})
    step = 128 if operands.turned else 32 // dtype.itemsize
    if operands.pages_UC is not None:
        keys_fit, rule = sizes.keys % S == 0, f"a multiple of the page of {S}"
    else:
        sizes = Blocks(heads=sizes.heads, rows=sizes.rows, keys=min(sizes.keys, S))
        keys_fit = sizes.keys == S or sizes.keys % step == 0
        rule = f"a multiple of {step}, or all {S}"
    wanted = {
        "heads": (K % sizes.heads == 0, f"a divisor of {K}"),
        "rows": (
            sizes.rows == R or sizes.rows % 128 == 0,
            f"a multiple of 128, or all {R}",
        ),
        "keys": (keys_fit, rule),
    }
    for name, (fits, expected) in wanted.items():
        if not fits:
            raise ValueError(
                f"{op}: block size {name}={getattr(sizes, name)}, expected {expected}."
            )
    return sizes


def default_blocks(operands: Operands) -> dict[str, int]:
    """Returns sizes that fit into the fast memory of every generation.

    As many kv heads share a step as fit, for a step costs time of its own and a block
    of one head is small.
    """
    _, K, R, H = operands.q_UKRH.shape
    S, itemsize = operands.k_LUKSH.shape[3], operands.k_LUKSH.dtype.itemsize
    rows = R if R <= 512 else 512
    keys = min(S, 512)
    if operands.pages_UC is not None:
        keys = S * max(1, min(8, 256 // S, operands.pages_UC.shape[1]))

    def fits(heads: int) -> bool:
        # Keys and values, each twice: one block is read while another is fetched.
        fetched = 4 * heads * keys * max(H, 128) * itemsize
        return fetched <= 2**23 and heads * rows * keys <= 2**19

    heads = next((h for h in range(K, 0, -1) if K % h == 0 and fits(h)), 1)
    return {"heads": heads, "rows": rows, "keys": keys}
