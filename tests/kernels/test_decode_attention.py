"""Letters: B rows, T queries, N query heads, K kv heads, H head dim, S slots."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.decode_attention import decode_attention
from pallas_kernels.operands import Keys, Logits, NodeKeys, PagedKeys
from tests.kernels.attention_oracle import (
    assert_same,
    attention,
    dense,
    in_pages,
    normal,
    poisoned,
    visible,
)

S = 40
LENGTHS = [0, 1, 15, 16, 17, S]
B = len(LENGTHS)
POSITION_BT = jnp.asarray(LENGTHS)[:, None] + jnp.asarray([0, 1, 1])


def inputs(heads=4, kv_heads=2, head_dim=128, slots=S, queries=3, dtype="float32"):
    """Queries and keys of rows of all lengths, with NaN behind them."""
    q_BTNH = normal(0, B, queries, heads, head_dim, dtype=dtype)
    keys = dense(1, B, kv_heads, slots, head_dim, dtype=dtype)
    return q_BTNH, poisoned(keys, [min(n, slots) for n in LENGTHS])


def wanted(q_BTNH, keys, *, window=None, softcap=None):
    shape = (B, q_BTNH.shape[1], keys.k.shape[-2])
    seen = visible(shape, keys.length, position_BT=POSITION_BT, window=window)
    layer = keys.layer
    return attention(q_BTNH, keys.k[layer], keys.v[layer], seen, softcap=softcap)


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


def test_the_reference_equals_attention_written_out():
    q_BTNH, keys = inputs()
    want = wanted(q_BTNH, keys, window=6, softcap=5.0)
    paged = in_pages(keys, 8)
    for held in (keys, paged):
        found = decode_attention(
            q_BTNH, held, POSITION_BT, 6, logits=Logits(softcap=5.0)
        )
        assert_same(found, want)


@pytest.mark.parametrize(
    ("block", "window"),
    [
        ({"heads": 1, "keys": 8}, None),
        slow({"heads": 1, "keys": 8}, 6),
        slow({"heads": 2, "keys": 16}, None),
        slow({"heads": 2, "keys": 16}, 6),
        slow({"heads": 1, "rows": 128, "keys": S}, None),
        slow({"heads": 1, "rows": 128, "keys": S}, 6),
    ],
)
def test_the_kernel_equals_attention_written_out(block, window):
    q_BTNH, keys = inputs()
    found = decode_attention(
        q_BTNH,
        keys,
        POSITION_BT,
        window,
        logits=Logits(softcap=5.0),
        implementation="interpret",
        block=block,
    )
    assert_same(found, wanted(q_BTNH, keys, window=window, softcap=5.0))


@pytest.mark.parametrize(
    ("options", "block"),
    [
        # Keys are read turned where heads are no multiple of the lanes.
        ({"head_dim": 80, "slots": 300, "dtype": "bfloat16"}, {"keys": 128}),
        slow({"head_dim": 64, "queries": 1}, None),
        slow({"dtype": "bfloat16"}, {"keys": 16}),
        slow({"heads": 2, "queries": 1}, None),
        slow({"heads": 5, "kv_heads": 1}, {"keys": 16, "rows": 128}),
    ],
)
def test_dtypes_and_head_shapes(options, block):
    q_BTNH, keys = inputs(**options)
    dtype = options.get("dtype", "float32")
    want = wanted(q_BTNH, keys)
    for implementation in ("reference", "interpret"):
        found = decode_attention(
            q_BTNH, keys, implementation=implementation, block=block
        )
        assert_same(found, want, dtype)


@pytest.mark.parametrize("keys_of_block", [24, slow(8), slow(None)])
def test_pages_equal_dense_keys(keys_of_block):
    q_BTNH, keys = inputs()
    found = decode_attention(
        q_BTNH,
        in_pages(keys, 8),
        POSITION_BT,
        9,
        implementation="interpret",
        block=None if keys_of_block is None else {"keys": keys_of_block},
    )
    assert_same(found, wanted(q_BTNH, keys, window=9))


@pytest.mark.slow
def test_keys_of_one_layer_are_a_stack_of_one():
    q_BTNH, keys = inputs()
    stacked = decode_attention(q_BTNH, keys, implementation="interpret")
    one = Keys(keys.k[1], keys.v[1], keys.length)
    paged = in_pages(keys, 8)
    page = PagedKeys(paged.k[1], paged.v[1], paged.length, paged.pages)
    for layer in (one, page):
        for implementation in ("reference", "interpret"):
            found = decode_attention(q_BTNH, layer, implementation=implementation)
            assert_same(found, stacked)


def test_it_runs_inside_a_loop_over_layers_and_compiled():
    q_BTNH, keys = inputs(queries=1)

    @functools.partial(jax.jit, static_argnames="implementation")
    def layers(q_BTNH, keys, implementation):
        def body(state):
            layer, q_BTNH = state
            here = Keys(keys.k, keys.v, keys.length, layer)
            out, _ = decode_attention(q_BTNH, here, implementation=implementation)
            return layer + 1, q_BTNH + out

        return jax.lax.while_loop(lambda s: s[0] < 2, body, (0, q_BTNH))[1]

    found, want = (layers(q_BTNH, keys, i) for i in ("interpret", "reference"))
    np.testing.assert_allclose(found, want, rtol=0, atol=1e-5)


def test_draft_nodes_see_their_ancestors():
    q_BTNH, nodes = normal(0, 2, 4, 6, 16), dense(3, 2, 3, 4, 16, layers=1)
    seen = np.tril(np.random.default_rng(4).random((2, 4, 4)) < 0.5)
    seen[1, 2] = False
    keys = NodeKeys(nodes.k[0], nodes.v[0], jnp.asarray(seen))
    want = attention(q_BTNH, keys.k, keys.v, seen)
    assert_same(decode_attention(q_BTNH, keys), want)
    with pytest.raises(NotImplementedError, match="no tpu kernel for draft nodes"):
        decode_attention(q_BTNH, keys, implementation="tpu")


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ({"heads": 3}, "heads=3, expected a divisor of 2"),
        ({"keys": 12}, "keys=12, expected a multiple of 8, or all 40"),
        ({"rows": 16}, "rows=16, expected a multiple of 128, or all 6"),
        ({"row": 16}, "'row', expected one of heads, rows, keys"),
    ],
)
def test_wrong_block_sizes_are_named(block, message):
    q_BTNH, keys = inputs()
    with pytest.raises(ValueError, match=message):
        decode_attention(q_BTNH, keys, implementation="interpret", block=block)


def test_what_cannot_run_is_named():
    q_BTNH, keys = inputs()
    with pytest.raises(ValueError, match="a window without position_BT"):
        decode_attention(q_BTNH, keys, window=3)
    narrow = in_pages(inputs(head_dim=64)[1], 8)
    with pytest.raises(ValueError, match="pages of head dim 64"):
        decode_attention(normal(0, B, 1, 4, 64), narrow, implementation="interpret")
