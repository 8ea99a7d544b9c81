"""Where results go: a JSONL file that survives a kill at any byte, or standard output.

Every row is one write of a whole line behind the rows before it, so whatever stops the
job leaves whole rows and at most one torn line at the end, which is dropped when the
job is started again.
"""

import contextlib
import hashlib
import json
import os
import stat
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from jaxllm.checkpoints.files import first_line, quote, read_json_object, replacing
from jaxllm.checkpoints.locks import locked
from jaxllm.core.errors import UserError

__all__ = [
    "ResultFile",
    "ResultStream",
    "Results",
    "describe_prompts",
    "key_of",
    "write_text",
]

_WRITE = "cannot write rows"
_BEGINNING = b'{"id": '

Key = tuple[str, str | int, int]


class Results(Protocol):
    """Takes the rows of a job."""

    def has(self, keys: Iterable[Key]) -> bool:
        """Returns whether one of these rows is there already."""

    def write(self, rows: list[dict[str, Any]]) -> None:
        """Writes rows for good."""


def key_of(row: Mapping[str, Any]) -> Key:
    """Returns what an output row is known by: its id, or its line if it failed."""
    sample = row.get("sample", 0)
    if row["finish_reason"] == "error":
        return ("line", row["line"], sample)
    return ("id", row["id"], sample)


class ResultStream:
    """Rows on standard output."""

    def has(self, keys: Iterable[Key]) -> bool:
        """Returns False: what was printed earlier is gone."""
        return False

    def write(self, rows: list[dict[str, Any]]) -> None:
        """Prints rows, one a line."""
        for row in rows:
            write_text(_line(row).decode())


def write_text(text: str) -> None:
    """Prints text at once.

    Raises:
      UserError: Standard output cannot be written, such as to a full disk.
      BrokenPipeError: Whoever read it has gone.
    """
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as cause:
        raise UserError(
            f"cannot write: standard output: {cause.strerror}, expected room for the "
            "text. Free some space, or give --output."
        ) from None


class ResultFile:
    """Rows in a file, behind those that an earlier run of the same job left there.

    Beside the file stand `FILE.config.json`, what the rows were made with, and while
    the job runs `FILE.lock`.
    """

    def __init__(self, path: str, config: Mapping[str, Any]):
        """Opens the file, locks it, and finds out which rows it has.

        Args:
          path: The file; what is no regular file, such as a pipe, is only written to.
          config: What the rows depend on: `flags`, and `prompts` as
            `describe_prompts` gives them. A file whose rows were made with something
            else is refused.

        Raises:
          UserError: The file cannot be written, is in use by another job, holds
            something else than rows, or rows made with other flags.
        """
        self.path = Path(path)
        self._keys: set[Key] = set()
        self._end = self._written = self.found = self.found_failed = 0
        with contextlib.ExitStack() as stack, self._explained():
            self._regular = not _is_special(self.path)
            if self._regular:
                stack.enter_context(locked(self.path, _WRITE, "--output"))
                self._check_config(config)
            access = os.O_RDWR | os.O_APPEND if self._regular else os.O_WRONLY
            self._descriptor = os.open(self.path, access | os.O_CREAT, 0o666)
            stack.callback(os.close, self._descriptor)
            if self._regular:
                self._read()
            self._closing = stack.pop_all()

    def __enter__(self) -> "ResultFile":
        """Returns the open file."""
        return self

    def __exit__(self, *error: object) -> None:
        """Closes the file and lets go of it."""
        self._closing.close()

    @property
    def keys(self) -> list[Key]:
        """What is there, as `has` knows it."""
        return sorted(self._keys, key=repr)

    def has(self, keys: Iterable[Key]) -> bool:
        """Returns whether one of these rows is there already."""
        return any(key in self._keys for key in keys)

    def write(self, rows: list[dict[str, Any]]) -> None:
        """Appends rows and waits until they are on the disk.

        Raises:
          UserError: The disk is full or the file unwritable; rows written before are
            safe.
        """
        try:
            for row in rows:
                self._append(_line(row))
                self._keys.add(key_of(row))
                self._written += 1
            if self._regular:
                os.fsync(self._descriptor)
        except BrokenPipeError:
            raise
        except OSError as cause:
            with contextlib.suppress(OSError):
                os.ftruncate(self._descriptor, self._end)
                os.fsync(self._descriptor)
            kept = self.found + self._written
            raise UserError(
                f"{_WRITE}: {self.path}: {_what(cause)}, expected room for them. "
                f"{kept} rows are safe: free some space and start again."
            ) from None

    def _append(self, line: bytes) -> None:
        rest = memoryview(line)
        while rest:
            rest = rest[os.write(self._descriptor, rest) :]
        self._end += len(line)

    def _read(self) -> None:
        """Collects the keys of whole rows and drops a torn last line."""
        with open(self.path, "rb") as file:
            for number, raw in enumerate(file, start=1):
                row = _row(raw)
                if row is None or not raw.endswith(b"\n"):
                    if file.read(1) or not _is_torn(raw):
                        raise UserError(
                            f"{_WRITE}: {self.path}: line {number} is no row of this "
                            "command, expected a file of such rows, or none. Choose "
                            "another --output."
                        )
                    os.ftruncate(self._descriptor, self._end)
                    return
                self._keys.add(key_of(row))
                self.found += 1
                self.found_failed += row["finish_reason"] == "error"
                self._end += len(raw)

    def _check_config(self, config: Mapping[str, Any]) -> None:
        target = self.path.with_name(f"{self.path.name}.config.json")
        begun = self.path.is_file() and self.path.stat().st_size > 0
        if begun and target.is_file():
            earlier = read_json_object(target, "cannot resume")
            _compare(self.path, earlier, config)
            if earlier.get("prompts") == config.get("prompts"):
                return
        with replacing(target, _WRITE) as file:
            file.write(json.dumps(config, indent=2).encode() + b"\n")

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except OSError as cause:
            raise UserError(
                f"{_WRITE}: {self.path}: {_what(cause)}, expected a file that "
                "can be written. Choose another --output."
            ) from None


