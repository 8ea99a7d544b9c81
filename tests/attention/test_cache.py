"""Letters: B rows, K kv heads, S slots, H head dim, T new tokens, J path length, l
layers of a stack.
"""

import dataclasses

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from jaxllm.attention import DenseCache, attend_segment, init_cache

B, S, H, T = 3, 6, 2, 4
# Stacks of one and of three layers, with kv heads of their own.
LAYERS, KV_HEADS = (1, 3), (2, 1)

append = jax.jit(DenseCache.append)


def fresh(dtype=jnp.float32):
    return init_cache(
        LAYERS, rows=B, capacity=S, kv_heads=KV_HEADS, head_dim=H, dtype=dtype
    )


def tokens_of(length, seed=0, dtype=jnp.float32):
    """New keys and values of every stack, no two of them equal."""
    random = np.random.default_rng(seed)

    def draw(layers, heads):
        return jnp.asarray(random.normal(size=(layers, B, heads, length, H)), dtype)

    return tuple(
        (draw(layers, heads), draw(layers, heads))
        for layers, heads in zip(LAYERS, KV_HEADS, strict=True)
    )


def filled(dtype=jnp.float32, length_B=(0, 0, 0)):
    """A cache whose every slot holds something."""
    kv = tokens_of(S, seed=9, dtype=dtype)
    return DenseCache(
        tuple(k for k, _ in kv),
        tuple(v for _, v in kv),
        jnp.asarray(length_B, jnp.int32),
    )


def append_in_a_loop(cache, new_kv, path_BJ, count_B):
    """The arrays of the grown cache, token by token."""
    grown = []
    for stack in range(len(LAYERS)):
        for old, new in zip(
            (cache.k[stack], cache.v[stack]), new_kv[stack], strict=True
        ):
            old, new = np.array(old), np.asarray(new.astype(old.dtype))
            for b in range(B):
                for j in range(count_B[b]):
                    slot = int(cache.length_B[b]) + j
                    if slot < S:
                        old[:, b, :, slot] = new[:, b, :, path_BJ[b][j]]
            grown.append(old)
    return grown


def arrays_of(cache):
    return [x for pair in zip(cache.k, cache.v, strict=True) for x in pair]


def assert_equal(cache, arrays, length_B):
    for ours, expected in zip(arrays_of(cache), arrays, strict=True):
        assert ours.dtype == expected.dtype
        np.testing.assert_array_equal(ours, expected)
    assert cache.length_B.dtype == jnp.int32
    np.testing.assert_array_equal(cache.length_B, length_B)


def rows(low, high):
    return st.lists(st.integers(low, high), min_size=B, max_size=B)


paths = st.lists(rows(0, T - 1), min_size=3, max_size=3).map(
    lambda path_JB: np.transpose(path_JB).tolist()
)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@hypothesis.given(length_B=rows(0, S + 2), path_BJ=paths, count_B=rows(0, 3))
@hypothesis.example([S, S - 1, 0], [[3, 2, 1], [0, 0, 0], [1, 2, 3]], [3, 3, 3])
@hypothesis.example([0, 2, 3], [[0, 1, 2]] * 3, [0, 0, 0])
@hypothesis.settings(max_examples=40)
def test_append_equals_a_loop_over_tokens(dtype, length_B, path_BJ, count_B):
    cache, new_kv = filled(dtype, length_B), tokens_of(T)
    grown = append(cache, new_kv, jnp.asarray(path_BJ), jnp.asarray(count_B))
    expected = append_in_a_loop(cache, new_kv, path_BJ, count_B)
    assert_equal(grown, expected, np.add(length_B, count_B))


@pytest.mark.parametrize("count_B", [None, [4, 0, 2]])
def test_all_tokens_are_kept_in_order_unless_told(count_B):
    cache, new_kv = filled(length_B=[0, 1, 3]), tokens_of(T)
    counts = [T] * B if count_B is None else count_B
    grown = append(cache, new_kv, None, None if count_B is None else jnp.array(count_B))
    expected = append_in_a_loop(cache, new_kv, [list(range(T))] * B, counts)
    assert_equal(grown, expected, np.add([0, 1, 3], counts))


def test_a_path_without_counts_is_kept_whole():
    cache, new_kv = filled(length_B=[0, 1, 3]), tokens_of(T)
    path_BJ = [[3, 1], [2, 2], [0, 3]]
    grown = append(cache, new_kv, jnp.asarray(path_BJ))
    expected = append_in_a_loop(cache, new_kv, path_BJ, [2] * B)
    assert_equal(grown, expected, [2, 3, 5])


def test_a_full_row_is_never_written_over():
    cache = filled(length_B=[S, S + 5, S - 1])
    grown = append(append(cache, tokens_of(T)), tokens_of(T, seed=1))
    for ours, before in zip(arrays_of(grown), arrays_of(cache), strict=True):
        np.testing.assert_array_equal(ours[:, :2], before[:, :2])
        np.testing.assert_array_equal(ours[:, 2, :, : S - 1], before[:, 2, :, : S - 1])
    np.testing.assert_array_equal(
        grown.k[0][:, 2, :, -1], tokens_of(T)[0][0][:, 2, :, 0]
    )
    # A length above the capacity says what was lost.
    np.testing.assert_array_equal(grown.length_B, [S + 8, S + 13, S + 7])


