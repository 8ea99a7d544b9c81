"""Rows to tasks and batches, without running a model."""

import random

import pytest

from jaxllm.checkpoints import load_language_model
from jaxllm.cli.rows import Failure, Row
from jaxllm.cli.tasks import Settings, Task, batches, make_tasks, shape_of
from jaxllm.core.errors import UserError
from jaxllm.decoding.buckets import Shapes
from jaxllm.decoding.job import BATCH
from jaxllm.drafting import Autoregressive
from tests.cli.conftest import POSITIONS, TEMPLATE, write_checkpoint


@pytest.fixture(scope="module")
def lm(checkpoint):
    return load_language_model(checkpoint, dtype="float32")


def one(lm, row, **settings):
    [task] = make_tasks(lm, row, Settings(**settings))
    return task


def error_of(lm, row, **settings):
    with pytest.raises(UserError) as caught:
        make_tasks(lm, row, Settings(**settings))
    return str(caught.value)


def test_a_row_overrides_the_flags(lm):
    options = {"max_new_tokens": 3, "temperature": 0.5, "stop": ["b"], "seed": 8}
    options["presence_penalty"] = -1
    flags = {"max_new_tokens": 9, "top_k": 4, "stop": ("a", "c"), "seed": 2}
    flags |= {"repetition_penalty": 1.5, "presence_penalty": 2.0, "verify": "reject"}
    task = one(lm, Row(5, "x", "Hi", options=options), **flags)
    assert (task.line, task.id, task.sample) == (5, "x", 0)
    assert task.ids == lm.tokenizer.encode("Hi")
    assert task.max_new_tokens == 3
    assert task.sampling == {
        "temperature": 0.5,
        "top_p": 1,
        "top_k": 4,
        "min_p": 0,
        "repetition_penalty": 1.5,
        "presence_penalty": -1,
    }
    shared = {"verify": "reject", "constraint": None, "shared_prefix": "auto"}
    assert task.shared == shared
    assert task.stop == ("b",)
    assert task.seed == 8


def test_a_preamble_stands_before_every_prompt(lm):
    said = [{"role": "user", "content": "Hi"}]
    system = [{"role": "system", "content": "Be brief. "}]
    rows = {
        "text": (Row(1, 1, "Hi"), lm.tokenizer.encode("Be brief. Hi")),
        "ids": (Row(1, 1, [3, 4]), [*lm.tokenizer.encode("Be brief. "), 3, 4]),
        "chat": (
            Row(1, 1, said, is_chat=True),
            lm.tokenizer.encode(
                lm.tokenizer.apply_chat_template([*system, *said]),
                add_special_tokens=False,
            ),
        ),
    }
    for row, expected in rows.values():
        assert one(lm, row, preamble="Be brief. ").ids == expected
    assert (
        one(lm, Row(1, 1, "Hi"), preamble="Be brief. ", chat=True).ids
        == (rows["chat"][1])
    )


def test_the_first_line_has_the_seed_of_the_flag(lm):
    # As row 0 of a list in Python does.
    seeds = [one(lm, Row(n, n, "Hi"), seed=7).seed for n in (1, 2, 90)]
    assert seeds == [7, 8, 96]
    assert one(lm, Row(3, 3, "Hi"), seed=2**32 - 1).seed == 1


def test_samples_have_seeds_of_their_own(lm):
    rows = [Row(line, line, "Hi") for line in range(1, 101)]
    settings = Settings(num_samples=50)
    seeds = [task.seed for row in rows for task in make_tasks(lm, row, settings)]
    assert len(set(seeds)) == len(seeds)
    assert seeds[::50] == list(range(100))
    assert all(0 <= seed < 2**32 for seed in seeds)


def test_chat_writes_what_the_template_says(lm):
    messages = [{"role": "user", "content": "Hi"}]
    written = lm.tokenizer.encode("[user]Hi[assistant]")
    assert one(lm, Row(1, 1, messages, is_chat=True)).ids == written
    assert one(lm, Row(1, 1, "Hi"), chat=True).ids == written
    assert one(lm, Row(1, 1, "Hi")).ids == lm.tokenizer.encode("Hi")
    assert one(lm, Row(1, 1, [5, 6]), chat=True).ids == [5, 6]


def test_chat_needs_a_template(tmp_path):
    directory = write_checkpoint(tmp_path / "plain", template=None)
    lm = load_language_model(directory)
    assert error_of(lm, Row(1, 1, "Hi"), chat=True) == (
        f"cannot apply chat template: {directory}/tokenizer_config.json: has no "
        "'chat_template' and there is no chat_template.jinja beside it, expected one "
        "of them. Use a chat checkpoint or a plain prompt."
    )


def test_text_needs_a_tokenizer(tmp_path):
    directory = write_checkpoint(tmp_path / "bare", template=TEMPLATE)
    (directory / "tokenizer.json").unlink()
    lm = load_language_model(directory)
    assert one(lm, Row(1, 1, [5])).ids == [5]
    assert error_of(lm, Row(2, 2, "Hi")) == (
        f"cannot encode: prompt 2 is text, expected token ids: {directory} has no "
        "tokenizer. Pass lists of ids."
    )
    assert error_of(lm, Row(2, 2, [{}], is_chat=True)) == (
        f"cannot chat: {directory}: has no tokenizer, expected one. Give token_ids."
    )


def test_the_default_is_what_the_positions_leave(lm):
    assert one(lm, Row(1, 1, "a" * 10)).max_new_tokens == POSITIONS - 10
    assert one(lm, Row(1, 1, "a" * (POSITIONS - 1))).max_new_tokens == 1


