"""Prompts of the package, and files of benchmark suites."""

import hashlib
import json
import pathlib

import pytest

import jaxllm
from jaxllm import api
from jaxllm.core.errors import UserError
from jaxllm.decoding.buckets import prompt_bucket
from jaxllm.evaluation import PromptRow, PromptSet, default_prompts, read_prompts

STORIES = pathlib.Path(jaxllm.__file__).parent / "_data" / "prompts" / "stories.jsonl"


def test_the_prompts_of_the_package():
    found = default_prompts()
    assert found.categories == ("story", "repetition", "dialogue")
    counts = [sum(r.category == c for r in found.rows) for c in found.categories]
    assert counts == [4, 4, 4]
    assert len({row.id for row in found.rows}) == len(found.rows) == 12
    assert found.path == "jaxllm/_data/prompts/stories.jsonl"
    assert found.sha256 == hashlib.sha256(STORIES.read_bytes()).hexdigest()


def test_the_prompts_of_the_package_share_a_compiled_shape():
    tokenizer = api.load("demo", dtype="float32").tokenizer
    lengths = [len(tokenizer.encode(row.prompt)) for row in default_prompts().rows]
    assert {prompt_bucket(length) for length in lengths} == {64}


def test_phrases_come_back_in_prompts_of_repetition():
    def repeated(text):
        words = text.split()
        triples = list(zip(words, words[1:], words[2:], strict=False))
        return 1 - len(set(triples)) / len(triples)

    rows = default_prompts().rows
    shares = {row.id: repeated(row.prompt) for row in rows}
    for row in rows:
        assert (shares[row.id] > 0.1) == (row.category == "repetition"), row.id


def test_a_file_is_read_whatever_else_stands_in_it(tmp_path):
    lines = [
        {"id": "a", "prompt": "One", "category": "x", "reference": [1]},
        {"question_id": 81, "category": "writing", "turns": ["Two", "and more"]},
        {"question": "Three?", "answer": "3", "id": None},
        {"token_ids": [1, 2], "category": "x"},
        {"prompt": ""},
    ]
    content = b"\xef\xbb\xbf\r\n" + b"".join(
        json.dumps(x).encode() + b"\n\n" for x in lines
    )
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    found = read_prompts(path)
    assert found.rows == (
        PromptRow(id="a", prompt="One", category="x"),
        PromptRow(id=81, prompt="Two", category="writing"),
        PromptRow(id=6, prompt="Three?", category="all"),
        PromptRow(id=8, prompt=[1, 2], category="x"),
        PromptRow(id=10, prompt="", category="all"),
    )
    assert found.categories == ("x", "writing", "all")
    assert found.described() == {
        "path": str(path),
        "sha256": hashlib.sha256(content).hexdigest(),
        "count": 5,
    }


def test_the_first_of_every_category():
    rows = [PromptRow(id=i, prompt="", category=c) for i, c in enumerate("aababb")]
    prompts = PromptSet(rows=tuple(rows), path=None, sha256="")
    assert prompts.first(None) is prompts
    assert [row.id for row in prompts.first(1).rows] == [0, 2]
    assert [row.id for row in prompts.first(2).rows] == [0, 1, 2, 4]
    assert [row.id for row in prompts.first(9).rows] == [0, 1, 2, 3, 4, 5]


def test_prompts_made_in_python():
    found = PromptSet.of(["a", [1, 2]])
    assert [(row.id, row.prompt) for row in found.rows] == [(1, "a"), (2, [1, 2])]
    assert found.sha256 == PromptSet.of(["a", [1, 2]]).sha256
    assert found.sha256 != PromptSet.of(["a", [1, 3]]).sha256


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no rows, expected at least one. Write one JSON object a line."),
        ('{"prompt": "a"', "line 1: is not JSON in UTF-8, expected an object on one"),
        ('{"prompt": "\\ud800', "line 1: is not JSON in UTF-8, expected an object"),
        ("\n[1]", 'line 2: is a list, expected an object {"prompt": ...}. Correct'),
        ("[" * 99999, "line 1: is not JSON in UTF-8, expected an object on one line"),
        (
            '{"id": 1}',
            "line 1: what to continue: none is given, expected one of prompt",
        ),
        (
            '{"prompt": "a", "turns": ["b"]}',
            "line 1: what to continue: prompt and turns is given, expected one of",
        ),
        ('{"prompt": 1}', "line 1: field 'prompt': 1, expected a string. Correct the"),
        ('{"turns": []}', "line 1: field 'turns': [], expected at least one turn."),
        ('{"turns": "a"}', "line 1: field 'turns': \"a\", expected a list of strings."),
        ('{"token_ids": [true]}', "line 1: field 'token_ids': [true], expected a list"),
        (
            '{"prompt": "a", "id": 1.5}',
            "line 1: field 'id': 1.5, expected a string or an integer. Correct the",
        ),
        (
            '{"prompt": "a", "category": 3}',
            "line 1: field 'category': 3, expected a string. Correct the line.",
        ),
        (
            '{"prompt": "a", "id": 2}\n{"prompt": "b"}',
            "line 2: has id 2 of an earlier line, expected another. Give every row",
        ),
    ],
)
def test_a_line_that_is_no_row(text, message, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        read_prompts(path)
    assert str(caught.value).startswith(f"cannot read prompts: {path}: {message}")


def test_a_file_that_is_not_utf_8(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"prompt": "\xff"}')
    with pytest.raises(UserError, match="line 1: is not JSON in UTF-8"):
        read_prompts(path)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(UserError) as caught:
        read_prompts(tmp_path / "none.jsonl")
    assert str(caught.value) == (
        f"cannot read prompts: {tmp_path}/none.jsonl: No such file or directory, "
        "expected a JSONL file. Correct --prompts."
    )
