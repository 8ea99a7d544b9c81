"""Methods side by side: what is counted, what is timed, what is judged."""

import dataclasses
import itertools
import json
import types

import jax
import numpy as np
import pytest

import jaxllm
from jaxllm.checkpoints import GenerationDefaults
from jaxllm.core.errors import CapacityError, ConfigError
from jaxllm.core.rng import position_gumbel, row_keys
from jaxllm.decoding import Output
from jaxllm.drafting import Autoregressive
from jaxllm.evaluation import (
    PromptRow,
    PromptSet,
    Settings,
    compare,
    entrants,
)
from jaxllm.evaluation.divergence import Judge, first_difference
from jaxllm.evaluation.entrants import Course
from jaxllm.version import __version__
from tests.decoding.toys import Replay
from tests.evaluation.drafters import (
    SEEN,
    VOCABULARY,
    Bent,
    Counting,
    Learner,
    tied_lm,
    tiny_lm,
)

NEW = 6
ONCE = Settings(runs=1, max_new_tokens=NEW)
TOGETHER = dataclasses.replace(ONCE, batch=4)
LENGTHS = (3, 9, 5)
PLAIN = {"autoregressive": Autoregressive()}
# Only the second prompt is long enough to come to this position.
BENT = Bent(position=LENGTHS[1] + 4)


def prompt_set(lengths=LENGTHS, categories=("a",)):
    rng = np.random.default_rng(1)
    names = itertools.cycle(categories)
    rows = [
        PromptRow(
            id=f"row {i}",
            prompt=rng.integers(0, VOCABULARY, n).tolist(),
            category=next(names),
        )
        for i, n in enumerate(lengths)
    ]
    return PromptSet(rows=tuple(rows), path="some.jsonl", sha256="0" * 64)


def generated(lm, prompts):
    rows = [row.prompt for row in prompts.rows]
    found = jaxllm.generate(lm, rows, max_new_tokens=NEW)
    return [result.token_ids for result in found]


def replay(prompts, answers, kind=Replay, **options):
    # Of the rows of a batch that have answers; at batch 1 every prompt is row 0.
    lengths = tuple(len(row.prompt) for row in prompts.rows[: len(answers)])
    return kind(tuple(map(tuple, answers)), lengths, **options)


class Recorder:
    """A watcher that remembers."""

    def __init__(self):
        self.cost, self.steps = None, []

    def begin(self, cost):
        assert self.cost is None and not self.steps
        self.cost = cost

    def step(self, step):
        self.steps.append(step)


@pytest.mark.parametrize("settings", [ONCE, TOGETHER])
def test_a_method_that_is_not_lossless_is_caught(settings):
    lm, prompts = tiny_lm(), prompt_set()
    found = compare(lm, PLAIN | {"x": BENT}, prompts, settings)
    expected = generated(lm, prompts)
    plain, wrong = found.methods
    assert plain.lossless and plain.first_divergence is None
    assert (wrong.lossless, wrong.divergences, wrong.near_ties) == (False, 1, 0)
    first = wrong.first_divergence
    assert (first.row, first.position) == (1, 4)
    logits = jaxllm.logits(lm, [prompts.rows[1].prompt + expected[1]])[0]
    second, best = np.argsort(logits[LENGTHS[1] + 3])[-2:]
    assert (first.expected, first.found) == (best, second)
    gap = logits[LENGTHS[1] + 3, best] - logits[LENGTHS[1] + 3, second]
    assert first.gap == pytest.approx(gap, rel=1e-3)
    assert not found.lossless
    row = wrong.to_json([row.id for row in prompts.rows])["first_divergence"]
    assert row == {
        "row": 1,
        "position": 4,
        "id": "row 1",
        "expected": first.expected,
        "found": first.found,
        "gap": first.gap,
    }


def test_the_first_divergence_is_that_of_the_first_row():
    prompts = prompt_set((10, 9))
    wrong = compare(tiny_lm(), PLAIN | {"x": BENT}, prompts, ONCE).methods[1]
    assert wrong.divergences == 2
    assert (wrong.first_divergence.row, wrong.first_divergence.position) == (0, 3)


