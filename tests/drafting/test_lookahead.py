"""Lookahead decoding against plain Python, and its trees against what they promise."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxllm
from jaxllm.core.errors import ConfigError
from jaxllm.core.registry import build
from jaxllm.core.rng import row_keys
from jaxllm.decoding import BoundDrafter, Committed, Drafter, match_reference
from jaxllm.decoding.verify import match_choices
from jaxllm.drafting import METHODS, Lookahead
from jaxllm.drafting.lookahead import Pool
from tests.contracts.test_lossless import toy_lm
from tests.decoding.test_engine import (
    assert_equals_reference,
    prompts_of,
    request_of,
    run,
)
from tests.decoding.toys import TEMPERATURES

ALPHABET = 11


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_tokens_are_those_of_plain_decoding(temperature) -> None:
    options = {"temperature": temperature}
    request = request_of(prompts_of(1, 9, 4), 20, **options)
    drafter = Lookahead(window=2, ngram=3, pool=2, slots=8)
    outputs = run(request, drafter)
    assert_equals_reference(outputs, request, options)
    assert all(o.stats["target_passes"] <= 20 for o in outputs)


class PlainPool:
    """One row's pool in plain Python: newest n-grams first."""

    def __init__(self, slots, most):
        self.slots, self.most = slots, most
        self.found = {}

    def add(self, token, gram):
        key, grams = self.found.get(token % self.slots, (token, []))
        grams = grams if key == token else []
        if gram not in grams:
            grams = [gram, *grams][: self.most]
        self.found[token % self.slots] = (token, grams)

    def find(self, token):
        key, grams = self.found.get(token % self.slots, (-1, []))
        return grams if key == token else []


def test_a_pool_is_a_ring_of_each_first_token() -> None:
    rows, slots, most = 2, 5, 3
    pool = Pool(
        jnp.full((rows, slots), -1),
        jnp.zeros((rows, slots, most, 2), jnp.int32),
        jnp.zeros((rows, slots), jnp.int32),
    )
    plain = [PlainPool(slots, most) for _ in range(rows)]
    add, find = jax.jit(Pool.add), jax.jit(Pool.find)
    rng = np.random.default_rng(0)
    for _ in range(60):
        token, gram = rng.integers(0, 7, rows), rng.integers(0, 2, (rows, 2))
        new = rng.random(rows) < 0.8
        pool = add(pool, jnp.asarray(token), jnp.asarray(gram), jnp.asarray(new))
        for row in range(rows):
            if new[row]:
                plain[row].add(int(token[row]), gram[row].tolist())
        asked = rng.integers(0, 7, rows)
        grams, there = find(pool, jnp.asarray(asked))
        for row in range(rows):
            found = grams[row][there[row]].tolist()
            assert found == plain[row].find(int(asked[row]))


def committed_of(*rows, slots=200):
    tokens = np.zeros((len(rows), slots), np.int32)
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = row
    lengths = jnp.asarray([len(row) for row in rows], jnp.int32)
    return Committed(jnp.asarray(tokens), lengths, row_keys(np.arange(len(rows))))


def a_map():
    """Returns a target whose next token follows from the last one alone."""
    return np.random.default_rng(5).permutation(ALPHABET)


def orbit(token, count):
    found = []
    for _ in range(count):
        token = int(a_map()[token])
        found.append(token)
    return found


@functools.partial(jax.jit, static_argnums=0)
def step(drafter, state, committed):
    """Does what the engine does, under a target that is a map."""
    state, draft = drafter.propose({"drafter": {}}, state, committed)
    chosen = jnp.asarray(a_map(), jnp.int32)[draft.tokens_BM]
    verdict = match_choices(draft, chosen, depth=drafter.depth)
    along = jnp.take_along_axis(chosen, verdict.path_BJ, axis=1)
    grown = committed.extend(along, verdict.num_accepted_B + 1)
    after = drafter.observe({}, state, grown, draft, verdict, None)
    return draft, chosen, verdict, grown, after


class Step(NamedTuple):
    """A step, with what stood before it and after it."""

    before: Any
    committed: Any
    draft: Any
    chosen: Any
    verdict: Any
    grown: Any
    after: Any


