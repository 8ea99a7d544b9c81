"""The output file: whole rows only, whatever stops the job."""

import errno
import json
import os
import subprocess
import sys

import pytest

from jaxllm.cli import output
from jaxllm.cli.output import ResultFile
from jaxllm.core.errors import UserError

CONFIG = {"command": "generate", "flags": {"seed": 0, "stop": []}}
ROWS = [
    {"id": "é\u2028", "text": "a\nb", "finish_reason": "eos"},
    {"id": 2, "sample": 1, "text": "", "finish_reason": "stop"},
    {"id": 3, "line": 3, "text": "", "finish_reason": "error", "error": "why"},
    {"id": "\ud800", "text": "c", "finish_reason": "length"},
]
KEYS = [("id", "é\u2028", 0), ("id", 2, 1), ("line", 3, 0), ("id", "\ud800", 0)]


def write(path, rows, config=CONFIG):
    with ResultFile(str(path), config) as results:
        results.write(rows)
        return results


def refusal(path, config=CONFIG):
    with pytest.raises(UserError) as caught:
        write(path, ROWS, config)
    return str(caught.value)


def parsed(path):
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def test_rows_are_lines_and_are_known_again(tmp_path):
    path = tmp_path / "out.jsonl"
    write(path, ROWS)
    assert [json.loads(raw) for raw in path.read_bytes().split(b"\n")[:-1]] == ROWS
    with ResultFile(str(path), CONFIG) as results:
        assert (results.found, results.found_failed) == (4, 1)
        assert all(results.has([key]) for key in KEYS)
        others = [("id", 2, 0), ("id", "2", 1), ("id", 3, 0), ("line", 2, 0)]
        assert not results.has(others)


def test_a_kill_at_any_byte_leaves_whole_rows(tmp_path):
    whole = tmp_path / "whole.jsonl"
    write(whole, ROWS)
    content = whole.read_bytes()
    path = tmp_path / "out.jsonl"
    for size in range(len(content) + 1):
        path.write_bytes(content[:size])
        lines = content[:size].count(b"\n")
        with ResultFile(str(path), CONFIG) as results:
            assert results.found == lines, size
            missing = [
                row
                for row, key in zip(ROWS, KEYS, strict=True)
                if not results.has([key])
            ]
            results.write(missing)
        assert path.read_bytes() == content, size


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (b'{"id": "a", "prompt": "not an output"}\n', 1),
        (b'{"id": "a", "prompt": "not an output"}', 1),
        (b"text without an end", 1),
        (b"\n", 1),
        (b'{"id": 1, "finish_reason": "eos"}\n{"id": 2, "fin\n{"id": 3}\n', 2),
        (b'{"id": [1], "finish_reason": "eos"}\n', 1),
        (b'{"id": 1, "finish_reason": "error"}\n', 1),
        (b"\xff\xfe\n", 1),
        (b"[1]", 1),
    ],
)
def test_what_is_not_ours_is_left_alone(content, line, tmp_path):
    path = tmp_path / "out.jsonl"
    path.write_bytes(content)
    assert refusal(path) == (
        f"cannot write rows: {path}: line {line} is no row of this command, expected "
        "a file of such rows, or none. Choose another --output."
    )
    assert path.read_bytes() == content


def test_a_full_disk_loses_no_whole_row(tmp_path, monkeypatch):
    path = tmp_path / "out.jsonl"
    write(path, ROWS[:1])
    before = path.read_bytes()
    real, calls = os.write, []

    def full(descriptor, data):
        calls.append(len(data))
        if len(calls) == 4:  # the lock's note, a row, half a row, no more
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(descriptor, data[:10] if len(calls) == 3 else data)

    monkeypatch.setattr(output.os, "write", full)
    with ResultFile(str(path), CONFIG) as results:
        with pytest.raises(UserError) as caught:
            results.write(ROWS[1:3])
    assert str(caught.value) == (
        f"cannot write rows: {path}: No space left on device, expected room for them. "
        "2 rows are safe: free some space and start again."
    )
    assert len(calls) == 4
    monkeypatch.undo()
    assert path.read_bytes().startswith(before)
    assert parsed(path) == ROWS[:2]
    write(path, ROWS[2:])
    assert parsed(path) == ROWS


def test_rows_are_on_the_disk_before_write_returns(tmp_path, monkeypatch):
    synced = []
    real = os.fsync
    monkeypatch.setattr(
        output.os, "fsync", lambda fd: (synced.append(os.fstat(fd).st_size), real(fd))
    )
    path = tmp_path / "out.jsonl"
    write(path, ROWS)
    assert synced[-1] == path.stat().st_size


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
def test_a_device_that_is_full():
    assert refusal("/dev/full") == (
        "cannot write rows: /dev/full: No space left on device, expected room for "
        "them. 0 rows are safe: free some space and start again."
    )
    assert not os.path.exists("/dev/full.lock")
    assert not os.path.exists("/dev/full.config.json")


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda p: None, "No such file or directory"),
        (lambda p: p.parent.write_text("x"), "Not a directory"),
        (lambda p: p.mkdir(parents=True), "Is a directory"),
    ],
)
def test_a_path_that_cannot_be_written(make, reason, tmp_path):
    path = tmp_path / "folder" / "out.jsonl"
    make(path)
    assert refusal(path) == (
        f"cannot write rows: {path}: {reason}, expected a file that can be written. "
        "Choose another --output."
    )


def test_other_flags_do_not_go_on(tmp_path):
    path = tmp_path / "out.jsonl"
    write(path, ROWS[:1])
    before = path.read_bytes()
    other = CONFIG | {"flags": {"seed": 1, "stop": []}}
    assert refusal(path, other) == (
        f"cannot resume: {path}: was made with --seed 0, expected 1 as given now. "
        "Give the same flags, or another --output."
    )
    assert path.read_bytes() == before
    path.unlink()
    write(path, ROWS[:1], other)
    beside = json.loads((tmp_path / "out.jsonl.config.json").read_text())
    assert beside["flags"]["seed"] == 1


def test_two_jobs_do_not_share_a_file(tmp_path):
    path = tmp_path / "out.jsonl"
    code = (
        "import sys\n"
        "from jaxllm.cli.output import ResultFile\n"
        f"with ResultFile({str(path)!r}, {CONFIG!r}):\n"
        "    print('open', flush=True)\n"
        "    sys.stdin.read()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as other:
        assert other.stdout.readline() == "open\n"
        written = json.loads((tmp_path / "out.jsonl.lock").read_text())["written"]
        assert refusal(path) == (
            f"cannot write rows: {path}: is in use by pid {other.pid} (lock written "
            f"{written}), expected one job at a time. Wait for it, or choose another "
            "--output."
        )
        other.kill()  # which leaves the lock's file behind
    assert (tmp_path / "out.jsonl.lock").exists()
    write(path, ROWS)
    assert parsed(path) == ROWS
    assert not (tmp_path / "out.jsonl.lock").exists()
