"""Filters against plain loops, and choices against the distribution they follow."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxllm.core.errors import ConfigError
from jaxllm.core.rng import row_keys
from jaxllm.decoding import choose, make_sampler, warp
from jaxllm.decoding.sampling import best, largest


def warp_reference(logits, temperature, top_k, top_p, min_p) -> np.ndarray:
    """Filters one row in plain Python, token by token from the likeliest down."""
    if temperature == 0:
        return logits
    scaled = logits / np.float32(temperature)
    order = np.argsort(-scaled, kind="stable")
    if top_k:
        order = order[:top_k]
    p = np.exp(scaled[order] - scaled[order].max())
    p /= p.sum()
    kept, mass = [], 0.0
    for token, share in zip(order, p, strict=True):
        if mass >= top_p or share < min_p * p[0]:
            break
        kept.append(token)
        mass += share
    out = np.full_like(scaled, -np.inf)
    out[kept] = scaled[kept]
    return out


@settings(max_examples=60)
@given(
    seed=st.integers(0, 10**6),
    temperature=st.sampled_from([0.0, 0.3, 1.0, 2.5]),
    top_k=st.sampled_from([0, 1, 3, 11, 50]),
    top_p=st.sampled_from([1.0, 0.95, 0.5, 0.013]),
    min_p=st.sampled_from([0.0, 0.07, 0.6]),
)
def test_filters_equal_a_plain_loop(seed, temperature, top_k, top_p, min_p) -> None:
    logits = np.random.default_rng(seed).normal(0, 2, 11).astype(np.float32)
    sampler = make_sampler(
        1, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p
    )
    found = np.asarray(warp(jnp.asarray(logits)[None, None], sampler))[0, 0]
    expected = warp_reference(logits, temperature, top_k, top_p, min_p)
    np.testing.assert_array_equal(np.isinf(found), np.isinf(expected))
    np.testing.assert_allclose(
        found[np.isfinite(found)], expected[np.isfinite(expected)], rtol=1e-6
    )


def test_rows_have_their_own_options() -> None:
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(3, 2, 9)), jnp.float32)
    sampler = make_sampler(
        3, temperature=[0.0, 1.0, 0.5], top_k=[2, 0, 3], top_p=[0.5, 0.4, 1.0]
    )
    found = np.asarray(warp(logits, sampler))
    np.testing.assert_array_equal(found[0], logits[0])
    assert np.isfinite(found[2]).sum(axis=-1).tolist() == [3, 3]


def chi_square(counts: np.ndarray, p: np.ndarray) -> float:
    expected = p * counts.sum()
    if counts[p == 0].any():
        return np.inf
    return float(((counts - expected)[p > 0] ** 2 / expected[p > 0]).sum())


@pytest.mark.parametrize(
    ("options", "wrong"),
    [
        ({"temperature": 0.7}, {"temperature": 0.8}),
        ({"temperature": 1.0, "top_k": 4}, {"temperature": 1.1, "top_k": 4}),
        ({"temperature": 1.5, "top_p": 0.8}, {"temperature": 1.4, "top_p": 0.8}),
    ],
)
def test_choices_follow_the_warped_distribution(options, wrong) -> None:
    rows, V = 20_000, 8
    logits = jnp.asarray(np.random.default_rng(5).normal(0, 1.5, V), jnp.float32)
    many = jnp.broadcast_to(logits, (rows, 1, V))
    position = jnp.full((rows, 1), 17, jnp.int32)
    keys = row_keys(np.arange(rows))
    tokens = np.asarray(choose(many, position, keys, make_sampler(rows, **options)))
    counts = np.bincount(tokens[:, 0], minlength=V)

    def statistic(options) -> float:
        p = jax.nn.softmax(warp(logits[None, None], make_sampler(1, **options)))
        return chi_square(counts, np.asarray(p, np.float64)[0, 0])

    # The 99.9th percentile of chi-square with 7 degrees of freedom is 24.3.
    assert statistic(options) < 24.3
    assert statistic(wrong) > 24.3


def test_choice_depends_on_key_and_position_only() -> None:
    logits = jnp.zeros((4, 3, 50))
    position = jnp.asarray([[1, 2, 3]] * 4)
    sampler = make_sampler(4, temperature=1.0)
    tokens = choose(logits, position, row_keys(np.arange(4)), sampler)
    alone = choose(
        logits[2:3, :1],
        position[2:3, 1:2],
        row_keys(np.asarray([2])),
        make_sampler(1, temperature=1.0),
    )
    assert int(alone[0, 0]) == int(tokens[2, 1])
    assert len(set(np.asarray(tokens).ravel().tolist())) > 6


def test_ties_go_to_the_lowest_id() -> None:
    logits = jnp.asarray([[[0.0, 2.0, 2.0, 1.0]]])
    token = choose(logits, jnp.zeros((1, 1), int), row_keys([0]), make_sampler(1))
    assert int(token[0, 0]) == 1


@pytest.mark.parametrize(
    ("name", "value", "rule"),
    [
        ("temperature", -0.5, "a number from 0 to 1e+06"),
        ("temperature", float("nan"), "a number from 0 to 1e+06"),
        ("top_p", 0.0, "a number from 1e-06 to 1"),
        ("top_p", 1.5, "a number from 1e-06 to 1"),
        ("top_k", -1, "a number from 0 to 2.14748e+09"),
        ("min_p", 1.0, "a number from 0 to 0.999999"),
    ],
)
def test_values_out_of_range_are_refused(name, value, rule) -> None:
    with pytest.raises(ConfigError) as caught:
        make_sampler(2, **{name: value})
    assert str(caught.value) == (
        f"cannot sample: {name} is {value}, expected {rule}. Correct --{name}."
    )


@pytest.mark.parametrize("count", [8, 128, 1000, 1024])
@pytest.mark.parametrize("width", [1, 3, 8])
def test_the_largest_scores_are_those_of_a_sort(count: int, width: int) -> None:
    rng = np.random.default_rng(count + width)
    scores = rng.integers(-9, 10, (4, 3, count)).astype(np.float32)  # ties everywhere
    scores[0] = rng.normal(size=(3, count))
    scores[1, 0] = -np.inf
    scores[1, 1, :-1] = -np.inf  # the one that is left stands in the last block
    top, index = largest(jnp.asarray(scores), width)
    expected = np.argsort(-scores, axis=-1, kind="stable")[..., :width]
    np.testing.assert_array_equal(index, expected)
    np.testing.assert_array_equal(top, np.take_along_axis(scores, expected, axis=-1))


def test_the_best_score_is_that_of_argmax() -> None:
    rng = np.random.default_rng(0)
    scores = rng.integers(-3, 4, (5, 4, 40)).astype(np.float32)  # ties everywhere
    scores[0, 0, :] = -np.inf
    scores[1, 1, 3:] = -np.inf
    assert (best(jnp.asarray(scores)) == scores.argmax(-1)).all()
    scores[2, 2, 5] = np.nan
    assert 0 <= int(best(jnp.asarray(scores))[2, 2]) < 40
