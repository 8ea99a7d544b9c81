import gzip
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import tracemalloc

import numpy as np
import pytest

from jaxllm.core.errors import CheckpointError, ConfigError, UserError
from jaxllm.training import corpus, token_files
from jaxllm.training.corpus import CorpusReader
from jaxllm.training.token_files import open_token_file
from tests.training.small_data import SEPARATOR, byte_tokenizer

STORIES = ["the red cat", "a\n\nb", "naïve 日本 🙂", "the end"]
MESSAGES = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "the"}]
RECORDS = [
    {"text": "the cat", "id": 1},
    {"prompt": "2+2=", "completion": "4"},
    {"messages": MESSAGES, "text": None},
]


def write_stories(path, stories=STORIES):
    text = "".join(f"{story}\n{SEPARATOR}\n" for story in stories)
    data = text.encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def write_records(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def opened(path, tmp_path, tokenizer=None, **options):
    options = {"separator": SEPARATOR} | options
    tokenizer = tokenizer or byte_tokenizer()
    return open_token_file(path, tokenizer, tmp_path / "cache", **options)


def content(file):
    return [tuple(part.tolist() for part in file[i]) for i in range(len(file))]


def texts(file, tokenizer=None):
    tokenizer = tokenizer or byte_tokenizer()
    return [tokenizer.decode(tokens) for tokens, _ in content(file)]


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz"])
def test_text_becomes_documents_with_begin_and_end(tmp_path, name):
    file = opened(write_stories(tmp_path / name), tmp_path)
    assert texts(file) == STORIES
    assert all(tokens[0] == 0 and tokens[-1] == 1 for tokens, _ in content(file))
    assert all(set(learn) == {1} for _, learn in content(file))
    header = file.header
    assert header.documents == len(STORIES)
    assert header.tokens == header.learned == sum(len(t) for t, _ in content(file))
    assert header.longest == max(file.lengths) == max(len(t) for t, _ in content(file))
    assert header.source["bytes"] == (tmp_path / name).stat().st_size


def test_a_text_without_separator_is_one_document(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbfthe\r\n\r\ncat\n")
    assert texts(opened(path, tmp_path, separator=None)) == ["the\n\ncat"]


def test_empty_texts_are_skipped_and_counted(tmp_path):
    path = write_stories(tmp_path / "a.txt", ["", "the", "", "cat"])
    file = opened(path, tmp_path)
    assert texts(file) == ["the", "cat"]
    assert file.header.skipped == 2
    path = write_records(tmp_path / "a.jsonl", [{"text": ""}, {"text": "x"}])
    assert opened(path, tmp_path).header.skipped == 1


def test_an_empty_line_may_separate(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("one\ntwo\n \nthree\n")
    assert texts(opened(path, tmp_path, separator="")) == ["one\ntwo", "three"]


def test_what_follows_the_last_separator_is_a_document(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text(f"one\n{SEPARATOR}\ntwo {SEPARATOR} still\n")
    assert texts(opened(path, tmp_path)) == ["one", f"two {SEPARATOR} still"]
    path.write_text(f"one\n{SEPARATOR}\n \n\n")
    assert texts(opened(path, tmp_path)) == ["one"]


def test_records_are_learned_by_their_fields(tmp_path):
    path = write_records(tmp_path / "a.jsonl", RECORDS)
    tokenizer = byte_tokenizer()
    file = opened(path, tmp_path, tokenizer)
    learned = [
        tokenizer.decode(
            [t for t, is_learned in zip(*document, strict=True) if is_learned],
            skip_special_tokens=False,
        )
        for document in content(file)
    ]
    assert learned == ["<s>the cat</s>", "4</s>", "the<|end|>"]
    assert file.header.learned == sum(sum(learn) for _, learn in content(file))


def test_ids_beyond_16_bits_are_kept(tmp_path):
    path = write_stories(tmp_path / "a.txt", ["the <extra 69999> cat"])
    tokenizer = byte_tokenizer(extra=70_000)
    largest = tokenizer.id_of("<extra 69999>")
    tokenizer._backend.add_special_tokens(["<extra 69999>"])
    file = opened(path, tmp_path, tokenizer)
    assert file.header.dtype == "uint32"
    assert largest > 1 << 16
    assert largest in content(file)[0][0]


# --- Used again, and built again ---------------------------------------------------


def test_a_token_file_is_used_again(tmp_path):
    path = write_stories(tmp_path / "a.txt")
    first = opened(path, tmp_path)
    os.utime(path, (1, 1))  # as a copy has another time
    second = opened(path, tmp_path)
    assert first.was_built
    assert not second.was_built
    assert content(second) == content(first)


def test_a_large_corpus_is_trusted_by_its_time(tmp_path, monkeypatch):
    path = write_stories(tmp_path / "a.txt")
    opened(path, tmp_path)
    monkeypatch.setattr(token_files, "_CHECKED_BYTES", 0)
    monkeypatch.setattr(token_files, "digest_of_file", lambda _: "was read")
    assert not opened(path, tmp_path).was_built
    os.utime(path, (1, 1))
    assert opened(path, tmp_path).was_built


def test_a_changed_corpus_is_tokenised_again(tmp_path):
    path = write_stories(tmp_path / "a.txt")
    opened(path, tmp_path)
    status = path.stat()
    changed = path.read_bytes().replace(b"red", b"big")
    path.write_bytes(changed)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    file = opened(path, tmp_path)
    assert file.was_built
    assert texts(file)[0] == "the big cat"
    assert len(list((tmp_path / "cache").iterdir())) == 1


@pytest.mark.parametrize(
    "change",
    [
        {"tokenizer": byte_tokenizer(merges=[])},  # the same vocabulary
        {"tokenizer": byte_tokenizer(begins=False)},
        {"tokenizer": byte_tokenizer(extra=3)},
        {"separator": None},
    ],
)
def test_another_recipe_is_another_token_file(tmp_path, change):
    path = write_stories(tmp_path / "a.txt")
    first = opened(path, tmp_path)
    other = opened(path, tmp_path, **change)
    assert other.was_built
    assert other.path != first.path
    assert not opened(path, tmp_path).was_built


def test_another_chat_template_is_another_token_file(tmp_path):
    path = write_records(tmp_path / "a.jsonl", RECORDS)
    opened(path, tmp_path)
    template = byte_tokenizer().chat_template.replace("<|end|>", "<|end|>\n")
    assert opened(path, tmp_path, byte_tokenizer(template=template)).was_built


def test_any_damaged_byte_is_noticed_and_mended(tmp_path):
    path = write_records(tmp_path / "a.jsonl", RECORDS)
    file = opened(path, tmp_path)
    whole, wanted = file.path.read_bytes(), content(file)
    text_end = len(whole[: token_files._HEADER_BYTES].rstrip())
    assert file.header.learned < file.header.tokens, "no learn mask to damage"
    places = [0, 20, text_end - 3, *range(token_files._HEADER_BYTES, len(whole))]
    for place in places:
        damaged = bytearray(whole)
        damaged[place] ^= 64
        file.path.write_bytes(damaged)
        again = opened(path, tmp_path)
        assert again.was_built, place
        assert content(again) == wanted


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[:-1],
        lambda data: data + b"x",
        lambda data: data[:100],
        lambda data: b"",
        lambda data: b"[1]".ljust(8192) + data[8192:],
        lambda data: data.replace(b'"format_version": 1', b'"format_version": 2'),
        lambda data: data.replace(b'"documents": 4', b'"documents": "4"'),
        lambda data: data.replace(b'"skipped": 0', b'"unknown": 0'),
        lambda data: data.replace(b'"format": "text"', b'"format": "tent"'),
    ],
)
def test_a_damaged_file_is_built_again(tmp_path, damage):
    path = write_stories(tmp_path / "a.txt")
    file = opened(path, tmp_path)
    wanted, whole = content(file), file.path.read_bytes()
    assert damage(whole) != whole
    file.path.write_bytes(damage(whole))
    again = opened(path, tmp_path)
    assert again.was_built
    assert content(again) == wanted


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[:-1],
        lambda data: data + b"x",
        lambda data: data[:-1] + b"x",  # the last offset
    ],
)
def test_the_ends_of_a_large_file_are_checked(tmp_path, monkeypatch, damage):
    path = write_stories(tmp_path / "a.txt")
    file = opened(path, tmp_path)
    wanted, whole = content(file), file.path.read_bytes()
    monkeypatch.setattr(token_files, "_CHECKED_BYTES", 0)
    assert not opened(path, tmp_path).was_built
    file.path.write_bytes(damage(whole))
    again = opened(path, tmp_path)
    assert again.was_built
    assert content(again) == wanted


