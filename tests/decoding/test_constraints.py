"""Decoding under patterns: what is written matches, and drafts change nothing."""

import re

import jax
import jax.numpy as jnp
import pytest

import jaxllm
from jaxllm.core.errors import ConfigError
from jaxllm.decoding import advance, make_sampler
from jaxllm.decoding.constraints import compile_regex
from jaxllm.decoding.constraints.constraint import walk_states
from jaxllm.decoding.protocol import Draft
from jaxllm.drafting import Autoregressive
from tests.decoding.byte_vocabulary import (
    BYTES,
    END,
    LENGTHS,
    MIXED,
    run,
    text_of,
    tokens_of,
)
from tests.decoding.test_compiled import abstract_state
from tests.decoding.toys import VOCABULARY, Replay, toy_model

# Each with words of at most so many bytes that they fit 24 tokens.
PATTERNS = [
    r"[a-c]{2,9}\.",
    r"(ab|cab|[xyz]é){1,5}",
    r"\{\"a\":(12|00|-\d)(, \d)?\}",
    "(\U0001f642|é|a){3,5}",
    "[^a-z0-9]{4}",
]


def assert_matches(outputs, pattern, eos=(END,)) -> None:
    for output in outputs:
        ids = output.token_ids
        written = ids[:-1] if output.ended else ids
        assert output.ended == (END in eos)
        assert END not in written
        text = text_of(written).decode()
        assert re.fullmatch(pattern, text, re.ASCII), text


@pytest.mark.parametrize("pattern", PATTERNS)
def test_what_is_written_matches(pattern) -> None:
    assert_matches(run(compile_regex(pattern, BYTES), **MIXED), pattern)


def test_a_row_without_an_end_token_stops_where_nothing_may_follow() -> None:
    pattern = "[a-c]{2,9}X|[a-c]{2,9}x"
    outputs = run(compile_regex(pattern, BYTES), eos=(), **MIXED)
    assert_matches(outputs, pattern, eos=())
    for output in outputs:
        assert output.stats["emitted"] == len(output.token_ids) < 24


@pytest.mark.parametrize("tree", [False, True])
@pytest.mark.parametrize("eos", [(END,), ()])
def test_a_language_of_one_word_is_spelled_and_the_row_ends(eos, tree) -> None:
    word = "cab\U0001f642é, 12"
    constraint = compile_regex(re.escape(word), BYTES)
    plain = run(constraint, eos=eos)
    assert_matches(plain, re.escape(word), eos)
    # Right proposals, and then wrong ones behind the end of the word.
    answers = tuple((*o.token_ids[: len(o.token_ids) - len(eos)], 3, 4) for o in plain)
    drafted = run(constraint, eos=eos, drafter=Replay(answers, LENGTHS, tree=tree))
    assert tokens_of(drafted) == tokens_of(plain)
    assert all(o.stats["accepted"][3] > 0 for o in drafted)
    assert all(o.stats["target_passes"] < len(o.token_ids) for o in drafted)


def drafts_of(answers, free):
    """Returns proposals for four copies of the rows.

    Right ones; every third token replaced; what the model would write if it were free;
    and none that is right, most of which violate the pattern.
    """
    halves = [
        [(t + 7) % VOCABULARY if i % 3 == 2 else t for i, t in enumerate(answer)]
        for answer in answers
    ]
    wrong = [[(t + 2) % VOCABULARY for t in answer] for answer in answers]
    return tuple(map(tuple, [*answers, *halves, *free, *wrong]))


@pytest.mark.parametrize("tree", [False, True])
def test_drafts_do_not_change_the_tokens(tree) -> None:
    constraint = compile_regex(PATTERNS[1], BYTES)
    drafts = drafts_of(
        tokens_of(run(constraint, **MIXED)), tokens_of(run(None, **MIXED))
    )
    drafter = Replay(drafts, LENGTHS * 4, tree=tree)
    width = Autoregressive(query_width=drafter.nodes)
    plain = run(constraint, drafter=width, copies=4, **MIXED)
    outputs = run(constraint, drafter=drafter, copies=4, **MIXED)
    assert tokens_of(outputs) == tokens_of(plain)
    assert tokens_of(plain)[:2] == tokens_of(plain)[6:]
    accepted = [sum(output.stats["accepted"][1:]) for output in outputs]
    right, halves, _, wrong = (sum(accepted[i : i + 2]) for i in range(0, 8, 2))
    assert right > halves > wrong == 0