def simulate(drafter, committed, steps):
    state = jax.jit(drafter.init)({"drafter": {}}, committed, None)
    for _ in range(steps):
        found = Step(state, committed, *step(drafter, state, committed))
        yield found
        committed, state = found.grown, found.after


def chain(parents, tokens, node):
    """Returns the tokens from below the root down to a node."""
    path = []
    while node:
        path.append(int(tokens[node]))
        node = int(parents[node])
    return path[::-1]


def test_every_tree_holds_the_fitting_ngrams_and_the_window() -> None:
    drafter = Lookahead(window=3, ngram=4, pool=2, slots=64)
    committed = committed_of([1, 2, 3], [7])
    for found in simulate(drafter, committed, 12):
        draft, verdict = found.draft, found.verdict
        for row in range(2):
            tokens, valid = draft.tokens_BM[row].tolist(), draft.valid_BM[row].tolist()
            parents = draft.parents_BM[row].tolist()
            assert parents[0] == -1 and valid[0]
            assert all(0 <= parents[i] < i for i in range(1, drafter.nodes))
            assert all(valid[parents[i]] for i in range(1, drafter.nodes) if valid[i])
            # No two valid pooled nodes stand for the same beginning.
            pooled = [i for i in range(1, 7) if valid[i]]
            begun = [tuple(chain(parents, tokens, i)) for i in pooled]
            assert len(set(begun)) == len(begun)
            grams, there = found.before.pool.find(draft.tokens_BM[:, 0])
            for gram in grams[row][there[row]].tolist():
                for length in range(1, 4):
                    assert tuple(gram[:length]) in begun
            window = found.before.window_BWL[row].tolist()
            for i in range(3):
                for level in range(3):
                    node = 7 + 3 * i + level
                    head = [window[j][0] for j in range(i + 1)]
                    wanted = head + window[i][1 : level + 1]
                    assert valid[node]
                    assert chain(parents, tokens, node) == wanted
            choices = found.chosen[row].tolist()
            path, after = match_reference(tokens, parents, valid, choices)
            accepted = int(verdict.num_accepted_B[row])
            assert verdict.path_BJ[row, : accepted + 1].tolist() == path
            assert int(verdict.next_token_B[row]) == after
            assert draft.depth_BM[row].max() >= drafter.depth == 3


def test_every_pooled_ngram_is_the_targets() -> None:
    drafter = Lookahead(window=4, ngram=4, pool=3, slots=ALPHABET)
    committed = committed_of([1, 2, 3, 5], [7], [4, 6])
    *_, last = simulate(drafter, committed, 25)
    pool, grown, pooled = last.after.pool, last.grown, 0
    for row in range(3):
        for token in range(ALPHABET):
            if int(pool.count_BH[row, token]):
                # One continuation alone is right, so none is written twice.
                assert int(pool.count_BH[row, token]) == 1
                assert int(pool.key_BH[row, token]) == token
                gram = pool.gram_BHGL[row, token, 0].tolist()
                assert gram == orbit(token, 3)
                pooled += 1
        length = int(grown.length_B[row])
        text = grown.tokens_BS[row, :length].tolist()
        first = int(committed.length_B[row])
        assert text[first:] == orbit(text[first - 1], length - first)
    assert pooled > 6


def test_once_known_a_whole_ngram_is_accepted_a_pass() -> None:
    drafter = Lookahead(window=4, ngram=4, pool=3, slots=ALPHABET)
    emitted = [
        int(found.verdict.num_accepted_B[0]) + 1
        for found in simulate(drafter, committed_of([1]), 30)
    ]
    assert emitted[0] <= 2
    assert all(count >= 4 for count in emitted[-8:])


