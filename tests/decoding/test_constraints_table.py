"""Patterns as tables: against a slow walk, against `re`, and what is refused."""

import itertools
import re
import sys

import hypothesis
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies

from jaxllm.core.errors import CapacityError, ConfigError
from jaxllm.decoding.constraints import compile_regex, compile_regex_reference
from tests.decoding.byte_vocabulary import BYTES

PATTERNS = [
    "",
    "a",
    "ab|cab|abc",
    "(ab|c)*",
    "[a-c]{2,5}",
    ".*",
    "(?s:.)*",
    r"\d{1,3}(\.\d{1,2})?",
    "é+|\U0001f642{1,2}",
    "[^a-z]{0,3}",
    r"[^\W\d]{2}é?",
    "(?i:AB)+",
    r"\{\"a\": (12|00)\}",
    "a.{3}b",
    r"[à-ÿ]{1,2}",
]


def table_of(constraint):
    """Returns, for every state that tokens reach, the tokens and states behind it."""
    rows, tokens = constraint.next_QC.shape[0], constraint.class_V.shape[0]
    states = jnp.repeat(jnp.arange(rows), tokens)
    tokens = jnp.tile(jnp.arange(tokens), rows)
    allowed = np.asarray(constraint.allowed(jnp.arange(rows)))
    after = np.asarray(constraint.advance(states, tokens)).reshape(rows, -1)
    return allowed, after, np.asarray(constraint.accepting(jnp.arange(rows)))


def assert_equal_languages(pattern, vocabulary) -> None:
    moves, accepting = compile_regex_reference(pattern, vocabulary)
    if not moves:
        with pytest.raises(ConfigError, match="spells a match"):
            compile_regex(pattern, vocabulary)
        return
    constraint = compile_regex(pattern, vocabulary)
    allowed, after, ends = table_of(constraint)
    assert constraint.init(2).tolist() == [0, 0]
    pairs = [(0, 0)]
    for state, expected in pairs:  # which grows as it is read
        assert np.flatnonzero(allowed[state]).tolist() == sorted(moves[expected])
        assert ends[state] == accepting[expected]
        for token, behind in moves[expected].items():
            if (int(after[state, token]), behind) not in pairs:
                pairs.append((int(after[state, token]), behind))


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_table_equals_the_reference(pattern) -> None:
    assert_equal_languages(pattern, BYTES)


# Signs of one, two, three and four bytes, of which the vocabulary has parts.
ATOMS = strategies.sampled_from(
    [
        "a",
        "b",
        "c",
        "é",
        "\U0001f642",
        "[ab]",
        "[^a]",
        "[^bé]",
        ".",
        r"\w",
        "[à-ê]",
        "一",
    ]
)


def combine(inner):
    pairs = strategies.tuples(inner, inner)
    repeats = strategies.sampled_from(["*", "+", "?", "{2}", "{0,2}", "{1,3}", "{1,}"])
    return strategies.one_of(
        pairs.map("".join),
        pairs.map(lambda pair: f"(?:{pair[0]}|{pair[1]})"),
        strategies.tuples(inner, repeats).map(lambda p: f"(?:{p[0]}){p[1]}"),
    )


REGEXES = strategies.recursive(ATOMS, combine, max_leaves=6)
SMALL = (b"a", b"b", b"c", b"ab", b"bc", b"\xc3", b"\xa9", b"\xa9a", b"\xf0\x9f", b"")
SMALL = (*SMALL, b"\x99\x82", "é".encode(), b"\xff", b"b\xe4\xb8", b"\x80")


@hypothesis.settings(max_examples=60)
@hypothesis.given(REGEXES)
def test_any_table_equals_the_reference(pattern) -> None:
    assert_equal_languages(pattern, SMALL)


SINGLE = tuple(bytes([byte]) for byte in range(256))
WORDS = [
    "".join(word) for n in range(4) for word in itertools.product("abcé一", repeat=n)
]


@hypothesis.settings(max_examples=60)
@hypothesis.given(REGEXES)
def test_what_a_table_accepts_is_what_re_matches(pattern) -> None:
    constraint = compile_regex(pattern, SINGLE)
    next_QC, class_V, accepting_Q = map(
        np.asarray, (constraint.next_QC, constraint.class_V, constraint.accepting_Q)
    )
    for word in WORDS:
        state = 0
        for byte in word.encode():
            state = next_QC[state, class_V[byte]] if state >= 0 else -1
        found = state >= 0 and bool(accepting_Q[state])
        assert found == bool(re.fullmatch(pattern, word, re.ASCII)), word


def test_no_token_leads_where_no_token_leads_on() -> None:
    # Without a "d", a "c" would be the last token ever.
    vocabulary = (b"a", b"b", b"c", b"ab", b"ca", b"x")
    constraint = compile_regex("ab|cd|x(ca)*d|ca[^a]", vocabulary)
    allowed = np.asarray(constraint.allowed(constraint.init(1)))[0]
    assert allowed.tolist() == [True, False, True, True, True, False]
    behind_c = constraint.advance(constraint.init(1), jnp.asarray([2]))
    allowed = np.asarray(constraint.allowed(behind_c))[0]
    assert np.flatnonzero(allowed).tolist() == [0, 3]  # "ca" or "cab"


