"""Examples that a function makes."""

import pytest

from jaxllm.core.errors import ConfigError
from jaxllm.training import synthetic
from jaxllm.training.documents import Examples
from tests.training.small_data import (
    TOKENIZER,
    stream_of,
    take,
)


def task_examples(seed):
    return Examples(
        lambda index: synthetic.example("arithmetic", index, seed), 1000, TOKENIZER
    )


def test_examples_depend_on_seed_and_number_alone():
    one, again, other = task_examples(1), task_examples(1), task_examples(2)
    late = [part.tolist() for part in one[900]]
    assert [part.tolist() for part in again[900]] == late
    assert [part.tolist() for part in other[900]] != late


def test_examples_learn_the_answer():
    made = synthetic.example("arithmetic", 5, 1)
    tokens, learn = task_examples(1)[5]
    assert TOKENIZER.decode(tokens[learn == 0]) == made.prompt
    answer = TOKENIZER.decode(tokens[learn == 1], skip_special_tokens=False)
    assert answer == made.completion + "</s>"


def test_a_stream_of_examples():
    stream = stream_of({"sums": task_examples(1)}, packing="first_fit", row_length=256)
    tokens, learned = 0, 0
    for batch in take(stream, 5):
        tokens += int((batch.segment_BT > 0).sum())
        learned += batch.weight_BT.sum()
    assert 0 < learned < tokens / 3
    (summary,) = stream.sources
    assert summary.is_estimate
    assert summary.documents == 1000


def test_examples_may_be_token_ids():
    source = Examples(lambda index: ([1, 2], [index]), 9)
    tokens, learn = source[7]
    assert (tokens.tolist(), learn.tolist()) == ([1, 2, 7], [0, 0, 1])
    with pytest.raises(ConfigError, match="example 3: is text and there is no token"):
        Examples(lambda index: ("1", "2"), 9)[3]
    with pytest.raises(ConfigError, match="count: 0, expected 1 or more"):
        Examples(lambda index: ("1", "2"), 0)