@pytest.mark.parametrize(
    ("expected", "found", "position"),
    [
        ([1, 2, 3], [1, 2, 3], None),
        ([1, 2, 3], [1, 2], 2),
        ([1, 2], [1, 2, 3], 2),
        ([], [5], 0),
    ],
)
def test_an_output_that_ends_elsewhere_diverges(expected, found, position):
    def output(ids):
        return {0: Output(ids, [], False, {})}

    course = Course.make(tiny_lm(), prompt_set((3,)).rows, ONCE)
    differences = Judge(course, output(expected)).differences(output(found))
    if position is None:
        assert differences == []
        return
    [difference] = differences
    assert (difference.row, difference.position) == (0, position)
    assert (difference.near_tie, difference.gap) == (False, None)
    pair = (difference.expected, difference.found)
    assert pair == (*expected[position:], None)[:1] + (*found[position:], None)[:1]


def test_where_outputs_first_differ():
    assert first_difference([1, 2, 3], [1, 2, 3]) is None
    assert first_difference([1, 2, 3], [1, 5, 4]) == 1
    assert first_difference([1, 2, 3], [1, 2]) == 2


def twins(prompts):
    """A token that the second row has, and a later one that no row has."""
    emitted = generated(tiny_lm(), prompts)
    token = emitted[1][2]
    return token, max(set(range(VOCABULARY)) - {t for row in emitted for t in row})


def test_near_ties_are_counted():
    prompts = prompt_set()
    token, other = twins(prompts)
    lm = tied_lm(token, other)
    expected = generated(lm, prompts)
    rows = [row for row in expected if token in row]
    assert rows and not any(other in row for row in expected)
    nudge = Bent(token=other, push=1e-3)
    found = compare(lm, PLAIN | {"x": nudge}, prompts, ONCE)
    nudged = found.methods[1]
    assert (nudged.lossless, nudged.near_ties) == (True, len(rows))
    assert (nudged.divergences, nudged.first_divergence) == (0, None)
    assert found.lossless and found.methods[0].near_ties == 0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_a_near_tie_is_depends_on_the_dtype(dtype):
    prompts = prompt_set()
    token, other = twins(prompts)
    lm = tied_lm(token, other, apart=3e-3, dtype=dtype)
    nudge = Bent(token=other, push=0.1)
    found = compare(lm, PLAIN | {"x": nudge}, prompts, TOGETHER)
    nudged = found.methods[1]
    assert found.dtype == dtype
    if dtype == "float32":
        assert (nudged.lossless, nudged.near_ties) == (False, 0)
        # Far above rounding in float32, far below that in bfloat16.
        assert 1e-3 < nudged.first_divergence.gap < 1e-2
    else:
        assert (nudged.lossless, nudged.near_ties) == (True, 1)


def test_sampling_is_judged_with_its_noise():
    lm, prompts = tiny_lm(), prompt_set()
    settings = dataclasses.replace(ONCE, temperature=0.8, seed=3)
    recorded = Recorder()
    found = compare(lm, PLAIN | {"x": BENT}, prompts, settings, recorded)
    plain, wrong = found.methods
    first = wrong.first_divergence
    assert (plain.lossless, first.row, first.position) == (True, 1, 4)
    [drawn] = jaxllm.generate(
        lm, [prompts.rows[1].prompt], max_new_tokens=NEW, temperature=0.8, seed=4
    )
    assert drawn.token_ids[4] == first.expected
    place = LENGTHS[1] + 4
    known = [*prompts.rows[1].prompt, *drawn.token_ids[:4]]
    noise = position_gumbel(row_keys([4]), np.asarray([[place]]), VOCABULARY)[0, 0]
    scores = jaxllm.logits(lm, [known])[0][-1] / 0.8 + np.asarray(noise)
    gap = scores[first.expected] - scores[first.found]
    assert np.argmax(scores) == first.expected
    assert first.gap == pytest.approx(gap, rel=1e-3)


