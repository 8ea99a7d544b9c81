"""Letters: B rows, T queries, N query heads, K kv heads, H head dim, U users, R rows of
a user, P slots of a level.
"""

import dataclasses

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from jaxllm.attention import (
    GLOBAL_WINDOW,
    PrefixedCache,
    PrefixLevel,
    SharedPrefix,
    attend,
    attend_reference,
    attend_segment,
    init_cache,
)

K, N, H = 2, 4, 8
SCALE = H**-0.5


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def level(seed, lengths, starts, readers, rows, slots=None):
    """A level of one stack of one layer, from its readers' lists."""
    slots = max(lengths) if slots is None else slots
    shape = (1, len(lengths), K, slots, H)
    table = np.full((len(readers), max(1, *map(len, readers))), rows, np.int32)
    for user, members in enumerate(readers):
        table[user, : len(members)] = members
    return PrefixLevel(
        (normal(seed, *shape),),
        (normal(seed + 1, *shape),),
        jnp.asarray(starts, jnp.int32),
        jnp.asarray(lengths, jnp.int32),
        jnp.asarray(table),
    )


def cache_of(levels, rows, own=(3, 0, 5), capacity=8):
    suffix = init_cache(
        [1], rows=rows, capacity=capacity, kv_heads=[K], head_dim=H, dtype="float32"
    )
    length_B = jnp.asarray([own[row % len(own)] for row in range(rows)], jnp.int32)
    suffix = dataclasses.replace(
        suffix,
        k=(normal(90, *suffix.k[0].shape),),
        v=(normal(91, *suffix.v[0].shape),),
        length_B=length_B,
    )
    return PrefixedCache(SharedPrefix.make(tuple(levels), rows), suffix)


def joined(cache, row):
    """Keys and values of one row in the order of positions, by plain Python."""
    pieces = []
    for part in cache.prefix.levels:
        for user, members in enumerate(np.asarray(part.rows_UR).tolist()):
            if row in members:
                length, start = int(part.length_U[user]), int(part.start_U[user])
                pieces.append((start, part.k[0][0, user], part.v[0][0, user], length))
    start = sum(length for *_, length in pieces)
    own, length = cache.suffix, int(cache.suffix.length_B[row])
    pieces.append((start, own.k[0][0, row], own.v[0][0, row], length))
    pieces.sort(key=lambda piece: piece[0])
    k = np.concatenate([k[:, :length] for _, k, _, length in pieces], axis=1)
    v = np.concatenate([v[:, :length] for _, _, v, length in pieces], axis=1)
    return k, v


