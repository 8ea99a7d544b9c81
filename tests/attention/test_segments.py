"""Letters: B rows, T queries, N query heads, K kv heads, H head dim, S keys of a
segment, U users of a segment.
"""

import dataclasses
import functools
import itertools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from jaxllm.attention import (
    CAUSAL,
    GLOBAL_WINDOW,
    AttentionOutput,
    Segment,
    ancestor,
    ancestors_of,
    attend,
    attend_reference,
    attend_segment,
    merge,
    packed,
)

B, T, N, H, S = 4, 3, 4, 8, 6
SCALE = H**-0.5
POSITION_BT = jnp.asarray([[3, 4, 5], [0, 1, 2], [9, 9, 10], [5, 6, 7]], jnp.int32)


def normal(seed, *shape, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def integers(*values):
    return jnp.asarray(values, jnp.int32)


Q_BTNH = normal(0, B, T, N, H)


def keys_of(users, kv_heads=2, seed=1, length=S, dtype=jnp.float32, **fields):
    shape = (users, kv_heads, length, H)
    k, v = normal(seed, *shape, dtype=dtype), normal(seed + 1, *shape, dtype=dtype)
    return Segment(k_UKSH=k, v_UKSH=v, **fields)


TREE_BTT = ancestors_of(integers([-1, 0, 0], [-1, 0, 1], [-1, -1, 1], [-1, 0, 1]))
TREE = Segment(
    k_UKSH=normal(7, B, 2, T, H),
    v_UKSH=normal(8, B, 2, T, H),
    position_US=POSITION_BT,
    valid_US=jnp.asarray([[1, 1, 1], [1, 1, 0], [1, 1, 1], [0, 0, 0]], bool),
    mask=ancestor(TREE_BTT),
)
DOCUMENTS = packed(
    integers([0, 0, 1], [0, 1, 1], [2, 2, -1], [0, 0, 0]),
    integers(*[[0, 0, 0, 1, 1, 2]] * B),
)
ROW_B = integers(2, 0, 0, 1)

SEGMENTS = {
    "multi head": [keys_of(B, kv_heads=4)],
    "multi query": [keys_of(B, kv_heads=1)],
    "length": [keys_of(B, length_U=integers(6, 0, 1, 4))],
    "start and length": [
        keys_of(
            B, start_U=integers(0, 1, 4, 3), length_U=integers(2, 0, 9, 6), mask=CAUSAL
        )
    ],
    "positions": [
        keys_of(B, position_US=integers(*[[7, 0, 3, 3, 9, 1]] * B), mask=CAUSAL)
    ],
    "validity": [
        keys_of(
            B,
            valid_US=jnp.asarray(np.random.default_rng(5).random((B, S)) < 0.5),
            length_U=integers(5, 6, 0, 3),
        )
    ],
    "tree": [TREE],
    "documents": [keys_of(B, mask=DOCUMENTS)],
    "joined masks": [keys_of(B, mask=DOCUMENTS & CAUSAL)],
    "one user": [keys_of(1, start_U=integers(1), length_U=integers(5), mask=CAUSAL)],
    "one user, a mask for each row": [keys_of(1, mask=DOCUMENTS)],
    "one user, multi head": [keys_of(1, kv_heads=4, mask=CAUSAL)],
    "rows to users": [keys_of(3, row_B=ROW_B)],
    "rows to users of their own": [
        keys_of(
            3,
            row_B=ROW_B,
            start_U=integers(0, 2, 4),
            length_U=integers(6, 0, 3),
            mask=CAUSAL,
        )
    ],
    "rows to users by position": [
        keys_of(
            3,
            row_B=ROW_B,
            position_US=integers(*[[5, 4, 3, 2, 1, 0]] * 3),
            valid_US=jnp.asarray([[1, 0] * 3, [0, 1] * 3, [1] * 6], bool),
            mask=CAUSAL,
        )
    ],
    "prefix, cache and tree": [
        keys_of(1, length_U=integers(5)),
        keys_of(2, seed=3, row_B=integers(0, 1, 1, 0), start_U=integers(5, 5)),
        keys_of(B, seed=5, start_U=integers(0, 2, 4, 6), length_U=integers(6, 0, 2, 1)),
        TREE,
    ],
}


@functools.partial(jax.jit, static_argnames=("softcap", "window"))
def in_parts(q_BTNH, position_BT, segments, **options):
    return merge(
        *(
            attend_segment(q_BTNH, position_BT, segment, scale=SCALE, **options)
            for segment in segments
        )
    )


# Not compiled: its steps have the same shapes in most tests, and are shared.
in_one = functools.partial(attend_reference, scale=SCALE)


def assert_close(output, expected, tolerance=2e-6):
    np.testing.assert_allclose(
        output.out_BTNH, expected.out_BTNH, atol=tolerance, rtol=tolerance
    )
    np.testing.assert_allclose(
        output.lse_BTN, expected.lse_BTN, atol=tolerance, rtol=tolerance
    )


def one_query(q_NH, position, keys, values, key_positions, window):
    """Attention of one query over the keys that it sees, head by head."""
    out_NH = np.zeros_like(q_NH)
    seen = [s for s, p in enumerate(key_positions) if p <= position < p + window]
    for n in range(N):
        kv_head = n // (N // keys.shape[0])
        weights = [np.exp(SCALE * q_NH[n] @ keys[kv_head, s]) for s in seen]
        for s, weight in zip(seen, weights, strict=True):
            out_NH[n] += weight / sum(weights) * values[kv_head, s]
    return out_NH


@pytest.mark.parametrize("window", [2, 100])
def test_the_reference_is_attention_head_by_head(window):
    start = integers(0, 1, 4, 3)
    segment = keys_of(B, start_U=start, mask=CAUSAL)
    out = attend_reference(Q_BTNH, POSITION_BT, [segment], scale=SCALE, window=window)
    for b in range(B):
        k, v = np.asarray(segment.k_UKSH[b]), np.asarray(segment.v_UKSH[b])
        for t in range(T):
            expected = one_query(
                np.asarray(Q_BTNH[b, t]),
                int(POSITION_BT[b, t]),
                k,
                v,
                range(int(start[b]), int(start[b]) + S),
                window,
            )
            np.testing.assert_allclose(out.out_BTNH[b, t], expected, atol=2e-6)


@pytest.mark.parametrize("kind", SEGMENTS)
def test_segments_equal_the_reference(kind):
    output = in_parts(Q_BTNH, POSITION_BT, SEGMENTS[kind])
    assert output.out_BTNH.dtype == output.lse_BTN.dtype == jnp.float32
    assert_close(output, in_one(Q_BTNH, POSITION_BT, SEGMENTS[kind]))


@pytest.mark.parametrize(
    "options", [{"softcap": 0.7}, {"window": 3}, {"softcap": 0.7, "window": 1}]
)
def test_options_equal_the_reference(options):
    segments = SEGMENTS["rows to users by position"]
    output = in_parts(Q_BTNH, POSITION_BT, segments, **options)
    expected = in_one(Q_BTNH, POSITION_BT, segments, **options)
    assert_close(output, expected)
    without = in_one(Q_BTNH, POSITION_BT, segments)
    assert not np.allclose(expected.out_BTNH, without.out_BTNH)


def test_a_layers_window_holds_for_every_segment():
    """Traced, as a scan over layers gives it."""
    segments = SEGMENTS["prefix, cache and tree"]

    @jax.jit
    def within(window):
        parts = (
            attend_segment(Q_BTNH, POSITION_BT, s, scale=SCALE, window=window)
            for s in segments
        )
        return merge(*parts)

    for window in (1, 4, GLOBAL_WINDOW):
        expected = in_one(Q_BTNH, POSITION_BT, segments, window=window)
        assert_close(within(jnp.asarray(window)), expected)


@pytest.mark.parametrize("kind", ["length", "tree", "documents", "start and length"])
def test_a_query_without_keys_gives_zero_and_minus_infinity(kind):
    (segment,) = SEGMENTS[kind]
    output = in_parts(Q_BTNH, POSITION_BT, [segment])
    blind_BTN = np.isneginf(output.lse_BTN)
    assert blind_BTN.any()
    assert not blind_BTN.all()
    assert not output.out_BTNH[blind_BTN].any()
    assert np.isfinite(output.lse_BTN[~blind_BTN]).all()


def test_a_segment_without_slots_changes_nothing():
    segment = keys_of(B, mask=CAUSAL)
    alone = in_parts(Q_BTNH, POSITION_BT, [keys_of(B, length=0)])
    assert not alone.out_BTNH.any()
    assert np.isneginf(alone.lse_BTN).all()
    segments = [keys_of(1, length=0), segment, keys_of(B, length=0)]
    output = in_parts(Q_BTNH, POSITION_BT, segments)
    assert_close(output, in_one(Q_BTNH, POSITION_BT, [segment]))


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(jnp.float32, 2e-6), (jnp.bfloat16, 1e-2)]
)
def test_attend_is_the_merge_in_the_dtype_of_the_queries(dtype, tolerance):
    segments = [keys_of(1), keys_of(B, seed=3)]
    options = {"softcap": 0.7, "window": 5}
    expected = in_one(Q_BTNH, POSITION_BT, segments, **options).out_BTNH

    @jax.jit
    def merged(q_BTNH):
        return attend(q_BTNH, POSITION_BT, segments, scale=SCALE, **options)

    out = merged(Q_BTNH.astype(dtype))
    assert out.dtype == dtype
    np.testing.assert_allclose(
        out.astype(jnp.float32), expected, atol=tolerance, rtol=tolerance
    )


