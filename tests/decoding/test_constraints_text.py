"""Constraints on texts: bytes of real tokenizers, the string form, the Python door."""

import functools
import json
import re

import pytest
import tokenizers
from tokenizers import decoders, models

import jaxllm
from jaxllm.checkpoints import GenerationDefaults, load_tokenizer, resolve
from jaxllm.checkpoints.tokenizer import Tokenizer
from jaxllm.core.errors import ConfigError, UserError
from jaxllm.decoding.constraints import (
    GrammarConstraint,
    RegularConstraint,
    make_constraint,
    token_bytes,
)
from tests.decoding.toys import TEMPERATURES, toy_model

TEXTS = [
    "Once upon a time",
    " two  spaces\n\tand\r\n",
    "na\u00efve \u65e5\u672c \U0001f642 \ufb01",
]
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "toys": {"type": "array", "items": {"enum": ["ball", "doll"]}, "maxItems": 2},
    },
    "required": ["name", "age", "toys"],
    "additionalProperties": False,
}


@functools.cache
def demo():
    return jaxllm.load("demo", dtype="float32")


def check_person(text: str) -> None:
    found = json.loads(text)
    assert sorted(found) == ["age", "name", "toys"]
    assert len(found["name"]) <= 12
    assert 0 <= found["age"] <= 120
    assert set(found["toys"]) <= {"ball", "doll"} and len(found["toys"]) <= 2


def test_bytes_of_byte_level_tokens() -> None:
    tokenizer = load_tokenizer(resolve("demo"))
    found = token_bytes(tokenizer, 2050, (5,))
    assert len(found) == 2050
    assert [found[0], found[5], *found[2048:]] == [b""] * 4  # special, end, unused
    assert set(found) >= {bytes([byte]) for byte in range(256)} - {b"%"}
    assert tokenizer.token_string(5) == "%"
    for text in TEXTS:
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert b"".join(found[token] for token in ids) == text.encode()


@pytest.mark.data
@pytest.mark.parametrize("name", ["tokenizers/llama2", "models/stories260K"])
def test_bytes_of_pieces(name, data_dir) -> None:
    tokenizer = load_tokenizer(data_dir / name)
    found = token_bytes(tokenizer, tokenizer.vocab_size)
    assert {bytes([byte]) for byte in range(256)} <= set(found)
    assert [found[token] for token in (0, 1, 2)] == [b""] * 3
    for text in TEXTS:
        ids = tokenizer.encode(text, add_special_tokens=False)
        # The space that this kind puts before a text.
        assert b"".join(found[token] for token in ids) == b" " + text.encode()


def piece_tokenizer(vocabulary, decoder) -> Tokenizer:
    backend = tokenizers.Tokenizer(models.BPE(vocabulary, [], byte_fallback=True))
    backend.decoder = decoder
    backend.add_special_tokens(["<s>"])
    return Tokenizer(backend)


def test_bytes_of_names_that_look_like_others() -> None:
    vocabulary = {
        "<s>": 0,
        "\u2581a": 1,
        "<0xE2>": 2,
        "<0xZZ>": 3,
        "\u2581": 4,
        "\u0120": 5,
    }
    parts = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    pieces = piece_tokenizer(vocabulary, decoders.Sequence(parts))
    assert token_bytes(pieces, 6) == (
        b"",
        b" a",
        b"\xe2",
        b"<0xZZ>",
        b" ",
        "\u0120".encode(),
    )
    # The same names where the decoder joins them as they are.
    plain = piece_tokenizer(vocabulary, decoders.Fuse())
    assert token_bytes(plain, 6)[1:3] == ("\u2581a".encode(), b"<0xE2>")
    levels = piece_tokenizer(vocabulary, decoders.ByteLevel())
    assert token_bytes(levels, 6)[5] == b" "


def test_tokens_that_are_joined_in_another_way_are_refused() -> None:
    backend = tokenizers.Tokenizer(models.WordPiece({"a": 0, "##b": 1}, unk_token="a"))
    backend.decoder = decoders.WordPiece()
    with pytest.raises(ConfigError) as caught:
        token_bytes(Tokenizer(backend), 2)
    assert str(caught.value) == (
        "cannot constrain: tokenizer: its tokens are not simply put one behind the "
        "other, expected byte-level BPE or SentencePiece. Use a model with such a "
        "tokenizer."
    )


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_a_pattern_on_a_real_model(temperature) -> None:
    pattern = r"(, | )[a-z ]{5,30}\. (Lily|The cat) (saw|had) [0-9]{1,2} birds[.!]"
    results = jaxllm.generate(
        demo(),
        ["Once upon a time", "The cat", "One day"],
        constraint=f"regex:{pattern}",
        max_new_tokens=60,
        temperature=temperature,
    )
    for result in results:
        assert re.fullmatch(pattern, result.text), result.text
        assert result.finish_reason == "eos"


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_a_schema_on_a_real_model(temperature, tmp_path) -> None:
    path = tmp_path / "schema.json"
    path.write_text(json.dumps(SCHEMA))
    options = {"max_new_tokens": 80, "temperature": temperature}
    prompts = ["Lily was three years old. ", "Tom"]
    results = jaxllm.generate(demo(), prompts, constraint=f"json:{path}", **options)
    for result in results:
        check_person(result.text)
        assert result.finish_reason == "eos"
    inline = f"json:{json.dumps(SCHEMA)}"
    pieces = jaxllm.stream(demo(), prompts[0], constraint=inline, **options)
    assert "".join(pieces) == results[0].text


