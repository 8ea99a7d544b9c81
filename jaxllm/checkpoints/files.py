"""Reading JSON and replacing files, with errors that a user can act on."""

import contextlib
import json
import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from jaxllm.core.errors import CheckpointError, ConfigError, UserError

__all__ = ["first_line", "quote", "read_json_object", "replacing"]

_QUOTE_LIMIT = 80


def quote(value: object) -> str:
    """Returns `repr(value)`, cut to a length that fits an error message.

    Args:
        value: anything; what a hostile file holds may be megabytes long.

    Returns:
        At most about 80 characters.
    """
    text = repr(value)
    return text if len(text) <= _QUOTE_LIMIT else f"{text[: _QUOTE_LIMIT - 3]}..."


def first_line(error: BaseException) -> str:
    """Returns the first line of an error's text, cut to fit a message.

    Args:
        error: an error of another library.

    Returns:
        At most 200 characters, without a full stop at the end.
    """
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:200].rstrip(" .:")


def read_json_object(
    path: str | os.PathLike[str],
    what: str,
    error: type[UserError] = ConfigError,
) -> dict[str, Any]:
    """Reads a JSON file that holds one object.

    Args:
        path: the file.
        what: what fails when the file cannot be read: `cannot read config`.
        error: the class to raise.

    Returns:
        The object as a plain dict.

    Raises:
        UserError: of class `error`; the file is absent or unreadable, is not JSON in
            UTF-8, or holds something else than an object.
    """
    try:
        text = Path(path).read_bytes().decode("utf-8")
    except OSError as cause:
        raise error(
            f"{what}: {path}: {cause.strerror}, expected a JSON file. Check the path."
        ) from None
    except UnicodeDecodeError as cause:
        raise error(
            f"{what}: {path}: byte {cause.start} is not UTF-8, expected a JSON file. "
            "Download or save it again."
        ) from None
    try:
        content = json.loads(text)
    except json.JSONDecodeError as cause:
        raise error(
            f"{what}: {path}: line {cause.lineno}, column {cause.colno}: {cause.msg}, "
            "expected valid JSON. Correct the file or download it again."
        ) from None
    except (ValueError, RecursionError):
        # Numbers of thousands of digits, or thousands of nested brackets.
        raise error(
            f"{what}: {path}: is too deeply nested or has a number that is too long, "
            "expected valid JSON. Correct the file or download it again."
        ) from None
    if not isinstance(content, dict):
        raise error(
            f"{what}: {path}: holds a {type(content).__name__} at top level, expected "
            "an object {...}. Correct the file or download it again."
        )
    return content


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str], what: str) -> Iterator[IO[bytes]]:
    """Opens a file that appears under its name only when it is complete.

    The bytes go to a temporary sibling, are flushed to the disk, and the sibling is
    renamed: a reader never sees half a file, and a failure leaves the old one.

    Args:
        path: the file to write; an existing one is replaced.
        what: what fails when it cannot be written: `cannot write weights`.

    Yields:
        The open binary file.

    Raises:
        CheckpointError: the disk is full, or the directory is absent or not writable.
    """
    target = Path(path)
    # Processes on several machines that share a directory may have the same id.
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
        _sync_directory(target.parent)
    except OSError as cause:
        raise CheckpointError(
            f"{what}: {target}: {cause.strerror}, expected a writable directory with "
            "room for the file. Free some space or choose another directory."
        ) from cause
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def _sync_directory(directory: Path) -> None:
    # Without it a power cut can lose the rename although the data is on the disk.
    if os.name != "posix":
        return
    with contextlib.suppress(OSError):
        # Some file systems do not sync directories, and the name is there already.
        descriptor = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
