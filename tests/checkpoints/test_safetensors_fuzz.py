"""Random and damaged files: refused with a sentence, or read as the reference does."""

import json
import re
import tempfile
import tracemalloc
from pathlib import Path

import hypothesis
import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy
from hypothesis import strategies as st

from jaxllm.checkpoints import read_safetensors
from jaxllm.checkpoints.safetensors import DTYPES
from jaxllm.core.errors import CheckpointError
from tests.checkpoints.raw_files import encode_file, write


def valid_file():
    buffer = {
        "wte": np.arange(12, dtype=np.float32).reshape(3, 4),
        "layers.0.w": np.arange(6, dtype=ml_dtypes.bfloat16).reshape(2, 3),
        "layers.0.b": np.arange(5, dtype=np.int8),
        "none": np.zeros((0, 7), np.uint16),
    }
    return safetensors.numpy.save(buffer, {"format": "pt"})


VALID = valid_file()
LENGTH = int.from_bytes(VALID[:8], "little")
HEADER = json.loads(VALID[8 : 8 + LENGTH])

scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.integers(0, 64),
    st.floats(),
    st.text(max_size=5),
    st.sampled_from([*DTYPES, "F4", "F6_E2M3", "C64"]),
)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner),
    max_leaves=6,
)


@st.composite
def edited_headers(draw):
    header = json.loads(json.dumps(HEADER))
    for _ in range(draw(st.integers(1, 2))):
        name = draw(st.sampled_from(sorted(HEADER)))
        field = draw(st.sampled_from(["dtype", "shape", "data_offsets", "", "extra"]))
        kind = draw(st.sampled_from(["drop", "replace", "swap"]))
        if kind == "drop" and not field:
            header.pop(name, None)
        elif kind == "replace" and not field:
            header[name] = draw(values)
        elif kind == "swap":
            other = draw(st.sampled_from(sorted(HEADER)))
            header[name], header[other] = header.get(other), header.get(name)
        elif isinstance(header.get(name), dict) and field:
            header[name][field] = draw(values)
    return encode_file(header, VALID[8 + LENGTH :])


@st.composite
def damaged_files(draw):
    damaged = bytearray(VALID)
    for _ in range(draw(st.integers(1, 4))):
        position = draw(st.integers(0, len(damaged) - 1))
        damaged[position] ^= draw(st.integers(1, 255))
    if draw(st.booleans()):
        del damaged[draw(st.integers(0, len(damaged))) :]
    return bytes(damaged)


def check_against_the_reference(content):
    """Refused with a CheckpointError, or the tensors that the reference reads."""
    with tempfile.TemporaryDirectory() as directory:
        path = write(Path(directory), content)
        tracemalloc.start()
        try:
            found = {n: t.read() for n, t in read_safetensors(path).items()}
        except CheckpointError as error:
            assert re.match(r"^[a-z].+: .+", str(error), re.DOTALL)
            assert len(str(error)) < 600
            return False
        finally:
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            assert peak < 64e6
        reference = dict(safetensors.deserialize(content))
        assert set(found) == set(reference)
        for name, array in found.items():
            assert list(array.shape) == reference[name]["shape"]
            assert DTYPES[reference[name]["dtype"]] == array.dtype
            assert array.tobytes() == bytes(reference[name]["data"])
        return True


def test_the_fuzzed_file_is_accepted_whole():
    assert check_against_the_reference(VALID)


@hypothesis.settings(max_examples=300)
@hypothesis.given(st.binary(max_size=200))
def test_fuzz_random_bytes(content):
    check_against_the_reference(content)


@hypothesis.settings(max_examples=300)
@hypothesis.given(st.binary(max_size=120), st.binary(max_size=40))
def test_fuzz_random_headers(header, data):
    check_against_the_reference(encode_file(b"{" + header, data))


@hypothesis.settings(max_examples=600)
@hypothesis.given(damaged_files())
def test_fuzz_flipped_and_truncated_files(content):
    check_against_the_reference(content)


@hypothesis.settings(max_examples=600)
@hypothesis.given(edited_headers())
def test_fuzz_edited_headers(content):
    check_against_the_reference(content)
