"""A job that was stopped, anywhere, ends with the rows of one that was not."""

import errno
import os
import signal
import time

import pytest

from jaxllm.cli import jobs, output
from tests.cli.conftest import read_rows, write_rows

FLAGS = ("--max_new_tokens", 6, "--temperature", 1, "--seed", 11)
# Two batches, of short and of longer prompts, a row that stops elsewhere, two bad ones.
ROWS = [
    {"id": "a", "prompt": "Hello"},
    {"prompt": "One day in the park"},
    {"id": "é", "prompt": "Tom"},
    {"prompt": "x" * 95},
    {"id": "a", "prompt": "again"},
    {"prompt": "Hi", "seed": 5, "top_k": 3},
    {"prompt": "Two birds sang a song"},
]


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    return write_rows(tmp_path_factory.mktemp("prompts") / "rows.jsonl", ROWS)


@pytest.fixture
def job(generate, prompts):
    """Runs the job into a file."""

    def run(output, *flags):
        return generate("--prompts", prompts, "--output", output, *FLAGS, *flags)

    return run


def by_key(rows):
    found = {}
    for row in rows:
        key = (row["id"], row.get("line"), row.get("sample"))
        assert key not in found, f"{key} is there twice"
        found[key] = row
    return found


@pytest.fixture
def uninterrupted(job, tmp_path):
    path = tmp_path / "whole.jsonl"
    assert job(path).code == 0
    rows = read_rows(path)
    assert len(by_key(rows)) == len(ROWS)
    assert sum(row["finish_reason"] == "error" for row in rows) == 2
    return path, by_key(rows)


def test_a_job_killed_at_any_byte_ends_with_the_same_rows(job, uninterrupted, tmp_path):
    # Of the bytes within a line two stand for all, test_output.py tries each of them.
    whole, rows = uninterrupted
    content = whole.read_bytes()
    ends = [i + 1 for i, byte in enumerate(content) if byte == ord("\n")]
    sizes = {0, *ends, *(end - 1 for end in ends), *(end - 40 for end in ends)}
    for size in sorted(sizes):
        path = tmp_path / f"{size}.jsonl"
        path.write_bytes(content[:size])
        found = job(path)
        assert (found.code, found.out) == (0, ""), size
        kept = content[: content[:size].rfind(b"\n") + 1]
        assert path.read_bytes().startswith(kept), size
        assert by_key(read_rows(path)) == rows, size


def test_a_batch_of_which_a_row_is_missing_runs_whole(
    job, uninterrupted, monkeypatch, tmp_path
):
    # So that the same program computes the row as in a run without interruption.
    whole, _ = uninterrupted
    path = tmp_path / "out.jsonl"
    path.write_bytes(b"".join(whole.read_bytes().splitlines(keepends=True)[:-1]))
    real, batches = jobs.generate_batch, []

    def generate_batch(lm, drafter, batch):
        batches.append([task.line for task in batch])
        return real(lm, drafter, batch)

    monkeypatch.setattr(jobs, "generate_batch", generate_batch)
    assert job(path).code == 0
    assert batches == [[2, 7]]


def test_a_job_that_is_done_says_so(job, uninterrupted):
    path, _ = uninterrupted
    before = path.read_bytes()
    found = job(path)
    assert found.code == 0
    assert found.err == (
        "jaxllm generate: 2 rows failed; their 'error' says why\n"
        f"jaxllm generate: nothing to do: all 7 rows are in {path}\n"
    )
    assert path.read_bytes() == before


def test_rows_taken_out_are_done_again(job, uninterrupted):
    path, rows = uninterrupted
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[::2]))
    assert job(path).code == 0
    assert by_key(read_rows(path)) == rows


def test_a_row_has_its_numbers_whatever_runs_beside_it(
    generate, uninterrupted, prompts, tmp_path
):
    # Alone in its batch, and behind other lines.
    _, rows = uninterrupted
    path = tmp_path / "one.jsonl"
    path.write_text("\n" * 6 + prompts.read_text().splitlines()[6] + "\n")
    [row] = generate("--prompts", path, *FLAGS).rows
    row.pop("seconds")
    assert row == rows[7, None, None]


