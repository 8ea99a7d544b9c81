import json
import os
import pickle

import ml_dtypes
import numpy as np
import pytest
import safetensors

from jaxllm.checkpoints import open_weights, refuse_pickles, write_weights
from jaxllm.core.errors import CheckpointError

INDEX = "model.safetensors.index.json"


def sample():
    return {
        f"layers.{i}.w": np.arange(16, dtype=ml_dtypes.bfloat16).reshape(4, 4) + i
        for i in range(5)
    } | {"norm": np.ones(4, np.float32)}


def assert_holds(directory, expected):
    found = open_weights(directory)
    assert set(found) == set(expected)
    for name, array in expected.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name].read(), array)


@pytest.fixture
def sharded(tmp_path):
    """A directory of three shards, and the name of the shard of each tensor."""
    write_weights(tmp_path, sample(), max_shard_bytes=70)
    return tmp_path, json.loads((tmp_path / INDEX).read_text())["weight_map"]


def relist(directory, weight_map):
    (directory / INDEX).write_text(json.dumps({"weight_map": weight_map}))


def test_one_file_and_shards_hold_the_same(tmp_path, sharded):
    single = tmp_path / "single"
    single.mkdir()
    write_weights(single, sample())
    assert [p.name for p in single.iterdir()] == ["model.safetensors"]
    assert_holds(single, sample())
    directory, weight_map = sharded
    assert sorted(set(weight_map.values())) == [
        f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)
    ]
    assert_holds(directory, sample())
    index = json.loads((directory / INDEX).read_text())
    assert index["metadata"] == {"total_size": 5 * 32 + 16}
    for shard in set(weight_map.values()):
        # Older versions of transformers refuse a file without a format.
        with safetensors.safe_open(directory / shard, framework="numpy") as file:
            assert file.metadata() == {"format": "pt"}


def test_a_shard_is_full_but_not_fuller_than_asked(sharded):
    directory, weight_map = sharded
    sizes = {}
    for name, tensor in open_weights(directory).items():
        shard = weight_map[name]
        sizes[shard] = sizes.get(shard, 0) + tensor.nbytes
    assert sorted(sizes.values()) == [48, 64, 64]


def test_a_tensor_over_the_limit_has_its_own_shard(tmp_path):
    big = {"a": np.zeros(2), "b": np.zeros(100), "c": np.zeros(2)}
    write_weights(tmp_path, big, max_shard_bytes=20)
    assert_holds(tmp_path, big)
    assert len(list(tmp_path.glob("*.safetensors"))) == 3


def test_no_weights_at_all(tmp_path):
    with pytest.raises(CheckpointError) as caught:
        open_weights(tmp_path)
    assert str(caught.value) == (
        f"cannot load weights: {tmp_path}: has no weights, expected model.safetensors "
        f"or {INDEX}. Check the path."
    )


def test_a_missing_shard(sharded):
    directory, _ = sharded
    (directory / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError) as caught:
        open_weights(directory)
    assert str(caught.value) == (
        f"cannot load weights: {directory / INDEX}: 1 of 3 shards are missing, the "
        "first is 'model-00002-of-00003.safetensors', expected them beside the index. "
        "Download them."
    )


def test_a_truncated_shard_names_the_shard(sharded):
    directory, _ = sharded
    shard = directory / "model-00002-of-00003.safetensors"
    os.truncate(shard, shard.stat().st_size - 1)
    with pytest.raises(CheckpointError) as caught:
        open_weights(directory)
    assert f"cannot read weights: {shard}: is cut short" in str(caught.value)


def test_a_tensor_in_two_shards(sharded):
    directory, weight_map = sharded
    first, second, _ = sorted(set(weight_map.values()))
    (directory / second).write_bytes((directory / first).read_bytes())
    name = sorted(n for n, shard in weight_map.items() if shard == first)[0]
    with pytest.raises(CheckpointError) as caught:
        open_weights(directory)
    assert str(caught.value) == (
        f"cannot load weights: {directory / second}: {name!r} is also in {first!r}, "
        "expected it once. Download the shards again."
    )


def test_a_tensor_that_the_index_does_not_list(sharded):
    directory, weight_map = sharded
    shard = weight_map.pop("norm")
    relist(directory, weight_map)
    with pytest.raises(CheckpointError) as caught:
        open_weights(directory)
    assert str(caught.value) == (
        f"cannot load weights: {directory / shard}: 'norm' is in this shard, expected "
        f"nowhere by {INDEX}. Download the index again."
    )


def test_a_tensor_in_another_shard_than_listed(sharded):
    directory, weight_map = sharded
    place = "model-00001-of-00003.safetensors"
    shard, weight_map["norm"] = weight_map["norm"], place
    relist(directory, weight_map)
    with pytest.raises(CheckpointError) as caught:
        open_weights(directory)
    assert str(caught.value) == (
        f"cannot load weights: {directory / shard}: 'norm' is in this shard, expected "
        f"{place!r} by {INDEX}. Download the index again."
    )


