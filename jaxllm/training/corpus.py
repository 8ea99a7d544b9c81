"""Corpora: one pass over a file of text or of records, whatever its size.

    text    .txt, .txt.gz: documents between lines that hold the separator and nothing
            else; without a separator the file is one document
    jsonl   .jsonl, .jsonl.gz: a JSON object a line

The digest of the file is taken in the same pass, so it is of what was read.
"""

import dataclasses
import gzip
import hashlib
import io
import json
import os
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

from jaxllm.checkpoints.files import first_line
from jaxllm.core.errors import ConfigError, UserError
from jaxllm.core.registry import unknown_name

__all__ = ["CorpusReader", "Progress", "Record", "corpus_format", "digest_of_file"]

Progress: TypeAlias = Callable[[str, int, int], None]
"""Is told the path, the bytes read so far, and the bytes of the file."""

_READ = "cannot read corpus"
_SUFFIXES = {".txt": "text", ".jsonl": "jsonl"}
_BLOCK = 1 << 20
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
# Tokenising takes some hundred bytes of memory for each of text.
_MAX_DOCUMENT_BYTES = 1 << 26


@dataclasses.dataclass(frozen=True)
class Record:
    """A document as the file has it.

    Attributes:
      line: Of the file, from 1, where it begins.
      content: Text, or the object of a line.
    """

    line: int
    content: str | dict[str, Any]


def corpus_format(path: Path, declared: str = "auto") -> str:
    """Returns `"text"` or `"jsonl"`.

    Args:
      path: The file; its name decides when nothing is declared.
      declared: `"text"`, `"jsonl"`, or `"auto"`.

    Raises:
      ConfigError: The name says nothing, or the format is unknown.
    """
    if declared != "auto":
        if declared not in _SUFFIXES.values():
            raise unknown_name("format", declared, ("auto", *_SUFFIXES.values()))
        return declared
    suffix = path.with_suffix("").suffix if path.suffix == ".gz" else path.suffix
    if suffix not in _SUFFIXES:
        raise ConfigError(
            f"{_READ}: {path}: its name ends in {suffix or 'no suffix'!r}, expected "
            f"{' or '.join(_SUFFIXES)}, with or without .gz. Rename it or set format."
        )
    return _SUFFIXES[suffix]


def digest_of_file(path: Path) -> str:
    """Returns the SHA-256 of a file's bytes, as hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class CorpusReader:
    """One pass over a corpus; afterwards it knows what it has read.

    Attributes:
      size: Bytes read, of the file itself.
      modified_ns: When the file was last changed, before it was read.
    """

    def __init__(
        self,
        path: Path,
        *,
        format: str,
        separator: str | None = None,
        progress: Progress | None = None,
    ):
        """Prepares a pass; nothing is opened yet.

        Args:
          path: The file.
          format: `"text"` or `"jsonl"`.
          separator: The line between documents of a text.
          progress: Called now and then, and at the end.
        """
        self._path, self._format, self._progress = path, format, progress
        self._separator = None if separator is None else separator.strip().encode()
        self._digest = hashlib.sha256()
        self.size = 0
        self.modified_ns = 0

    @property
    def sha256(self) -> str:
        """Of what was read so far, as hexadecimal digits."""
        return self._digest.hexdigest()

    def __iter__(self) -> Iterator[Record]:
        try:
            with open(self._path, "rb", buffering=0) as raw:
                status = os.fstat(raw.fileno())
                self.modified_ns = status.st_mtime_ns
                yield from self._records(raw, status.st_size)
        except (EOFError, gzip.BadGzipFile, zlib.error) as cause:
            raise UserError(
                f"{_READ}: {self._path}: {first_line(cause)}, expected a whole gzip "
                "file. Copy or download it again."
            ) from None
        except OSError as cause:
            raise UserError(
                f"{_READ}: {self._path}: {cause.strerror or first_line(cause)}, "
                "expected a readable file. Check the path."
            ) from None

    def _records(self, raw: io.RawIOBase, total: int) -> Iterator[Record]:
        counted = io.BufferedReader(_Counted(raw, self, total), _BLOCK)
        stream: BinaryIO = counted
        if self._path.suffix == ".gz":
            stream = gzip.GzipFile(fileobj=counted)  # type: ignore[assignment]
        if self._format == "jsonl":
            yield from self._objects(stream)
        else:
            yield from self._texts(stream)
        if self._progress is not None:
            self._progress(str(self._path), self.size, self.size)

    def _seen(self, block: memoryview, total: int) -> None:
        self._digest.update(block)
        self.size += len(block)
        if self._progress is not None:
            self._progress(str(self._path), self.size, max(total, self.size))

    def _lines(self, stream: BinaryIO) -> Iterator[tuple[int, bytes]]:
        number = 0
        while line := stream.readline(_MAX_DOCUMENT_BYTES + 1):
            number += 1
            if number == 1:
                line = line.removeprefix(_BYTE_ORDER_MARK)
            self._check_size(len(line), number)
            yield number, line

    def _texts(self, stream: BinaryIO) -> Iterator[Record]:
        lines: list[str] = []
        first, size = 1, 0
        for number, line in self._lines(stream):
            if self._separator is not None and line.strip() == self._separator:
                yield Record(first, _joined(lines))
                lines, first, size = [], number + 1, 0
                continue
            size += len(line)
            self._check_size(size, first)
            lines.append(self._decoded(line, number))
        # What follows the last separator is a document only if something stands there.
        if any(line.strip() for line in lines):
            yield Record(first, _joined(lines))

    def _objects(self, stream: BinaryIO) -> Iterator[Record]:
        for number, line in self._lines(stream):
            if not line.strip():
                continue
            text = self._decoded(line, number).rstrip()
            try:
                content = json.loads(text)
            except json.JSONDecodeError as cause:
                raise self._wrong(
                    number,
                    f"column {cause.colno}: {cause.msg}, expected a JSON object",
                ) from None
            except (ValueError, RecursionError):
                # Numbers of thousands of digits, or thousands of nested brackets.
                raise self._wrong(
                    number,
                    "is nested too deeply or has a number too long, expected "
                    "a JSON object",
                ) from None
            if not isinstance(content, dict):
                kind = type(content).__name__
                raise self._wrong(number, f"is a {kind}, expected a JSON object")
            yield Record(number, content)

    def _decoded(self, line: bytes, number: int) -> str:
        try:
            return line.decode("utf-8")
        except UnicodeDecodeError as cause:
            raise self._wrong(
                number, f"byte {cause.start + 1} is not UTF-8, expected text in UTF-8"
            ) from None

    def _check_size(self, size: int, line: int) -> None:
        if size > _MAX_DOCUMENT_BYTES:
            raise UserError(
                f"{_READ}: {self._path}: line {line}: a document of more than "
                f"{_MAX_DOCUMENT_BYTES} bytes begins here, expected less. Name the "
                "line between documents as separator, or split the file."
            )

    def _wrong(self, line: int, what: str) -> UserError:
        return UserError(f"{_READ}: {self._path}: line {line}: {what}. Correct it.")


class _Counted(io.RawIOBase):
    """A file that tells its reader of every block."""

    def __init__(self, raw: io.RawIOBase, reader: CorpusReader, total: int):
        self._raw, self._reader, self._total = raw, reader, total

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count = self._raw.readinto(buffer) or 0
        if count:
            self._reader._seen(memoryview(buffer)[:count], self._total)
        return count


def _joined(lines: list[str]) -> str:
    # The line ends at the borders belong to the separators.
    return "".join(lines).replace("\r\n", "\n").strip("\n")