def test_one_user_is_read_once_by_all_rows():
    """The folded product is one, over all queries of all rows."""
    segment = keys_of(1)

    def part(q_BTNH, segment):
        return attend_segment(q_BTNH, POSITION_BT, segment, scale=SCALE)

    text = jax.jit(part).lower(Q_BTNH, segment).as_text()
    dots = [line for line in text.splitlines() if "dot_general" in line]
    # 2 kv heads, each with 2 query heads of 4 rows of 3 queries.
    assert len(dots) == 2
    assert all("tensor<1x2x24x8xf32>" in line for line in dots)


PARTITION_LENGTH = 12
WHOLE = Segment(
    k_UKSH=normal(11, B, 2, PARTITION_LENGTH, H),
    v_UKSH=normal(12, B, 2, PARTITION_LENGTH, H),
    position_US=jnp.tile(jnp.arange(PARTITION_LENGTH), (B, 1)),
    valid_US=jnp.arange(PARTITION_LENGTH) < integers(12, 7, 1, 0)[:, None],
    mask=CAUSAL,
)


def part_of(order_S, count):
    """The first `count` of the keys in an order, in a segment of fixed size."""
    return Segment(
        k_UKSH=WHOLE.k_UKSH[:, :, order_S],
        v_UKSH=WHOLE.v_UKSH[:, :, order_S],
        position_US=WHOLE.position_US[:, order_S],
        valid_US=WHOLE.valid_US[:, order_S],
        length_U=jnp.full(B, count),
        mask=CAUSAL,
    )


