"""Answers of a target on disk: whose they are, what is learned, what a kill does."""

import dataclasses
import json

import numpy as np
import pytest

import jaxllm
from jaxllm.core.errors import CapacityError, ConfigError, UserError
from jaxllm.drafting import PromptLookup
from jaxllm.training import generated
from jaxllm.training.generated import (
    GeneratedDocuments,
    GenerationConfig,
    prompts_from_texts,
    write_generated,
)
from tests.drafting.toy_methods import toy_lm, toy_prompts

CONFIG = GenerationConfig(temperatures=(0.0, 1.0), max_new_tokens=6, seed=5)


class Killed(Exception):
    """Stands for a signal in the middle of a run."""


def prompts_of_shapes() -> list[list[int]]:
    """Prompts of two shapes: two batches."""
    return toy_prompts(3, 20, 5)


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    path = tmp_path_factory.mktemp("generated") / "answers.jsonl"
    write_generated(toy_lm(), prompts_of_shapes(), path, CONFIG)
    return path


def test_every_prompt_is_answered_at_every_temperature(answers) -> None:
    prompts = prompts_of_shapes()
    lines = [json.loads(line) for line in answers.read_text().splitlines()]
    assert sorted(line["id"] for line in lines) == list(range(6))
    for line in lines:
        prompt = prompts[line["prompt"]]
        assert line["temperature"] == CONFIG.temperatures[line["id"] % 2]
        assert line["prompt_tokens"] == len(prompt)
        # The same seed gives the same answer alone as in a batch.
        [alone] = jaxllm.generate(
            toy_lm(),
            [prompt],
            max_new_tokens=6,
            temperature=line["temperature"],
            top_p=CONFIG.top_p,
            seed=CONFIG.seed + line["id"],
        )
        assert line["token_ids"] == [*prompt, *alone.token_ids]
        assert line["finish_reason"] == alone.finish_reason
    sampled, greedy = ([x for x in lines if x["id"] % 2 == odd] for odd in (1, 0))
    assert [x["token_ids"] for x in sampled] != [x["token_ids"] for x in greedy]


def test_prompts_are_not_learned(answers) -> None:
    documents = GeneratedDocuments(answers)
    assert len(documents) == 6
    for line, (tokens, learn) in zip(
        answers.read_text().splitlines(), documents, strict=True
    ):
        row = json.loads(line)
        prompt = row["prompt_tokens"]
        assert tokens.tolist() == row["token_ids"] and tokens.dtype == np.int32
        assert learn.tolist() == [0] * prompt + [1] * (len(tokens) - prompt)


@pytest.mark.parametrize("torn", [0, 1, 30])
def test_a_killed_run_ends_in_the_same_bytes(
    answers, tmp_path, monkeypatch, torn
) -> None:
    path = tmp_path / "answers.jsonl"

    def kill(done: int, total: int) -> None:
        raise Killed

    with pytest.raises(Killed):
        write_generated(toy_lm(), prompts_of_shapes(), path, CONFIG, progress=kill)
    whole = path.read_bytes()
    assert whole and answers.read_bytes().startswith(whole)
    if torn:
        # A line of a batch that was written by half, and the beginning of the next.
        path.write_bytes(answers.read_bytes()[: -3 * torn])
    calls = []
    answer = generated._answer

    def counted(*args):
        calls.append(args)
        return answer(*args)

    monkeypatch.setattr(generated, "_answer", counted)
    write_generated(toy_lm(), prompts_of_shapes(), path, CONFIG)
    assert len(calls) == 1, "the first batch was there"
    assert path.read_bytes() == answers.read_bytes()
    write_generated(toy_lm(), prompts_of_shapes(), path, CONFIG)
    assert len(calls) == 1


def test_a_drafter_changes_no_answer(answers, tmp_path) -> None:
    path = tmp_path / "answers.jsonl"
    write_generated(toy_lm(), prompts_of_shapes(), path, CONFIG, PromptLookup())
    assert path.read_bytes() == answers.read_bytes()


def test_something_else_is_not_mixed_in(answers, tmp_path) -> None:
    lm, prompts = toy_lm(), prompts_of_shapes()
    with pytest.raises(UserError, match="made with seed 5, expected 6"):
        write_generated(lm, prompts, answers, dataclasses.replace(CONFIG, seed=6))
    with pytest.raises(UserError, match="made with prompts"):
        write_generated(lm, prompts[:2], answers, CONFIG)
    other = tmp_path / "mine.jsonl"
    other.write_text('{"text": "precious"}\n')
    with pytest.raises(UserError, match="holds other lines"):
        write_generated(lm, prompts, other, CONFIG)
    assert other.read_text() == '{"text": "precious"}\n'
    with pytest.raises(CapacityError, match="prompt 0 has 2045 tokens"):
        write_generated(lm, [[1] * 2045], tmp_path / "long.jsonl", CONFIG)
    with pytest.raises(ConfigError, match="temperatures are"):
        GenerationConfig(temperatures=())
    with pytest.raises(UserError, match="line 1 is no answer"):
        GeneratedDocuments(other)
    with pytest.raises(UserError, match="No such file"):
        GeneratedDocuments(tmp_path / "none.jsonl")


def test_prompts_are_the_beginnings_of_texts() -> None:
    lm = jaxllm.load("demo-draft")
    texts = ["Once upon a time there was a little dog who liked to run.", "Hi."] * 8
    found = prompts_from_texts(lm, texts, shortest=4, longest=7, seed=1)
    whole = lm.tokenizer.encode(texts[0])
    assert len(found) == 8, "texts that are too short are left out"
    assert all(prompt == whole[: len(prompt)] for prompt in found)
    assert {len(prompt) for prompt in found} == {4, 5, 6, 7}
    assert found == prompts_from_texts(lm, texts, shortest=4, longest=7, seed=1)
    with pytest.raises(ConfigError, match="shortest is 5 and longest 4"):
        prompts_from_texts(lm, texts, shortest=5, longest=4)
