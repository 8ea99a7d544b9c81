"""One job at a time: a lock beside what is written."""

import contextlib
import datetime
import errno
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from jaxllm.core.errors import UserError

try:
    import fcntl
except ImportError:  # Not POSIX; two jobs on one file are not noticed there.
    fcntl = None  # type: ignore[assignment]

__all__ = ["locked"]


@contextlib.contextmanager
def locked(path: Path, what: str, option: str) -> Iterator[None]:
    """Holds `PATH.lock`; the system lets go of it for a process that has died.

    Args:
      path: What one job writes at a time.
      what: What fails when another job holds it: `cannot write rows`.
      option: Where a user chose it: `--output`.

    Raises:
      UserError: Another job holds it.
    """
    if fcntl is None:
        yield
        return
    target = path.with_name(f"{path.name}.lock")
    descriptor = _locked_file(target, path, what, option)
    try:
        os.ftruncate(descriptor, 0)
        written = datetime.datetime.now().strftime("%H:%M")
        note = {"pid": os.getpid(), "host": socket.gethostname(), "written": written}
        os.write(descriptor, json.dumps(note).encode())
        yield
    finally:
        with contextlib.suppress(OSError):
            target.unlink()
        os.close(descriptor)


def _locked_file(target: Path, path: Path, what: str, option: str) -> int:
    while True:
        descriptor = os.open(target, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The holder may have removed the file between our opening and locking it.
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.stat(target), os.fstat(descriptor)):
                    return descriptor
        except OSError as cause:
            held = os.pread(descriptor, 4096, 0)
            os.close(descriptor)
            if cause.errno not in (errno.EAGAIN, errno.EACCES):
                raise
            raise UserError(
                f"{what}: {path}: is in use by {_holder(held)}, expected one job "
                f"at a time. Wait for it, or choose another {option}."
            ) from None
        os.close(descriptor)


def _holder(held: bytes) -> str:
    try:
        note = json.loads(held)
        where = "" if note["host"] == socket.gethostname() else f" on {note['host']}"
        return f"pid {note['pid']}{where} (lock written {note['written']})"
    except (ValueError, KeyError, TypeError):
        return "another job"