def test_rejection_is_equal_in_distribution_only():
    settings = dataclasses.replace(ONCE, temperature=0.8, verify="reject")
    methods = PLAIN | {"again": Autoregressive()}
    found = compare(tiny_lm(), methods, prompt_set((3,)), settings)
    for method in found.methods:
        assert method.lossless is None
        assert (method.first_divergence, method.near_ties) == (None, 0)
    assert found.lossless
    # Without a temperature the rule is that of greedy decoding.
    assert not settings.exact
    assert dataclasses.replace(settings, temperature=0).exact
    assert dataclasses.replace(settings, verify="match").exact


def test_a_tree_cannot_be_rejected():
    settings = dataclasses.replace(ONCE, temperature=1.0, verify="reject")
    prompts = prompt_set()
    tree = replay(prompts, [[0]] * 3, tree=True)
    watcher = Recorder()
    with pytest.raises(ConfigError, match="drafts trees"):
        compare(tiny_lm(), PLAIN | {"tree": tree}, prompts, settings, watcher)
    assert watcher.cost is None


def test_methods_take_turns_and_every_round_begins_with_another():
    methods = dict.fromkeys("abc", Autoregressive())
    watcher = Recorder()
    settings = dataclasses.replace(ONCE, runs=4)
    compare(tiny_lm(), methods, prompt_set(), settings, watcher)
    order = [key for key, _ in itertools.groupby(watcher.steps, turn_of)]
    assert order == [
        *((0, name) for name in "abc"),
        *((1, name) for name in "abc"),
        *((2, name) for name in "bca"),
        *((3, name) for name in "cab"),
        *((4, name) for name in "abc"),
    ]
    for turn, steps in itertools.groupby(watcher.steps, turn_of):
        if turn[0] > 0:
            assert [step.rows for step in steps] == [(0,), (1,), (2,)]


def turn_of(step):
    return step.round, step.method


def test_the_cost_is_told_before_anything_runs():
    lm, watcher = tiny_lm(), Recorder()
    settings = dataclasses.replace(ONCE, runs=2)
    methods = dict.fromkeys("ab", Autoregressive())
    compare(lm, methods, prompt_set((3, 9, 20)), settings, watcher)
    cost = watcher.cost
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(lm.params))
    assert (cost.parameter_bytes, cost.methods, cost.prompts) == (size, 2, 3)
    assert cost.shapes == 4  # two buckets of lengths, for each method
    assert cost.rows == sum(len(step.rows) for step in watcher.steps) == 8 + 12
    assert cost.passes == cost.rows * NEW
    assert sum(step.tokens for step in watcher.steps) == cost.rows * NEW


def test_every_round_starts_from_the_same_memory_and_compiles_nothing():
    lm, prompts = tiny_lm(), prompt_set((3, 5))
    # It knows the answers to the first prompt only.
    learner = replay(prompts, generated(lm, prompts)[:1], Learner, depth=2)
    events = []

    class Listener(Recorder):
        def step(self, step):
            super().step(step)
            compiles.setdefault(step.round, []).extend(events)
            events.clear()

    def listen(event, duration_secs, **_):
        if event.startswith("/jax/core/compile/"):
            events.append(event)

    compiles = {}
    SEEN.clear()
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        settings = dataclasses.replace(ONCE, runs=3)
        found = compare(lm, PLAIN | {"x": learner}, prompts, settings, Listener())
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    # The warm-up runs its one shape twice; then a round is as long as the prompts.
    assert SEEN == [0, 1] * 4
    assert found.methods[1].lossless
    # Unlearned at the first prompt, although the warm-up has decoded it.
    assert found.methods[1].overall.target_passes == 2 * NEW
    assert compiles[0]
    assert compiles[1] == compiles[2] == compiles[3] == []


