"""Letters: B rows, M nodes, V vocabulary."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.core import position_gumbel, row_keys

V = 11
SEEDS = [3, 1, 3, 15]
POSITION_BM = [[5, 6, 7], [0, 0, 2], [9, 5, 1], [5, 6, 2**31 - 1]]

gumbel = jax.jit(position_gumbel, static_argnums=2)


@pytest.fixture(scope="module")
def noise_BMV():
    return gumbel(row_keys(SEEDS), jnp.asarray(POSITION_BM), V)


@pytest.mark.parametrize(
    "seeds", [[0, 1, 7], np.asarray([5, 1, 2**32 - 1], np.uint32), jnp.asarray([3])]
)
def test_a_rows_key_is_that_of_its_seed(seeds):
    key_B = row_keys(seeds)
    assert key_B.shape == (len(seeds),)
    for key, seed in zip(key_B, np.asarray(seeds, np.uint32), strict=True):
        np.testing.assert_array_equal(
            jax.random.key_data(key), jax.random.key_data(jax.random.key(seed))
        )


def test_noise_is_that_of_its_key_and_position(noise_BMV):
    @jax.jit
    def noise_of(seed, position):
        key = jax.random.fold_in(jax.random.key(seed), position)
        return jax.random.gumbel(key, (V,), jnp.float32)

    assert noise_BMV.dtype == jnp.float32
    expected = [
        [noise_of(seed, position) for position in row]
        for seed, row in zip(SEEDS, POSITION_BM, strict=True)
    ]
    np.testing.assert_array_equal(noise_BMV, expected)


def test_a_row_has_the_same_noise_alone_in_a_batch_and_in_any_order(noise_BMV):
    key_B, position_BM = row_keys(SEEDS), jnp.asarray(POSITION_BM)
    order = jnp.asarray([2, 0, 3, 1])
    np.testing.assert_array_equal(
        gumbel(key_B[order], position_BM[order], V), noise_BMV[order]
    )
    for b in range(4):
        for m in range(3):
            alone = gumbel(key_B[b : b + 1], position_BM[b : b + 1, m : m + 1], V)
            np.testing.assert_array_equal(alone[0, 0], noise_BMV[b, m])


def test_other_positions_and_other_keys_have_other_noise(noise_BMV):
    by_place = {}
    for seed, row, noise_MV in zip(SEEDS, POSITION_BM, noise_BMV, strict=True):
        for position, noise_V in zip(row, noise_MV, strict=True):
            by_place.setdefault((seed, position), noise_V.tolist())
    assert len(by_place) == 10  # of 12: two pairs repeat
    assert len({value for values in by_place.values() for value in values}) == 10 * V


def test_the_largest_of_logits_and_noise_is_a_draw_from_their_softmax():
    probability_V = np.asarray([0.5, 0.3, 0.15, 0.05])
    noise_BMV = gumbel(row_keys([0]), jnp.arange(20_000)[None], 4)
    token_M = jnp.argmax(jnp.log(probability_V) + noise_BMV[0], axis=-1)
    count_V, expected_V = np.bincount(token_M, minlength=4), 20_000 * probability_V
    # The 99.9% point of chi-square with 3 degrees of freedom.
    assert ((count_V - expected_V) ** 2 / expected_V).sum() < 16.27