def test_who_has_a_file_open_keeps_it(tmp_path):
    path = write_stories(tmp_path / "a.txt")
    first = opened(path, tmp_path)
    wanted = content(first)
    write_stories(path, ["other"])
    assert texts(opened(path, tmp_path)) == ["other"]
    assert content(first) == wanted


# --- Building ----------------------------------------------------------------------


def test_progress_is_told_and_ends_at_the_size(tmp_path):
    stories = [f"{i} the cat" * 20_000 for i in range(12)]
    path = write_stories(tmp_path / "a.txt", stories)
    told = []
    opened(path, tmp_path, progress=lambda *args: told.append(args))
    size = path.stat().st_size
    assert len(told) >= 3
    assert {name for name, _, _ in told} == {str(path)}
    assert [done for _, done, _ in told] == sorted(done for _, done, _ in told)
    assert told[-1] == (str(path), size, size)


def test_two_builds_at_once_do_no_harm(tmp_path):
    path = write_stories(tmp_path / "a.txt")
    meeting = threading.Barrier(2, timeout=30)
    files = {}

    def build(name):
        # Both stand in the middle of the file at the same time.
        def progress(*_):
            if name not in met:
                met.add(name)
                meeting.wait()

        files[name] = opened(path, tmp_path, progress=progress)

    met = set()
    threads = [threading.Thread(target=build, args=(name,)) for name in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert files["a"].was_built and files["b"].was_built
    assert texts(files["a"]) == texts(files["b"]) == STORIES
    assert [p.name for p in (tmp_path / "cache").iterdir()] == [files["a"].path.name]
    assert not opened(path, tmp_path).was_built


KILLED = """
import os, signal, sys
from jaxllm.training.token_files import open_token_file
from tests.training.small_data import SEPARATOR, byte_tokenizer
def die(path, done, total):
    if done > total // 2:
        os.kill(os.getpid(), signal.SIGKILL)
open_token_file(sys.argv[1], byte_tokenizer(), sys.argv[2], separator=SEPARATOR,
                progress=die)
"""


def test_a_killed_build_leaves_no_token_file(tmp_path):
    path = write_stories(tmp_path / "a.txt", ["the cat " * 40_000] * 8)
    cache = tmp_path / "cache"
    child = subprocess.run([sys.executable, "-c", KILLED, str(path), str(cache)])
    assert child.returncode == -signal.SIGKILL
    left = list(cache.iterdir())
    assert [p.suffix for p in left] == [".tmp"], "it was killed in the middle"
    assert left[0].stat().st_size > 100_000
    long_ago = time.time() - 7200
    os.utime(left[0], (long_ago, long_ago))
    file = opened(path, tmp_path)
    assert file.was_built
    assert list(cache.iterdir()) == [file.path]


def test_a_failed_build_leaves_nothing(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "the"}\n' * 50 + "no json\n")
    with pytest.raises(UserError, match="line 51"):
        opened(path, tmp_path)
    assert list((tmp_path / "cache").iterdir()) == []


class OneTokenATime:
    """A tokenizer that costs nothing, to see what the files cost."""

    vocab_size, bos_id, eos_id, chat_template, special_tokens = 9, None, None, None, {}

    def encode(self, text, add_special_tokens=True):
        return [len(text) % 9]

    def fingerprint(self):
        return "none"


def test_a_large_corpus_is_streamed(tmp_path):
    path = tmp_path / "a.txt"
    with open(path, "w") as file:
        for i in range(40_000):
            file.write(f"{'x' * 600} {i}\n{SEPARATOR}\n")
    tracemalloc.start()
    try:
        file = opened(path, tmp_path, OneTokenATime())
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(file) == 40_000
    assert peak < path.stat().st_size / 5


# --- What a user can do wrong ------------------------------------------------------


def refusal(path, tmp_path, error=UserError, **options):
    with pytest.raises(error) as raised:
        opened(path, tmp_path, **options)
    message = str(raised.value)
    assert re.fullmatch(r"[a-z][^:\n]+: .+, expected .+\.", message), message
    assert len(message) < 600
    return message


def test_a_missing_corpus_is_named(tmp_path):
    message = refusal(tmp_path / "no.txt", tmp_path, ConfigError)
    assert f"looked for {tmp_path / 'no.txt'}" in message
    assert "is a directory" in refusal(tmp_path, tmp_path, ConfigError)


def test_formats_are_known_by_name(tmp_path):
    path = write_stories(tmp_path / "a.md")
    assert "'.md', expected .txt or .jsonl" in refusal(path, tmp_path, ConfigError)
    assert texts(opened(path, tmp_path, format="text")) == STORIES
    with pytest.raises(ConfigError, match=r"unknown format: 'txt', expected one of"):
        opened(path, tmp_path, format="txt")


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.txt.gz"])
@pytest.mark.parametrize("text", ["", "\n\n"])
def test_an_empty_corpus_is_refused(tmp_path, name, text):
    path = tmp_path / name
    data = text.encode()
    path.write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    assert "holds no text" in refusal(path, tmp_path)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b'{"question": "x", "answer": "y"}', "fields are 'question', 'answer'"),
        (b"{}", "fields are none"),
        (b'{"prompt": "x"}', "fields are 'prompt'"),
        (b'{"text": 5}', "'text' is 5"),
        (b'{"prompt": "x", "completion": null}', "fields are 'prompt',"),
        (b'{"prompt": "x", "completion": 4}', "'completion' is 4"),
        (b'{"messages": "hi"}', "'messages' is 'hi'"),
        (b'{"messages": []}', "no message of role 'assistant'"),
        (b'{"messages": [{"role": "user", "content": "x"}]}', "no message of role"),
        (b'{"text": "x"', "column 13"),
        (b'["text"]', "is a list"),
        (b'{"text": "\xff"}', "byte 11 is not UTF-8"),
        (b'{"text": "\\ud800"}', "not Unicode"),
        (b"[" * 100_000, "too deeply"),
    ],
)
def test_a_wrong_line_is_named(tmp_path, line, said):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "the"}\n\n' + line + b"\n")
    message = refusal(path, tmp_path)
    assert f"{path}: line 3: " in message
    assert said in message


