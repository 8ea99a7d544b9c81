"""Widths that follow acceptance: bounded tries, shared decisions, equal tokens."""

import dataclasses

import jax.numpy as jnp
import pytest

from jaxllm.core.errors import ConfigError
from jaxllm.core.registry import build
from jaxllm.decoding import Drafter, Verdict, decode_chunks, drain
from jaxllm.drafting import METHODS, Autoregressive, Jacobi
from jaxllm.drafting.adaptive import Adaptive, AdaptiveState
from jaxllm.drafting.costs import measure_cost
from jaxllm.drafting.prompt_lookup import PromptLookup
from tests.contracts.test_lossless import toy_lm
from tests.decoding.test_engine import (
    assert_equals_reference,
    prompts_of,
    request_of,
    run,
)
from tests.decoding.toys import TEMPERATURES, Replay, toy_model

COSTS = {"costs": (1.0, 1.5, 1.7), "draft_cost": 0.0, "budget": 1.0}


def replay(prompts, new, shift=0, tree=False, depth=7):
    plain = run(request_of(prompts, new))
    answers = tuple(tuple(o.token_ids) for o in plain)
    return Replay(answers, tuple(map(len, prompts)), depth, tree, shift)


def test_wrong_drafts_are_tried_ever_more_rarely() -> None:
    prompts, new = prompts_of(3, 6), 60
    inner = replay(prompts, new, shift=2)
    request = request_of(prompts, new)
    outputs = run(request, Adaptive(drafter=inner, wait=4, **COSTS))
    assert_equals_reference(outputs, request)
    for output in outputs:
        assert output.stats["target_passes"] == new
        # The widest ran in the first step, then after 4, 8, 16 and 32 others, except
        # that the last try would begin behind the end.
        assert output.stats["drafted"] == 7 * 4
        assert output.stats["accepted"][1:] == [0] * 7


