"""What the compiled loop does and does not hold: no callback, no copy of the cache."""

import jax
import jax.numpy as jnp

from jaxllm.core.rng import row_keys
from jaxllm.decoding import Request, advance, decode, make_sampler, prefill
from jaxllm.decoding.buckets import prompt_bucket, shapes_for
from jaxllm.decoding.protocol import Committed
from jaxllm.drafting import Autoregressive
from tests.decoding.toys import toy_model


def abstract_state(model, params, rows, capacity, drafter):
    """Returns shapes of the loop's arguments."""

    def make():
        committed = Committed(
            jnp.zeros((rows, capacity), jnp.int32),
            jnp.ones((rows,), jnp.int32),
            row_keys(jnp.arange(rows)),
        )
        return prefill(
            {"target": params, "drafter": {}},
            committed,
            model.init_cache(params, rows, capacity),
            jnp.full((rows,), capacity, jnp.int32),
            jnp.zeros((rows,), bool),
            model=model,
            drafter=drafter,
            chunk=16,
        )

    return jax.eval_shape(make)


def lower(rows=4, capacity=1 << 14, drafter=None, **options):
    model, params = toy_model()
    drafter = drafter or Autoregressive()
    state = abstract_state(model, params, rows, capacity, drafter)
    return state, advance.lower(
        {"target": params, "drafter": {}},
        state,
        make_sampler(rows, **options),
        jnp.asarray([-1]),
        jnp.int32(8),
        model=model,
        drafter=drafter,
    )


def test_loop_holds_no_copy_of_the_cache() -> None:
    state, lowered = lower()
    memory = lowered.compile().memory_analysis()
    cache = sum(x.size * x.dtype.itemsize for x in (*state.cache.k, *state.cache.v))
    assert memory.alias_size_in_bytes >= cache
    # Logits over the cache are one layer's: 4 rows x 4 heads x S floats, a few times.
    assert memory.temp_size_in_bytes < 0.2 * cache


def test_loop_has_no_callback() -> None:
    _, lowered = lower(capacity=64, temperature=1.0, top_p=0.9)
    text = lowered.as_text()
    assert "while" in text
    assert "callback" not in text
    assert "infeed" not in text


def test_mixed_lengths_compile_once_a_bucket() -> None:
    model, params = toy_model()
    lengths = [1, 5, 16, 17, 30, 33, 60, 64, 70, 100, 128, 3, 20]

    def run(temperature=0.0, seed=0) -> None:
        for length in lengths:
            request = Request(
                prompts=[[2] * length],
                max_new_tokens=[3],
                sampler=make_sampler(1, temperature=temperature),
                seeds=[seed],
                eos=(seed,),
            )
            decode(
                model,
                {"target": params, "drafter": {}},
                request,
                drafter=Autoregressive(),
            )

    prefill.clear_cache()
    advance.clear_cache()
    run()
    buckets = {prompt_bucket(n) for n in lengths}
    assert prefill._cache_size() == len(buckets) == 5
    assert advance._cache_size() <= len(buckets)
    before = prefill._cache_size(), advance._cache_size()
    run()
    assert (prefill._cache_size(), advance._cache_size()) == before
    run(temperature=0.5)
    warm = prefill._cache_size(), advance._cache_size()
    run(temperature=0.9, seed=4)
    assert (prefill._cache_size(), advance._cache_size()) == warm


def test_shapes_leave_room_for_prompt_answer_and_draft() -> None:
    for length in (1, 16, 17, 511, 512, 513, 1500):
        for new in (1, 63, 64):
            shapes = shapes_for([length], new, depth=7)
            assert shapes.capacity >= length + new + 7
            assert shapes.chunk <= min(512, prompt_bucket(length))
