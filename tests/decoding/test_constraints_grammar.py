"""Decoding under grammars matched on the host, with and without drafts."""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.core.errors import ConfigError
from jaxllm.decoding import DecodeState, advance, make_sampler
from jaxllm.decoding.constraints import compile_grammar, compile_regex, with_room
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
from tests.decoding.test_constraints import drafts_of
from tests.decoding.toys import VOCABULARY, Replay, toy_model

SCHEMA = {
    "type": "object",
    "properties": {
        "a": {"type": "integer", "minimum": 0, "maximum": 999},
        "b": {"type": "array", "items": {"enum": ["ab", "é", 12]}, "maxItems": 3},
        "c": {"type": "string", "pattern": "^[abc]{0,4}$"},
    },
    "required": ["a", "b"],
    "additionalProperties": False,
}
BRACKETS = 'start: "[" (start | /[abc]/)~0..3 "]"'


def check_object(text: str) -> None:
    found = json.loads(text)
    assert {"a", "b"} <= set(found) <= {"a", "b", "c"}
    assert type(found["a"]) is int and 0 <= found["a"] <= 999
    assert len(found["b"]) <= 3
    assert all(item in ("ab", "é", 12) for item in found["b"])
    assert set(found.get("c", "")) <= set("abc")


@pytest.fixture(scope="module")
def schema():
    return compile_grammar("json", json.dumps(SCHEMA), BYTES, capacity=64)


@pytest.mark.parametrize("tree", [False, True])
def test_what_is_written_is_json_with_any_drafts(schema, tree) -> None:
    options = {"new": 48, **MIXED}
    free, answers = run(None, **options), run(schema, **options)
    drafts = drafts_of(tokens_of(answers), tokens_of(free))
    drafter = Replay(drafts, LENGTHS * 4, tree=tree)
    width = Autoregressive(query_width=drafter.nodes)
    plain = run(schema, drafter=width, copies=4, **options)
    for output in plain:
        assert output.ended
        check_object(text_of(output.token_ids[:-1]).decode())
    outputs = run(schema, drafter=drafter, copies=4, **options)
    assert tokens_of(outputs) == tokens_of(plain)
    accepted = [sum(output.stats["accepted"][1:]) for output in outputs]
    right, halves, _, wrong = (sum(accepted[i : i + 2]) for i in range(0, 8, 2))
    assert right > halves > wrong == 0


def test_brackets_are_closed_and_the_row_ends_without_an_end_token() -> None:
    constraint = compile_grammar("lark", BRACKETS, BYTES, capacity=64)
    for output in run(constraint, new=60, copies=2, eos=(), temperature=2.0):
        text = text_of(output.token_ids).decode()
        depth, depths = 0, []
        for sign in text:
            depth += {"[": 1, "]": -1}.get(sign, 0)
            depths.append(depth)
        assert set(text) <= set("[]abc")
        assert min(depths[:-1], default=1) > 0
        assert depths[-1] == 0 or len(output.token_ids) == 60


def random_texts(constraint, rng, rows: int, length: int) -> np.ndarray:
    """Writes texts that a table allows, token by token."""
    state, texts = constraint.init(rows), []
    for _ in range(length):
        allowed = np.asarray(constraint.allowed(state))
        scores = np.where(allowed, rng.random(allowed.shape), -1)
        texts.append(scores.argmax(axis=1))
        state = constraint.advance(state, jnp.asarray(texts[-1]))
    return np.stack(texts, axis=1)


def masks_of(grammar, texts, count, tokens, parents):
    bits = grammar.masks(texts, count, tokens, parents, np.ones(np.shape(tokens), bool))
    bits = np.unpackbits(bits.view(np.uint8), axis=-1, bitorder="little")
    return bits[..., : VOCABULARY + 1].astype(bool)


def test_masks_depend_on_the_text_and_on_nothing_before() -> None:
    # Where a digit is begun that is none of ASCII, the vocabulary has no end for it.
    pattern = r"(ab|[abc]{2}é|\d{1,2}, ?){1,9}\."
    table = compile_regex(pattern, BYTES)
    grammar = compile_grammar("regex", pattern, BYTES).grammar
    rng = np.random.default_rng(0)
    root = np.zeros((1, 1), np.int32)
    for _ in range(12):
        rows = 3
        texts = random_texts(table, rng, rows, 6).astype(np.int32)
        count = rng.integers(0, 4, rows)
        # A tree of what the text goes on with, of that and something else, and of
        # things that may not come.
        tokens = np.zeros((rows, 6), np.int32)
        parents = np.tile(np.asarray([-1, 0, 0, 2, 3, 2], np.int32), (rows, 1))
        for row in range(rows):
            rest = texts[row, count[row] :]
            wild = rng.integers(0, VOCABULARY, 2)
            tokens[row, 1:] = [wild[0], rest[0], rest[1], rest[2], wild[1]]
        found = masks_of(grammar, texts, count, tokens, parents)
        for row in range(rows):
            for node in range(6):
                path, at = [], node
                while at:
                    path.append(tokens[row, at])
                    at = parents[row, at]
                text = [*texts[row, : count[row]], *path[::-1]]
                fresh = compile_grammar("regex", pattern, BYTES).grammar
                alone = masks_of(
                    fresh, np.asarray([[*text, 0]]), [len(text)], root, root - 1
                )
                assert (found[row, node] == alone[0, 0]).all(), (text, node)


