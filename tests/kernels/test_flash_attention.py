"""Letters: B rows, T queries, N query heads, K kv heads, H head dim, S keys."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.flash_attention import flash_attention
from pallas_kernels.operands import Keys, Logits
from tests.kernels.attention_oracle import (
    assert_same,
    attention,
    dense,
    normal,
    poisoned,
    visible,
)

B, T, N, K, S = 4, 9, 4, 2, 40
LENGTHS = [0, 9, 40, 30]
# A row with no keys, one that starts, one that continues, one past its keys.
POSITION_BT = jnp.asarray([0, 0, 31, 35])[:, None] + jnp.arange(T)
CAPPED = Logits(softcap=5.0)
# Three sequences in a row of keys; queries of two of them and padding.
KEY_BS = jnp.asarray(np.repeat([[0, 1, 2]], B, 0)).repeat(
    jnp.asarray([12, 13, 15]), axis=1
)
QUERY_BT = jnp.asarray(
    [[0] * 9, [0] * 9, [2] * 7 + [-1] * 2, [2] * 3 + [7] * 3 + [-1] * 3]
)


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


def inputs(head_dim=128, dtype="float32", packed=False):
    q_BTNH = normal(0, B, T, N, head_dim, dtype=dtype)
    keys = poisoned(dense(1, B, K, S, head_dim, dtype=dtype), LENGTHS)
    return q_BTNH, dataclasses.replace(keys, segment=KEY_BS if packed else None)


def wanted(q_BTNH, keys, *, packed=False, **options):
    seen = visible((B, T, S), LENGTHS, **options)
    if packed:
        same = np.asarray(QUERY_BT)[:, :, None] == np.asarray(KEY_BS)[:, None, :]
        seen &= same & (np.asarray(QUERY_BT) >= 0)[:, :, None]
    return attention(q_BTNH, keys.k[1], keys.v[1], seen, softcap=5.0)


CASES = [
    # causal, window, packed
    (True, 5, False),
    (True, None, True),
    (False, None, False),
]


@pytest.mark.parametrize(("causal", "window", "packed"), [*CASES, (True, 5, True)])
def test_the_reference_equals_attention_written_out(causal, window, packed):
    check("reference", None, causal, window, packed)


@pytest.mark.parametrize(
    ("block", "causal", "window", "packed"),
    [
        ({"keys": 8, "rows": 128}, True, 5, False),
        slow({"keys": S, "heads": 1}, True, 5, True),
        *(slow({"keys": 16, "rows": 128, "heads": 1}, *case) for case in CASES[::2]),
        *(slow({"keys": 8}, *case) for case in CASES[::2]),
        *(slow(None, *case) for case in CASES),
    ],
)
def test_the_kernel_equals_attention_written_out(block, causal, window, packed):
    check("interpret", block, causal, window, packed)


def check(implementation, block, causal, window, packed):
    q_BTNH, keys = inputs(packed=packed)
    position_BT = POSITION_BT if causal else None
    found = flash_attention(
        q_BTNH,
        keys,
        position_BT,
        window,
        QUERY_BT if packed else None,
        logits=CAPPED,
        implementation=implementation,
        block=block,
    )
    options = {"position_BT": position_BT, "window": window, "causal": causal}
    assert_same(found, wanted(q_BTNH, keys, packed=packed, **options))


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [{"head_dim": 64}, {"head_dim": 80, "dtype": "bfloat16"}, {"dtype": "bfloat16"}],
)
def test_dtypes_and_head_shapes(options):
    q_BTNH, keys = inputs(**options)
    want = wanted(q_BTNH, keys, position_BT=POSITION_BT, causal=True)
    one = Keys(keys.k[1], keys.v[1], keys.length)
    for implementation in ("reference", "interpret"):
        found = flash_attention(
            q_BTNH, one, POSITION_BT, logits=CAPPED, implementation=implementation
        )
        assert_same(found, want, options.get("dtype", "float32"))


def test_packed_rows_in_blocks_of_the_lanes():
    keys = poisoned(dense(1, 2, K, 256, 128), [240, 256])
    ids_BS = jnp.asarray(
        [
            [0] * 100 + [1] * 100 + [2] * 40 + [-1] * 16,
            [5] * 30 + [3] * 200 + [-1] * 26,
        ]
    )
    keys = dataclasses.replace(keys, segment=ids_BS)
    q_BTNH = normal(0, 2, 256, 2, 128)
    position_BT = jnp.broadcast_to(jnp.arange(256), (2, 256))
    found, want = (
        flash_attention(
            q_BTNH,
            keys,
            position_BT,
            None,
            ids_BS,
            implementation=name,
            block={"keys": 128, "rows": 128},
        )
        for name in ("interpret", "reference")
    )
    assert_same(found, want)


def test_ids_of_one_side_alone_are_refused():
    q_BTNH, keys = inputs()
    with pytest.raises(ValueError, match="expected both"):
        flash_attention(q_BTNH, keys, POSITION_BT, None, QUERY_BT)
