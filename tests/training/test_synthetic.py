"""Templated tasks: right answers, wrong answers, splits, and one number one example."""

import itertools
import json
import operator
import os
import pathlib
import re
import sqlite3
import subprocess
import sys
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxllm.core.errors import UserError
from jaxllm.evaluation import read_prompts
from jaxllm.training.synthetic import (
    END_OF_TEXT,
    TASKS,
    Drawn,
    Example,
    Task,
    check,
    example,
    held_back,
    mixed_example,
    prompt_rows,
    split_of,
)
from jaxllm.training.synthetic.texts import EditText, RepeatText

ROOT = pathlib.Path(__file__).resolve().parents[2]
LISTS = ("copy", "replace", "reverse", "sort")
every_task = pytest.mark.parametrize("task", TASKS)
indices = st.integers(0, 10**9)


def some(task, count=300, split="train", seed=0):
    return [example(task, i, seed, split) for i in range(count)]


def line(made, name):
    return re.search(rf"^{name}: (.*)$", made.prompt, re.MULTILINE)[1]


# --- Answers that are right ------------------------------------------------------


@every_task
def test_the_answers_of_the_generator_are_right(task):
    for made in [*some(task, 800), *some(task, 200, "test")]:
        assert made.task == task
        assert made.prompt.startswith("Question: ") and made.prompt.endswith(
            "\nAnswer:"
        )
        # One token boundary, and no end marker that would end a document too early.
        assert made.completion.startswith(" ") and made.completion[1:].strip()
        assert END_OF_TEXT not in made.text and "{" not in made.prompt
        assert check(made, made.completion)
        assert check(made, made.completion.strip() + "\n")
        assert check(made, f"{made.completion}{END_OF_TEXT} and so on")
        assert not check(made, f"{made.completion} and so on")


@pytest.mark.parametrize("task", LISTS)
def test_list_answers_are_what_the_question_asks(task):
    """Solves each problem from the words of the prompt alone."""
    for made in some(task, 1000):
        question, items = line(made, "Question"), line(made, "List").split(", ")
        assert 3 <= len(items) <= 8
        if task == "copy":
            wanted = items
        elif task == "reverse":
            wanted = [items[-1 - i] for i in range(len(items))]
        elif task == "replace":
            named = [w for w in re.findall(r"\w+", question) if w in items]
            (old,) = set(named)
            pool = "0123456789" if old.isdigit() else r"[a-z]+"
            pattern = (
                rf"(?:by|with|to|put) ({pool if old.isalpha() else '[0-9]'})"
                rf"(?: in| where|\.)"
            )
            new = re.search(pattern, question)[1]
            assert new not in items
            wanted = [new if item == old else item for item in items]
        elif re.search("alphabet|dictionary|from a to z", question):
            wanted = sorted(items)
            assert len(items) <= 5
        else:
            up = re.search("small to large|rising|smallest first", question)
            down = re.search("large to small|falling|largest first", question)
            assert bool(up) != bool(down)
            wanted = sorted(items, key=int, reverse=bool(down))
        assert made.completion == f" {', '.join(wanted)}"


def test_the_steps_of_word_problems_lead_from_the_story_to_the_answer():
    signs = {
        "+": operator.add,
        "-": operator.sub,
        "*": operator.mul,
        "/": operator.floordiv,
    }
    lengths = set()
    for made in some("arithmetic", 1500):
        known = set(map(int, re.findall(r"[0-9]+", made.prompt)))
        steps = re.findall(r"([0-9]+)([-+*/])([0-9]+)=([0-9]+)\.", made.completion)
        lengths.add(len(steps))
        for left, sign, right, result in steps:
            left, right, result = int(left), int(right), int(result)
            assert {left, right} <= known
            assert signs[sign](left, right) == result >= 0
            assert sign != "/" or left % right == 0
            assert result < 100
            known.add(result)
        assert made.completion.endswith(f" The answer is {steps[-1][3]}.")
    assert lengths == {1, 2}


def test_records_hold_what_the_sentence_says():
    sizes = set()
    for made in some("json", 1000):
        question, text = line(made, "Question"), line(made, "Text")
        record = json.loads(made.completion)
        sizes.add(len(record))
        assert made.completion == f" {json.dumps(record)}"
        said = re.findall(r"\w+", text)
        places = [question.rfind(key) for key in record]
        assert -1 not in places
        for value in record.values():
            assert said.count(str(value)) == 1
        assert len(set(map(str, record.values()))) == len(record)
    assert sizes == {2, 3, 4, 5}


