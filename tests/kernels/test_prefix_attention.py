"""Letters: B rows, T queries, N query heads, K kv heads, H head dim, P keys."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.operands import Keys, Logits
from pallas_kernels.prefix_attention import prefix_attention
from tests.kernels.attention_oracle import (
    assert_same,
    attention,
    dense,
    normal,
    poisoned,
    visible,
)

B, T, N, K, P, LAYERS = 4, 3, 4, 2, 40, 2
POSITION_BT = jnp.asarray([[40, 41, 42], [17, 17, 18], [90, 91, 92], [20, 30, 50]])


def inputs(length, *, heads=N, head_dim=128, dtype="float32"):
    """Queries, and one prefix `[L, K, P, H]` with NaN behind its length."""
    one = poisoned(dense(1, 1, K, P, head_dim, dtype=dtype), [length])
    keys = Keys(one.k[:, 0], one.v[:, 0], one.length[0], one.layer)
    return normal(0, B, T, heads, head_dim, dtype=dtype), keys


def wanted(q_BTNH, keys, **options):
    seen = visible((B, T, P), [keys.length] * B, **options)
    k, v = (np.broadcast_to(x[1], (B, K, P, x.shape[-1])) for x in (keys.k, keys.v))
    return attention(q_BTNH, k, v, seen, softcap=5.0)


CAPPED = Logits(softcap=5.0)


@pytest.mark.parametrize("length", [0, 1, 15, 16, 17, P])
def test_the_reference_equals_attention_written_out(length):
    q_BTNH, keys = inputs(length)
    found = prefix_attention(q_BTNH, keys, POSITION_BT, 30, logits=CAPPED)
    assert_same(found, wanted(q_BTNH, keys, position_BT=POSITION_BT, window=30))


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("length", "block", "window"),
    [
        (17, {"keys": 16, "heads": 1, "rows": 128}, 30),
        slow(0, {"keys": 16}, 30),
        slow(1, {"keys": 16}, None),
        slow(15, {"keys": 16}, None),
        slow(16, {"keys": 16}, 30),
        slow(P, {"keys": 16, "rows": 128}, None),
        slow(P, {"keys": P, "heads": 2}, 30),
        slow(33, None, None),
    ],
)
def test_the_kernel_equals_attention_written_out(length, block, window):
    q_BTNH, keys = inputs(length)
    position_BT = POSITION_BT if window else None
    found = prefix_attention(
        q_BTNH,
        keys,
        position_BT,
        window,
        logits=CAPPED,
        implementation="interpret",
        block=block,
    )
    want = wanted(q_BTNH, keys, position_BT=position_BT, window=window)
    assert_same(found, want)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [{"head_dim": 64}, {"head_dim": 80, "dtype": "bfloat16"}, {"dtype": "bfloat16"}],
)
def test_dtypes_and_head_shapes(options):
    q_BTNH, keys = inputs(33, **options)
    want = wanted(q_BTNH, keys)
    for implementation in ("reference", "interpret"):
        found = prefix_attention(
            q_BTNH, keys, logits=CAPPED, implementation=implementation
        )
        assert_same(found, want, options.get("dtype", "float32"))


@pytest.mark.slow
def test_many_samples_of_a_prompt_are_several_blocks_of_rows():
    keys = inputs(33)[1]
    q_BTNH = normal(3, 70, 2, N, 128)
    position_BT = jnp.arange(140).reshape(70, 2) // 3
    found, want = (
        prefix_attention(
            q_BTNH,
            keys,
            position_BT,
            8,
            implementation=name,
            block={"keys": 16, "rows": 128},
        )
        for name in ("interpret", "reference")
    )
    assert_same(found, want)


def test_without_a_length_all_keys_count_and_one_layer_is_a_stack_of_one():
    q_BTNH, keys = inputs(P)
    want = wanted(q_BTNH, keys)
    one = Keys(keys.k[1], keys.v[1])
    whole = dataclasses.replace(keys, length=None)
    for held in (one, whole):
        assert_same(prefix_attention(q_BTNH, held, logits=CAPPED), want)
    found = prefix_attention(q_BTNH, one, logits=CAPPED, implementation="interpret")
    assert_same(found, want)
