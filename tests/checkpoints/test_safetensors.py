import os
import pickle
import subprocess
import sys
import tracemalloc

import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy

from jaxllm.checkpoints import (
    PendingTensor,
    read_metadata,
    read_safetensors,
    write_safetensors,
)
from jaxllm.checkpoints.safetensors import DTYPES
from jaxllm.core.errors import CheckpointError
from tests.checkpoints.raw_files import encode_file, write

AGAIN = "Download or save the file again."


def entry(shape, begin, end, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def sample(dtype):
    values = np.arange(-6, 6).reshape(3, 4)
    if dtype == np.bool_:
        return values % 2 == 0
    return np.abs(values).astype(dtype) if dtype.kind == "u" else values.astype(dtype)


def assert_same(found, expected):
    assert found.dtype == expected.dtype
    assert found.shape == expected.shape
    assert found.tobytes() == expected.tobytes()


def test_every_dtype_round_trips(tmp_path):
    tensors = {name: sample(dtype) for name, dtype in DTYPES.items()}
    path = tmp_path / "all.safetensors"
    write_safetensors(path, tensors)
    found = read_safetensors(path)
    assert set(found) == set(DTYPES)
    for name, expected in tensors.items():
        tensor = found[name]
        assert (tensor.name, tensor.path) == (name, path)
        assert tensor.shape == (3, 4)
        assert tensor.dtype == expected.dtype
        assert tensor.nbytes == expected.nbytes
        assert tensor.read().flags.aligned
        assert_same(tensor.read(), expected)


@pytest.mark.parametrize("length", range(8))
def test_the_first_tensor_starts_at_a_multiple_of_eight(tmp_path, length):
    path = tmp_path / "x.safetensors"
    write_safetensors(path, {"x" * (length + 1): np.ones(3)})
    assert int.from_bytes(path.read_bytes()[:8], "little") % 8 == 0
    assert read_safetensors(path)["x" * (length + 1)].read().tolist() == [1, 1, 1]


def test_the_plain_library_reads_what_we_write(tmp_path):
    tensors = {n: sample(d) for n, d in DTYPES.items() if not n.startswith("F8")}
    tensors |= {"scalar": np.float32(2.5), "empty": np.zeros((0, 3), np.int8)}
    path = tmp_path / "plain.safetensors"
    write_safetensors(path, tensors, {"format": "pt", "note": "two  wörds"})
    with safetensors.safe_open(path, framework="numpy") as file:
        assert file.metadata() == {"format": "pt", "note": "two  wörds"}
        assert set(file.keys()) == set(tensors)
        for name, expected in tensors.items():
            assert_same(file.get_tensor(name), np.asarray(expected))
    assert read_metadata(path) == {"format": "pt", "note": "two  wörds"}


def test_we_read_what_the_plain_library_writes(tmp_path):
    tensors = {name: sample(dtype) for name, dtype in DTYPES.items()}
    path = tmp_path / "plain.safetensors"
    safetensors.numpy.save_file(tensors, path)
    found = read_safetensors(path)
    for name, expected in tensors.items():
        assert_same(found[name].read(), expected)
    assert read_metadata(path) == {}


def test_slices_are_views_of_the_file(tmp_path):
    values = np.arange(24, dtype=np.float32).reshape(4, 3, 2)
    path = tmp_path / "slices.safetensors"
    write_safetensors(path, {"x": values, "scalar": np.float32(3)})
    tensors = read_safetensors(path)
    for index in ((), slice(1, 3), 2, (slice(0, 2), 1), (..., 0), (3, 2, 1)):
        view = tensors["x"].read(index)
        assert isinstance(view, np.ndarray)
        assert_same(view, np.asarray(values[index]))
    for index in ((), slice(1, 3), 2):
        view = tensors["x"].read(index)
        assert view.flags.c_contiguous
        assert not view.flags.owndata
        assert not view.flags.writeable
    scalar = tensors["scalar"].read()
    assert isinstance(scalar, np.ndarray)
    assert_same(scalar, np.asarray(np.float32(3)))


def test_a_view_outlives_its_reader_and_a_release(tmp_path):
    values = np.arange(5000, dtype=np.float32)
    path = tmp_path / "views.safetensors"
    write_safetensors(path, {"x": values, "none": np.zeros((0,), np.float32)})
    tensors = read_safetensors(path)
    view = tensors["x"].read()
    tensors["x"].release()
    tensors["none"].release()
    del tensors
    path.unlink()
    np.testing.assert_array_equal(view, values)


def test_tensors_come_in_the_order_of_their_bytes(tmp_path):
    header = {"b": entry([1], 4, 8), "a": entry([1], 0, 4), "z": entry([0], 4, 4)}
    path = write(tmp_path, encode_file(header, bytes(8)))
    assert list(read_safetensors(path)) == ["a", "z", "b"]


def test_writing_takes_one_tensor_at_a_time(tmp_path):
    held = []

    def compute(value):
        def make():
            held.append(value)
            return np.full((2, 2), value, np.float32)

        return make

    pending = [(f"w{i}", (2, 2), np.float32, compute(i)) for i in range(3)]
    pending.append(
        PendingTensor("wide", (1,), np.int64, lambda: np.array([7], np.int64))
    )
    path = tmp_path / "pending.safetensors"
    write_safetensors(path, iter(pending))
    assert held == [0, 1, 2]
    found = read_safetensors(path)
    assert list(found) == ["wide", "w0", "w1", "w2"]  # wide first: all stay aligned
    assert found["w2"].read().tolist() == [[2.0, 2.0], [2.0, 2.0]]
    # Writing from a file reads it tensor by tensor as well.
    write_safetensors(tmp_path / "copy.safetensors", found)
    assert (tmp_path / "copy.safetensors").read_bytes() == path.read_bytes()


def test_a_strided_array_is_written_in_its_own_order(tmp_path):
    values = np.arange(6, dtype=np.float32).reshape(2, 3)
    path = tmp_path / "strided.safetensors"
    write_safetensors(path, {"t": values.T, "step": values[:, ::2]})
    found = read_safetensors(path)
    np.testing.assert_array_equal(found["t"].read(), values.T)
    np.testing.assert_array_equal(found["step"].read(), values[:, ::2])


GOOD = {"a": entry([2], 0, 8), "b": entry([1], 8, 12)}

MALFORMED = {
    "empty": (b"", "has 0 bytes, expected at least 8"),
    "short": (b"\x01\x02\x03", "has 3 bytes, expected at least 8"),
    "short header": (
        encode_file(b"{}", length=3),
        "has a header of 3 bytes, expected at most 2",
    ),
    "header of 2**64-1": (
        encode_file(b"{}", length=2**64 - 1),
        "has a header of 18446744073709551615 bytes, expected at most 2",
    ),
    "no header": (encode_file(b""), "has a header starting b'', expected b'{'"),
    "a list": (encode_file([1]), "has a header starting b'[1]', expected b'{'"),
    "bad JSON": (
        encode_file(b'{"a": }'),
        "has a header that is not JSON (Expecting value at character 6), expected an "
        "object",
    ),
    "not UTF-8": (
        encode_file(b'{"\xff": 1}'),
        "has a header that cannot be decoded, expected JSON in UTF-8",
    ),
    "deep nesting": (
        encode_file(b'{"a":' + b"[" * 100_000),
        "has a header that cannot be decoded, expected JSON in UTF-8",
    ),
    "a constant of JavaScript": (
        encode_file(b'{"__metadata__": {}, "a": NaN}'),
        "has a header that cannot be decoded, expected JSON in UTF-8",
    ),
    "endless number": (
        encode_file(b'{"a":' + b"9" * 10_000 + b"}"),
        "has a header that cannot be decoded, expected JSON in UTF-8",
    ),
    "duplicate tensor": (
        encode_file(b'{"a": 1, "a": 2}'),
        "has 'a' twice in its header, expected once",
    ),
    "duplicate field": (
        encode_file(b'{"a": {"dtype": "F32", "dtype": "F32"}}'),
        "has 'dtype' twice in its header, expected once",
    ),
    "bad metadata": (
        encode_file({"__metadata__": {"a": 1}}),
        "'__metadata__' is {'a': 1}, expected an object of strings",
    ),
    "no entry": (
        encode_file({"a": [1]}),
        "'a' is [1], expected an object with dtype, shape and data_offsets",
    ),
    "missing field": (
        encode_file({"a": {"dtype": "F32", "shape": [1]}}),
        "'a' is {'dtype': 'F32', 'shape': [1]}, expected an object with dtype, shape "
        "and data_offsets",
    ),
    "half a surrogate": (
        encode_file(rb'{"\ud800": 1}'),
        r"'\ud800' is not a valid name, expected Unicode text",
    ),
    "unknown dtype": (
        encode_file({"a": entry([2], 0, 1, "F4")}, bytes(1)),
        f"'a' has dtype 'F4', expected one of {', '.join(DTYPES)}",
    ),
    "dtype a list": (
        encode_file({"a": entry([2], 0, 8, ["F32"])}, bytes(8)),
        f"'a' has dtype ['F32'], expected one of {', '.join(DTYPES)}",
    ),
    "negative shape": (
        encode_file({"a": entry([-2], 0, 8)}, bytes(8)),
        "'a' has shape [-2], expected at most 64 whole numbers from 0 to 2**63 - 1",
    ),
    "shape of true": (
        encode_file({"a": entry([True], 0, 4)}, bytes(4)),
        "'a' has shape [True], expected at most 64 whole numbers from 0 to 2**63 - 1",
    ),
    "shape of a fraction": (
        encode_file({"a": entry([1.0], 0, 4)}, bytes(4)),
        "'a' has shape [1.0], expected at most 64 whole numbers from 0 to 2**63 - 1",
    ),
    "shape a number": (
        encode_file({"a": entry(2, 0, 8)}, bytes(8)),
        "'a' has shape 2, expected at most 64 whole numbers from 0 to 2**63 - 1",
    ),
    "65 axes": (
        encode_file({"a": entry([1] * 65, 0, 4)}, bytes(4)),
        f"'a' has shape {repr([1] * 65)[:77]}..., expected at most 64 whole numbers "
        "from 0 to 2**63 - 1",
    ),
    "overflow shape": (
        encode_file({"a": entry([2**62, 2**62], 0, 0)}),
        f"'a' has shape [{2**62}, {2**62}], expected less than 2**63",
    ),
    "overflow behind a zero": (
        encode_file({"a": entry([2**62, 2**62, 0], 0, 0)}),
        f"'a' has shape [{2**62}, {2**62}, 0], expected less than 2**63",
    ),
    "too large an axis": (
        encode_file({"a": entry([2**63, 0], 0, 0)}),
        f"'a' has shape [{2**63}, 0], expected at most 64 whole numbers from 0 to "
        "2**63 - 1",
    ),
    "falling offsets": (
        encode_file({"a": entry([2], 8, 0)}, bytes(8)),
        "'a' has data_offsets [8, 0], expected two rising positions",
    ),
    "three offsets": (
        encode_file({"a": entry([2], 0, 8) | {"data_offsets": [0, 4, 8]}}, bytes(8)),
        "'a' has data_offsets [0, 4, 8], expected two rising positions",
    ),
    "shape against bytes": (
        encode_file({"a": entry([3], 0, 8)}, bytes(8)),
        "'a' has 8 bytes, expected 12 for shape [3] of F32",
    ),
    "overlap": (
        encode_file({"a": entry([2], 0, 8), "b": entry([1], 4, 8)}, bytes(8)),
        "'b' starts at byte 4, expected 8 (overlaps the tensor before it)",
    ),
    "gap": (
        encode_file({"a": entry([1], 0, 4), "b": entry([1], 8, 12)}, bytes(12)),
        "'b' starts at byte 8, expected 4 (is a gap)",
    ),
    "gap at the start": (
        encode_file({"a": entry([1], 4, 8)}, bytes(8)),
        "'a' starts at byte 4, expected 0 (is a gap)",
    ),
    "truncated data": (
        encode_file(GOOD, bytes(11)),
        "is cut short: has 11 bytes of tensors, expected 12",
    ),
    "trailing bytes": (
        encode_file(GOOD, bytes(15)),
        "has 3 bytes after its last tensor, expected 0",
    ),
    "renamed pickle": (
        pickle.dumps({"w": list(range(99))}),
        "is a pickle under another name, expected safetensors (pickle files can run "
        "code)",
    ),
    "renamed torch archive": (
        b"PK\x03\x04" + bytes(99),
        "is a pickle under another name, expected safetensors (pickle files can run "
        "code)",
    ),
}


# Good by the format, but no numpy array: the reference package opens these.
NO_ARRAY = ("unknown dtype", "65 axes", "too large an axis")


@pytest.mark.parametrize("case", MALFORMED)
def test_a_malformed_file_is_named(tmp_path, case):
    content, fault = MALFORMED[case]
    path = write(tmp_path, content)
    with pytest.raises(CheckpointError) as caught:
        read_safetensors(path)
    assert str(caught.value) == f"cannot read weights: {path}: {fault}. {AGAIN}"
    if case not in NO_ARRAY:
        with pytest.raises(safetensors.SafetensorError):
            safetensors.deserialize(content)


def test_the_file_that_the_malformed_ones_are_made_from_is_good(tmp_path):
    path = write(tmp_path, encode_file(GOOD, bytes(12)))
    assert {n: t.shape for n, t in read_safetensors(path).items()} == {
        "a": (2,),
        "b": (1,),
    }


def test_a_header_over_the_limit_is_not_read(tmp_path):
    path = write(tmp_path, encode_file(b"{", length=100_000_001))
    os.truncate(path, 200_000_000)  # sparse: takes no room
    tracemalloc.start()
    with pytest.raises(CheckpointError) as caught:
        read_safetensors(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert str(caught.value) == (
        f"cannot read weights: {path}: has a header of 100000001 bytes, expected at "
        f"most 100000000. {AGAIN}"
    )
    assert peak < 1e6


def test_a_long_name_does_not_fill_the_message(tmp_path):
    path = write(tmp_path, encode_file({"n" * 10_000: 1}))
    with pytest.raises(CheckpointError) as caught:
        read_safetensors(path)
    assert len(str(caught.value)) < 300 + len(str(path))


def test_an_absent_file_and_a_directory_are_named(tmp_path):
    path = tmp_path / "absent.safetensors"
    with pytest.raises(CheckpointError) as caught:
        read_safetensors(path)
    assert str(caught.value) == (
        f"cannot read weights: {path}: No such file or directory, expected a "
        "safetensors file. Check the path."
    )
    with pytest.raises(CheckpointError, match="Is a directory"):
        read_metadata(tmp_path)


@pytest.mark.parametrize("dtype", [np.complex64, ml_dtypes.int4, ">f4"])
def test_a_dtype_outside_the_format_is_refused(tmp_path, dtype):
    path = tmp_path / "bad.safetensors"
    with pytest.raises(CheckpointError) as caught:
        write_safetensors(path, {"x": np.zeros(2, dtype)})
    assert str(caught.value) == (
        f"cannot write weights: {path}: 'x' has dtype {np.dtype(dtype)}, "
        f"expected one of {', '.join(DTYPES)}. Convert or pack it first."
    )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("names", [["x", "x"], ["__metadata__"]])
def test_a_name_given_twice_or_reserved_is_refused(tmp_path, names):
    path = tmp_path / "bad.safetensors"
    pending = [(name, (1,), np.int8, lambda: np.zeros(1, np.int8)) for name in names]
    with pytest.raises(CheckpointError) as caught:
        write_safetensors(path, pending)
    assert str(caught.value) == (
        f"cannot write weights: {path}: {names[0]!r} is given twice or reserved, "
        "expected a name of its own. Rename it."
    )


def test_a_failed_write_keeps_the_old_file(tmp_path):
    path = tmp_path / "model.safetensors"
    write_safetensors(path, {"x": np.zeros(3)})
    before = path.read_bytes()

    def full():
        raise OSError(28, "No space left on device")

    pending = [
        ("y", (1,), np.float64, lambda: np.zeros(1)),
        ("z", (1,), np.float32, full),
    ]
    with pytest.raises(CheckpointError) as caught:
        write_safetensors(path, pending)
    assert str(caught.value) == (
        f"cannot write weights: {path}: No space left on device, expected a writable "
        "directory with room for the file. Free some space or choose another directory."
    )
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]


def test_a_wrong_announcement_is_a_bug_not_a_file(tmp_path):
    pending = [("x", (2,), np.float32, lambda: np.zeros(3, np.float32))]
    with pytest.raises(AssertionError, match="x was announced as"):
        write_safetensors(tmp_path / "model.safetensors", pending)
    assert not list(tmp_path.iterdir())


STREAM = """
import re, sys
import numpy as np
from jaxllm.checkpoints import read_safetensors

def peak():  # ru_maxrss would begin with the memory of the parent process
    with open("/proc/self/status") as status:
        return int(re.search(r"VmHWM:\\s*(\\d+) kB", status.read())[1]) * 1024

tensors = read_safetensors(sys.argv[1])
before = peak()
total = 0.0
for tensor in tensors.values():
    total += float(np.add.reduce(tensor.read(), dtype=np.float64))
    if sys.argv[2] == "release":
        tensor.release()
print(peak() - before, total)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_streaming_a_file_holds_one_tensor_in_memory(tmp_path):
    path = tmp_path / "big.safetensors"
    size = 4_000_000  # 16 MB a tensor
    pending = [
        (f"w{i}", (size,), np.float32, lambda i=i: np.full(size, i, np.float32))
        for i in range(8)
    ]
    write_safetensors(path, pending)

    def growth(mode):
        child = subprocess.run(
            [sys.executable, "-c", STREAM, str(path), mode],
            capture_output=True,
            text=True,
            check=True,
        )
        grown, total = child.stdout.split()
        assert float(total) == size * sum(range(8))
        return int(grown)

    assert growth("release") < 1.5 * 4 * size
    assert growth("keep") > 6 * 4 * size  # so the measurement can fail
