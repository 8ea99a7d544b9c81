"""Token files: a corpus tokenised once, read from disk as if it lay in memory.

    bytes 0-8191   a JSON object, padded with spaces: the `TokenHeader`
    tokens         uint16 or uint32, the documents one behind the other; zero bytes
                   up to a multiple of 8
    offsets        int64 [documents + 1], where each document begins; the last is the
                   number of tokens
    learn          uint8, 1 where a token is learned; absent where all of them are

Numbers are little-endian. A file appears under its name only when it is complete, and
is never changed afterwards: a process that has it open keeps what it opened, whatever
others build in the meantime.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np

from jaxllm.checkpoints import Tokenizer
from jaxllm.checkpoints.files import first_line, replacing
from jaxllm.core.errors import ConfigError, UserError
from jaxllm.training.corpus import (
    CorpusReader,
    Progress,
    Record,
    corpus_format,
    digest_of_file,
)
from jaxllm.training.instructions import encode_record, encode_text

__all__ = ["TokenFile", "TokenHeader", "open_token_file"]

FORMAT_VERSION = 1

_HEADER_BYTES = 8192
# Up to this size the bytes themselves are checked when a file is opened: it takes a
# tenth of a second. Beyond it sizes and times of change have to do.
_CHECKED_BYTES = 1 << 28
_ABANDONED_SECONDS = 3600
_COPY_BYTES = 1 << 20
# Vocabularies may be equal and the rules that cut text into them not.
_PROBE = "It's  1,234.5 km\n\n\tnaïve ﬁ (x_1 += 2); 日本 🙂 <s></s>  End. "


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenHeader:
    """What a token file says of itself.

    Attributes:
      format_version: Of this layout.
      source: Of the corpus: `path`, `bytes`, `modified_ns`, `sha256`.
      recipe: What else the tokens depend on: `format`, `separator`, `vocabulary` (the
        tokenizer's fingerprint), `rules`, `template`.
      dtype: `"uint16"` or `"uint32"`.
      documents: How many, at least one.
      tokens: Of all documents.
      learned: Tokens that are learned.
      longest: Tokens of the longest document.
      skipped: Empty texts that were left out.
      sha256: Of all bytes behind the header.
    """

    format_version: int
    source: Mapping[str, Any]
    recipe: Mapping[str, Any]
    dtype: str
    documents: int
    tokens: int
    learned: int
    longest: int
    skipped: int
    sha256: str

    @property
    def offsets_start(self) -> int:
        """The byte at which the offsets begin."""
        size = self.tokens * np.dtype(self.dtype).itemsize
        return _HEADER_BYTES + -(-size // 8) * 8

    @property
    def learn_start(self) -> int:
        """The byte at which the learn mask begins, or the file ends."""
        return self.offsets_start + 8 * (self.documents + 1)

    @property
    def file_bytes(self) -> int:
        """The size of the whole file."""
        return self.learn_start + (self.tokens if self.learned < self.tokens else 0)


class TokenFile:
    """The documents of a token file, read from disk when they are asked for.

    Attributes:
      path: The token file.
      header: What it says of itself.
      was_built: Whether opening it meant building it.
      offsets: int64 `[documents + 1]`.
    """

    def __init__(self, path: Path, header: TokenHeader, was_built: bool = False):
        """Maps a file whose header was read and found right."""
        self.path, self.header, self.was_built = path, header, was_built
        dtype = np.dtype(header.dtype).newbyteorder("<")
        self._tokens = np.memmap(path, dtype, "r", _HEADER_BYTES, (header.tokens,))
        count = (header.documents + 1,)
        self.offsets = np.memmap(path, "<i8", "r", header.offsets_start, count)
        self._learn = None
        if header.learned < header.tokens:
            start = header.learn_start
            self._learn = np.memmap(path, np.uint8, "r", start, (header.tokens,))

    def __len__(self) -> int:
        return self.header.documents

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns int32 token ids and, as long, uint8 1 where a token is learned."""
        start, stop = int(self.offsets[index]), int(self.offsets[index + 1])
        tokens = self._tokens[start:stop].astype(np.int32)
        if self._learn is None:
            return tokens, np.ones(stop - start, np.uint8)
        return tokens, np.array(self._learn[start:stop])

    @property
    def lengths(self) -> np.ndarray:
        """int64 `[documents]`, the tokens of each."""
        return np.diff(self.offsets)


def open_token_file(
    path: str | os.PathLike[str],
    tokenizer: Tokenizer,
    cache_dir: str | os.PathLike[str],
    *,
    format: str = "auto",
    separator: str | None = None,
    progress: Progress | None = None,
) -> TokenFile:
    """Opens the tokens of a corpus; tokenises it first where that was not done yet.

    A token file is used again while corpus and tokenizer are what they were, and is
    built again when one of them changed or the file is damaged. Several processes may
    do so at once: each builds its own, and the last one stays.

    Args:
      path: The corpus, see `corpus`.
      tokenizer: Of the model.
      cache_dir: Where token files are kept; made if it is absent.
      format: `"text"`, `"jsonl"`, or `"auto"` by the name.
      separator: The line between documents of a text; None for a single document.
      progress: Told of the bytes read while the file is built.

    Returns:
      The documents.

    Raises:
      ConfigError: There is no such corpus, or its format is unknown.
      UserError: The corpus holds no text or something that cannot be read, or the
        directory cannot be written.
      CheckpointError: The corpus has conversations and the tokenizer no chat template.
    """
    source = Path(path).expanduser().absolute()
    if not source.is_file():
        found = "is a directory" if source.is_dir() else "there is no such file"
        raise ConfigError(
            f"cannot open corpus: {path}: {found}, expected a file (looked for "
            f"{source}). Check the path."
        )
    recipe = _recipe(tokenizer, corpus_format(source, format), separator)
    key = json.dumps([FORMAT_VERSION, str(source), recipe], sort_keys=True)
    digest = hashlib.sha256(key.encode()).hexdigest()[:16]
    target = Path(cache_dir).absolute() / f"{source.name[:64]}-{digest}.tokens"
    header = _reusable(target, source, recipe)
    if header is not None:
        return TokenFile(target, header)
    header = _build(source, target, recipe, tokenizer, progress)
    return TokenFile(target, header, was_built=True)


def _recipe(tokenizer: Tokenizer, format: str, separator: str | None) -> dict[str, Any]:
    rules = [tokenizer.encode(_PROBE), tokenizer.bos_id, tokenizer.eos_id]
    template = [tokenizer.chat_template, sorted(tokenizer.special_tokens.items())]
    return {
        "format": format,
        "separator": separator if format == "text" else None,
        "vocabulary": tokenizer.fingerprint(),
        "rules": _digest_of(rules),
        "template": _digest_of(template) if format == "jsonl" else None,
    }


def _digest_of(content: Any) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


# --- Reading ---------------------------------------------------------------------


def _reusable(
    target: Path, source: Path, recipe: Mapping[str, Any]
) -> TokenHeader | None:
    """Returns the header of a token file if it is whole and still holds the corpus."""
    try:
        with open(target, "rb") as file:
            fields = json.loads(file.read(_HEADER_BYTES))
            header = TokenHeader(**fields)
            size = os.fstat(file.fileno()).st_size
            is_whole = (
                header.format_version == FORMAT_VERSION
                and header.recipe == recipe
                and size == header.file_bytes
            )
            if not is_whole or not _is_source_unchanged(header.source, source):
                return None
            if size <= _CHECKED_BYTES:
                file.seek(_HEADER_BYTES)
                found = hashlib.file_digest(file, "sha256").hexdigest()
                return header if found == header.sha256 else None
        offsets = TokenFile(target, header).offsets
        ends_right = offsets[0] == 0 and offsets[-1] == header.tokens
        return header if ends_right else None
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        # Whatever a damaged header makes of itself, the corpus is there to begin anew.
        return None


def _is_source_unchanged(known: Mapping[str, Any], source: Path) -> bool:
    status = source.stat()
    if status.st_size != known["bytes"]:
        return False
    if status.st_size > _CHECKED_BYTES and status.st_mtime_ns == known["modified_ns"]:
        return True
    return digest_of_file(source) == known["sha256"]


# --- Building --------------------------------------------------------------------


def _build(
    source: Path,
    target: Path,
    recipe: Mapping[str, Any],
    tokenizer: Tokenizer,
    progress: Progress | None,
) -> TokenHeader:
    reader = CorpusReader(
        source,
        format=recipe["format"],
        separator=recipe["separator"],
        progress=progress,
    )
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(target)
        with (
            replacing(target, "cannot write token file") as file,
            _Writer(file, target.parent, tokenizer) as out,
        ):
            for record in reader:
                out.add(*_encode(record, tokenizer, source))
            if not out.documents:
                raise UserError(
                    f"cannot read corpus: {source}: holds no text, expected one "
                    "document at least. Check the file."
                )
            header = TokenHeader(
                format_version=FORMAT_VERSION,
                source={
                    "path": str(source),
                    "bytes": reader.size,
                    "modified_ns": reader.modified_ns,
                    "sha256": reader.sha256,
                },
                recipe=recipe,
                **out.finish(),
            )
            text = json.dumps(dataclasses.asdict(header)).encode()
            file.seek(0)
            file.write(text.ljust(_HEADER_BYTES - 1) + b"\n")
    except OSError as cause:
        raise UserError(
            f"cannot write token file: {target}: {cause.strerror or first_line(cause)},"
            " expected a writable directory with room for it. Free some space or "
            "choose another directory."
        ) from cause
    return header


def _encode(
    record: Record, tokenizer: Tokenizer, source: Path
) -> tuple[list[int], list[int]]:
    where = f"{source}: line {record.line}"
    try:
        if isinstance(record.content, str):
            return encode_text(record.content, tokenizer)
        return encode_record(record.content, tokenizer, where)
    except UserError as cause:
        if where in str(cause):
            raise
        # It knows of no file, but the line is what has to be mended.
        raise type(cause)(f"cannot read corpus: {where}: {cause}") from None


class _Writer:
    """Writes documents behind the header as they come, and counts them."""

    def __init__(self, file: IO[bytes], directory: Path, tokenizer: Tokenizer):
        # A tokenizer's frame may have ids of its own.
        largest = max([tokenizer.vocab_size - 1, *tokenizer.encode("")])
        self._dtype = np.dtype(np.uint16 if largest < 1 << 16 else np.uint32)
        self._file, self._digest = file, hashlib.sha256()
        # Both have to follow the tokens, and may be too long for memory.
        self._offsets = tempfile.TemporaryFile(dir=directory)
        self._learn = tempfile.TemporaryFile(dir=directory)
        self.documents = self._tokens = self._learned = 0
        self._longest = self._skipped = 0
        file.write(b" " * _HEADER_BYTES)

    def __enter__(self) -> "_Writer":
        return self

    def __exit__(self, *_: object) -> None:
        self._offsets.close()
        self._learn.close()

    def add(self, tokens: list[int], learn: list[int]) -> None:
        if not tokens:
            self._skipped += 1
            return
        self._append(np.asarray(tokens, self._dtype.newbyteorder("<")).tobytes())
        self._learn.write(bytes(learn))
        self._offsets.write(self._tokens.to_bytes(8, "little"))
        self.documents += 1
        self._tokens += len(tokens)
        self._learned += sum(learn)
        self._longest = max(self._longest, len(tokens))

    def finish(self) -> dict[str, Any]:
        """Writes the rest and returns what the header says of the content."""
        self._append(b"\0" * (-self._tokens * self._dtype.itemsize % 8))
        self._offsets.write(self._tokens.to_bytes(8, "little"))
        followers = [self._offsets]
        if self._learned < self._tokens:
            followers.append(self._learn)
        for follower in followers:
            follower.seek(0)
            while block := follower.read(_COPY_BYTES):
                self._append(block)
        return {
            "dtype": self._dtype.name,
            "documents": self.documents,
            "tokens": self._tokens,
            "learned": self._learned,
            "longest": self._longest,
            "skipped": self._skipped,
            "sha256": self._digest.hexdigest(),
        }

    def _append(self, data: bytes) -> None:
        self._digest.update(data)
        self._file.write(data)


def _remove_abandoned(target: Path) -> None:
    """Removes what killed processes left; one that lives writes all the time."""
    for path in target.parent.glob(".*.tmp"):
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime > _ABANDONED_SECONDS:
                path.unlink()
