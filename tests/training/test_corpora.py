"""Readers of documents, the mixture, and the tokenizer that is trained on it."""

import ast
import gzip
import itertools
import textwrap
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxllm.checkpoints import Tokenizer, load_tokenizer
from jaxllm.core.errors import ConfigError, UserError
from jaxllm.training.corpora import (
    interleave,
    python_documents,
    python_roots,
    read_stories,
    split_source,
    train_tokenizer,
    without_overlap,
)
from jaxllm.training.synthetic import END_OF_TEXT, TASKS, example, mixed_example

TALE = (
    "A grey mole dug a tunnel under the meadow, and it was longer than any other. "
    "On its first evening there the mole invited the hedgehog, who brought a pear. "
)
LAST = "They shared the pear in the dark and never asked each other what time it was."

# --- The tokenizer ---------------------------------------------------------------


@pytest.fixture(scope="module")
def trained():
    texts = [mixed_example(i, 0).text for i in range(600)]
    return train_tokenizer([*texts, TALE + LAST], 900)


@pytest.fixture(scope="module")
def tokenizer(trained):
    return Tokenizer(trained, special_tokens={"eos_token": END_OF_TEXT})


@pytest.mark.parametrize("task", TASKS)
def test_examples_survive_the_tokenizer(tokenizer, task):
    for i in range(200):
        made = example(task, i, 1)
        ids = tokenizer.encode(made.text, add_special_tokens=False)
        assert tokenizer.decode(ids) == made.text
        # A prompt alone is tokenized as it was when the model learned the answer.
        parts = [
            tokenizer.encode(part, add_special_tokens=False)
            for part in (made.prompt, made.completion)
        ]
        assert parts[0] + parts[1] == ids
        assert len(ids) < 256


@given(text=st.text().filter(lambda text: END_OF_TEXT not in text))
def test_any_text_survives_the_tokenizer(tokenizer, text):
    ids = tokenizer.encode(text)
    assert ids[0] == tokenizer.eos_id == 0
    assert tokenizer.decode(ids[1:]) == text


def test_digits_are_tokens_of_their_own(trained):
    with_digits = {t for t in trained.get_vocab() if any(c.isdigit() for c in t)}
    ascii_digits = {t for t in with_digits if t.isascii()}
    assert ascii_digits == set("0123456789")
    assert not [t for t in with_digits if len(t) > 1]
    encoding = trained.encode("12+345=357 or 2026", add_special_tokens=False)
    digits = [t for t in encoding.tokens if t.isdigit()]
    assert digits == list("123453572026")


def test_the_vocabulary_has_every_byte_and_is_full(trained):
    vocabulary = trained.get_vocab()
    assert len(vocabulary) == 900 and vocabulary[END_OF_TEXT] == 0
    assert sum(len(token) == 1 for token in vocabulary) >= 256
    # Frequent words of the tasks were merged whole.
    assert {"Answer", "ĠSELECT", "ĠWHERE"} <= set(vocabulary)


def test_the_tokenizer_is_saved_and_loaded(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    again = load_tokenizer(tmp_path)
    text = mixed_example(9, 4).text
    assert again.encode(text) == tokenizer.encode(text)
    assert again.fingerprint() == tokenizer.fingerprint()


def test_a_vocabulary_needs_room_for_the_bytes():
    with pytest.raises(ConfigError, match="vocabulary: 256, expected at least 257"):
        train_tokenizer([TALE], 256)
    assert train_tokenizer([TALE], 257).get_vocab_size() == 257


# --- Stories ---------------------------------------------------------------------


def write_stories(folder, train, valid):
    for name, text in (("train", train), ("valid", valid)):
        with gzip.open(folder / f"tinystories_{name}.txt.gz", "wt") as file:
            file.write(text)


def test_stories_of_the_validation_text_are_left_out(tmp_path):
    own = "The mole slept all winter. " * 30
    # Held back from its beginning, from character 200 or 400 on; with other line ends.
    later = f"{'x' * 400}{TALE}"
    known = [TALE + LAST, TALE.replace(" ", "\n"), later]
    write_stories(
        tmp_path,
        f"\n{END_OF_TEXT}\n".join([own, *known, "Short.", ""]),
        f"Before it.\n{TALE + LAST}\nAfter it.",
    )
    stories = read_stories(tmp_path)
    assert stories.train == (own.strip(), "Short.")
    assert TALE in stories.held_back


def test_overlap_is_seen_at_three_places_only():
    for start, kept in ((0, 0), (200, 0), (400, 0), (300, 1)):
        document = "-" * start + TALE + "-" * 300
        assert len(without_overlap([document], f"...{TALE}...")) == kept, start
    assert without_overlap(["", "Short."], TALE) == ["Short."]


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"tinystories_valid\.txt\.gz"):
        read_stories(tmp_path)


