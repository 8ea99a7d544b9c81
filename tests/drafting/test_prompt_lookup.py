"""Prompt lookup: the matcher against a plain search, and what it gains at best."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxllm.core.errors import ConfigError
from jaxllm.core.registry import build
from jaxllm.core.rng import row_keys
from jaxllm.decoding.protocol import Committed, Drafter
from jaxllm.drafting import METHODS, PromptLookup
from jaxllm.drafting.prompt_lookup import (
    match_continuation,
    match_continuation_reference,
    match_continuations,
    match_continuations_reference,
)
from tests.decoding.test_engine import assert_equals_reference, request_of, run
from tests.drafting.repeating_target import repeats

SLOTS, ROWS, LENGTH = 24, 4, 5

# Few different tokens, so that long matches come by themselves.
texts = st.lists(st.integers(0, 2), min_size=1, max_size=SLOTS)
batches = st.lists(texts, min_size=ROWS, max_size=ROWS)


def padded(rows: list[list[int]]):
    """Rows with garbage behind them that would match."""
    tokens_BS = np.ones((len(rows), SLOTS), np.int32)
    for i, row in enumerate(rows):
        tokens_BS[i, : len(row)] = row
    return jnp.asarray(tokens_BS), jnp.asarray([len(row) for row in rows])


def committed_of(rows: list[list[int]]) -> Committed:
    return Committed(*padded(rows), row_keys(np.arange(len(rows))))


match = jax.jit(
    match_continuations, static_argnames=("length", "max_ngram", "min_ngram", "branch")
)


@settings(max_examples=60)
@given(batches, st.sampled_from([(1, 1), (4, 1), (4, 2), (16, 3)]))
def test_the_best_match_is_that_of_a_plain_search(rows, ngrams) -> None:
    options = {"length": LENGTH, "max_ngram": ngrams[0], "min_ngram": ngrams[1]}
    tokens_BWL, matched_BW = match(*padded(rows), **options)
    for i, row in enumerate(rows):
        expected, matched = match_continuation_reference(row, **options)
        assert matched_BW[i, 0] == matched
        if matched:
            assert tokens_BWL[i, 0].tolist() == expected


@settings(max_examples=60)
@given(batches, st.sampled_from([(4, 1), (3, 2)]))
def test_several_continuations_are_those_of_a_plain_search(rows, ngrams) -> None:
    options = {"length": LENGTH, "max_ngram": ngrams[0], "min_ngram": ngrams[1]}
    tokens_BWL, matched_BW = match(*padded(rows), branch=3, **options)
    for i, row in enumerate(rows):
        expected = match_continuations_reference(row, branch=3, **options)
        count = int((matched_BW[i] > 0).sum())
        found = list(zip(tokens_BWL[i].tolist(), matched_BW[i].tolist(), strict=True))
        assert found[:count] == expected
        assert matched_BW[i, count:].tolist() == [0] * (3 - count)


def test_a_copy_goes_on_beyond_the_end_with_its_beginning() -> None:
    tokens_BS, length_B = padded([[0, 1, 2, 0, 1]])
    tokens_BL, matched_B = match_continuation(
        tokens_BS, length_B, length=7, max_ngram=4
    )
    assert matched_B.tolist() == [2]
    assert tokens_BL[0].tolist() == [2, 0, 1, 2, 0, 1, 2]


def test_a_row_without_a_match_drafts_nothing() -> None:
    _, draft = PromptLookup(length=3).propose({}, (), committed_of([[0, 2, 0], [5]]))
    assert draft.tokens_BM.tolist()[0] == [0, 2, 0, 2]
    assert draft.valid_BM.tolist() == [[True] * 4, [True] + [False] * 3]
    assert draft.tokens_BM[1, 0] == 5


@settings(max_examples=60)
@given(batches)
@pytest.mark.slow
def test_the_tree_holds_every_continuation_once(rows) -> None:
    options = {"length": LENGTH, "max_ngram": 4, "min_ngram": 1}
    drafter = PromptLookup(**options, branch=3)
    assert drafter.tree
    _, draft = jax.jit(drafter.propose)({}, (), committed_of(rows))
    assert draft.tokens_BM.shape[1] == drafter.nodes
    for i, row in enumerate(rows):
        tokens, parents, valid = (
            np.asarray(x[i])
            for x in (draft.tokens_BM, draft.parents_BM, draft.valid_BM)
        )
        assert (parents[1:] < np.arange(1, drafter.nodes)).all()
        nodes = [n for n in range(1, drafter.nodes) if valid[n]]
        assert all(parents[n] == 0 or valid[parents[n]] for n in nodes)
        siblings = [(int(parents[n]), int(tokens[n])) for n in nodes]
        assert len(set(siblings)) == len(siblings)

        def path(node, tokens=tokens, parents=parents):
            return [*path(parents[node]), int(tokens[node])] if node else []

        paths = {tuple(path(n)) for n in nodes}
        expected = match_continuations_reference(row, branch=3, **options)
        beginnings = {tuple(t[:n]) for t, _ in expected for n in range(1, LENGTH + 1)}
        assert paths == beginnings


@pytest.mark.parametrize("branch", [1, 2])
def test_a_repeating_target_gives_a_whole_draft_a_pass(branch) -> None:
    cycle = (3, 7, 7, 1, 9)
    prompts = [(list(cycle) * 3)[:n] for n in (11, 14)]
    drafter = repeats(PromptLookup(length=7, branch=branch), cycle)
    outputs = run(request_of(prompts, 40), drafter)
    for prompt, output in zip(prompts, outputs, strict=True):
        whole = (list(cycle) * 20)[: len(prompt) + 40]
        assert prompt + output.token_ids == whole
        assert output.stats["target_passes"] == 40 // 8


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0}])
@pytest.mark.parametrize("branch", [1, 3])
def test_tokens_are_those_of_plain_decoding(branch, options) -> None:
    prompts = [[5, 6, 5, 6, 5], [1], [2, 2, 3]]
    request = request_of(prompts, 24, **options)
    drafter = PromptLookup(length=4, branch=branch)
    outputs = run(request, drafter)
    assert_equals_reference(outputs, request, options)
    assert sum(o.stats["drafted"] for o in outputs) > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            "length=0",
            "cannot draft: prompt_lookup has length 0 and branch 1, expected both to "
            "be 1 or more. Correct them.",
        ),
        (
            "min_ngram=5",
            "cannot draft: prompt_lookup has min_ngram 5 and max_ngram 4, expected 1 "
            "<= min_ngram <= max_ngram. Correct them.",
        ),
    ],
)
def test_bad_options_are_refused(options, message) -> None:
    with pytest.raises(ConfigError) as caught:
        build(f"prompt_lookup:{options}", METHODS, {Drafter: METHODS})
    assert str(caught.value) == message