def test_right_drafts_run_at_the_widest() -> None:
    prompts, new = prompts_of(3, 6), 40
    outputs = run(
        request_of(prompts, new), Adaptive(drafter=replay(prompts, new), **COSTS)
    )
    for output in outputs:
        assert output.stats["target_passes"] == new // 8
        assert output.stats["accepted"] == [new // 8] * 8


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_tokens_are_those_of_plain_decoding(temperature) -> None:
    options = {"temperature": temperature}
    request = request_of(prompts_of(1, 9, 4), 25, **options)
    drafter = Adaptive(drafter=Jacobi(window=6), widths=(1, 3, 8), wait=2, max_wait=3)
    assert drafter.nodes == 6
    outputs = run(request, drafter)
    assert_equals_reference(outputs, request, options)
    # Some steps drafted and some did not.
    drafted = [o.stats["drafted"] for o in outputs]
    passes = [o.stats["target_passes"] for o in outputs]
    assert all(0 < d < 5 * p for d, p in zip(drafted, passes, strict=True))


@pytest.mark.slow
def test_a_tree_is_cut_to_its_first_nodes() -> None:
    prompts, new = prompts_of(3, 6), 24
    request = request_of(prompts, new)
    inner = replay(prompts, new, tree=True, depth=3)
    # At width 3 one right node is left; 7 is the whole tree of depth 3.
    for widths, passes in [((1, 3), 12), ((1, 5, 9), 6)]:
        costs = (1.0, *[1.1] * (len(widths) - 1))
        outputs = run(request, Adaptive(drafter=inner, widths=widths, costs=costs))
        assert_equals_reference(outputs, request)
        assert [o.stats["target_passes"] for o in outputs] == [passes] * 2


def test_width_one_alone_is_plain_decoding() -> None:
    request = request_of(prompts_of(3, 6), 8)
    outputs = run(request, Adaptive(widths=(1,)))
    plain = run(request, Autoregressive())
    assert [o.token_ids for o in outputs] == [o.token_ids for o in plain]
    assert [o.stats["drafted"] for o in outputs] == [0, 0]


@dataclasses.dataclass(frozen=True)
class Watching(Replay):
    """Checks that every step comes in its own shapes, and keeps what it saw."""

    def init(self, params, committed, prefill):
        rows = committed.length_B.shape[0]
        # Whole path lengths, emitted tokens, and valid nodes, each summed over steps.
        return jnp.zeros((rows, 3), jnp.int32)

    def propose(self, params, state, committed):
        return state, super().propose(params, state, committed)[1]

    def observe(self, params, state, committed, draft, verdict, forward):
        rows, depth = state.shape[0], self.depth
        assert draft.tokens_BM.shape == draft.valid_BM.shape == (rows, self.nodes)
        assert (draft.parents_BM is not None) == self.tree
        assert verdict.path_BJ.shape == (rows, depth + 1)
        assert verdict.chosen_BM.shape == (rows, self.nodes)
        assert forward.logits_BTV.shape[:2] == (rows, self.nodes)
        assert forward.hidden_BTD.shape[:2] == (rows, self.nodes)
        assert all(k.shape[3] == self.nodes for k, _ in forward.new_kv)
        seen = [verdict.num_accepted_B, jnp.ones((rows,), int), draft.valid_BM.sum(1)]
        return state + jnp.stack(seen, axis=1)

    def learned(self, params, state):
        return state


@pytest.mark.parametrize("tree", [False, True])
def test_the_inner_drafter_sees_every_step_at_its_own_width(tree) -> None:
    prompts, new = prompts_of(3, 6), 20
    plain = replay(prompts, new, shift=2, tree=tree, depth=3)
    inner = Watching(plain.answers, plain.prompts, 3, tree, 2)
    model, params = toy_model()
    done = drain(
        decode_chunks(
            model,
            {"target": params, "drafter": {}},
            request_of(prompts, new),
            drafter=Adaptive(drafter=inner, widths=(1, 2, 4), wait=4),
        )
    )
    for row, output in enumerate(done.outputs):
        passes, drafted = output.stats["target_passes"], output.stats["drafted"]
        assert passes == new
        # At width 1 too, which is most of the time.
        assert done.drafter[row].tolist() == [0, passes, passes + drafted]
        assert 0 < drafted < passes


@dataclasses.dataclass(frozen=True)
class Running(Watching):
    """Runs the target itself, as drafters with nodes of their own do."""

    def forward(self, params, state, draft, context):
        assert state.shape == (draft.tokens_BM.shape[0], 3)
        assert context.positions_BT.shape == draft.tokens_BM.shape
        return toy_model()[0](params["target"], draft.tokens_BM, context)


@pytest.mark.slow
def test_an_inner_drafter_may_run_the_target_itself() -> None:
    prompts, new = prompts_of(3), 9
    plain = replay(prompts, new, depth=3)
    inner = Running(plain.answers, plain.prompts, 3)
    request = request_of(prompts, new)
    [output] = run(request, Adaptive(drafter=inner, widths=(1, 4)))
    assert tuple(output.token_ids) == plain.answers[0]
    assert output.stats["target_passes"] == 3


def decide(accepted, index=2, state=None, active=None, adaptive=None):
    """Returns the state after a step of a chain at widths 1, 4, 8."""
    adaptive = adaptive or Adaptive(drafter=Replay((), (), 7), **COSTS)
    accepted = jnp.asarray(accepted)
    none = jnp.zeros((3,), jnp.float32)
    zero = jnp.int32(0)
    if state is None:
        state = AdaptiveState((), accepted, zero, none, none, zero, jnp.int32(8))
    path = jnp.minimum(jnp.arange((1, 4, 8)[index]), accepted[:, None])
    active = jnp.ones_like(accepted, bool) if active is None else jnp.asarray(active)
    verdict = Verdict(path, accepted, accepted, path)
    return adaptive.decide(state, index, verdict, active)


def test_a_wide_step_shows_what_narrower_ones_would_have_done() -> None:
    state = decide([2, 7])
    assert (state.tokens_W / state.weight_W).tolist() == [1.0, 3.5, 5.5]
    # 3.5 / 1.5 is less than 5.5 / 1.7.
    assert int(state.variant) == 2
    assert int(decide([1, 3]).variant) == 1
    assert int(decide([0, 0]).variant) == 0
    assert int(decide([1, 0]).variant) == 0


def test_rows_that_have_stopped_do_not_count() -> None:
    state = decide([0, 7], active=[False, True])
    assert (state.tokens_W / state.weight_W).tolist() == [1.0, 4.0, 8.0]
    silent = decide([0, 0], state=state, active=[False, False])
    assert int(silent.variant) == 2


def test_estimates_fade_and_tries_back_off() -> None:
    state = decide([7, 7])
    # The widest holds on for some failures, then gives way.
    steps = 0
    while int(state.variant) != 0:
        state, steps = decide([0, 0], state=state), steps + 1
    assert 4 < steps < 16
    assert int(state.wait) == 8
    waits = []
    for _ in range(6):
        count = 0
        while int(state.variant) != 2:
            state, count = decide([0, 0], index=0, state=state), count + 1
        waits.append(count)
        state = decide([0, 0], state=state)
    assert waits == [8, 16, 32, 64, 128, 128]
    # A try that succeeds is believed: what was seen long ago has faded.
    while int(state.variant) != 2:
        state = decide([0, 0], index=0, state=state)
    state = decide([5, 5], state=state)
    assert int(state.variant) == 2
    assert int(state.wait) == 8


def test_costs_come_from_the_table_the_options_or_the_clock() -> None:
    inner = Replay((), (), 7)
    given = {"drafter": inner, "widths": (1, 4, 16), "draft_cost": 0.05}
    found = Adaptive(**given).costs_W()
    # The widest is no wider than the inner drafter.
    assert found == pytest.approx([1.0, 1.59, 1.76])
    found = Adaptive(**given, costs=(1, 2, 6)).costs_W()
    assert found == pytest.approx([1.0, 2.05, 2 + 4 / 3 + 0.05])
    drafter = Adaptive(drafter=PromptLookup(length=3), measure=True, draft_cost=9.0)
    bound, _ = drafter.bind(toy_lm())
    assert bound.widths == (1, 4) and not bound.measure
    # Whole steps were timed: the cost of drafting is in them.
    assert bound.costs_W() == list(bound.costs) and bound.costs[0] == 1.0


def test_measured_costs_are_medians_of_turns() -> None:
    # Seconds of each turn at widths 1, 2 and 4; the first, which compiles, is dropped.
    turns = [(9, 9, 9), (1, 2, 3), (2, 3, 8), (1, 1, 9)]
    ticks = iter([t for turn in turns for seconds in turn for t in (0, seconds)])
    found = measure_cost(
        toy_lm(), [4, 2], context=5, steps=2, repeats=3, clock=lambda: next(ticks)
    )
    assert found == {1: 1.0, 2: 1.5, 4: 4.0}
    with pytest.raises(ConfigError, match="a width is 0"):
        measure_cost(toy_lm(), [0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"widths": (2, 4)}, r"widths is 2\+4, expected ascending numbers from 1"),
        ({"widths": (1, 4, 4)}, r"widths is 1\+4\+4, expected ascending"),
        ({"costs": (1.0,)}, "costs has 1 numbers, expected 3"),
        ({"patience": 0}, "patience is 0, expected 1 or more"),
        ({"drafter": Adaptive()}, "chooses between variants itself"),
    ],
)
def test_bad_options_are_refused(options, message) -> None:
    with pytest.raises(ConfigError, match=message):
        Adaptive(**options)


def test_it_is_read_from_text() -> None:
    built = build(
        "adaptive:drafter=(jacobi:window=4),widths=1+2+4",
        METHODS,
        {Drafter: METHODS},
    )
    assert built == Adaptive(drafter=Jacobi(window=4), widths=(1, 2, 4))
    assert isinstance(hash(built), int)