@pytest.mark.data
def test_the_real_stories(data_dir):
    stories = read_stories(data_dir / "text")
    assert len(stories.train) == 8112
    assert all(story == story.strip() != "" for story in stories.train)
    assert len(stories.held_back) > 380_000


# --- Python ----------------------------------------------------------------------


def function(name, lines=6, docstring=True):
    body = ['"""Says what it is for."""'] if docstring else []
    body += [f"value_{i} = argument + {name}_of_something" for i in range(lines)]
    return f"def {name}(argument):\n" + textwrap.indent("\n".join(body), "    ") + "\n"


def packages(folder, count=120):
    """A tree of modules, a function each; returns it."""
    for i in range(count):
        path = folder / f"package{i % 7}" / f"module{i}.py"
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_text(function(f"work_{chr(97 + i % 26)}{chr(97 + i // 26)}"))
    return folder


def read(folder, **options):
    return list(python_documents(roots=[folder], **options))


def test_what_is_no_good_source_is_left_out(tmp_path):
    good = tmp_path / "good.py"
    good.write_text(function("good"))
    for folder in ("tests", "deep/test", "site-packages", ".hidden", "__pycache__"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "module.py").write_text(function("left_out"))
    for name in ("test_x.py", "x_test.py", "conftest.py", "x_pb2.py", "text.txt"):
        (tmp_path / name).write_text(function("left_out"))
    (tmp_path / "latin.py").write_bytes(function("left_out").encode() + b"# \xe9\n")
    (tmp_path / "old.py").write_text(function("left_out") + "print 'x'\n")
    (tmp_path / "null.py").write_text(function("left_out") + "\0")
    (tmp_path / "huge.py").write_text(function("left_out") + "# fine\n" * 40_000)
    (tmp_path / "wide.py").write_text(function("left_out") + f"x = '{'y' * 130}'\n")
    numbers = '"""Left out."""\nleft_out = [\n' + "  1, 2,\n" * 40 + "]\n"
    (tmp_path / "numbers.py").write_text(numbers)
    (tmp_path / "copy.py").write_text(function("good") + "\n\n\n")
    found = [*read(tmp_path, split="train"), *read(tmp_path, split="test")]
    assert found == [function("good").strip()]


def test_splits_are_by_file_and_share_nothing(tmp_path):
    folder = packages(tmp_path, 400)
    train, test = (read(folder, split=split) for split in ("train", "test"))
    assert len(train) + len(test) == len({*train, *test}) == 400
    assert 4 <= len(test) <= 28
    # A file of two documents lies in one split.
    for path in folder.rglob("*.py"):
        path.write_text(path.read_text() + function(f"{path.stem}_more", 60))
    for split, own in (("train", train), ("test", test)):
        documents = read(folder, split=split, longest=3300)
        assert len(documents) == 2 * len(own)


def test_equal_documents_of_two_files_appear_once_in_either_split(tmp_path):
    folder = packages(tmp_path, 200)
    shared = function("shared", 50)
    for path in folder.rglob("*.py"):
        path.write_text(f"{path.read_text()}\n\n{shared}")
    documents = read(folder, longest=2400) + read(folder, split="test", longest=2400)
    assert Counter(documents)[shared.strip()] == 1
    assert len(documents) == 201


def test_the_order_is_fixed_and_a_limit_takes_its_beginning(tmp_path):
    folder = packages(tmp_path / "one")
    everything = read(folder)
    assert everything == read(packages(tmp_path / "two"))
    some = read(folder, characters=3000)
    assert some == everything[: len(some)]
    assert 3000 <= sum(map(len, some)) < 3000 + max(map(len, everything))
    # A beginning is a sample: it has documents of most packages.
    names = {d.split("(")[0]: p for p in folder.rglob("*.py") for d in [p.read_text()]}
    assert len({names[d.split("(")[0]].parent for d in some}) >= 4