def test_a_grammar_in_a_file(tmp_path) -> None:
    path = tmp_path / "sums.lark"
    path.write_text(
        'start: number ("+" number)~1..2 "=" number\nnumber: /[0-9]{1,2}/\n'
    )
    (result,) = jaxllm.generate(
        demo(), ["One"], constraint=f"lark:{path}", max_new_tokens=30, temperature=1.0
    )
    assert re.fullmatch(r"[0-9]{1,2}(\+[0-9]{1,2}){1,2}=[0-9]{1,2}", result.text)


def test_a_constraint_made_once_serves_many_calls() -> None:
    lm = demo()
    ends = lm.generation.eos_ids
    made = make_constraint("regex:(yes|no)", lm.tokenizer, lm.config.vocabulary, ends)
    assert isinstance(made, RegularConstraint)
    for prompt in ("Was it?", "Is it?"):
        (result,) = jaxllm.generate(lm, [prompt], constraint=made, max_new_tokens=8)
        assert result.text in ("yes", "no")
    schema = make_constraint('json: {"type": "null"}', lm.tokenizer, 2048)
    assert isinstance(schema, GrammarConstraint)


def test_an_end_token_that_is_no_special_one_is_not_written() -> None:
    model, params = toy_model(vocabulary=2048)
    tokenizer = load_tokenizer(resolve("demo"), 2048)
    end = tokenizer.id_of("a")
    lm = jaxllm.LanguageModel(
        model=model,
        params=params,
        tokenizer=tokenizer,
        generation=GenerationDefaults(eos_ids=(end,)),
        name="toy",
    )
    results = jaxllm.generate(
        lm, ["x", "y"], constraint="regex:[ab]{3}|aaa", max_new_tokens=9
    )
    for result in results:
        assert result.token_ids[-1] == end
        assert tokenizer.decode(result.token_ids[:-1]) == "bbb"


REFUSED = [
    (
        "regexp:a",
        "unknown constraint: 'regexp', expected one of json:..., lark:..., regex:.... "
        "Did you mean 'regex:...'?",
    ),
    (
        "yes|no",
        "unknown constraint: 'yes|no', expected one of json:..., lark:..., regex:.... "
        "Choose one of these.",
    ),
    (
        "json:/no/such.json",
        "cannot constrain: '/no/such.json': No such file or directory, expected a file "
        "with a JSON schema. Correct the path.",
    ),
    (
        "lark:/no/such.lark",
        "cannot constrain: '/no/such.lark': No such file or directory, expected a file "
        "with a grammar. Correct the path.",
    ),
    (
        'json:{"type": }',
        "cannot constrain: '{\"type\": }': Expecting value, expected a JSON schema. "
        "Correct it.",
    ),
    (
        "regex:[a",
        "cannot constrain: pattern '[a': unterminated character set at position 0, "
        "expected a regular expression that is matched whole. Correct the pattern.",
    ),
]


@pytest.mark.parametrize(("text", "message"), REFUSED)
def test_a_string_that_is_none_is_refused(text, message) -> None:
    with pytest.raises(UserError) as caught:
        jaxllm.generate(demo(), ["x"], constraint=text)
    assert str(caught.value) == message


def test_a_file_that_is_no_schema_is_refused(tmp_path) -> None:
    tokenizer = load_tokenizer(resolve("demo"))
    path = tmp_path / "schema.json"
    path.write_text("[1]")
    with pytest.raises(ConfigError, match="is a list, expected an object that is"):
        make_constraint(f"json:{path}", tokenizer, 2048)
    path.write_bytes(b"\xff")
    with pytest.raises(UserError, match="is no text in UTF-8, expected a file with"):
        make_constraint(f"json:{path}", tokenizer, 2048)


def test_a_model_without_a_tokenizer_is_refused() -> None:
    with pytest.raises(UserError) as caught:
        make_constraint("regex:a", None, 61)
    assert str(caught.value) == (
        "cannot constrain: the model: has no tokenizer, expected one that says what "
        "its tokens write. Make a constraint in Python, from their bytes."
    )