def test_samples_that_are_missing_are_made(generate, tmp_path):
    path = tmp_path / "out.jsonl"
    flags = ("--prompt=Hello", *FLAGS, "--num_samples=4", "--output", path)
    assert generate(*flags).code == 0
    rows = by_key(read_rows(path))
    assert sorted(rows) == [(1, None, sample) for sample in range(4)]
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[1] + lines[3][:10])
    assert generate(*flags).code == 0
    assert by_key(read_rows(path)) == rows


def test_other_flags_are_refused(job, uninterrupted):
    path, _ = uninterrupted
    before = path.read_bytes()
    found = job(path, "--top_p=0.5")
    assert (found.code, found.out) == (2, "")
    assert found.err == (
        f"jaxllm generate: cannot resume: {path}: was made with --top_p 1.0, expected "
        "0.5 as given now. Give the same flags, or another --output.\n"
    )
    assert path.read_bytes() == before


def test_rows_may_be_added_but_not_changed(generate, tmp_path):
    path, prompts = tmp_path / "out.jsonl", tmp_path / "rows.jsonl"
    flags = ("--prompts", prompts, "--output", path, *FLAGS)
    write_rows(prompts, ROWS[:1])
    assert generate(*flags).code == 0
    for count in (2, 3):
        write_rows(prompts, ROWS[:count])
        assert generate(*flags).code == 0
        assert len(read_rows(path)) == count
    before = path.read_bytes()
    write_rows(prompts, [ROWS[0], ROWS[3], ROWS[2], ROWS[1]])
    found = generate(*flags)
    assert (found.code, found.out) == (2, "")
    assert found.err == (
        f"jaxllm generate: cannot resume: {path}: was made with other rows than "
        f"{prompts} begins with, expected the same. Choose another --output.\n"
    )
    assert path.read_bytes() == before


def test_a_disk_that_is_full_ends_the_job(job, monkeypatch, tmp_path):
    path, real, rows_written = tmp_path / "out.jsonl", os.write, []

    def write(descriptor, data):
        if bytes(data[:7]) == b'{"id": ':
            if len(rows_written) == 3:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            rows_written.append(data)
        return real(descriptor, data)

    monkeypatch.setattr(output.os, "write", write)
    found = job(path)
    assert (found.code, found.out) == (2, "")
    assert found.err.splitlines()[-1] == (
        f"jaxllm generate: cannot write rows: {path}: No space left on device, "
        "expected room for them. 3 rows are safe: free some space and start again."
    )
    monkeypatch.undo()
    assert len(read_rows(path)) == 3


def test_an_interrupt_keeps_what_is_written(job, uninterrupted, monkeypatch, tmp_path):
    real, calls = jobs.generate_batch, []

    def generate_batch(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(jobs, "generate_batch", generate_batch)
    path = tmp_path / "out.jsonl"
    found = job(path)
    assert (found.code, found.out) == (130, "")
    kept = len(read_rows(path))
    assert found.err.splitlines()[-1] == (
        f"jaxllm generate: stopped: {kept} rows are in {path}; start again"
    )
    monkeypatch.undo()
    assert job(path).code == 0
    assert by_key(read_rows(path)) == uninterrupted[1]


@pytest.mark.slow
def test_kill_9_loses_and_repeats_nothing(child, tmp_path):
    rows = [{"prompt": "x" * (1 + i % 60), "temperature": 1} for i in range(300)]
    prompts = write_rows(tmp_path / "rows.jsonl", rows)
    whole, killed = tmp_path / "whole.jsonl", tmp_path / "killed.jsonl"

    def start(output):
        flags = ("--prompts", prompts, "--output", output, "--max_new_tokens", 24)
        return child(*flags)

    process = start(whole)
    assert process.wait(timeout=240) == 0, process.stderr.read()
    kills = 0
    for wanted in (20, 120, 220):
        process = start(killed)
        while process.poll() is None:
            if killed.exists() and killed.read_bytes().count(b"\n") >= wanted:
                process.send_signal(signal.SIGKILL)
                break
            time.sleep(0.002)
        kills += process.wait(timeout=240) == -signal.SIGKILL
    assert kills >= 2
    process = start(killed)
    assert process.wait(timeout=240) == 0, process.stderr.read()
    assert by_key(read_rows(killed)) == by_key(read_rows(whole))
    assert len(read_rows(killed)) == len(rows)