def test_counts_are_sums_over_rows():
    lm, prompts = tiny_lm(), prompt_set()
    settings = dataclasses.replace(TOGETHER, runs=2)
    right = replay(prompts, generated(lm, prompts), Counting, depth=2)
    plain, right = compare(lm, PLAIN | {"x": right}, prompts, settings).methods
    assert plain.overall.tokens == plain.overall.target_passes == 3 * NEW
    assert plain.acceptance_by_depth == [] and plain.draft_passes == {}
    assert right.lossless
    assert right.overall.tokens == 3 * NEW
    assert right.overall.target_passes == 3 * 2
    assert right.overall.tokens_per_pass == 3.0
    assert right.acceptance_by_depth == [1.0, 1.0]
    assert right.draft_passes == {"inner": 3 * 2 * 2}
    assert right.draft_tokens == {"inner": 3 * 2 * 5}


def test_a_speedup_is_the_median_of_ratios_within_rounds(monkeypatch):
    seconds = {
        (1, "a"): 8.0,
        (1, "b"): 2.0,  # 4
        (2, "b"): 3.0,
        (2, "a"): 3.0,  # 1
        (3, "a"): 6.0,
        (3, "b"): 4.0,  # 1.5
    }
    # Two readings a run, when it begins and when it ends; four runs warm up.
    clock = [0.0] * 8
    for spent in seconds.values():
        clock += [0.0, spent]
    readings = iter(clock)
    fake = types.SimpleNamespace(perf_counter=lambda: next(readings))
    monkeypatch.setattr(entrants, "time", fake)
    methods = dict.fromkeys("ab", Autoregressive())
    settings = dataclasses.replace(ONCE, runs=3)
    a, b = compare(tiny_lm(), methods, prompt_set((3,)), settings).methods
    assert a.overall.seconds == [8.0, 3.0, 6.0]
    assert b.overall.seconds == [2.0, 3.0, 4.0]
    assert a.overall.speedups == [1.0, 1.0, 1.0]
    assert b.overall.speedups == [4.0, 1.0, 1.5]
    assert (b.overall.speedup, b.overall.spread) == (1.5, [1.0, 4.0])
    assert b.overall.tokens_per_second == NEW / 3
    assert b.by_category["a"].speedup == 1.5


def test_the_parts_of_categories_add_up():
    lm, prompts = tiny_lm(), prompt_set((3, 9, 5, 4, 6), ("a", "b"))
    foreseen = replay(prompts, generated(lm, prompts)[:1], depth=2)
    settings = dataclasses.replace(ONCE, runs=2)
    found = compare(lm, PLAIN | {"x": foreseen}, prompts, settings)
    for method in found.methods:
        whole, parts = method.overall, method.by_category
        assert list(parts) == ["a", "b"]
        assert parts["a"].tokens == 3 * NEW
        assert parts["b"].tokens == 2 * NEW
        assert whole.tokens == 5 * NEW
        passes = sum(p.target_passes for p in parts.values())
        assert passes == whole.target_passes
        for run in range(2):
            total = sum(p.seconds[run] for p in parts.values())
            assert total == pytest.approx(whole.seconds[run], rel=1e-12)
        for part in parts.values():
            assert part.tokens_per_pass == part.tokens / part.target_passes
    # Only the first prompt was foreseen, so the categories are told apart.
    assert parts["a"].target_passes == 2 + 2 * NEW
    assert parts["b"].target_passes == 2 * NEW