def test_a_missing_template_is_named_with_the_line(tmp_path):
    path = write_records(tmp_path / "a.jsonl", [{"messages": MESSAGES}])
    tokenizer = byte_tokenizer(template=None)
    message = refusal(path, tmp_path, CheckpointError, tokenizer=tokenizer)
    assert f"{path}: line 1: " in message
    assert "chat_template" in message


def test_text_of_another_encoding_is_named_by_line(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes("the\ncafé\n".encode("latin-1"))
    assert "line 2: byte 4 is not UTF-8" in refusal(path, tmp_path)


@pytest.mark.parametrize("damage", [lambda d: d[:-9], lambda d: b"plain text"])
def test_damaged_gzip_is_refused(tmp_path, damage):
    path = write_stories(tmp_path / "a.txt.gz")
    path.write_bytes(damage(path.read_bytes()))
    assert "expected a whole gzip file" in refusal(path, tmp_path)


def test_a_document_beyond_all_measure_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "_MAX_DOCUMENT_BYTES", 1000)
    path = write_stories(tmp_path / "a.txt", ["the", "x\n" * 501])
    assert "line 3: a document of more than 1000 bytes" in refusal(path, tmp_path)
    path.write_text("x" * 2000)
    assert "line 1: a document of more" in refusal(path, tmp_path)
    path = write_records(tmp_path / "a.jsonl", [{"text": "x"}, {"text": "x" * 2000}])
    assert "line 2: a document of more" in refusal(path, tmp_path)


def test_a_directory_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "cache").write_text("in the way")
    path = write_stories(tmp_path / "a.txt")
    assert "cannot write token file" in refusal(path, tmp_path)


def test_a_full_disk_is_refused_and_leaves_nothing(tmp_path, monkeypatch):
    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(token_files.os, "fsync", full)
    path = write_stories(tmp_path / "a.txt")
    assert "No space left on device" in refusal(path, tmp_path)
    assert list((tmp_path / "cache").iterdir()) == []


def test_the_digest_is_of_what_was_read(tmp_path):
    path = write_stories(tmp_path / "a.txt.gz")
    reader = CorpusReader(path, format="text", separator=SEPARATOR)
    assert [record.line for record in reader] == [1, 3, 7, 9]
    assert reader.size == path.stat().st_size
    assert reader.sha256 == corpus.digest_of_file(path)


def test_documents_are_copies_of_what_is_mapped(tmp_path):
    file = opened(write_stories(tmp_path / "a.txt"), tmp_path)
    tokens, learn = file[0]
    assert tokens.dtype == np.int32
    assert learn.dtype == np.uint8
    tokens[:] = 9
    learn[:] = 9
    assert set(file[0][1].tolist()) == {1}
    assert file[0][0][0] == 0
