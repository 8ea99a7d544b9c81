"""Lines of a JSONL file: what they ask for, and why some cannot be read."""

import json

import hypothesis
import pytest
from hypothesis import strategies

from jaxllm.cli.rows import Failure, Row, read_rows

LINES = strategies.lists(
    strategies.one_of(
        strategies.binary(max_size=40).map(lambda raw: raw.replace(b"\n", b"")),
        strategies.dictionaries(
            strategies.sampled_from(["id", "prompt", "token_ids", "stop", "seed", "x"]),
            strategies.recursive(
                strategies.none()
                | strategies.booleans()
                | strategies.integers()
                | strategies.floats()
                | strategies.text(max_size=5),
                lambda inner: strategies.lists(inner, max_size=3),
                max_leaves=4,
            ),
        ).map(lambda row: json.dumps(row).encode()),
    ),
    max_size=6,
)


def only(line):
    [found] = read_rows([line])
    return found


def test_a_row_has_what_the_line_says():
    line = (
        b'{"id": "a", "prompt": "Hi", "max_new_tokens": 3, "temperature": 1, '
        b'"top_p": 0.5, "top_k": 4, "min_p": 0.1, "repetition_penalty": 2, '
        b'"presence_penalty": -0.5, "stop": "x", "seed": 9}\n'
    )
    options = {
        "max_new_tokens": 3,
        "temperature": 1,
        "top_p": 0.5,
        "top_k": 4,
        "min_p": 0.1,
        "repetition_penalty": 2,
        "presence_penalty": -0.5,
        "stop": ["x"],
        "seed": 9,
    }
    assert only(line) == Row(1, "a", "Hi", False, options)


def test_prompts_are_text_messages_or_ids():
    messages = [{"role": "user", "content": "Hi"}]
    rows = [{"prompt": ""}, {"messages": messages}, {"token_ids": [1, 2]}]
    found = list(read_rows(json.dumps(row).encode() for row in rows))
    assert found == [
        Row(1, 1, ""),
        Row(2, 2, messages, is_chat=True),
        Row(3, 3, [1, 2]),
    ]


def test_the_id_is_the_line_number_where_there_is_none():
    lines = [b'{"prompt": "a"}\n', b"\n", b'{"id": null, "prompt": "b"}\n', b"  \r\n"]
    assert list(read_rows(lines)) == [Row(1, 1, "a"), Row(3, 3, "b")]


@pytest.mark.parametrize("mark", [b"\xef\xbb\xbf", b""])
@pytest.mark.parametrize("end", [b"\n", b"\r\n", b""])
def test_marks_of_other_systems_do_no_harm(mark, end):
    assert only(mark + b'{"prompt": "\xc3\xa9"}' + end) == Row(1, 1, "é")


def test_a_long_line_is_read():
    prompt = "word " * 2_000_000
    assert only(json.dumps({"prompt": prompt}).encode()).prompt == prompt