def test_columns_move_with_the_text() -> None:
    drafter = Lookahead(window=5, ngram=3, pool=1, slots=4)
    L, first = drafter.levels, 1 + drafter.pool * drafter.levels
    for found in simulate(drafter, committed_of([1, 2, 3], [7]), 8):
        before, after, grown = found.before, found.after, found.grown
        for row in range(2):
            moved = int(found.verdict.num_accepted_B[row])
            old = before.window_BWL[row].tolist()
            ends = found.chosen[row, first:].tolist()
            for i in range(drafter.window):
                column = after.window_BWL[row, i].tolist()
                if i + moved >= drafter.window:
                    text = grown.tokens_BS[row, : grown.length_B[row]].tolist()
                    assert set(column) <= set(text)
                    assert int(after.age_BW[row, i]) == 0
                    continue
                end = ends[(i + moved) * L + L - 1]
                assert column == [*old[i + moved][1:], end]
                age = int(before.age_BW[row, i + moved])
                assert int(after.age_BW[row, i]) == age + 1


def test_somebody_elses_step_teaches_nothing() -> None:
    drafter = Lookahead(window=3, ngram=3, pool=1, slots=4)
    committed = committed_of([1, 2, 3])
    *_, last = simulate(drafter, committed, 4)
    state, draft = last.after, last.draft
    strange = dataclasses.replace(draft, tokens_BM=draft.tokens_BM + 1)
    one = last.grown.extend(jnp.asarray([[5]]), jnp.asarray([1]))
    observe = jax.jit(drafter.observe)
    after = observe({}, state, one, strange, last.verdict, None)
    assert after.pool.count_BH.tolist() == state.pool.count_BH.tolist()
    # The columns still follow the text.
    assert after.window_BWL[0, :2].tolist() == state.window_BWL[0, 1:].tolist()
    assert after.age_BW[0].tolist() == [*state.age_BW[0, 1:].tolist(), 0]


def test_what_was_pooled_is_saved_and_helps_the_next_batch(tmp_path) -> None:
    drafter = Lookahead(window=4, ngram=3, pool=2, slots=64)
    lm, prompts = toy_lm("float32"), [[3, 4, 5]]
    bound = BoundDrafter(lm, drafter)
    options = {"drafter": bound, "max_new_tokens": 24}
    [cold] = jaxllm.generate(lm, prompts, **options)
    assert int((bound.params["memory"]["count"] > 0).sum()) > 0
    bound.save_memory(tmp_path / "pool.safetensors")
    [warm] = jaxllm.generate(lm, prompts, **options)
    assert warm.token_ids == cold.token_ids
    assert warm.stats["target_passes"] < cold.stats["target_passes"]
    fresh = BoundDrafter(lm, drafter)
    fresh.load_memory(tmp_path / "pool.safetensors")
    [again] = jaxllm.generate(lm, prompts, drafter=fresh, max_new_tokens=24)
    assert again.stats["target_passes"] == warm.stats["target_passes"]


def test_the_memory_keeps_the_busiest_row_of_every_slot() -> None:
    drafter = Lookahead(window=1, ngram=2, pool=2, slots=3)
    state = jax.jit(drafter.init)({"drafter": {}}, committed_of([1], [2]), None)
    pool = Pool(
        key_BH=jnp.asarray([[0, 1, -1], [3, 4, 5]]),
        gram_BHGL=jnp.arange(12).reshape(2, 3, 2, 1),
        count_BH=jnp.asarray([[2, 1, 0], [1, 5, 1]]),
    )
    learned = drafter.learned({}, type(state)(*[None] * 3, pool))["memory"]
    assert learned["key"].tolist() == [0, 4, 5]
    assert learned["count"].tolist() == [2, 5, 1]
    assert learned["gram"].reshape(-1).tolist() == [0, 1, 8, 9, 10, 11]
    warm = jax.jit(drafter.init)(
        {"drafter": {"memory": learned}}, committed_of([1], [2]), None
    )
    assert warm.pool.key_BH.tolist() == [[0, 4, 5]] * 2


def test_options_are_checked_and_read_from_text() -> None:
    for name, low in [("window", 1), ("ngram", 2), ("pool", 1), ("slots", 1)]:
        with pytest.raises(ConfigError, match=f"lookahead.{name} is {low - 1}"):
            Lookahead(**{name: low - 1})
    built = build("lookahead:window=3,ngram=5,pool=2", METHODS, {Drafter: METHODS})
    assert built == Lookahead(window=3, ngram=5, pool=2)
    assert built.nodes == 1 + 4 * (2 + 3)
    assert built.depth == 4