def test_a_listed_tensor_that_is_absent(sharded):
    directory, weight_map = sharded
    shard = weight_map["norm"]
    relist(directory, weight_map | {"head": shard})
    with pytest.raises(CheckpointError) as caught:
        open_weights(directory)
    assert str(caught.value) == (
        f"cannot load weights: {directory / shard}: 'head' is absent, expected in this "
        f"shard by {INDEX}. Download the shard again."
    )


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (
            '{"weight_map": {',
            "line 1, column 17: Expecting property name enclosed in double quotes, "
            "expected valid JSON. Correct the file or download it again.",
        ),
        (
            "[1]",
            "holds a list at top level, expected an object {...}. Correct the file or "
            "download it again.",
        ),
        (
            "{}",
            "'weight_map' is None, expected an object of tensor names and files. "
            "Download the index again.",
        ),
        (
            '{"weight_map": {}}',
            "'weight_map' is {}, expected an object of tensor names and files. "
            "Download the index again.",
        ),
        (
            '{"weight_map": []}',
            "'weight_map' is [], expected an object of tensor names and files. "
            "Download the index again.",
        ),
        *(
            (
                json.dumps({"weight_map": {"a": shard}}),
                f"'a' is in {shard!r}, expected the name of a .safetensors file beside "
                "the index. Correct the index.",
            )
            for shard in (1, "../a.safetensors", "/a.safetensors", "a.bin")
        ),
    ],
)
def test_a_malformed_index(tmp_path, content, fault):
    (tmp_path / INDEX).write_text(content)
    with pytest.raises(CheckpointError) as caught:
        open_weights(tmp_path)
    assert str(caught.value) == f"cannot load weights: {tmp_path / INDEX}: {fault}"


def test_weights_are_never_written_over_others(tmp_path):
    write_weights(tmp_path, {"a": np.zeros(1)})
    with pytest.raises(CheckpointError) as caught:
        write_weights(tmp_path, {"b": np.zeros(1)})
    assert str(caught.value) == (
        f"cannot save weights: {tmp_path}: already holds 'model.safetensors', expected "
        "no weights. Choose another directory or delete them."
    )
    assert_holds(tmp_path, {"a": np.zeros(1)})
    with pytest.raises(CheckpointError, match="No such file or directory"):
        write_weights(tmp_path / "absent", {})


def test_an_interrupted_write_leaves_nothing_that_loads(tmp_path):
    def stop():
        raise KeyboardInterrupt

    pending = [
        ("a", (4,), np.float32, lambda: np.zeros(4, np.float32)),
        ("b", (4,), np.float32, stop),
    ]
    with pytest.raises(KeyboardInterrupt):
        write_weights(tmp_path, pending, max_shard_bytes=16)
    with pytest.raises(CheckpointError, match="has no weights"):
        open_weights(tmp_path)


def test_a_name_given_twice_across_shards(tmp_path):
    pending = [("a", (4,), np.float32, lambda: np.zeros(4, np.float32))] * 2
    with pytest.raises(CheckpointError, match="'a' is given twice"):
        write_weights(tmp_path, pending, max_shard_bytes=16)


class Bomb:
    """Creates a file when it is unpickled."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


class NoInput:
    def __getattr__(self, name):
        raise AssertionError(f"standard input was used: {name}")


@pytest.mark.parametrize(
    "name",
    ["pytorch_model.bin", "model.pt", "consolidated.00.pth", "a.ckpt", "MODEL.PKL"],
)
def test_a_pickle_is_refused_and_not_opened(tmp_path, monkeypatch, name):
    marker = tmp_path / "marker"
    directory = tmp_path / "checkpoint"
    directory.mkdir()
    content = pickle.dumps(Bomb(marker))
    (directory / name).write_bytes(content)
    (directory / "config.json").write_text("{}")
    monkeypatch.setattr("sys.stdin", NoInput())
    with pytest.raises(CheckpointError) as caught:
        open_weights(directory)
    assert str(caught.value) == (
        f"refusing to load {name!r}: pickle files can run code. Convert it to "
        "safetensors with transformers and torch, where you trust it: "
        f"AutoModelForCausalLM.from_pretrained({str(directory)!r})"
        ".save_pretrained('converted')."
    )
    # Under the right name it is refused as well.
    (directory / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match="is a pickle under another name"):
        open_weights(directory)
    assert not marker.exists()
    pickle.loads(content)
    assert marker.exists()  # so the marker would have shown it


def test_a_pickle_beside_weights_is_left_alone(tmp_path):
    write_weights(tmp_path, sample())
    (tmp_path / "training_args.bin").write_bytes(b"")
    refuse_pickles(tmp_path)
    assert_holds(tmp_path, sample())


def test_the_weights_are_named_not_what_lies_beside_them(tmp_path):
    for name in ("optimizer.pt", "pytorch_model-00001-of-00002.bin"):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(CheckpointError, match="'pytorch_model-00001-of"):
        refuse_pickles(tmp_path)
    with pytest.raises(CheckpointError, match="No such file or directory"):
        refuse_pickles(tmp_path / "absent")


def test_the_real_checkpoints_open(data_dir):
    for name, parameters in (("stories260K", 260_032), ("babyllama105", 936_448)):
        tensors = open_weights(data_dir / "models" / name)
        count = sum(tensor.read().size for tensor in tensors.values())
        assert count == parameters
        assert all(np.isfinite(tensor.read()).all() for tensor in tensors.values())