def test_queries_run_on_their_schema():
    kinds = set()
    for made in some("sql", 1000):
        database = sqlite3.connect(":memory:")
        # Double quotes would otherwise stand for text where a column is misspelt.
        for table, columns in re.findall(r"(\w+)\(([^)]*)\)", line(made, "Schema")):
            database.execute(f"CREATE TABLE {table} ({columns})")
        database.execute(made.completion)
        database.close()
        for value in re.findall(r"'(\w+)'|([0-9]+)", made.completion):
            assert "".join(value) in re.findall(r"\w+", line(made, "Question"))
        kinds.update(re.findall(r"[A-Z]{2,}", made.completion))
    assert {"COUNT", "MAX", "MIN", "AVG", "SUM", "WHERE", "AND", "LIMIT"} <= kinds
    assert {"ORDER", "BY", "DESC"} <= kinds


@pytest.mark.parametrize("task", ["repeat", "edit", "pattern"])
def test_long_answers_follow_from_the_prompt(task):
    for made in some(task, 800):
        answer, question = made.completion[1:], line(made, "Question")
        if task == "repeat":
            assert answer == line(made, "Text")
        elif task == "edit":
            text = line(made, "Text")
            before, after = (re.findall(r"\w+", t) for t in (text, answer))
            assert len(before) == len(after)
            ((old, new),) = {
                (a, b) for a, b in zip(before, after, strict=True) if a != b
            }
            assert old not in after and new not in before
            assert answer == re.sub(rf"\b{old}\b", new, text)
            # Which of the two goes is told by the word before it.
            goes = re.search(rf"(Replace|place of|every|says) {old}\b", question)
            comes = re.search(rf"(by|with|to|Say) {new}\b", question)
            assert goes and comes
        else:
            shown = line(made, "Pattern").split(", ")
            items = answer.split(", ")
            last = re.search(r"([0-9]+)\.$", question)[1]
            assert items[-1].split()[0] == last
            numbers = [int(item.split()[0]) for item in shown + items]
            steps = {b - a for a, b in itertools.pairwise(numbers)}
            assert len(steps) == 1 and numbers[-1] < 100
            words = [item.split()[1:] for item in shown + items]
            period = len(set(map(tuple, words)))
            assert len(shown) >= 2 * period
            assert all(a == b for a, b in zip(words, words[period:], strict=False))


class Coarse(Random):
    """Draws from few choices, so that the same prompt comes often."""

    def randint(self, low, high):
        return super().randint(low, min(low + 1, high))

    def choice(self, options):
        return super().choice(options[:2] if len(options) > 8 else options)

    def sample(self, options, count):
        options = list(options)
        if len(options) > 8 and self.random() < 0.7:
            return options[:count]
        return super().sample(options[: max(3, count)], count)


SHORT = {"edit": EditText(fewest=1, most=1), "repeat": RepeatText(fewest=1, most=1)}


@every_task
def test_a_prompt_has_one_answer_and_one_content(task):
    """Two wordings that look alike may not ask for different things."""
    drawer = SHORT.get(task, TASKS[task])
    random, seen, again = Coarse(0), {}, 0
    for _ in range(12_000):
        drawn = drawer.draw(random)
        first = seen.setdefault(drawn.prompt, drawn)
        again += first is not drawn
        assert first.content == drawn.content
        assert drawer.agrees(first.completion, drawn.completion)
    assert again > 300


@every_task
def test_tasks_have_several_wordings(task):
    """Digits and names aside, the first words of the questions differ."""
    starts = {tuple(line(made, "Question").split()[:2]) for made in some(task, 500)}
    assert len(starts) >= 3


# --- Right answers in other words ------------------------------------------------


@given(indices, st.randoms(use_true_random=False))
def test_keys_stand_in_any_order(index, random):
    made = example("json", index, 0)
    pairs = list(json.loads(made.completion).items())
    random.shuffle(pairs)
    assert check(made, json.dumps(dict(pairs), indent=random.choice([None, 1])))


@given(indices)
def test_queries_are_compared_by_what_they_mean(index):
    made = example("sql", index, 0)
    query = made.completion
    assert check(made, query.replace(" ", "\n  ") + ";")
    lower = re.sub(r"\b[A-Z]{2,}\b", lambda match: match[0].lower(), query)
    assert lower != query and check(made, lower)
    if " ORDER BY " in query and " DESC" not in query:
        assert check(made, re.sub(r"(ORDER BY \w+)", r"\1 ASC", query))
        assert not check(made, re.sub(r"(ORDER BY \w+)", r"\1 DESC", query))
    parts = re.fullmatch(r"(.* WHERE )(.*) AND (.*?)((?: ORDER| LIMIT).*)?", query)
    if parts:
        swapped = f"{parts[1]}{parts[3]} AND {parts[2]}{parts[4] or ''}"
        assert swapped != query and check(made, swapped)