@pytest.mark.parametrize(
    ("line", "error"),
    [
        (
            b'{"prompt": ',
            "cannot read row: column 12: Expecting value, expected a JSON object on "
            "one line. Correct the line.",
        ),
        (
            b'{"prompt": "\xff"}',
            "cannot read row: byte 13 is not UTF-8, expected JSON in UTF-8. Save the "
            "file in UTF-8.",
        ),
        (
            b"[1, 2]",
            'cannot read row: it is a list, expected an object {"prompt": ...}. '
            "Correct the line.",
        ),
        (
            b"[" * 100_000,
            "cannot read row: it is too deeply nested or has a number that is too "
            "long, expected a JSON object. Correct the line.",
        ),
        (
            b'{"seed": ' + b"1" * 5000 + b"}",
            "cannot read row: it is too deeply nested or has a number that is too "
            "long, expected a JSON object. Correct the line.",
        ),
        (
            b'{"id": "a"}',
            "cannot read row: what to continue: none is given, expected one of "
            "prompt, messages, token_ids. Give one of them.",
        ),
        (
            b'{"prompt": "a", "token_ids": [1]}',
            "cannot read row: what to continue: prompt and token_ids is given, "
            "expected one of prompt, messages, token_ids. Give one of them.",
        ),
        (
            b'{"prompt": "a", "prompt": "b"}',
            "cannot read row: field 'prompt': is there twice, expected once. Leave "
            "one out.",
        ),
        (
            b'{"promt": "a"}',
            "unknown field: row: 'promt', expected one of id, max_new_tokens, "
            "messages, min_p, presence_penalty, prompt, repetition_penalty, seed, "
            "stop, temperature, token_ids, top_k, top_p. Did you mean 'prompt'?",
        ),
        (
            b'{"prompt": 5}',
            "cannot read row: field 'prompt': 5, expected a string. Correct the line.",
        ),
        (
            b'{"messages": "Hi"}',
            "cannot read row: field 'messages': \"Hi\", expected a list of objects. "
            "Correct the line.",
        ),
        (
            b'{"token_ids": [1, true]}',
            "cannot read row: field 'token_ids': [1, true], expected a list of "
            "integers. Correct the line.",
        ),
        (
            b'{"id": 1.5, "prompt": "a"}',
            "cannot read row: field 'id': 1.5, expected a string or an integer. "
            "Correct the line.",
        ),
        (
            b'{"prompt": "a", "max_new_tokens": -1}',
            "cannot read row: field 'max_new_tokens': -1, expected an integer of 0 or "
            "more. Correct the line.",
        ),
        (
            b'{"prompt": "a", "temperature": "hot"}',
            "cannot read row: field 'temperature': \"hot\", expected a number. Correct "
            "the line.",
        ),
        (
            b'{"prompt": "a", "presence_penalty": true}',
            "cannot read row: field 'presence_penalty': true, expected a number. "
            "Correct the line.",
        ),
        (
            b'{"prompt": "a", "stop": ["x", ""]}',
            'cannot read row: field \'stop\': ["x", ""], expected a string or a list '
            "of strings, none of them empty. Correct the line.",
        ),
        (
            b'{"prompt": "a", "seed": 4294967296}',
            "cannot read row: field 'seed': 4294967296, expected an integer from 0 to "
            "4294967295. Correct the line.",
        ),
        (
            b'{"prompt": ["' + b"a" * 500 + b'"]}',
            "cannot read row: field 'prompt': [\"" + "a" * 35 + "..., expected a "
            "string. Correct the line.",
        ),
    ],
)
def test_a_line_that_cannot_be_read(line, error):
    failure = only(line)
    assert isinstance(failure, Failure)
    assert failure.error == f"line 1: {error}"


def test_an_id_is_given_once():
    lines = [
        b'{"id": 2, "prompt": "a"}',
        b'{"prompt": "b"}',
        b'{"id": "2", "prompt": ""}',
    ]
    first, second, third = read_rows(lines)
    assert (first.id, third.id) == (2, "2")
    assert second == Failure(
        2,
        2,
        "line 2: cannot read row: id 2: is that of line 1 too, expected another. Give "
        "every row its own id.",
    )


def test_a_line_that_failed_takes_no_id():
    lines = [b'{"id": "a"}', b'{"id": "a", "prompt": "x"}']
    failure, row = read_rows(lines)
    assert isinstance(failure, Failure) and (failure.id, failure.line) == ("a", 1)
    assert row == Row(2, "a", "x")


def test_the_job_goes_on_behind_a_bad_line():
    lines = [b'{"prompt": "a"}\n', b"\xff\n", b'{"prompt": "c"}\n']
    assert [type(item) for item in read_rows(lines)] == [Row, Failure, Row]


@hypothesis.given(LINES)
def test_no_line_ends_the_job(lines):
    found = list(read_rows(lines))
    blank = sum(not line.removeprefix(b"\xef\xbb\xbf").strip() for line in lines)
    assert len(found) == len(lines) - blank
    ids = [(type(item.id), item.id) for item in found if isinstance(item, Row)]
    assert len(set(ids)) == len(ids)