def test_the_results_field_by_field():
    prompts = prompt_set(categories=("a", "b"))
    settings = Settings(runs=2, max_new_tokens=NEW, seed=7)
    found = compare(tiny_lm(), PLAIN | {"x": BENT}, prompts, settings)
    whole = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert list(whole) == [
        "format",
        "model",
        "device",
        "dtype",
        "seed",
        "versions",
        "prompts",
        "config",
        "methods",
    ]
    assert whole["format"] == 1
    assert (whole["model"], whole["dtype"], whole["seed"]) == ("tiny", "float32", 7)
    assert whole["device"] == jax.devices()[0].device_kind
    assert whole["versions"]["jaxllm"] == __version__
    assert whole["versions"]["jax"] == jax.__version__
    assert {"jaxlib", "flax"} < set(whole["versions"])
    assert whole["prompts"] == {"path": "some.jsonl", "sha256": "0" * 64, "count": 3}
    assert whole["config"] == dataclasses.asdict(settings)
    figures = {
        "tokens": int,
        "target_passes": int,
        "tokens_per_pass": float,
        "seconds": list,
        "tokens_per_second": float,
        "speedup": float,
        "spread": list,
        "speedups": list,
    }
    fields = figures | {
        "name": str,
        "lossless": bool,
        "divergences": int,
        "near_ties": int,
        "draft_passes": dict,
        "draft_tokens": dict,
        "acceptance_by_depth": list,
        "by_category": dict,
    }
    plain, wrong = whole["methods"]
    for method in (plain, wrong):
        assert set(method) == {*fields, "first_divergence", "peak_bytes"}
        for name, kind in fields.items():
            assert type(method[name]) is kind, name
        assert method["peak_bytes"] is None or method["peak_bytes"] > 0
        assert len(method["seconds"]) == len(method["speedups"]) == 2
        assert len(method["spread"]) == 2
        assert set(method["by_category"]) == {"a", "b"}
        for part in method["by_category"].values():
            assert {name: type(part[name]) for name in part} == figures
    assert (plain["name"], wrong["name"]) == ("autoregressive", "x")
    assert plain["first_divergence"] is None
    assert wrong["first_divergence"]["row"] == 1
    assert wrong["first_divergence"]["position"] == 4


def test_the_memory_of_the_largest_program():
    lm, prompts = tiny_lm(), prompt_set((3,))
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(lm.params))
    # A width that nothing else runs, so it is compiled here; the other is known.
    wide = Autoregressive(query_width=19)
    new, known = compare(lm, {"x": wide, "y": wide}, prompts, ONCE).methods
    assert size < new.peak_bytes < 100 * size
    assert known.peak_bytes is None


def test_strings_that_stop_a_text_are_left_out_of_account():
    class Reads:
        """A tokenizer to which every token is an x."""

        def stream(self):
            return types.SimpleNamespace(step=lambda ids: "x", finish=lambda: "")

    stop = GenerationDefaults(stop_strings=("x",))
    lm = dataclasses.replace(tiny_lm(), generation=stop, tokenizer=Reads())
    prompts = PromptSet.of([[1, 2], [3]])
    assert compare(lm, PLAIN, prompts, ONCE).methods[0].overall.tokens == 2 * NEW


@pytest.mark.parametrize(
    ("rows", "options", "error", "message"),
    [
        ([[1]], {"runs": 0}, ConfigError, "runs is 0, expected 1 or more"),
        ([[1]], {"batch": 0}, ConfigError, "batch is 0, expected 1 or more"),
        ([[1]], {"max_new_tokens": 0}, ConfigError, "max_new_tokens is 0, expected"),
        ([[1]], {"top_p": 2.0}, ConfigError, "top_p is 2.0, expected a number"),
        ([], {}, ConfigError, "no prompt is given"),
        ([[1], []], {}, CapacityError, "prompt 1 is empty"),
        ([[1], [999]], {}, CapacityError, "prompt 1 has id 999"),
        ([[1], [1] * 250], {}, CapacityError, "prompt 1 has 250 tokens"),
    ],
)
def test_mistakes_are_found_before_anything_runs(rows, options, error, message):
    watcher = Recorder()
    with pytest.raises(error, match=message):
        compare(tiny_lm(), PLAIN, PromptSet.of(rows), Settings(**options), watcher)
    assert watcher.cost is None and not watcher.steps


def test_a_comparison_of_nothing():
    with pytest.raises(ConfigError, match="no method is given"):
        compare(tiny_lm(), {}, prompt_set(), ONCE)
