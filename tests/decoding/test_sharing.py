"""What prompts share is found, run once, and gives the tokens of prompts alone."""

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

import jaxllm
from jaxllm.core.errors import ConfigError
from jaxllm.decoding import Request, decode_chunks, drain, make_sampler
from jaxllm.decoding.job import Job
from jaxllm.decoding.sharing import Sharing, plan_sharing
from jaxllm.drafting import Autoregressive, PromptLookup
from tests.decoding.toys import VOCABULARY, toy_model

RNG = np.random.default_rng(0)


def some(count):
    return RNG.integers(1, VOCABULARY, count).tolist()


SYSTEM, LEFT, RIGHT = some(100), some(80), some(70)
TREE = [
    SYSTEM + LEFT + some(5),
    SYSTEM + RIGHT + some(3),
    SYSTEM + LEFT + some(9),
    some(12),
    SYSTEM + RIGHT + some(30),
    SYSTEM + some(2),
    SYSTEM + RIGHT,
]
PAIRS = {2: 64}
"""Shares what two rows have in common, which is too little to gain from."""
SAMPLES = [SYSTEM + LEFT] * 3
SKEWED = [SYSTEM + some(3)] * 6 + [some(400) + some(1)] * 2


def stretches(plan):
    return [(x.rows, x.start, x.stop, x.parent, x.level) for x in plan]


def test_a_tree_of_prompts_is_found():
    assert stretches(plan_sharing(TREE, least_tokens=PAIRS)) == [
        ((0, 1, 2, 4, 5, 6), 0, 100, -1, 0),
        ((0, 2), 100, 180, 0, 1),
        # The last two tokens of row 6 are its own.
        ((1, 4, 6), 100, 168, 0, 1),
    ]


def test_samples_of_one_prompt_share_all_but_two_tokens():
    assert stretches(plan_sharing(SAMPLES)) == [((0, 1, 2), 0, 178, -1, 0)]


def test_a_short_stretch_is_left_to_the_one_below():
    short, long = some(20), some(90)
    prompts = [short + long + some(4), short + long + some(4), short + some(90)]
    assert stretches(plan_sharing(prompts, least_tokens=PAIRS)) == [
        ((0, 1), 0, 110, -1, 0)
    ]


def test_nothing_is_shared_below_the_crossover():
    assert plan_sharing([SYSTEM + some(3)]) == ()
    assert plan_sharing([some(90), some(90)]) == ()
    assert plan_sharing([SYSTEM[:40] + some(9), SYSTEM[:40] + some(9)]) == ()
    assert plan_sharing([[], [1], [1]]) == ()
    # The fewer rows, the more tokens they need.
    for rows, least in ((2, 512), (3, 128), (4, 64), (9, 64)):
        head = some(least)
        assert plan_sharing([head + some(2) for _ in range(rows)])
        assert not plan_sharing([head[1:] + some(2) for _ in range(rows)])
    prompts = [SYSTEM + LEFT + some(4), SYSTEM + LEFT + some(4), SYSTEM + some(4)]
    assert len(plan_sharing(prompts, least_tokens=PAIRS)) == 2
    assert len(plan_sharing(prompts, least_tokens=PAIRS, most_levels=1)) == 1


@hypothesis.given(st.lists(st.lists(st.integers(0, 1), max_size=9), max_size=6))
def test_a_plan_is_what_the_rows_have_in_common(prompts):
    plan = plan_sharing(prompts, least_tokens={2: 2})
    for x in plan:
        assert len(x.rows) >= 2 and x.stop - x.start >= 2
        assert len({tuple(prompts[row][: x.stop]) for row in x.rows}) == 1
        assert all(len(prompts[row]) - 2 >= x.stop for row in x.rows)
        # No other row could have been in, and none could have gone further together.
        above = set(range(len(prompts))) if x.parent < 0 else {*plan[x.parent].rows}
        first = prompts[x.rows[0]][: x.stop]
        outside = above - set(x.rows)
        assert not any(
            prompts[row][: x.stop] == first and len(prompts[row]) - 2 >= x.stop
            for row in outside
        )
        longer = {tuple(prompts[row][: x.stop + 1]) for row in x.rows}
        assert len(longer) > 1 or min(len(prompts[r]) for r in x.rows) - 2 == x.stop
        if x.parent >= 0:
            assert plan[x.parent].stop == x.start
            assert plan[x.parent].level == x.level - 1
            assert set(x.rows) <= set(plan[x.parent].rows)
    for row in range(len(prompts)):
        own = [x for x in plan if row in x.rows]
        assert [x.level for x in own] == list(range(len(own)))