def test_documents_with_docstrings_are_favoured(tmp_path):
    for i in range(200):
        name = "".join(chr(97 + int(digit)) for digit in str(i))
        for docstring in (True, False):
            path = tmp_path / f"{name}{docstring}.py"
            path.write_text(function(f"{name}_{docstring}", docstring=docstring))
    documents = [*read(tmp_path), *read(tmp_path, split="test")]
    explained = [d for d in documents if '"""' in d]
    assert len(explained) == 200
    assert 30 <= len(documents) - len(explained) <= 75


SOURCE = f'''# Licence text that many files have.
"""A module."""

import os


# About the first.
@os.decorate
{function("first", 18)}

class Large:
    """A class that is cut."""

    size = 3

{textwrap.indent(function("method_a", 12), "    ")}
    # About b.
    @property
{textwrap.indent(function("method_b", 12, docstring=False), "    ")}
{textwrap.indent(function("method_c", 60), "    ")}

{function("last", 3, docstring=False)}
x = 1; y = 2
'''


def test_source_is_cut_between_definitions():
    pieces = split_source(SOURCE, 900)
    texts = [text for text, _ in pieces]
    assert all(0 < len(text) <= 900 for text in texts)
    starts = [text.splitlines()[0] for text in texts]
    assert starts == [
        '"""A module."""',
        "# About the first.",
        "class Large:",
        "# About b.",
        "def last(argument):",
    ]
    # `method_c` is too long for any document.
    assert "method_c" not in "".join(texts) and "Licence" not in "".join(texts)
    assert "method_a" in texts[2] and "size = 3" in texts[2]
    assert texts[4].endswith("x = 1; y = 2")
    assert [explained for _, explained in pieces] == [True, True, True, False, False]
    for text in texts:
        ast.parse(text)


def test_neighbours_share_a_document():
    (whole,) = split_source(SOURCE, 10_000)
    assert whole == (SOURCE.split("\n", 1)[1].strip(), True)
    assert split_source("# nothing\n", 100) == [] == split_source("", 100)
    ((first, _),) = split_source(f"# Licence.\n@decorated\n{function('f')}", 1000)
    assert first.startswith("@decorated\ndef f")
    windows = SOURCE.replace("\n", "\r\n")
    assert split_source(windows, 900) == split_source(SOURCE, 900)


def test_an_unknown_split_is_named():
    with pytest.raises(ConfigError, match=r"unknown split: 'tests'.*'test'\?"):
        next(python_documents("tests"))


def test_the_source_of_this_interpreter():
    assert all(root.is_dir() for root in python_roots())
    folder = Path(ast.__file__).parent / "json"
    documents = read(folder)
    assert len(documents) > 5 and max(map(len, documents)) <= 2000
    assert any("class JSONDecodeError" in document for document in documents)
    for document in documents:
        ast.parse(document)


# --- The mixture -----------------------------------------------------------------


def test_every_source_has_its_share_of_the_characters():
    sources = {
        "long": (f"{i}" + "x" * 900 for i in itertools.count()),
        "short": (f"{i}" + "y" * 20 for i in itertools.count()),
    }
    mixed = interleave(sources, {"long": 3, "short": 1})
    characters = Counter()
    for name, document in itertools.islice(mixed, 2000):
        characters[name] += len(document)
    assert characters["long"] / characters["short"] == pytest.approx(3, rel=0.05)


def test_the_mixture_ends_with_a_source():
    mixed = interleave({"a": ["1", "2"], "b": itertools.repeat("3")}, {"a": 1, "b": 1})
    assert [d for _, d in mixed if d != "3"] == ["1", "2"]


@pytest.mark.parametrize("shares", [{"a": 1}, {"a": 1, "b": 0}, {"a": 1, "c": 1}])
def test_shares_belong_to_sources(shares):
    with pytest.raises(ConfigError, match="a positive number for each of a, b"):
        next(interleave({"a": ["1"], "b": ["2"]}, shares))
