"""What the compiled loop of every method does and does not hold."""

import re

import jax
import jax.numpy as jnp
import pytest

import jaxllm
from jaxllm.core.rng import row_keys
from jaxllm.decoding import Committed, advance, make_sampler, prefill
from tests.contracts.enrolled import bound, methods, toy_lm

ROWS, CAPACITY = 2, 1 << 14


def lower(method, heads_file):
    """The loop of a method over a long cache, not compiled yet."""
    lm = toy_lm()
    drafter = bound(method, heads_file, lm)
    params = drafter.arguments()
    sampler = make_sampler(ROWS, temperature=1.0)

    def start():
        committed = Committed(
            jnp.zeros((ROWS, CAPACITY), jnp.int32),
            jnp.ones((ROWS,), jnp.int32),
            row_keys(jnp.arange(ROWS)),
            sampler,
            jnp.ones((ROWS,), jnp.int32),
        )
        return prefill(
            params,
            committed,
            lm.model.init_cache(lm.params, ROWS, CAPACITY),
            jnp.full((ROWS,), CAPACITY, jnp.int32),
            jnp.zeros((ROWS,), bool),
            model=lm.model,
            drafter=drafter.drafter,
            chunk=16,
        )

    state = jax.eval_shape(start)
    lowered = advance.lower(
        params,
        state,
        sampler,
        jnp.asarray([-1]),
        jnp.int32(8),
        model=lm.model,
        drafter=drafter.drafter,
    )
    return state, lowered


@pytest.mark.parametrize("method", methods(fast=False))
def test_the_loop_has_no_callback_and_no_copy_of_the_cache(method, heads_file) -> None:
    state, lowered = lower(method, heads_file)
    text = lowered.as_text()
    assert "callback" not in text and "infeed" not in text
    compiled = lowered.compile()
    memory = compiled.memory_analysis()
    layers = [*state.cache.k, *state.cache.v]
    cache = sum(x.size * x.dtype.itemsize for x in layers)
    assert memory.alias_size_in_bytes >= cache
    # One layer's attention logits over the cache, of as many tokens as run at once (a
    # draft, or the eight of a chunk that catches up), a few times; no copy of a cache.
    tokens = max(bound(method, heads_file, toy_lm()).drafter.nodes, 8)
    scores = ROWS * 4 * tokens * CAPACITY * 4
    assert memory.temp_size_in_bytes < 4.2 * scores
    # Nor is a layer of any cache copied and the copy thrown away.
    layer = rf"f32\[\d+,{ROWS},2,{CAPACITY},8\]"
    assert not re.findall(rf"{layer}\S* copy\(", compiled.as_text())


@pytest.mark.parametrize("method", methods(fast=False))
def test_one_compile_a_bucket_and_none_afterwards(method, heads_file) -> None:
    lm = toy_lm()
    drafter = bound(method, heads_file, lm)

    def run(length: int, seed: int) -> None:
        jaxllm.generate(
            lm,
            [[seed % 61] * length],
            drafter=drafter,
            max_new_tokens=5,
            temperature=0.5 + seed / 10,
            seed=seed,
        )

    prefill.clear_cache()
    advance.clear_cache()
    for length in (3, 16, 9, 1):  # one bucket
        run(length, seed=1)
    assert (prefill._cache_size(), advance._cache_size()) == (1, 1)
    run(40, seed=2)  # another
    assert (prefill._cache_size(), advance._cache_size()) == (2, 2)
    for length in (5, 60, 12):
        run(length, seed=length)
    assert (prefill._cache_size(), advance._cache_size()) == (2, 2)