def test_a_row_has_slots_for_what_is_its_own():
    plan = plan_sharing(TREE, least_tokens=PAIRS)
    own = Sharing.of(plan, [len(p) for p in TREE], 20, 0)
    assert own.shared == (180, 168, 180, 0, 168, 100, 168)
    assert own.shapes.capacity == 64 and own.shapes.chunk == 32
    assert own.slots(320) == 64 and own.slots(40) == 40


def run(prompts, shared, drafter, temperature=1.0, rungs=()):
    model, params = toy_model()
    rows = len(prompts)
    request = Request(
        prompts=prompts,
        max_new_tokens=[9 + row for row in range(rows)],
        sampler=make_sampler(rows, temperature=temperature),
        seeds=list(range(rows)),
        shared=shared,
        rungs=rungs,
    )
    params = {"target": params, "drafter": {}}
    return drain(decode_chunks(model, params, request, drafter=drafter)).outputs


WORKLOADS = {"tree": TREE, "one": SAMPLES, "skew": SKEWED}


@pytest.mark.parametrize("prompts", WORKLOADS.values(), ids=WORKLOADS)
@pytest.mark.parametrize(
    "drafter",
    [
        pytest.param(Autoregressive(), id="chain 1"),
        pytest.param(PromptLookup(lean=False), id="chain 8", marks=pytest.mark.slow),
    ],
)
def test_tokens_are_those_of_prompts_alone(prompts, drafter):
    plan = plan_sharing(prompts, least_tokens=PAIRS)
    assert plan
    found, expected = run(prompts, plan, drafter), run(prompts, (), drafter)
    assert [x.token_ids for x in found] == [x.token_ids for x in expected]
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours.logprobs, theirs.logprobs, atol=2e-4)
        assert ours.stats | {"shared_tokens": 0} == theirs.stats
    shared = [x.stats["shared_tokens"] for x in found]
    assert shared == [
        max((x.stop for x in plan if row in x.rows), default=0)
        for row in range(len(prompts))
    ]


@pytest.mark.slow
def test_slots_grow_behind_a_shared_prefix():
    prompts = TREE[:3]
    plan = plan_sharing(prompts, least_tokens=PAIRS)
    found = run(prompts, plan, Autoregressive(), rungs=(192, 196, 200))
    assert [x.token_ids for x in found] == [
        x.token_ids for x in run(prompts, (), Autoregressive())
    ]


def toy_lm():
    model, params = toy_model()
    return jaxllm.LanguageModel(model=model, params=params, name="toy")


def test_prompts_that_begin_alike_come_into_one_batch():
    prompts = [p for n in range(40) for p in ([1] * 70 + [n], [2] * 70 + [n])]
    job = Job.make(toy_lm(), prompts, 4, (), 0)
    first = [prompts[row][0] for row in job.batches()[0]]
    assert first == [1] * 32
    apart = Job.make(toy_lm(), prompts, 4, (), 0, "off")
    assert apart.batches()[0] == list(range(32))
    assert job.request(job.batches()[0], make_sampler(32)).shared
    assert not apart.request(apart.batches()[0], make_sampler(32)).shared


def test_generate_shares_by_itself():
    options = {"max_new_tokens": 5, "temperature": 1.0}
    found = jaxllm.generate(toy_lm(), SAMPLES, **options)
    apart = jaxllm.generate(toy_lm(), SAMPLES, shared_prefix="off", **options)
    assert [x.token_ids for x in found] == [x.token_ids for x in apart]
    assert [x.stats["shared_tokens"] for x in found] == [178] * 3
    assert [x.stats["shared_tokens"] for x in apart] == [0] * 3


def test_another_word_is_refused():
    with pytest.raises(ConfigError, match=r"shared_prefix is 'on', expected one of"):
        jaxllm.generate(toy_lm(), [[1, 2]], shared_prefix="on")