def test_rejection_sampling_obeys_the_pattern() -> None:
    constraint = compile_regex(PATTERNS[1], BYTES)
    drafts = drafts_of(
        tokens_of(run(constraint, **MIXED)), tokens_of(run(None, **MIXED))
    )
    drafter = Replay(drafts, LENGTHS * 4)
    outputs = run(constraint, drafter=drafter, copies=4, verify="reject", **MIXED)
    assert_matches(outputs, PATTERNS[1])
    assert sum(output.stats["accepted"][1] for output in outputs) > 0


def test_a_token_that_leads_nowhere_is_never_chosen() -> None:
    # Every token with an "x" is taken away, and "c" leads on to it alone.
    vocabulary = tuple(b"" if b"x" in content else content for content in BYTES)
    for output in run(compile_regex("(ab|cx){1,4}", vocabulary), **MIXED):
        assert b"c" not in text_of(output.token_ids)
        assert output.ended


def test_a_limit_cuts_a_word() -> None:
    outputs = run(compile_regex("[abc]{40}", BYTES), new=5)
    for output in outputs:
        assert len(output.token_ids) == 5
        assert not output.ended
        assert re.fullmatch("[abc]+", text_of(output.token_ids).decode())


def test_states_go_down_a_tree() -> None:
    constraint = compile_regex("a(b|c)x|bc", BYTES)
    a, b, c, x = (BYTES.index(sign) for sign in (b"a", b"b", b"c", b"x"))
    # The pending token is no part of the text; below it "a" and "b" with children.
    # The last two violate the pattern, each in its way.
    tokens = jnp.asarray([[9, a, b, b, c, c, x, x, a]])
    parents = jnp.asarray([[-1, 0, 0, 1, 2, 1, 3, 1, 7]])
    draft = Draft(tokens, jnp.ones((1, 9), bool), parents)
    states = walk_states(constraint, constraint.init(1), draft)[0]
    allowed = constraint.allowed(states)
    found = [
        sorted({BYTES[t] for t in range(VOCABULARY) if allowed[node, t]})
        for node in range(9)
    ]
    assert found == [
        [b"a", b"ab", b"b", b"bc"],
        [b"b", b"c"],
        [b"c"],
        [b"x"],
        [],
        [b"x"],
        [],
        [],
        [],
    ]
    ends = [False] * 4 + [True, False, True, False, False]
    assert constraint.accepting(states).tolist() == ends


def test_no_callback_in_the_loop() -> None:
    model, params = toy_model()
    constraint = compile_regex("[abc]{2}", BYTES)
    state = abstract_state(model, params, 2, 64, Autoregressive())

    def loop(state, constraint):
        state = jaxllm.decoding.DecodeState(
            **{**vars(state), "constraint": constraint.init(2)}
        )
        arguments = {"target": params, "drafter": {}, "constraint": constraint}
        return advance(
            arguments,
            state,
            make_sampler(2, temperature=1.0),
            jnp.asarray([END]),
            jnp.int32(4),
            model=model,
            drafter=Autoregressive(),
        )

    text = str(jax.make_jaxpr(loop)(state, constraint))
    assert "while" in text
    assert "callback" not in text


def test_a_constraint_for_another_vocabulary_is_refused() -> None:
    with pytest.raises(ConfigError) as caught:
        run(compile_regex("[abc]{2}", BYTES[:50]))
    assert str(caught.value) == (
        "cannot constrain: the constraint: is for 50 tokens, expected 61, the model's "
        "vocabulary. Make it for this model."
    )