@given(indices)
def test_the_working_is_free_and_the_answer_is_not(index):
    made = example("arithmetic", index, 0)
    answer = re.search(r"is ([0-9]+)\.$", made.completion)[1]
    assert check(made, f" First I count. The answer is {answer}.")
    assert not check(made, f" {answer}")
    assert not check(made, made.completion + f" The answer is {int(answer) + 1}.")


@given(indices, st.sampled_from(LISTS))
def test_white_space_in_lists_does_not_count(index, task):
    made = example(task, index, 0)
    assert check(made, made.completion.replace(", ", " ,  "))
    assert not check(made, made.completion.replace(",", ""))


# --- Answers that are wrong ------------------------------------------------------


def spoil_items(items, random):
    """A list of at least three items, not all equal, made into another one."""
    at = random.randrange(len(items))
    other = [*items]
    kind = random.choice(["drop", "twice", "change", "swap", "more"])
    if kind == "drop":
        del other[at]
    elif kind == "twice":
        other.insert(at, items[at])
    elif kind == "change":
        other[at] += random.choice("x7")
    elif kind == "more":
        other.append("x")
    else:
        apart = [i for i in range(len(items) - 1) if items[i] != items[i + 1]]
        at = random.choice(apart)
        other[at], other[at + 1] = items[at + 1], items[at]
    return other


def spoil_record(record, random):
    key = random.choice(list(record))
    value = record[key]
    spoilt = dict(record)
    kind = random.choice(["drop", "rename", "more", "type", "change"])
    if kind in ("drop", "rename"):
        del spoilt[key]
    if kind == "rename":
        spoilt[f"{key}s"] = value
    if kind == "more":
        spoilt["extra"] = value
    if kind == "type":
        spoilt[key] = float(value) if isinstance(value, int) else [value]
    if kind == "change":
        spoilt[key] = value + 1 if isinstance(value, int) else f"{value}a"
    return spoilt


def spoil(made, random):
    """An answer that differs from the right one where it counts."""
    answer = made.completion[1:]
    if made.task == "arithmetic":
        number = int(re.search(r"is ([0-9]+)\.$", answer)[1])
        wrong = random.choice([number + 1, number * 10, -number - 1, f"0{number}"])
        return re.sub(r"[0-9]+\.$", f"{wrong}.", answer)
    if made.task == "json":
        return json.dumps(spoil_record(json.loads(answer), random))
    if made.task == "sql":
        place = random.choice(list(re.finditer(r"\w+|[<>=*]", answer)))
        other = {"<": ">", ">": "=", "=": "<", "*": "x"}.get(place[0], f"{place[0]}1")
        return answer[: place.start()] + other + answer[place.end() :]
    mark = " " if made.task in ("repeat", "edit") else ", "
    return mark.join(spoil_items(answer.split(mark), random))


@every_task
@settings(max_examples=200)
@given(index=indices, random=st.randoms(use_true_random=False))
def test_spoilt_answers_are_wrong(task, index, random):
    made = example(task, index, 0)
    assert not check(made, f" {spoil(made, random)}")


@every_task
@given(text=st.text())
def test_anything_else_is_wrong_and_no_error(task, text):
    assert not check(example(task, 0, 0), text)


@pytest.mark.parametrize(
    ("task", "completion", "text"),
    [
        ("json", ' {"age": 7}', '{"age": 7, "age": 7}'),
        ("json", ' {"age": 7}', '{"age": 7} {}'),
        ("json", ' {"age": 1}', '{"age": true}'),
        ("json", ' {"age": 7}', "[" * 100_000),
        ("json", ' {"age": 7}', '["age", 7]'),
        ("sql", " SELECT a FROM t", "SELECT a FROM t WHERE "),
        ("sql", " SELECT a FROM t", "SELECT a FROM T"),
        ("sql", " SELECT a, b FROM t", "SELECT b, a FROM t"),
        ("sql", " SELECT a FROM t WHERE b = 3", "SELECT a FROM t WHERE b = '3'"),
        ("sql", " SELECT a FROM t WHERE b = 'x'", "SELECT a FROM t WHERE b = 'X'"),
        ("sql", " SELECT a FROM t", "SELECT a FROM t LIMIT 3"),
        ("arithmetic", " The answer is 4.", "The answer is 4. The answer is 5."),
        ("arithmetic", " The answer is 4.", "The answer is 4"),
        ("repeat", " A cat.", "a cat."),
    ],
)
def test_near_misses_are_wrong(task, completion, text):
    made = Example(task, "Question: ...\nAnswer:", completion)
    assert check(made, completion) and not check(made, text)


# --- Splits, seeds and numbers ---------------------------------------------------