def test_a_grammar_allows_no_more_than_a_table_and_ends_where_it_ends() -> None:
    pattern = "([abc]{1,3}é?|[0-9]{2}){2,4}"
    table = compile_regex(pattern, BYTES)
    constraint = compile_grammar("regex", pattern, BYTES, capacity=8)
    texts = random_texts(table, np.random.default_rng(1), 4, 5)
    states = [table.init(4), constraint.init(4)]
    for token in texts.T:
        allowed = [
            np.asarray(rule.allowed(state))
            for rule, state in zip((table, constraint), states, strict=True)
        ]
        assert not (allowed[1] & ~allowed[0]).any()
        assert (allowed[1].any(axis=1) == allowed[0].any(axis=1)).all()
        # Nothing is forced here; but of two tokens that write the same one is enough.
        for row in range(4):
            written = [{BYTES[t] for t in np.flatnonzero(a[row])} for a in allowed]
            assert written[0] == written[1]
        ends = [
            np.asarray(rule.accepting(state)).tolist()
            for rule, state in zip((table, constraint), states, strict=True)
        ]
        assert ends[0] == ends[1]
        states = [
            rule.advance(state, jnp.asarray(token))
            for rule, state in zip((table, constraint), states, strict=True)
        ]


def test_what_leaves_no_choice_is_split_as_the_tokenizer_does() -> None:
    vocabulary = (b"x", b"y", b"z", b"xy", b"yz", b"xyz", b" ")
    longest = compile_grammar("regex", "xyz", vocabulary)
    told = compile_grammar("regex", "xyz", vocabulary, lambda text: [0, 4])
    spaced = compile_grammar("regex", "xyz", vocabulary, lambda text: [6, 3, 2])
    wrong = compile_grammar("regex", "xyz", vocabulary, lambda text: [1, 1])
    for constraint, first in ((longest, 5), (told, 0), (spaced, 3), (wrong, 5)):
        allowed = np.asarray(constraint.allowed(constraint.init(1)))[0]
        assert np.flatnonzero(allowed).tolist() == [first]


def test_a_text_ends_where_there_is_no_more_room() -> None:
    constraint = compile_grammar("regex", "[abc]{40}", BYTES, capacity=4)
    for output in run(constraint):
        assert len(output.token_ids) == 5  # the one that had no room is the last
    roomy = with_room(constraint, 17)
    assert roomy.capacity >= 17
    assert roomy.grammar is constraint.grammar


def test_one_callback_in_the_loop(schema) -> None:
    model, params = toy_model()
    drafter = Replay(((1, 2, 3),), (3,), tree=True)
    state = abstract_state(model, params, 2, 64, drafter)

    def loop(state):
        state = DecodeState(**{**vars(state), "constraint": schema.init(2)})
        return advance(
            {"target": params, "drafter": {}, "constraint": schema},
            state,
            make_sampler(2),
            jnp.asarray([END]),
            jnp.int32(4),
            model=model,
            drafter=drafter,
        )

    assert str(jax.make_jaxpr(loop)(state)).count("pure_callback[") == 1


def test_an_equal_grammar_compiles_nothing_again(schema) -> None:
    run(schema, new=6)
    compiled = advance._cache_size()
    again = compile_grammar("json", json.dumps(SCHEMA), BYTES, capacity=64)
    assert again.grammar is not schema.grammar
    run(again, new=6)
    assert advance._cache_size() == compiled
    assert again != compile_grammar("json", "{}", BYTES, capacity=64)


REFUSED = [
    (
        "lark",
        'start: "a" foo',
        'cannot constrain: grammar: at 1(8): unknown name: "foo", expected one that '
        "llguidance reads. Correct it.",
    ),
    (
        "json",
        '{"type": "strange"}',
        "cannot constrain: grammar: ",
    ),
    (
        "json",
        "[]",
        "cannot constrain: json: Expecting object schema to apply options, expected a "
        "JSON object. Correct the schema.",
    ),
    (
        "regex",
        "Q+",
        "no sequence of this vocabulary's tokens begins a text, expected at least one. "
        "Correct the grammar, or use a tokenizer that has its characters.",
    ),
]


@pytest.mark.parametrize(("kind", "text", "message"), REFUSED)
def test_a_grammar_that_is_none_is_refused(kind, text, message) -> None:
    with pytest.raises(ConfigError) as caught:
        compile_grammar(kind, text, BYTES)
    assert message in str(caught.value)


def test_a_package_that_is_missing_is_named(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(ConfigError) as caught:
        compile_grammar("json", "{}", BYTES)
    assert str(caught.value) == (
        "cannot constrain: package llguidance: is not installed, expected it beside "
        'jaxllm. Run pip install "jaxllm[constraints]".'
    )
