"""MaG: longest match first, then bigrams of a table or of the row itself."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxllm.core.errors import ConfigError
from jaxllm.core.registry import build
from jaxllm.decoding.protocol import Drafter
from jaxllm.drafting import METHODS, MaxGram, PromptLookup
from jaxllm.drafting.max_gram import greedy_bigrams, max_gram_reference
from jaxllm.drafting.ngram_counts import build_trigram
from jaxllm.drafting.ngrams import save_table
from tests.decoding.test_engine import request_of, run
from tests.decoding.toys import TEMPERATURES, VOCABULARY
from tests.drafting.repeating_target import repeats
from tests.drafting.test_prompt_lookup import committed_of
from tests.drafting.toy_methods import ids, toy_lm, toy_prompts
from tests.drafting.toy_methods import run as run_method

texts = st.lists(st.integers(0, 5), min_size=1, max_size=24)
batches = st.lists(texts, min_size=4, max_size=4)


@settings(max_examples=40)
@given(batches, st.sampled_from([1, 3]), st.booleans())
def test_the_chain_is_that_of_a_plain_walk(rows, min_ngram, known) -> None:
    drafter = MaxGram(length=6, min_ngram=min_ngram)
    bigram_V = jnp.asarray([3, 3, 0, 1, 5, 2]) if known else None
    params = {"bigram_V": bigram_V} if known else {}
    _, draft = jax.jit(drafter.propose)({"drafter": params}, (), committed_of(rows))
    assert draft.valid_BM.all()
    for i, row in enumerate(rows):
        expected = max_gram_reference(
            row, length=6, max_ngram=16, min_ngram=min_ngram, bigram_V=bigram_V
        )
        assert draft.tokens_BM[i].tolist() == [row[-1], *expected]


def test_a_token_without_a_past_is_followed_by_itself() -> None:
    _, draft = MaxGram(length=3).propose({"drafter": {}}, (), committed_of([[4]]))
    assert draft.tokens_BM.tolist() == [[4, 4, 4, 4]]


def test_the_bigrams_of_a_table_are_walked(tmp_path) -> None:
    rng = np.random.default_rng(0)
    text = rng.integers(0, VOCABULARY - 1, 400)
    table = build_trigram(text, VOCABULARY, slots=16)
    save_table(tmp_path / "t.safetensors", table)
    drafter = MaxGram(table=str(tmp_path / "t.safetensors"))
    bound, params = drafter.bind(toy_lm())
    follow: dict[int, list[int]] = {}
    for a, b in zip(text[:-1].tolist(), text[1:].tolist(), strict=True):
        follow.setdefault(a, []).append(b)
    likeliest = np.bincount(text).argmax()
    for v in range(VOCABULARY):
        seen = follow.get(v, [])
        best = min(set(seen), key=lambda b: (-seen.count(b), b)) if seen else likeliest
        assert params["bigram_V"][v] == best
    assert (params["bigram_V"] == greedy_bigrams(table)).all()
    assert bound.nodes == 11


def test_a_repeating_target_gives_a_whole_draft_a_pass() -> None:
    cycle = (3, 7, 1)
    prompts = [(list(cycle) * 3)[:n] for n in (5, 7)]
    outputs = run(request_of(prompts, 44), repeats(MaxGram(), cycle))
    for output in outputs:
        assert output.stats["target_passes"] == 44 // 11


def test_where_rows_match_it_is_prompt_lookup() -> None:
    rows = [[1, 2, 1], [3, 4, 5, 3, 4]]
    options = {"length": 5, "max_ngram": 4}
    _, ours = MaxGram(**options).propose({"drafter": {}}, (), committed_of(rows))
    _, theirs = PromptLookup(**options).propose({}, (), committed_of(rows))
    assert (ours.tokens_BM == theirs.tokens_BM).all()
    assert theirs.valid_BM.all()


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_tokens_are_those_of_plain_decoding_of_its_width(temperature) -> None:
    options = {"temperature": temperature, "lengths": (1, 6)}
    plain = run_method("autoregressive:query_width=11", **options)
    assert ids(run_method("max_gram", **options)) == ids(plain)
    assert len(toy_prompts(1, 6)) == len(plain)


def test_bad_options_are_refused() -> None:
    with pytest.raises(ConfigError) as caught:
        build("max_gram:length=0", METHODS, {Drafter: METHODS})
    assert str(caught.value) == (
        "cannot draft: max_gram.length is 0, expected 1 or more. Correct it."
    )
