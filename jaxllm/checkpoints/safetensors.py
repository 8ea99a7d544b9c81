"""The safetensors file format: read tensor by tensor, written in one stream.

A file is eight bytes (the length of the header, little-endian), a JSON header that
gives every tensor a dtype, a shape and its bytes, then the bytes themselves without
gaps. Our own reader exists because the reference package cannot hand 8-bit floats to
numpy, because loading must not keep a second copy of the weights, and because every
malformed file has to end in a sentence instead of a stack trace.

Source: https://huggingface.co/docs/safetensors, section "Format".
"""

import functools
import json
import math
import mmap
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from jaxllm.checkpoints.files import quote, replacing
from jaxllm.core.errors import CheckpointError

__all__ = [
    "DTYPES",
    "LazyTensor",
    "PendingTensor",
    "as_pending",
    "read_metadata",
    "read_safetensors",
    "write_safetensors",
]

#: The dtype names of the format that are read and written.
DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I64": np.dtype(np.int64),
    "U64": np.dtype(np.uint64),
    "I32": np.dtype(np.int32),
    "U32": np.dtype(np.uint32),
    "I16": np.dtype(np.int16),
    "U16": np.dtype(np.uint16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_PREFIX = 8
_METADATA = "__metadata__"
# The format's own limit; a header is parsed in memory, so a limit there must be.
_HEADER_LIMIT = 100_000_000
_MAX_AXES = 64  # what numpy can hold
_READ = "cannot read weights"
_WRITE = "cannot write weights"
_AGAIN = "Download or save the file again."


@dataclass(frozen=True, eq=False)
class LazyTensor:
    """One tensor of a file: known by its header, read only when asked for.

    Attributes:
        name: the tensor's name in the file.
        shape: its shape; `()` for a scalar.
        dtype: the stored dtype; bfloat16 and 8-bit floats are those of `ml_dtypes`.
        path: the file that holds it.
    """

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    path: Path
    _bytes: mmap.mmap = field(repr=False)
    _offset: int = field(repr=False)

    @property
    def nbytes(self) -> int:
        """The number of bytes on disk."""
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self, index: Any = ()) -> np.ndarray:
        """Returns the values, as a read-only view of the mapped file.

        Nothing is copied: a page is read from the disk when it is first looked at. The
        view keeps the file mapped for as long as it lives.

        Args:
            index: a basic index, such as `(slice(0, 4), 2)`; leading-axis slices of a
                tensor are one contiguous piece of the file. `()` is the whole tensor.

        Returns:
            An array of the stored dtype, `shape[index]`. It may be unaligned.
        """
        if self.nbytes == 0:
            array = np.zeros(self.shape, self.dtype)
        else:
            count = math.prod(self.shape)
            flat = np.frombuffer(self._bytes, self.dtype, count, self._offset)
            array = flat.reshape(self.shape)
        # array[()] would turn a zero-dimensional array into a numpy scalar.
        return array if index == () else np.asarray(array[index])

    def release(self) -> None:
        """Gives the memory of the pages read so far back to the system.

        Call it after each tensor while streaming a file, or the process grows by the
        size of the file. Views stay valid: what is looked at again is read again.
        """
        if self.nbytes == 0 or not hasattr(mmap, "MADV_DONTNEED"):
            return
        # Whole pages only. Dropping a neighbour's bytes too is harmless.
        start = self._offset - self._offset % mmap.PAGESIZE
        length = self._offset + self.nbytes - start
        self._bytes.madvise(mmap.MADV_DONTNEED, start, length)