@every_task
def test_the_splits_share_no_prompt(task):
    train = {made.prompt for made in some(task, 3000, "train", seed=0)}
    test = {made.prompt for made in some(task, 600, "test", seed=1)}
    assert not train & test
    random = Random(3)
    drawn = [TASKS[task].draw(random).content for _ in range(3000)]
    share = sum(split_of(task, content) == "test" for content in drawn) / len(drawn)
    assert 0.07 < share < 0.13


@pytest.mark.parametrize(
    ("task", "name"),
    [("copy", "List"), ("reverse", "List"), ("repeat", "Text"), ("json", "Text")],
)
def test_what_is_held_back_is_held_back_in_every_wording(task, name):
    """Lists of three digits are few, so both splits would have met the same ones."""
    train = {line(made, name) for made in some(task, 3000, "train")}
    test = {line(made, name) for made in some(task, 600, "test")}
    assert not train & test


def test_no_held_back_query_is_learned():
    train = {made.completion for made in some("sql", 6000, "train")}
    test = {made.completion for made in some("sql", 1200, "test")}
    assert not train & test


def test_examples_depend_on_their_number_alone():
    forwards = [mixed_example(i, 5) for i in range(60)]
    order = Random(0).sample(range(60), 60)
    backwards = {i: mixed_example(i, 5) for i in order}
    assert forwards == [backwards[i] for i in range(60)]
    assert [made.task for made in forwards[:10]] == list(TASKS)
    chosen = [mixed_example(i, 5, ("sql", "sql", "copy")).task for i in range(6)]
    assert chosen == ["sql", "sql", "copy"] * 2
    assert mixed_example(7, 5) == example(list(TASKS)[7], 7, 5)


@every_task
def test_seeds_numbers_and_splits_change_examples(task):
    made = {example(task, i, seed).prompt for i in range(20) for seed in range(20)}
    assert len(made) > 385
    assert example(task, 0, 0, "test") != example(task, 0, 0, "train")


@every_task
def test_held_back_examples_differ(task):
    made = held_back(task, 200, seed=2)
    assert len({m.prompt for m in made}) == len(made) == 200
    assert made[:50] == held_back(task, 50, seed=2)
    assert made != held_back(task, 200, seed=3)
    assert not {m.prompt for m in made} & {m.prompt for m in some(task, 1000)}


class Few(Task):
    """A hundred problems."""

    def draw(self, random):
        number = str(random.randrange(100))
        return Drawn(number, f"Question: {number}\nAnswer:", f" {number}")

    def agrees(self, wanted, found):
        return wanted == found


def test_more_held_back_examples_than_there_are(monkeypatch):
    monkeypatch.setitem(TASKS, "few", Few())
    own = [str(i) for i in range(100) if split_of("few", str(i)) == "test"]
    assert {m.completion.strip() for m in held_back("few", len(own), 0)} == set(own)
    with pytest.raises(UserError, match=rf"expected at most {len(own)}\."):
        held_back("few", len(own) + 1, 0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: example("cpoy", 0, 0), r"unknown task: .*Did you mean 'copy'\?"),
        (lambda: example("copy", 0, 0, "tset"), r"unknown split: .*'test'\?"),
        (lambda: example("copy", -1, 0), r"index of 'copy': -1, expected 0 or more"),
        (lambda: mixed_example(0, 0, ()), r"tasks: none, expected at least one"),
        (lambda: check(Example("x", "", ""), ""), r"unknown task: 'x', expected"),
    ],
)
def test_mistakes_are_named(call, message):
    with pytest.raises(UserError, match=message):
        call()


# --- Prompt files ----------------------------------------------------------------


def test_prompts_are_written_for_compare(tmp_path):
    """The script, in a process that hashes strings otherwise, writes the same rows."""
    path = tmp_path / "new" / "tasks.jsonl"
    script = [sys.executable, "-m", "experiments.write_task_prompts"]
    options = [f"--output={path}", "--count=3", "--seed=4", "--task=sql", "--task=copy"]
    child = subprocess.run(
        [*script, *options],
        env=os.environ | {"PYTHONHASHSEED": "77", "JAX_PLATFORMS": "cpu"},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert child.returncode == 0, child.stderr
    rows = [json.loads(row) for row in path.read_text().splitlines()]
    assert rows == prompt_rows(("sql", "copy"), 3, 4)
    for row, made in zip(rows[:3], held_back("sql", 3, 4), strict=True):
        assert row["prompt"] == made.prompt and row["answer"] == made.completion
    prompts = read_prompts(path)
    assert prompts.categories == ("sql", "copy") and len(prompts.rows) == 6
    assert prompts.rows[0].id == "sql-1"
