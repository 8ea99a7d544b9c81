"""Every registered method gives the tokens of plain decoding: the lossless contract.

A new line in `drafting.METHODS` is enrolled here by itself, with its default options;
`enrolled.OPTIONS` says otherwise for those that need a file or a part. Chains are
compared with plain decoding at their own width, token for token. Trees, and drafters
whose width changes, compute in other shapes: where they differ from it, the target must
have been within a rounding error of a tie, which is counted and shown.
"""

import numpy as np
import pytest

import jaxllm
from jaxllm.decoding import make_sampler
from jaxllm.decoding.buckets import shapes_for
from jaxllm.decoding.reference import decode_reference
from jaxllm.decoding.service import Arrival, Service
from jaxllm.decoding.serving import serve
from jaxllm.drafting import Autoregressive
from tests.contracts.enrolled import bound, methods, toy_lm
from tests.decoding.toys import VOCABULARY

PROMPT_LENGTHS = (1, 9, 4)
GAP = 1e-4


def prompts(rows: int, vocabulary: int = VOCABULARY) -> list[list[int]]:
    rng = np.random.default_rng(rows)
    return [rng.integers(0, vocabulary, n).tolist() for n in PROMPT_LENGTHS[:rows]]


def assert_same(found, expected, drafter, lm, texts, options) -> None:
    """Asserts equal tokens; of a tree also near ties will do."""
    assert len(found) == len(expected)
    for row, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        if ours.token_ids == theirs.token_ids:
            continue
        inexact = drafter.tree or drafter.lean or len(drafter.variants) > 1
        assert inexact, (row, ours, theirs)
        pairs = zip(ours.token_ids, theirs.token_ids, strict=False)
        first = next(i for i, (a, b) in enumerate(pairs) if a != b)
        _, gaps = decode_reference(
            lm.model,
            lm.params,
            texts[row],
            first + 1,
            sampler=make_sampler(1, temperature=options["temperature"]),
            seed=options["seed"] + row,
        )
        print(f"near tie in row {row} at token {first}: gap {gaps[first]:.2e}")
        assert gaps[first] < GAP, (row, first, gaps[first])


@pytest.mark.parametrize(
    ("weights", "temperature"),
    [
        ("float32", 1.0),
        pytest.param("float32", 0.0, marks=pytest.mark.slow),
        pytest.param("int8", 1.0, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("method", methods())
def test_tokens_are_those_of_plain_decoding(
    method, weights, temperature, heads_file
) -> None:
    lm, texts = toy_lm(weights), prompts(3)
    drafter = bound(method, heads_file, lm)
    # Not a multiple of any width, and a limit inside a block for some row.
    options = {"temperature": temperature, "seed": 5, "max_new_tokens": 13}
    plain = Autoregressive(query_width=drafter.drafter.nodes)
    expected = jaxllm.generate(lm, texts, drafter=plain, **options)
    found = jaxllm.generate(lm, texts, drafter=drafter, **options)
    assert_same(found, expected, drafter.drafter, lm, texts, options)
    for result in found:
        stats = result.stats
        assert stats["emitted"] == 13
        assert stats["target_passes"] <= 13
        assert stats["accepted"][0] == stats["target_passes"]
    # An end token somewhere inside: nothing of the block after it may stand.
    end = found[0].token_ids[6]
    ending = toy_lm(weights, (end,))
    cut = jaxllm.generate(
        ending, texts, drafter=bound(method, heads_file, ending), **options
    )
    for row, whole in zip(cut, found, strict=True):
        ids = whole.token_ids
        stop = ids.index(end) + 1 if end in ids else len(ids)
        assert row.token_ids == ids[:stop]
        assert row.finish_reason == ("eos" if end in ids else "length")


@pytest.mark.parametrize("method", methods(fast=False))
def test_alone_as_in_a_batch_and_up_to_the_last_slot(method, heads_file) -> None:
    lm, texts = toy_lm(), prompts(3)
    drafter = bound(method, heads_file, lm)
    depth = drafter.drafter.depth
    # So many tokens that prompt, output and a draft's depth fill the slots exactly.
    new = 64 - 16 - depth
    assert shapes_for([9], new, depth).capacity == 64
    options = {"temperature": 1.0, "max_new_tokens": new}
    together = jaxllm.generate(lm, texts, drafter=drafter, seed=5, **options)
    for row, text in enumerate(texts):
        alone = jaxllm.generate(lm, [text], drafter=drafter, seed=5 + row, **options)
        shifted = {**options, "seed": 5 + row}
        assert_same(
            alone, together[row : row + 1], drafter.drafter, lm, [text], shifted
        )


@pytest.mark.parametrize("method", methods(fast=False))
def test_a_vocabulary_of_two(method, heads_file) -> None:
    lm, texts = toy_lm(vocabulary=2), prompts(2, vocabulary=2)
    drafter = bound(method, heads_file, lm)
    options = {"temperature": 1.0, "seed": 1, "max_new_tokens": 9}
    plain = Autoregressive(query_width=drafter.drafter.nodes)
    expected = jaxllm.generate(lm, texts, drafter=plain, **options)
    found = jaxllm.generate(lm, texts, drafter=drafter, **options)
    assert_same(found, expected, drafter.drafter, lm, texts, options)


@pytest.mark.parametrize("method", methods(fast=False, every=False))
def test_a_shared_prefix_changes_no_token(method, heads_file) -> None:
    lm = toy_lm()
    rng = np.random.default_rng(1)
    system, question = (rng.integers(0, VOCABULARY, n).tolist() for n in (260, 66))
    endings = ([3], [5, 7, 9], [4, 4, 4], [6, 1])
    texts = [system + question + ending for ending in endings]
    texts += [[*system, 4, 4], system]
    drafter = bound(method, heads_file, lm)
    options = {"temperature": 1.0, "seed": 2, "max_new_tokens": 13}
    found = jaxllm.generate(lm, texts, drafter=drafter, **options)
    assert [x.stats["shared_tokens"] for x in found] == [325] * 4 + [258] * 2
    fresh = bound(method, heads_file, lm)  # an online drafter has learned by now
    expected = jaxllm.generate(lm, texts, drafter=fresh, shared_prefix="off", **options)
    assert_same(found, expected, drafter.drafter, lm, texts, options)


@pytest.mark.parametrize("method", methods(fast=False, every=False))
def test_rows_that_come_and_go_give_the_tokens_of_rows_alone(method, heads_file):
    lm = toy_lm()
    drafter = bound(method, heads_file, lm)
    rng = np.random.default_rng(4)
    texts = [rng.integers(0, VOCABULARY, n).tolist() for n in (3, 20, 1, 9)]
    texts += [[*texts[1], 7, 8], texts[1]]
    options = {"temperature": 1.0, "max_new_tokens": 11}
    service = Service(rows=2, capacity=64, page_slots=8, steps=2, pages=10)
    arrivals = [
        Arrival(prompt=t, max_new_tokens=11, seed=i, sampling={"temperature": 1.0})
        for i, t in enumerate(texts)
    ]
    params = drafter.arguments()
    server = {"drafter": drafter.drafter, "service": service}
    found = dict(serve(lm.model, params, arrivals, **server))
    for i, text in enumerate(texts):
        fresh = bound(method, heads_file, lm)
        alone = jaxllm.generate(lm, [text], drafter=fresh, seed=i, **options)
        shifted = {**options, "seed": i}
        assert_same([found[i]], alone, drafter.drafter, lm, [text], shifted)
