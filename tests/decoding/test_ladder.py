"""Slots that grow while a batch is decoded change nothing but memory."""

import dataclasses
import importlib
import weakref

import jax
import jax.numpy as jnp
import pytest

from jaxllm.core.registry import build
from jaxllm.decoding import BoundDrafter, Drafter, decode, decode_chunks, drain
from jaxllm.decoding.buckets import rungs_between
from jaxllm.decoding.engine import advance
from jaxllm.decoding.ladder import LEAST_STEPS, first_rungs, grow, steps_within
from jaxllm.drafting import METHODS, Autoregressive
from tests.contracts.test_lossless import toy_lm
from tests.decoding.test_engine import prompts_of, request_of, run
from tests.decoding.toys import Replay, toy_model

NEW = 60
# The package has a function of the same name.
DECODE = importlib.import_module("jaxllm.decoding.decode")


def test_rungs_double_up_to_the_whole() -> None:
    assert rungs_between(64, 300) == (64, 128, 256, 300)
    assert rungs_between(64, 64) == (64,)
    assert rungs_between(64, 128) == (64, 128)


def test_a_batch_starts_at_the_first_rung_that_holds_its_prompts() -> None:
    rungs = [256, 16, 32, 64, 64, 512]
    assert first_rungs(rungs, [5, 20], 256, depth=0) == [32, 64, 256]
    # Beside the longest prompt there is room for a whole step.
    assert first_rungs(rungs, [5, 20], 256, depth=6) == [64, 256]
    assert first_rungs([], [5], 128, depth=3) == [128]


def test_no_step_can_pass_the_last_slot() -> None:
    for depth in (0, 3):
        for capacity in range(20, 60):
            for length in range(2, 20):
                rows = [(length, 50), (2, 6)]
                steps = steps_within(capacity, rows, 8, depth)
                reach = length + steps * (depth + 1) + depth
                if steps == 8 and capacity >= 50 + depth:
                    continue  # Every row stops before.
                assert steps == 0 or LEAST_STEPS <= steps <= 8
                assert steps == 0 or reach <= capacity
                if steps == 0:
                    short = length + LEAST_STEPS * (depth + 1) + depth
                    assert short > capacity
    assert steps_within(56, [(3, 50)], 2, 3) == 2
    assert steps_within(10, [(7, 8)], 64, 2) == 64


@pytest.mark.parametrize("rungs", [(16, 24, 40, 64), (48,), (21, 22, 23, 80)])
def test_growing_changes_no_token(rungs) -> None:
    prompts = prompts_of(3, 8)
    request = request_of(prompts, [NEW, NEW - 7], temperature=1.0)
    whole = run(request)
    grown = run(dataclasses.replace(request, rungs=rungs))
    for a, b in zip(grown, whole, strict=True):
        assert a.token_ids == b.token_ids
        assert a.stats == b.stats
        assert a.logprobs == pytest.approx(b.logprobs, abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    "method",
    [
        "jacobi:window=4,fill=ngram",
        "lookahead:window=2,ngram=3,pool=2,slots=16",
        "model:model=target,layers=1,length=3",
        "adaptive:drafter=(jacobi:window=4),widths=1+4",
    ],
)
def test_the_drafters_own_arrays_grow_too(method) -> None:
    lm, prompts = toy_lm(), prompts_of(3, 8)
    bound = BoundDrafter(lm, build(method, METHODS, {Drafter: METHODS}))
    request = request_of(prompts, NEW, temperature=1.0)

    def decoded(rungs):
        return decode(
            lm.model,
            bound.arguments(),
            dataclasses.replace(request, rungs=rungs),
            drafter=bound.drafter,
        )

    for a, b in zip(decoded((24, 48, 72)), decoded(()), strict=True):
        assert a.token_ids == b.token_ids
        assert a.stats == b.stats


@pytest.mark.slow
def test_capacities_are_those_of_the_rungs(monkeypatch) -> None:
    seen = []

    def watched(params, state, *args, **options):
        seen.append(state.cache.capacity)
        assert state.committed.tokens_BS.shape[1] == state.cache.capacity
        # Nothing may be dropped for want of a slot.
        depth, steps = options["drafter"].depth, int(args[2])
        active = jnp.where(state.done_B, 0, state.committed.length_B)
        end = jnp.minimum(active + steps * (depth + 1), state.limit_B)
        assert int(end.max()) + depth <= state.cache.capacity
        return advance(params, state, *args, **options)

    monkeypatch.setattr(DECODE, "advance", watched)
    prompts = prompts_of(4)
    answer = tuple(run(request_of(prompts, NEW))[0].token_ids)
    seen.clear()
    request = dataclasses.replace(request_of(prompts, NEW), rungs=(16, 40, 64))
    [output] = run(request, Replay((answer,), (4,), depth=3))
    assert tuple(output.token_ids) == answer
    assert list(dict.fromkeys(seen)) == [40, 64, 128]
    # A short answer never needs the last ones.
    seen.clear()
    run(dataclasses.replace(request, eos=(answer[5],)), Autoregressive())
    assert set(seen) == {16}


def test_rows_that_were_stopped_do_not_make_it_grow(monkeypatch) -> None:
    seen = []

    def watched(params, state, *args, **options):
        seen.append(state.cache.capacity)
        return advance(params, state, *args, **options)

    monkeypatch.setattr(DECODE, "advance", watched)
    model, params = toy_model()
    request = dataclasses.replace(
        request_of(prompts_of(4, 4), [NEW, 10]), rungs=(24, 48)
    )
    done = drain(
        decode_chunks(
            model,
            {"target": params, "drafter": {}},
            request,
            drafter=Autoregressive(),
            watch=lambda snapshot: [len(snapshot.token_ids[0]) > 4, False],
        )
    )
    assert 4 < len(done.outputs[0].token_ids) < NEW
    assert len(done.outputs[1].token_ids) == 10
    assert set(seen) == {24}


def test_growing_lets_go_of_the_old_arrays() -> None:
    held = [{"a": jnp.ones((2, 4)), "b": jnp.arange(3)}]
    old = weakref.ref(held[0]["a"])
    found = grow(held, lambda: {"a": jnp.zeros((2, 6)), "b": jnp.zeros((3,), int)})
    jax.block_until_ready(found)
    assert not held and old() is None
    assert found["a"].tolist() == [[1.0] * 4 + [0.0] * 2] * 2
    assert found["b"].tolist() == [0, 1, 2]