class PendingTensor(NamedTuple):
    """A tensor to be written, computed when its turn comes.

    Attributes:
        name: the name in the file.
        shape: the shape that `compute` will return.
        dtype: the dtype that `compute` will return.
        compute: a function without arguments that returns the array.
    """

    name: str
    shape: tuple[int, ...]
    dtype: Any
    compute: Callable[[], Any]

    @property
    def nbytes(self) -> int:
        """The number of bytes that it takes in the file."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


class _Repeated(Exception):
    """A key is twice in one JSON object of a header."""


class _Malformed(Exception):
    """What is wrong with a header: `<object>: <found>, expected <wanted>`."""


def read_safetensors(path: str | os.PathLike[str]) -> dict[str, LazyTensor]:
    """Opens a safetensors file and checks its whole header; reads no tensor.

    Args:
        path: the file.

    Returns:
        The tensors by name, in the order of their bytes.

    Raises:
        CheckpointError: the file cannot be opened or is not a well-formed safetensors
            file; the message names the file, and the tensor where there is one.

    Source: https://huggingface.co/docs/safetensors, section "Format".
    """
    path = Path(path)
    return _open(path)[0]


def read_metadata(path: str | os.PathLike[str]) -> dict[str, str]:
    """Returns the strings that a safetensors file carries beside its tensors.

    Args:
        path: the file.

    Returns:
        The `__metadata__` object of the header; empty where there is none.

    Raises:
        CheckpointError: as `read_safetensors`.
    """
    return _open(Path(path))[1]


def _open(path: Path) -> tuple[dict[str, LazyTensor], dict[str, str]]:
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            header = _read_header(file, size)
            start = _PREFIX + len(header)
            entries, metadata = _parse(header, size - start)
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except _Malformed as cause:
        raise CheckpointError(f"{_READ}: {path}: {cause}. {_AGAIN}") from None
    except OSError as cause:
        raise CheckpointError(
            f"{_READ}: {path}: {cause.strerror}, expected a safetensors file. "
            "Check the path."
        ) from None
    return {
        name: LazyTensor(name, shape, dtype, path, mapped, start + begin)
        for name, (dtype, shape, begin, _) in entries.items()
    }, metadata


def _read_header(file: Any, size: int) -> bytes:
    if size < _PREFIX:
        raise _Malformed(f"has {size} bytes, expected at least {_PREFIX}")
    prefix = file.read(_PREFIX)
    length = int.from_bytes(prefix, "little")
    # Nothing is read before its length is known to be there.
    limit = min(_HEADER_LIMIT, size - _PREFIX)
    if length > limit:
        if prefix[:2] in (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"):
            raise _Malformed(
                "is a pickle under another name, expected safetensors (pickle files "
                "can run code)"
            )
        raise _Malformed(f"has a header of {length} bytes, expected at most {limit}")
    header = file.read(length)
    if len(header) != length:
        raise _Malformed(f"ends after {len(header)} bytes, expected {length}")
    return header


_Entry = tuple[np.dtype, tuple[int, ...], int, int]


def _parse(header: bytes, data_bytes: int) -> tuple[dict[str, _Entry], dict[str, str]]:
    """Checks a header; entries are (dtype, shape, begin, end), ordered by bytes."""
    if not header.startswith(b"{"):
        raise _Malformed(f"has a header starting {header[:8]!r}, expected b'{{'")
    try:
        table = json.loads(
            header.decode("utf-8"),
            object_pairs_hook=_unique,
            parse_constant=_refuse_constant,
        )
    except _Repeated as cause:
        raise _Malformed(f"has {cause} twice in its header, expected once") from None
    except json.JSONDecodeError as cause:
        raise _Malformed(
            f"has a header that is not JSON ({cause.msg} at character {cause.pos}), "
            "expected an object"
        ) from None
    except (ValueError, RecursionError):
        # Not UTF-8, NaN, numbers of thousands of digits, thousands of brackets.
        raise _Malformed(
            "has a header that cannot be decoded, expected JSON in UTF-8"
        ) from None
    metadata = _check_metadata(table.pop(_METADATA, {}))
    entries = {name: _check_entry(name, entry) for name, entry in table.items()}
    ordered = sorted(entries.items(), key=lambda item: item[1][2:])
    _check_layout(ordered, data_bytes)
    return dict(ordered), metadata


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                raise _Repeated(quote(name))
            seen.add(name)
    return table


def _refuse_constant(name: str) -> None:
    # Python reads NaN and Infinity, which are not JSON.
    raise ValueError(name)


def _check_metadata(metadata: Any) -> dict[str, str]:
    if not isinstance(metadata, dict) or not all(
        isinstance(value, str) for value in metadata.values()
    ):
        raise _Malformed(
            f"'{_METADATA}' is {quote(metadata)}, expected an object of strings"
        )
    return metadata


def _check_entry(name: str, entry: Any) -> _Entry:
    key = quote(name)
    if any("\ud800" <= character <= "\udfff" for character in name):
        raise _Malformed(f"{key} is not a valid name, expected Unicode text")
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= set(
        entry
    ):
        raise _Malformed(
            f"{key} is {quote(entry)}, expected an object with dtype, shape and "
            "data_offsets"
        )
    dtype = DTYPES.get(entry["dtype"]) if isinstance(entry["dtype"], str) else None
    if dtype is None:
        raise _Malformed(
            f"{key} has dtype {quote(entry['dtype'])}, expected one of "
            f"{', '.join(DTYPES)}"
        )
    shape = entry["shape"]
    if not _is_sizes(shape) or len(shape) > _MAX_AXES:
        raise _Malformed(
            f"{key} has shape {quote(shape)}, expected at most {_MAX_AXES} whole "
            "numbers from 0 to 2**63 - 1"
        )
    offsets = entry["data_offsets"]
    if not _is_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise _Malformed(
            f"{key} has data_offsets {quote(offsets)}, expected two rising positions"
        )
    # A zero elsewhere must not hide axes that no array can have.
    if math.prod(size for size in shape if size) * dtype.itemsize >= 2**63:
        raise _Malformed(f"{key} has shape {quote(shape)}, expected less than 2**63")
    wanted = math.prod(shape) * dtype.itemsize
    begin, end = offsets
    if end - begin != wanted:
        raise _Malformed(
            f"{key} has {end - begin} bytes, expected {wanted} for shape "
            f"{quote(shape)} of {entry['dtype']}"
        )
    return dtype, tuple(shape), begin, end


def _is_sizes(value: Any) -> bool:
    # type() and not isinstance(): true and false are integers in Python.
    return isinstance(value, list) and all(
        type(item) is int and 0 <= item < 2**63 for item in value
    )


def _check_layout(ordered: list[tuple[str, _Entry]], data_bytes: int) -> None:
    position = 0
    for name, (_, _, begin, end) in ordered:
        if begin != position:
            fault = "overlaps the tensor before it" if begin < position else "is a gap"
            raise _Malformed(
                f"{quote(name)} starts at byte {begin}, expected {position} ({fault})"
            )
        position = end
    if position > data_bytes:
        raise _Malformed(
            f"is cut short: has {data_bytes} bytes of tensors, expected {position}"
        )
    if position < data_bytes:
        raise _Malformed(
            f"has {data_bytes - position} bytes after its last tensor, expected 0"
        )


def as_pending(
    tensors: Mapping[str, Any] | Iterable[PendingTensor],
) -> list[PendingTensor]:
    """Brings what is to be written into one form.

    Args:
        tensors: arrays (numpy, JAX or `LazyTensor`) by name, or tuples
            (name, shape, dtype, function that returns the array).

    Returns:
        One `PendingTensor` each; nothing is computed.
    """
    if not isinstance(tensors, Mapping):
        return [PendingTensor(*tensor) for tensor in tensors]
    return [
        PendingTensor(
            name,
            tuple(array.shape),
            array.dtype,
            array.read
            if isinstance(array, LazyTensor)
            else functools.partial(np.asarray, array),
        )
        for name, array in tensors.items()
    ]


def write_safetensors(
    path: str | os.PathLike[str],
    tensors: Mapping[str, Any] | Iterable[PendingTensor],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes a safetensors file, holding one tensor in memory at a time.

    The file appears under its name only when it is complete; an existing one is
    replaced. Wider dtypes come first, which keeps every tensor aligned.

    Args:
        path: the file to write.
        tensors: arrays (numpy, JAX or `LazyTensor`) by name, or tuples
            (name, shape, dtype, function that returns the array), which are computed
            one after another.
        metadata: strings to carry beside the tensors.

    Raises:
        CheckpointError: a dtype that the format does not have, a name given twice, a
            full disk or a directory that cannot be written.

    Source: https://huggingface.co/docs/safetensors, section "Format".
    """
    pending = as_pending(tensors)
    _check_writable(path, pending)
    pending.sort(key=lambda tensor: -np.dtype(tensor.dtype).itemsize)
    table: dict[str, Any] = {_METADATA: dict(metadata)} if metadata else {}
    position = 0
    for tensor in pending:
        table[tensor.name] = {
            "dtype": _NAMES[np.dtype(tensor.dtype)],
            "shape": list(tensor.shape),
            "data_offsets": [position, position + tensor.nbytes],
        }
        position += tensor.nbytes
    header = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    # Spaces at the end of the header let the first tensor start at a multiple of 8.
    header += b" " * (-len(header) % _PREFIX)
    with replacing(path, _WRITE) as file:
        file.write(len(header).to_bytes(_PREFIX, "little"))
        file.write(header)
        for tensor in pending:
            file.write(_contents(tensor))


def _check_writable(path: str | os.PathLike[str], pending: list[PendingTensor]) -> None:
    seen = {_METADATA}
    for tensor in pending:
        if tensor.name in seen:
            raise CheckpointError(
                f"{_WRITE}: {path}: {quote(tensor.name)} is given twice or reserved, "
                "expected a name of its own. Rename it."
            )
        seen.add(tensor.name)
        if np.dtype(tensor.dtype) not in _NAMES:
            raise CheckpointError(
                f"{_WRITE}: {path}: {quote(tensor.name)} has dtype "
                f"{np.dtype(tensor.dtype)}, expected one of {', '.join(DTYPES)}. "
                "Convert or pack it first."
            )


def _contents(tensor: PendingTensor) -> memoryview:
    array = np.asarray(tensor.compute())
    if array.shape != tuple(tensor.shape) or array.dtype != np.dtype(tensor.dtype):
        raise AssertionError(
            f"{tensor.name} was announced as {tensor.dtype} {tensor.shape} and "
            f"computed as {array.dtype} {array.shape}"
        )
    # Bytes, because the buffer protocol has no name for bfloat16.
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