def plain(q_TNH, position_T, k_KSH, v_KSH, window):
    """Attention of one row in numpy; key s stands at position s."""
    k_NSH, v_NSH = (np.repeat(x, N // K, axis=0) for x in (k_KSH, v_KSH))
    logits = np.einsum("tnh,nsh->tns", q_TNH, k_NSH) * SCALE
    seen = position_T[:, None] - np.arange(k_KSH.shape[1]) < window
    weight = np.where(seen[:, None], np.exp(logits), 0)
    total = np.maximum(weight.sum(-1, keepdims=True), 1e-30)
    return np.einsum("tns,nsh->tnh", weight / total, v_NSH)


def assert_is_plain_attention(cache, rows, tokens=2, window=GLOBAL_WINDOW):
    q_BTNH = normal(7, rows, tokens, N, H)
    position_BT = cache.length_B[:, None] + jnp.arange(tokens)
    found = jax.jit(attend, static_argnames=("scale", "window"))(
        q_BTNH, position_BT, cache.segments(0, 0), scale=SCALE, window=window
    )
    reference = attend_reference(
        q_BTNH, position_BT, cache.segments(0, 0), scale=SCALE, window=window
    )
    np.testing.assert_allclose(found, reference.out_BTNH, atol=2e-6, rtol=2e-6)
    cache = jax.tree.map(np.asarray, cache)
    q_BTNH, position_BT = np.asarray(q_BTNH), np.asarray(position_BT)
    for row in range(rows):
        k, v = joined(cache, row)
        assert k.shape[1] == cache.length_B[row]
        expected = plain(q_BTNH[row], position_BT[row], k, v, window)
        np.testing.assert_allclose(
            found[row], expected, atol=2e-6, rtol=2e-6, err_msg=f"row {row}"
        )


# Lengths of three levels of a tree, in the shape of the method's own test.
TREE = [[7, 7], [9, 10, 11, 4], [129, 2, 3, 4, 5, 6, 7, 128]]


@pytest.mark.parametrize("window", [GLOBAL_WINDOW, 12])
def test_a_tree_of_three_levels_is_attention_over_the_joined_keys(window):
    rows, levels, starts = 16, [], [[0, 0]]
    for lengths in TREE[:-1]:
        ends = [s + n for s, n in zip(starts[-1], lengths, strict=True)]
        starts.append([end for end in ends for _ in range(2)])
    for depth, lengths in enumerate(TREE):
        wide = rows // len(lengths)
        readers = [list(range(u * wide, (u + 1) * wide)) for u in range(len(lengths))]
        levels.append(level(10 * depth, lengths, starts[depth], readers, rows))
    assert_is_plain_attention(cache_of(levels, rows), rows, window=window)


@hypothesis.settings(max_examples=8)
@hypothesis.given(st.randoms(use_true_random=False))
def test_groups_of_any_size_and_order(random):
    rows = 5
    order = random.sample(range(rows), rows)
    cut = sorted(random.sample(range(rows + 1), 2))
    # The rows behind the second cut read nothing of this level.
    readers = [order[: cut[0]], order[cut[0] : cut[1]]]
    lengths = [random.randrange(0, 6), random.randrange(0, 6)]
    top = level(20, lengths, [0, 0], readers, rows, slots=6)
    assert_is_plain_attention(cache_of([top], rows), rows)


def test_one_user_of_all_rows_needs_no_table():
    rows = 3
    part = level(30, [9], [0], [list(range(rows))], rows)
    whole = dataclasses.replace(part, rows_UR=None)
    with_table, without = cache_of([part], rows), cache_of([whole], rows)
    np.testing.assert_array_equal(with_table.length_B, without.length_B)
    q_BTNH, position_BT = normal(7, rows, 2, N, H), with_table.length_B[:, None]
    position_BT = position_BT + jnp.arange(2)
    np.testing.assert_allclose(
        attend(q_BTNH, position_BT, with_table.segments(0, 0), scale=SCALE),
        attend(q_BTNH, position_BT, without.segments(0, 0), scale=SCALE),
        atol=1e-6,
    )


def test_a_row_of_no_group_sees_nothing():
    part = level(40, [4], [0], [[1]], 3).segment(0, 0)
    output = attend_segment(
        normal(1, 3, 1, N, H), jnp.full((3, 1), 9), part, scale=SCALE
    )
    assert jnp.isneginf(output.lse_BTN[0]).all() and (output.out_BTNH[0] == 0).all()
    assert jnp.isfinite(output.lse_BTN[1]).all() and (output.out_BTNH[1] != 0).any()


def test_without_levels_it_is_the_dense_cache():
    cache = cache_of([], 3)
    assert cache.starts_empty
    np.testing.assert_array_equal(cache.length_B, cache.suffix.length_B)
    [own] = cache.segments(0, 0)
    assert own.k_UKSH.shape == cache.suffix.k[0].shape


def test_only_the_rows_own_part_grows_and_shrinks():
    rows = 3
    cache = cache_of([level(50, [9], [0], [[0, 2]], rows)], rows)
    np.testing.assert_array_equal(cache.length_B, [12, 0, 14])
    assert not cache.starts_empty
    new = normal(1, 1, rows, K, 2, H)
    grown = cache.append(((new, new),), count_B=jnp.asarray([2, 1, 0]))
    np.testing.assert_array_equal(grown.length_B, [14, 1, 14])
    np.testing.assert_array_equal(grown.suffix.k[0][0, 0, :, 3:5], new[0, 0])
    np.testing.assert_array_equal(
        grown.crop(jnp.asarray([10, 5, 3])).length_B, [10, 1, 9]
    )
    assert cache.nbytes == cache.prefix.nbytes + cache.suffix.nbytes
    assert cache.prefix.nbytes == 2 * K * 9 * H * 4