def test_what_is_not_kept_never_reaches_the_cache():
    # A NaN in a slot would outlive the row: weight 0 times NaN is NaN.
    count_B = jnp.asarray([2, 0, 1])
    new_kv = jax.tree.map(
        lambda x: jnp.where(
            (jnp.arange(T) < count_B[:, None])[None, :, None, :, None], x, jnp.nan
        ),
        tokens_of(T),
    )
    everything = jnp.tile(jnp.arange(T), (B, 1))
    for path_BJ in (None, everything):
        grown = append(fresh(), new_kv, path_BJ, count_B)
        assert all(np.isfinite(x).all() for x in arrays_of(grown))


def test_a_path_may_point_nowhere_past_its_count():
    path_BJ = jnp.asarray([[0, -1, 99], [1, 2, -7], [T, T, T]])
    count_B = [1, 2, 0]
    cache, new_kv = filled(), tokens_of(T)
    grown = append(cache, new_kv, path_BJ, jnp.asarray(count_B))
    expected = append_in_a_loop(cache, new_kv, path_BJ.tolist(), count_B)
    assert_equal(grown, expected, count_B)


def test_a_stack_without_new_tokens_stays():
    cache, new_kv = filled(), tokens_of(T)
    grown = append(cache, (None, new_kv[1]))
    np.testing.assert_array_equal(grown.k[0], cache.k[0])
    np.testing.assert_array_equal(grown.v[0], cache.v[0])
    np.testing.assert_array_equal(grown.k[1][:, :, :, :T], new_kv[1][0])
    np.testing.assert_array_equal(grown.length_B, [T] * B)


def test_growing_token_by_token_equals_growing_at_once():
    new_kv, cache = tokens_of(T), fresh()
    for t in range(T):
        cache = append(
            cache, jax.tree.map(lambda x, t=t: x[:, :, :, t : t + 1], new_kv)
        )
    at_once = append(fresh(), new_kv)
    assert_equal(cache, arrays_of(at_once), at_once.length_B)


def test_crop_only_shortens():
    cache = filled(length_B=[5, 2, 0])
    cropped = cache.crop(jnp.asarray([3, 4, 0]))
    assert_equal(cropped, arrays_of(cache), [3, 2, 0])
    grown = append(cropped, tokens_of(T), None, jnp.asarray([1, 1, 1]))
    expected = append_in_a_loop(cropped, tokens_of(T), [[0]] * B, [1, 1, 1])
    assert_equal(grown, expected, [4, 3, 1])


@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize(("stack", "layer"), [(0, 0), (1, 0), (1, 2)])
def test_a_layer_reads_its_own_keys(stack, layer, traced):
    cache = filled(length_B=[3, 0, 6])
    read = jax.jit(cache.segments, static_argnums=0) if traced else cache.segments
    (segment,) = read(stack, layer)
    np.testing.assert_array_equal(segment.k_UKSH, cache.k[stack])
    np.testing.assert_array_equal(segment.v_UKSH, cache.v[stack])
    assert segment.layer == layer
    q_BTNH = jnp.ones((B, 1, 2, H))
    position_BT = jnp.full((B, 1), 9)
    alone = dataclasses.replace(
        segment,
        k_UKSH=cache.k[stack][layer],
        v_UKSH=cache.v[stack][layer],
        layer=None,
    )
    found, expected = (
        attend_segment(q_BTNH, position_BT, s, scale=1.0) for s in (segment, alone)
    )
    np.testing.assert_array_equal(found.out_BTNH, expected.out_BTNH)
    np.testing.assert_array_equal(segment.length_U, [3, 0, 6])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_new_cache_is_empty_and_finite(dtype):
    cache = fresh(dtype)
    assert [k.shape for k in cache.k] == [(1, B, 2, S, H), (3, B, 1, S, H)]
    assert [v.shape for v in cache.v] == [k.shape for k in cache.k]
    assert all(x.dtype == dtype and not x.any() for x in arrays_of(cache))
    assert not cache.length_B.any()
    assert cache.capacity == S
    assert cache.nbytes == 2 * (2 + 3) * B * S * H * jnp.dtype(dtype).itemsize


def test_each_stack_needs_its_kv_heads():
    with pytest.raises(ValueError, match="shorter"):
        init_cache(
            (1, 3), rows=B, capacity=S, kv_heads=(2,), head_dim=H, dtype="float32"
        )


@pytest.mark.parametrize("layers", [(1,) * 8, (8,)], ids=["unstacked", "stacked"])
@pytest.mark.parametrize("with_path", [False, True])
def test_appending_in_a_loop_copies_nothing(layers, with_path):
    """In float32; a narrow cache is widened on a CPU, hence `cache_dtype`."""
    rows, capacity, heads, head_dim = 4, 512, 2, 32

    def grow(cache, seed_kv, path_BJ):
        def step(i, cache):
            new_kv = jax.tree.map(lambda x: x + i, seed_kv)
            return cache.append(new_kv, path_BJ, count_B=i % 3 + jnp.arange(rows) % 2)

        return jax.lax.fori_loop(0, 50, step, cache)

    cache = jax.eval_shape(
        lambda: init_cache(
            layers,
            rows=rows,
            capacity=capacity,
            kv_heads=[heads] * len(layers),
            head_dim=head_dim,
            dtype=jnp.float32,
        )
    )
    new = [
        jax.ShapeDtypeStruct((count, rows, heads, T, head_dim), jnp.float32)
        for count in layers
    ]
    path_BJ = jax.ShapeDtypeStruct((rows, T), jnp.int32) if with_path else None
    compiled = (
        jax.jit(grow, donate_argnums=0)
        .lower(cache, tuple((x, x) for x in new), path_BJ)
        .compile()
    )
    memory = compiled.memory_analysis()
    size = 2 * sum(layers) * rows * capacity * heads * head_dim * 4
    assert memory.alias_size_in_bytes >= size
    assert memory.temp_size_in_bytes < 0.05 * size