@jax.jit
def over_parts(order_PS, count_P):
    segments = [part_of(order_PS[i], count_P[i]) for i in range(3)]
    return in_parts(Q_BTNH, POSITION_BT, segments, softcap=2.0)


@functools.cache
def whole():
    return in_one(Q_BTNH, POSITION_BT, [WHOLE], softcap=2.0)


@hypothesis.given(
    part_S=st.lists(
        st.integers(0, 2), min_size=PARTITION_LENGTH, max_size=PARTITION_LENGTH
    )
)
@hypothesis.example([0] * PARTITION_LENGTH)
@hypothesis.example([2, 1] * (PARTITION_LENGTH // 2))
@hypothesis.settings(max_examples=40)
def test_any_split_of_the_keys_equals_none(part_S):
    part_S = np.asarray(part_S)
    order_PS = [np.argsort(part_S != part, kind="stable") for part in range(3)]
    output = over_parts(np.asarray(order_PS), np.bincount(part_S, minlength=3))
    assert_close(output, whole())


def contiguous(cuts, dtype=jnp.float32):
    bounds = [0, *cuts, PARTITION_LENGTH]
    return [
        Segment(
            k_UKSH=WHOLE.k_UKSH[:, :, a:b].astype(dtype),
            v_UKSH=WHOLE.v_UKSH[:, :, a:b].astype(dtype),
            start_U=jnp.full(B, a),
            valid_US=WHOLE.valid_US[:, a:b],
            mask=CAUSAL,
        )
        for a, b in itertools.pairwise(bounds)
    ]


@pytest.mark.parametrize("cuts", [[6], [1, 5, 5, 11]])
def test_a_split_by_start_equals_none(cuts):
    output = in_parts(Q_BTNH, POSITION_BT, contiguous(cuts), softcap=2.0)
    assert_close(output, whole())


def test_a_split_of_bfloat16_keys_equals_none():
    q_BTNH = Q_BTNH.astype(jnp.bfloat16)
    output = in_parts(q_BTNH, POSITION_BT, contiguous([3, 7], jnp.bfloat16))
    expected = in_parts(q_BTNH, POSITION_BT, contiguous([], jnp.bfloat16))
    np.testing.assert_allclose(output.lse_BTN, expected.lse_BTN, atol=2e-6, rtol=2e-6)
    # A weight is rounded to bfloat16 before it meets a value.
    assert np.mean(np.abs(output.out_BTNH - expected.out_BTNH)) < 2e-3
    reference = in_one(q_BTNH, POSITION_BT, contiguous([], jnp.bfloat16))
    assert_close(expected, reference, tolerance=1e-2)


NOTHING = AttentionOutput(jnp.zeros((B, T, N, H)), jnp.full((B, T, N), -jnp.inf))
join = jax.jit(merge)


@pytest.fixture(scope="module")
def parts():
    """In each of the three another row sees nothing, and one row in all of them."""

    def part(seed, *length_B):
        segment = keys_of(B, seed=seed, length_U=integers(*length_B))
        return in_parts(Q_BTNH, POSITION_BT, [segment])

    return part(21, 6, 1, 0, 0), part(23, 0, 3, 6, 0), part(25, 6, 0, 2, 0)


def test_merge_is_associative_and_commutative(parts):
    a, b, c = parts
    together = join(a, b, c)
    assert_close(join(join(a, b), c), together, 1e-6)
    assert_close(join(a, join(b, c)), together, 1e-6)
    assert_close(join(c, a, b), together, 1e-6)
    assert_close(join(b, a), join(a, b), 1e-6)


def test_an_empty_part_is_the_identity_of_merge(parts):
    for part in parts:
        assert merge(part) is part
        for merged in (join(part, NOTHING), join(NOTHING, part, NOTHING)):
            assert_close(merged, part, 0)
    assert_close(join(NOTHING, NOTHING), NOTHING, 0)


def test_merge_survives_far_apart_parts(parts):
    a, b, _ = parts
    far = dataclasses.replace(b, lse_BTN=a.lse_BTN + 300)
    seen_BTN = np.isfinite(a.lse_BTN)
    merged = join(a, far)
    np.testing.assert_array_equal(merged.out_BTNH[seen_BTN], far.out_BTNH[seen_BTN])
    np.testing.assert_array_equal(merged.lse_BTN, far.lse_BTN)


def value_and_gradients(attention, segments):
    """Of a number that hangs on every output, by queries and by keys and values."""

    def loss(q_BTNH, kv):
        replaced = [
            dataclasses.replace(segment, k_UKSH=k, v_UKSH=v)
            for segment, (k, v) in zip(segments, kv, strict=True)
        ]
        output = attention(q_BTNH, POSITION_BT, replaced, softcap=5.0)
        lse_BTN = jnp.where(jnp.isfinite(output.lse_BTN), output.lse_BTN, 0.0)
        return jnp.sum(output.out_BTNH**2) + jnp.sum(jnp.sin(lse_BTN))

    kv = [(segment.k_UKSH, segment.v_UKSH) for segment in segments]
    return jax.value_and_grad(loss, (0, 1))(Q_BTNH, kv)


gradients_in_parts = jax.jit(functools.partial(value_and_gradients, in_parts))
gradients_in_one = jax.jit(functools.partial(value_and_gradients, in_one))


@pytest.mark.parametrize("kind", ["start and length", "prefix, cache and tree"])
def test_gradients_equal_those_of_the_reference(kind):
    value, ours = gradients_in_parts(SEGMENTS[kind])
    expected_value, expected = gradients_in_one(SEGMENTS[kind])
    np.testing.assert_allclose(value, expected_value, rtol=1e-5)
    for one, other in zip(*map(jax.tree.leaves, (ours, expected)), strict=True):
        assert np.isfinite(one).all()
        assert one.any()
        np.testing.assert_allclose(one, other, atol=1e-5, rtol=1e-5)


def test_the_gradient_of_a_merge_equals_that_of_the_whole():
    """The last row sees nothing, in any part."""
    _, (q_whole, [(k_whole, v_whole)]) = gradients_in_parts([WHOLE])
    _, (q_bar, kv_bar) = gradients_in_parts(contiguous([1, 6]))
    k_bar, v_bar = (jnp.concatenate(x, axis=2) for x in zip(*kv_bar, strict=True))
    for ours, expected in ((q_bar, q_whole), (k_bar, k_whole), (v_bar, v_whole)):
        assert np.isfinite(ours).all()
        np.testing.assert_allclose(ours, expected, atol=1e-5, rtol=1e-5)
        assert not ours[3].any()
        assert ours[0].any()


def poisoned(segment, visible_US, value):
    cover = visible_US[:, None, :, None]
    return dataclasses.replace(
        segment,
        k_UKSH=jnp.where(cover, segment.k_UKSH, value),
        v_UKSH=jnp.where(cover, segment.v_UKSH, -value),
    )


def test_finite_garbage_that_no_query_sees_changes_nothing():
    length_U = integers(4, 0, 6, 1)
    segment = keys_of(B, length_U=length_U, mask=CAUSAL)
    segments = [segment, TREE]
    expected = in_parts(Q_BTNH, POSITION_BT, segments)
    clean_value, clean = gradients_in_parts(segments)
    for value in (1e30, -1e30):
        garbage = [
            poisoned(segment, jnp.arange(S) < length_U[:, None], value),
            poisoned(TREE, TREE.valid_US, value),
        ]
        assert_close(in_parts(Q_BTNH, POSITION_BT, garbage), expected, 0)
        dirty_value, dirty = gradients_in_parts(garbage)
        assert clean_value == dirty_value
        jax.tree.map(np.testing.assert_array_equal, clean, dirty)


@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_a_nan_that_a_query_sees_stays_visible(poison):
    segment = keys_of(B, mask=CAUSAL)
    broken = dataclasses.replace(segment, k_UKSH=segment.k_UKSH.at[0, :, 3].set(poison))
    for segments in ([broken], [TREE, broken]):
        output = in_parts(Q_BTNH, POSITION_BT, segments)
        # Row 0 sees key 3 from each of its positions, the others from none.
        assert np.isnan(output.out_BTNH[0]).all()
        assert np.isnan(output.lse_BTN[0]).all()
        assert np.isfinite(output.out_BTNH[1:]).all()


# --- Packed rows of several blocks --------------------------------------------


@pytest.mark.parametrize("tokens", [64, 65, 150, 1030])
def test_packed_rows_in_blocks_give_the_attention_over_all_keys(tokens):
    rng = np.random.default_rng(tokens)
    lengths = rng.integers(1, 1 + tokens // 3, (2, tokens))
    # Rows end in padding, which no query sees and which sees nothing.
    document_BT = np.stack([np.repeat(np.arange(tokens), x)[:tokens] for x in lengths])
    document_BT[:, -7:] = -1
    position_BT = np.stack(
        [np.concatenate([np.arange(n) for n in x])[:tokens] for x in lengths]
    ).astype(np.int32)
    document_BT = jnp.asarray(document_BT, jnp.int32)
    q_BTNH = normal(1, 2, tokens, N, H)
    segment = Segment(
        k_UKSH=normal(2, 2, 2, tokens, H),
        v_UKSH=normal(3, 2, 2, tokens, H),
        position_US=jnp.asarray(position_BT),
        valid_US=document_BT >= 0,
        mask=packed(document_BT, document_BT),
    )
    output = in_parts(q_BTNH, position_BT, [segment], window=tokens // 4)
    expected = in_one(q_BTNH, position_BT, [segment], window=tokens // 4)
    assert_close(output, expected)
    assert jnp.isneginf(output.lse_BTN[:, -7:]).all()


def test_a_block_of_a_packed_row_meets_no_key_behind_it():
    T, blocks = 1024, 8
    ids = jnp.zeros((1, T), jnp.int32)
    segment = Segment(
        k_UKSH=normal(2, 1, 1, T, H),
        v_UKSH=normal(3, 1, 1, T, H),
        mask=packed(ids, ids),
    )
    position_BT = jnp.arange(T, dtype=jnp.int32)[None]
    count = functools.partial(jax.jit(attend_segment), scale=SCALE)
    cost = jax.jit(count).lower(normal(1, 1, T, 1, H), position_BT, segment)
    products = 2 * 2 * H * T * T  # of all keys
    share = (blocks + 1) / (2 * blocks)
    assert cost.cost_analysis()["flops"] < products
    assert cost.cost_analysis()["flops"] > products * share
