"""Which implementation runs where, and what is said when none can."""

import importlib
import inspect
import pathlib

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

import pallas_kernels
from pallas_kernels import dispatch, testing
from pallas_kernels.decode_attention import decode_attention
from pallas_kernels.decode_attention.shapes import SHAPES, Shape
from pallas_kernels.operands import Keys

SHAPE = SHAPES[0]
ROOT = pathlib.Path(pallas_kernels.__file__).parent
V5E = AbstractDevice("TPU v5 lite", 1, "tpu")
H200 = AbstractDevice("NVIDIA H200", 1, "cuda")


def on(device, sizes=(1,), kind=AxisType.Auto):
    """Traces for a device that is not there."""
    names = tuple("xyz"[: len(sizes)])
    mesh = AbstractMesh(
        sizes, names, axis_types=(kind,) * len(sizes), abstract_device=device
    )
    return jax.sharding.use_abstract_mesh(mesh)


def test_the_device_is_that_of_the_mesh_else_the_backend():
    assert dispatch.target() == dispatch.Target("cpu")
    with on(V5E):
        assert dispatch.target() == dispatch.Target("tpu", "v5e", "TPU v5 lite")
    with on(H200):
        assert dispatch.target() == dispatch.Target("gpu", None, "NVIDIA H200")


def test_none_takes_the_kernel_of_the_device_else_the_reference():
    assert dispatch.choose("decode_attention", None, SHAPE) == "reference"
    with on(V5E):
        assert dispatch.choose("decode_attention", None, SHAPE) == "tpu"
        assert dispatch.choose("decode_attention", "tpu", SHAPE) == "tpu"
        assert dispatch.choose("merge_lse", None, SHAPE) == "reference"
    with on(H200):
        assert dispatch.choose("decode_attention", None, SHAPE) == "reference"


def test_a_named_reference_or_interpreter_runs_anywhere():
    for name in ("reference", "interpret"):
        assert dispatch.choose("decode_attention", name, SHAPE) == name
        with on(V5E, (2,)):
            assert dispatch.choose("decode_attention", name, SHAPE) == name


def test_a_program_that_the_compiler_splits_takes_the_reference():
    for kind in (AxisType.Auto, AxisType.Explicit):
        with on(V5E, (2, 1), kind):
            assert dispatch.choose("decode_attention", None, SHAPE) == "reference"
            with pytest.raises(ValueError, match=r"inside jax\.shard_map"):
                dispatch.choose("decode_attention", "tpu", SHAPE)
    with on(V5E, (2, 1), AxisType.Manual):
        assert dispatch.choose("decode_attention", None, SHAPE) == "tpu"


@pytest.mark.parametrize(
    ("op", "name", "error", "message"),
    [
        ("decode_attention", "mosaic", ValueError, "'mosaic', expected one of ref"),
        ("decode_attention", "tpu", NotImplementedError, "cannot run on cpu"),
        ("decode_attention", "gpu", NotImplementedError, "there is no gpu kernel"),
        ("merge_lse", "interpret", NotImplementedError, "there is no tpu kernel"),
    ],
)
def test_a_named_implementation_fails_loudly(op, name, error, message):
    with pytest.raises(error, match=f"{op}: .*{message}"):
        dispatch.choose(op, name, SHAPE)


def test_a_shape_that_the_kernel_cannot_run():
    integers = Shape(
        rows=1, queries=1, heads=2, kv_heads=2, head_dim=128, keys=64, dtype="int8"
    )
    with on(V5E):
        assert dispatch.choose("decode_attention", None, integers) == "reference"
        with pytest.raises(ValueError, match="not int8"):
            dispatch.choose("decode_attention", "tpu", integers)
    with pytest.raises(ValueError, match="not int8"):
        dispatch.choose("decode_attention", "interpret", integers)


def test_an_empty_cache_takes_the_reference_on_a_tpu():
    empty = jnp.zeros((2, 2, 0, 128))
    with on(V5E):
        out, lse = decode_attention(jnp.ones((2, 1, 4, 128)), Keys(empty, empty))
    assert (out == 0).all()
    assert jnp.isneginf(lse).all()


def test_the_report_has_a_line_for_each_op():
    rows = {row["op"]: row for row in dispatch.report()}
    assert list(rows) == list(dispatch.OPS)
    assert {row["implementation"] for row in rows.values()} == {"reference"}
    assert rows["decode_attention"]["reason"] == "there is no cpu kernel"
    with on(V5E):
        rows = {row["op"]: row for row in dispatch.report()}
    assert rows["prefix_attention"]["implementation"] == "tpu"
    assert rows["prefix_attention"]["reason"] == ""
    assert rows["decode_attention"]["implementation"] == "tpu or reference"
    assert "pages of head dim 64" in rows["decode_attention"]["reason"]


@pytest.mark.parametrize("op", dispatch.OPS)
def test_the_folder_of_an_op_holds_what_the_registry_says(op):
    held = {p.stem for p in (ROOT / op).glob("*.py")}
    assert {"__init__", "shapes", *dispatch.OPS[op]} <= held
    assert ("gpu" in dispatch.OPS[op]) == ("gpu" in held)
    package = importlib.import_module(f"pallas_kernels.{op}")
    reference = importlib.import_module(f"pallas_kernels.{op}.reference")
    assert {op, f"{op}_reference"} <= set(package.__all__)
    assert f"{op}_reference" in reference.__all__
    parameters = inspect.signature(getattr(package, op)).parameters
    assert parameters["implementation"].default is None
    assert len(parameters) <= 8


@pytest.mark.parametrize("op", dispatch.OPS)
def test_the_shapes_of_an_op_can_be_called(op):
    names = []
    for name, function, arguments in testing.cases(op):
        names.append(name)
        assert jax.tree.leaves(jax.eval_shape(function, *arguments))
        for generation in dispatch.GENERATIONS:
            reason = testing.obstacle(op, name, generation)
            assert reason is None or reason
    assert len(names) == len(set(names)) > 1


def test_measured_block_sizes_replace_defaults(tmp_path, monkeypatch):
    table = '{"decode_attention": {"bfloat16:128": {"keys": 1024}}}'
    (tmp_path / "tpu_v5_lite.json").write_text(table)
    monkeypatch.setattr(dispatch, "_TUNING", tmp_path)
    dispatch._table.cache_clear()
    defaults = {"heads": 8, "keys": 512}
    with on(V5E):
        found = dispatch.blocks("decode_attention", "bfloat16:128", defaults)
        other = dispatch.blocks("decode_attention", "float32:128", defaults)
    assert found == {"heads": 8, "keys": 1024}
    assert other == dispatch.blocks("decode_attention", "", defaults) == defaults
    dispatch._table.cache_clear()
