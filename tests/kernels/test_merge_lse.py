"""Letters: B rows, T queries, N query heads, H head dim."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.merge_lse import merge_lse
from tests.kernels.attention_oracle import assert_same, attention, dense, normal

B, T, N, H, S = 3, 2, 4, 16, 20


def parts(bounds, seen):
    """The attentions over slices of the keys, and the one over all."""
    q_BTNH, keys = normal(0, B, T, N, H), dense(1, B, 2, S, H, layers=1)
    k, v = keys.k[0], keys.v[0]
    split = [
        attention(q_BTNH, k[:, :, i:j], v[:, :, i:j], seen[:, :, i:j])
        for i, j in itertools.pairwise(bounds)
    ]
    outs, lses = zip(*split, strict=True)
    floats = [[jnp.asarray(x, jnp.float32) for x in xs] for xs in (outs, lses)]
    return (*floats, attention(q_BTNH, k, v, seen))


SEEN = np.random.default_rng(5).random((B, T, S)) < 0.5
SEEN[0, 0] = False
SEEN[1, 1, :7] = False


@pytest.mark.parametrize("bounds", [(0, S), (0, 7, S), (0, 1, 7, 19, S)])
def test_any_split_gives_the_whole(bounds):
    outs, lses, want = parts(bounds, SEEN)
    assert_same(merge_lse(outs, lses), want)
    assert_same(merge_lse(outs[::-1], lses[::-1], implementation="reference"), want)


def test_a_part_that_saw_nothing_changes_nothing():
    outs, lses, want = parts((0, S), SEEN)
    garbage, nothing = jnp.full_like(outs[0], 1e9), jnp.full_like(lses[0], -jnp.inf)
    assert_same(merge_lse([garbage, *outs], [nothing, *lses]), want)
    found = merge_lse([garbage] * 2, [nothing] * 2)
    np.testing.assert_array_equal(found[1], nothing)
    np.testing.assert_array_equal(found[0], jnp.zeros_like(garbage))


def test_large_log_sum_exps_do_not_overflow():
    outs, lses, want = parts((0, 7, S), SEEN)
    found = merge_lse(outs, [lse + 500.0 for lse in lses])
    np.testing.assert_allclose(found[0], want[0], rtol=0, atol=1e-4)


def test_gradients_hold_no_nan():
    outs, lses, _ = parts((0, 7, S), SEEN)
    gradients = jax.grad(lambda o, s: merge_lse(o, s)[0].sum(), (0, 1))(outs, lses)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(gradients))


def test_parts_have_to_match():
    outs, lses, _ = parts((0, 7, S), SEEN)
    with pytest.raises(ValueError, match="2 outputs and 1 log-sum-exps"):
        merge_lse(outs, lses[:1])
    with pytest.raises(NotImplementedError, match="there is no tpu kernel"):
        merge_lse(outs, lses, implementation="tpu")