def describe_prompts(path: str) -> dict[str, Any]:
    """Returns what tells a file of prompts from another: path, size and digest."""
    size = os.path.getsize(path)
    return {"path": path, "bytes": size, "sha256": _digest(path, size)}


def _digest(path: str, size: int) -> str:
    """Returns the digest of a file's first bytes."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while size > 0 and (block := file.read(min(size, 2**20))):
            digest.update(block)
            size -= len(block)
    return digest.hexdigest()


def _compare(path: Path, earlier: Mapping[str, Any], config: Mapping[str, Any]) -> None:
    """Refuses to go on with rows that were made with other flags or prompts."""
    flags = earlier.get("flags", {})
    for name, value in config["flags"].items():
        if name in flags and flags[name] != value:
            raise UserError(
                f"cannot resume: {path}: was made with --{name} {quote(flags[name])}, "
                f"expected {quote(value)} as given now. Give the same flags, or "
                "another --output."
            )
    old, new = earlier.get("prompts"), config.get("prompts")
    # Rows may have been added behind the old ones.
    if old and new and _digest(new["path"], old["bytes"]) != old["sha256"]:
        raise UserError(
            f"cannot resume: {path}: was made with other rows than {new['path']} "
            "begins with, expected the same. Choose another --output."
        )


def _what(cause: OSError) -> str:
    """Returns what the system says of an error, such as `No space left on device`."""
    return cause.strerror or first_line(cause)


def _line(row: Mapping[str, Any]) -> bytes:
    try:
        return json.dumps(row, ensure_ascii=False).encode() + b"\n"
    except UnicodeEncodeError:
        # Half a surrogate pair in an id, which only an escape can express.
        return json.dumps(row).encode() + b"\n"


def _row(raw: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(raw)
        hash(key_of(row))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    return row


def _is_torn(raw: bytes) -> bool:
    """Returns whether this may be the beginning of a row, and nobody's data."""
    if not raw.startswith(_BEGINNING[: len(raw)]):
        return False
    try:
        json.loads(raw)
    except (ValueError, RecursionError):
        return True
    return _row(raw) is not None


def _is_special(path: Path) -> bool:
    try:
        return not stat.S_ISREG(path.stat().st_mode)
    except FileNotFoundError:
        return False