def test_tokens_that_are_no_text_are_never_allowed() -> None:
    constraint = compile_regex("(?s:.)*", BYTES)
    allowed, _, _ = table_of(constraint)
    empty = [token for token, content in enumerate(BYTES) if not content]
    assert not allowed[:, empty].any()
    assert allowed[0, 1]


def test_a_table_is_small_and_its_sizes_are_powers_of_two() -> None:
    vocabulary = [b"", *(bytes([a, b]) for a in range(97, 123) for b in range(97, 123))]
    constraint = compile_regex("[a-z]{200}", vocabulary)
    # 0, 2, ..., 200 letters; tokens are of two kinds, letters and none.
    assert constraint.next_QC.shape == (128, 2)
    assert constraint.class_V.shape == (677,)


REFUSED = [
    ("a(", "missing ), unterminated subpattern at position 1", "Correct the pattern."),
    (
        "^a",
        "has '^', which only repeats that all of it has to match",
        "Leave it out.",
    ),
    (
        "a$",
        "has '$', which only repeats that all of it has to match",
        "Leave it out.",
    ),
    ("(?=a)a", "has '(?=', which looks around", "Write out what may stand there."),
    ("(?<!b)a", "has '(?<!', which looks around", "Write out what may stand there."),
    ("a++", "has '++', which gives nothing back", "Leave out the second sign."),
    ("a{2}+", "has '{2}+', which gives nothing back", "Leave out the second sign."),
    (
        "a{}",
        "has '{}', which repeats nothing",
        r"Write \{\} for the signs themselves.",
    ),
    (
        "[]a]",
        "has '[]a]', a class that begins with its end",
        r"Write \] inside the class.",
    ),
    (
        r"[\D\S]",
        r"has '[\\D\\S]', a class with two complements",
        "Write it as alternatives.",
    ),
    ("(?#x)a", "has '(?#', a comment", "Leave it out."),
    (
        r"(a)\1",
        "has what no automaton can do, or writes it in an unusual way (Group "
        "references are not implemented)",
        "Put a backslash before signs that stand for themselves, or write it without "
        "what is named here.",
    ),
    (
        "a{2",
        "has what no automaton can do, or writes it in an unusual way",
        "Put a backslash before signs that stand for themselves, or write it without "
        "what is named here.",
    ),
]


@pytest.mark.parametrize(("pattern", "found", "action"), REFUSED)
def test_a_pattern_that_is_none_is_refused(pattern, found, action) -> None:
    with pytest.raises(ConfigError) as caught:
        compile_regex(pattern, BYTES)
    assert str(caught.value) == (
        f"cannot constrain: pattern {pattern!r}: {found}, expected a regular "
        f"expression that is matched whole. {action}"
    )


@pytest.mark.parametrize(
    "pattern", [r"\^a\$", "[$^]", r"\(?=", "a+?b", r"[\]a]", r"[^\D]", r"\\[\\D]+b"]
)
def test_signs_that_look_like_refused_ones_are_read(pattern) -> None:
    assert_equal_languages(pattern, tuple(bytes([b]) for b in range(128)))


def test_a_pattern_that_no_tokens_spell_is_refused() -> None:
    with pytest.raises(ConfigError) as caught:
        compile_regex("quick", BYTES)
    assert str(caught.value) == (
        "cannot constrain: pattern 'quick': no sequence of this vocabulary's tokens "
        "spells a match, expected at least one. Correct the pattern, or use a "
        "tokenizer that has its characters."
    )


@pytest.mark.parametrize(
    ("limit", "size"),
    [
        (1000, "0.001212 MB (101 states, 3 kinds of tokens)"),  # noticed on the way
        (2047, "0.002048 MB (128 states, 4 kinds of tokens)"),
    ],
)
def test_a_table_that_is_too_large_is_refused(limit, size) -> None:
    with pytest.raises(CapacityError) as caught:
        compile_regex("[a-c]{100}", BYTES, limit_bytes=limit)
    assert str(caught.value) == (
        f"cannot constrain: pattern '[a-c]{{100}}': takes {size}, expected at most "
        f"{limit / 1e6:.4g} MB. Shorten its repetitions, or write it as a grammar, "
        "which needs no table: lark:FILE."
    )
    assert compile_regex("[a-c]{100}", BYTES, limit_bytes=2048).next_QC.nbytes == 2048


def test_a_package_that_is_missing_is_named(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "interegular", None)
    with pytest.raises(ConfigError) as caught:
        compile_regex("a", BYTES)
    assert str(caught.value) == (
        "cannot constrain: package interegular: is not installed, expected it beside "
        'jaxllm. Run pip install "jaxllm[constraints]".'
    )