@pytest.mark.parametrize(
    ("length", "new", "limit", "positions_for"),
    [
        (POSITIONS, None, POSITIONS - 1, 1),
        (POSITIONS - 7, 8, POSITIONS - 8, 8),
        (1, POSITIONS + 4, 0, POSITIONS + 4),
    ],
)
def test_a_prompt_that_is_too_long(length, new, limit, positions_for, lm):
    assert error_of(lm, Row(1, 1, "a" * length), max_new_tokens=new) == (
        f"cannot generate: the prompt has {length} tokens, expected at most {limit} "
        f"(the model's {POSITIONS} positions less {positions_for} new ones). Shorten "
        "it, lower --max_new_tokens or pass --truncate=left."
    )


def test_the_longest_prompt_fits(lm):
    task = one(lm, Row(1, 1, "a" * (POSITIONS - 8)), max_new_tokens=8)
    assert len(task.ids) == POSITIONS - 8


def test_truncation_keeps_the_end(lm):
    text = "".join(chr(97 + i % 26) for i in range(POSITIONS + 50))
    cut = {"truncate": True}
    task = one(lm, Row(1, 1, text), max_new_tokens=8, **cut)
    assert task.ids == lm.tokenizer.encode(text)[-(POSITIONS - 8) :]
    assert one(lm, Row(1, 1, text), **cut).max_new_tokens == POSITIONS // 2
    assert len(one(lm, Row(1, 1, text), **cut).ids) == POSITIONS - POSITIONS // 2
    assert one(lm, Row(1, 1, "short"), **cut).ids == lm.tokenizer.encode("short")
    assert "has 146 tokens, expected at most 0" in error_of(
        lm, Row(1, 1, text), max_new_tokens=POSITIONS, **cut
    )


@pytest.mark.parametrize(
    ("row", "error"),
    [
        (
            Row(4, 4, [5, 98]),
            "cannot embed: prompt 4 has id 98 at index 1, expected 0 to 97. Use the "
            "model's own tokenizer.",
        ),
        (
            Row(4, 4, []),
            "cannot generate: the prompt is empty, expected at least one token: the "
            "model has no start token to put in its place. Write a prompt.",
        ),
        (
            Row(4, 4, "a", options={"top_p": 0}),
            "cannot sample: top_p is 0, expected a number from 1e-06 to 1. Correct "
            "--top_p.",
        ),
        (
            Row(4, 4, "a", options={"temperature": float("nan")}),
            "cannot sample: temperature is nan, expected a number from 0 to 1e+06. "
            "Correct --temperature.",
        ),
        (
            Row(4, 4, "a", options={"repetition_penalty": 0}),
            "cannot sample: repetition_penalty is 0, expected a number from 0.01 to "
            "100. Correct --repetition_penalty.",
        ),
    ],
)
def test_a_row_that_cannot_run(row, error, lm):
    assert error_of(lm, row) == error


def test_an_empty_text_is_the_start_token(lm):
    assert one(lm, Row(1, 1, "")).ids == [1]


def task(line, length=5, new=8, stop=()):
    return Task(
        line=line,
        id=line,
        sample=0,
        ids=[5] * length,
        max_new_tokens=new,
        sampling=vars_of_greedy(),
        stop=stop,
        seed=line,
    )


def vars_of_greedy():
    filters = {"top_p": 1.0, "top_k": 0, "min_p": 0.0}
    penalties = {"repetition_penalty": 1.0, "presence_penalty": 0.0}
    return {"temperature": 0.0, **filters, **penalties}


def lines_of(items):
    return [
        item.line if isinstance(item, Failure) else [task.line for task in item]
        for item in items
    ]


def test_a_batch_shares_bucket_length_and_stop():
    tasks = [
        task(1),
        task(2, length=17),
        task(3, new=9),
        task(4, stop=("a",)),
        task(5, length=16),
        task(6, stop=("a",)),
    ]
    found = lines_of(batches([task] for task in tasks))
    assert sorted(found) == [[1, 5], [2], [3], [4, 6]]


def test_a_full_batch_and_a_failure_come_at_once():
    def endless():
        for line in range(1, BATCH + 1):
            yield [task(line)]
        yield Failure(99, 99, "why")
        raise AssertionError("read too far")

    stream = batches(endless())
    assert lines_of([next(stream), next(stream)]) == [[*range(1, BATCH + 1)], 99]


def test_rows_that_wait_are_bounded():
    random_lengths = random.Random(0)
    read = 0

    def rows():
        nonlocal read
        for line in range(3000):
            read += 1
            # Hardly two of them share a batch.
            yield [task(line, new=random_lengths.randrange(1000))]

    given = 0
    for batch in batches(rows()):
        given += len(batch)
        assert read - given < 512
    assert given == 3000


def test_every_task_comes_once_and_always_in_the_same_batches():
    draw = random.Random(1)
    tasks = [task(n, draw.choice([5, 20, 70]), draw.choice([8, 9])) for n in range(700)]
    first = lines_of(batches([t] for t in tasks))
    assert first == lines_of(batches([t] for t in tasks))
    assert sorted(line for batch in first for line in batch) == list(range(700))


def test_the_shape_of_a_batch():
    batch = [task(1), task(2, length=3), task(3)]
    shapes, *kinds = shape_of(batch, Autoregressive())
    assert shapes == Shapes(rows=4, chunk=16, capacity=64)
    assert kinds == [True, False, False]
    batch[0].sampling["presence_penalty"] = 1.0
    assert shape_of(batch, Autoregressive()) == (shapes, True, False, True)
