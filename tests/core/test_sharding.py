import math
import types

import hypothesis
import jax
import jax.numpy as jnp
import pytest
from hypothesis import strategies as st
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

from jaxllm.core import (
    ConfigError,
    ShardingError,
    ShardingRules,
    constrain,
    make_mesh,
    parse_mesh,
)
from jaxllm.core.sharding import MESH_AXES

RULES = ShardingRules()


def mesh_of(**sizes):
    return AbstractMesh(tuple(sizes.values()), tuple(sizes))


def refusal(call, error_type, *args):
    with pytest.raises(error_type) as error:
        call(*args)
    return str(error.value)


FULL_MESH = mesh_of(data=2, fsdp=2, tensor=4, expert=2, sequence=2)


@pytest.mark.parametrize(
    ("names", "shape", "expected"),
    [
        (("batch", None, "heads"), (8, 5, 8), (("data", "fsdp"), None, "tensor")),
        (("embed", "ffn"), (64, 256), ("fsdp", "tensor")),
        (("vocab", "embed"), (512, 64), ("tensor", "fsdp")),
        (("experts", "embed", "ffn"), (4, 64, 256), ("expert", "fsdp", "tensor")),
        (("kv_heads", "kv_sequence", None), (4, 32, 8), ("tensor", "sequence", None)),
        # A name that the table lacks.
        (("layers", "embed"), (2, 64), (None, "fsdp")),
        ((), (), ()),
    ],
)
def test_axes_are_split_as_the_table_says(names, shape, expected):
    assert RULES.spec(names, shape, FULL_MESH) == PartitionSpec(*expected)


@pytest.mark.parametrize(
    ("mesh", "size", "expected"),
    [
        (mesh_of(data=2, fsdp=4), 8, ("data", "fsdp")),
        (mesh_of(data=2, fsdp=4), 4, "data"),
        (mesh_of(data=3, fsdp=4), 4, "fsdp"),
        (mesh_of(data=2, fsdp=4), 1, None),
        (mesh_of(data=2, fsdp=4), 7, None),
        # An axis of one device splits nothing, and an absent one is no error.
        (mesh_of(data=1, fsdp=4), 8, "fsdp"),
        (mesh_of(tensor=4), 8, None),
    ],
)
def test_mesh_axes_that_do_not_divide_are_dropped(mesh, size, expected):
    assert RULES.spec(("batch",), (size,), mesh) == PartitionSpec(expected)


def test_a_mesh_axis_is_used_once():
    spec = RULES.spec(("batch", "embed"), (8, 64), FULL_MESH)
    assert spec == PartitionSpec(("data", "fsdp"), None)
    spec = RULES.spec(("heads", "ffn"), (8, 64), FULL_MESH)
    assert spec == PartitionSpec("tensor", None)
    # Where the first could not use it, the second may.
    spec = RULES.spec(("heads", "ffn"), (6, 64), FULL_MESH)
    assert spec == PartitionSpec(None, "tensor")


def test_a_table_of_ones_own():
    rules = ShardingRules((("embed", ("tensor", "expert")),))
    spec = rules.spec(("batch", "embed"), (8, 64), FULL_MESH)
    assert spec == PartitionSpec(None, ("tensor", "expert"))
    assert hash(rules) == hash(ShardingRules((("embed", ("tensor", "expert")),)))


@hypothesis.given(
    names=st.lists(
        st.sampled_from([None, "unknown", *(name for name, _ in RULES.table)]),
        max_size=5,
    ),
    sizes=st.lists(st.integers(1, 48), min_size=5, max_size=5),
    ways=st.lists(st.sampled_from([1, 2, 3, 4]), min_size=5, max_size=5),
)
def test_every_spec_can_be_laid_out(names, sizes, ways):
    mesh = mesh_of(**dict(zip(MESH_AXES, ways, strict=True)))
    shape = sizes[: len(names)]
    used = []
    spec = RULES.spec(names, shape, mesh)
    for name, size, entry in zip(names, shape, spec, strict=True):
        axes = (entry,) if isinstance(entry, str) else entry or ()
        assert set(axes) <= set(dict(RULES.table).get(name, ()))
        assert size % math.prod(mesh.shape[axis] for axis in axes) == 0
        used += axes
    assert len(used) == len(set(used))


def test_every_axis_has_to_be_named():
    args = ("batch", None), (8, 5, 64), FULL_MESH
    assert refusal(RULES.spec, ShardingError, *args) == (
        "cannot shard: axes ('batch', None) have rank 2, expected 3 for shape "
        "(8, 5, 64). Name every axis."
    )


def test_check_is_the_strict_form():
    RULES.check({"batch": 8, "heads": 8, "unknown": 7}, FULL_MESH)
    RULES.check({"heads": 7}, mesh_of(data=8))
    sizes = {"embed": 64, "heads": 6}
    assert refusal(RULES.check, ShardingError, sizes, FULL_MESH) == (
        "cannot shard: axis 'heads' has size 6, expected a multiple of 4 (mesh axes "
        "tensor). Choose mesh sizes that divide it."
    )
    assert refusal(RULES.check, ShardingError, {"batch": 6}, FULL_MESH) == (
        "cannot shard: axis 'batch' has size 6, expected a multiple of 4 (mesh axes "
        "data, fsdp). Choose mesh sizes that divide it."
    )


@pytest.mark.parametrize(
    ("text", "sizes"),
    [
        ("data=2,tensor=4", {"data": 2, "tensor": 4}),
        ("tensor=-1", {"tensor": -1}),
        ("sequence=3,fsdp=2,expert=4", {"sequence": 3, "fsdp": 2, "expert": 4}),
        ("", {}),
    ],
)
def test_a_mesh_is_parsed(text, sizes):
    assert parse_mesh(text) == sizes


@pytest.mark.parametrize("text", ["model=4", "tensor=2,model=4", "model=4,data=x"])
def test_an_unknown_mesh_axis_is_named(text):
    message = (
        f"cannot parse mesh: 'model=4' in {text!r}, expected distinct axes of data, "
        "fsdp, tensor, expert, sequence. Write for example data=1,tensor=4."
    )
    assert refusal(parse_mesh, ConfigError, text) == message
    assert refusal(make_mesh, ConfigError, text) == message


def test_a_mesh_axis_is_given_once():
    assert refusal(parse_mesh, ConfigError, "data=2,data=4") == (
        "cannot parse mesh: 'data=4' in 'data=2,data=4', expected distinct axes of "
        "data, fsdp, tensor, expert, sequence. Write for example data=1,tensor=4."
    )


@pytest.mark.parametrize("size", ["", "=", "=x", "=0", "=-2", "=2.0", "=2=3"])
def test_a_mesh_size_is_positive_or_fills(size):
    text = f"data=2,tensor{size}"
    assert refusal(parse_mesh, ConfigError, text) == (
        f"cannot parse mesh: 'tensor{size}' in {text!r}, expected a positive size or "
        "-1. Write for example data=1,tensor=4."
    )


def test_one_mesh_size_may_fill():
    assert refusal(parse_mesh, ConfigError, "data=-1,tensor=-1") == (
        "cannot parse mesh: 'data=-1,tensor=-1' has several sizes of -1, expected at "
        "most one. Give the others."
    )


@hypothesis.given(text=st.text("datensorfpxqu=-,0123456789 "))
def test_any_text_is_parsed_or_refused(text):
    try:
        sizes = parse_mesh(text)
    except ConfigError:
        return
    assert set(sizes) <= set(MESH_AXES)
    assert all(size > 0 or size == -1 for size in sizes.values())


@pytest.mark.parametrize("sizes", [None, {}, "", "tensor=1", {"data": -1}])
def test_a_mesh_of_one_device_has_all_axes(sizes):
    mesh = make_mesh(sizes, jax.devices()[:1])
    assert dict(mesh.shape) == dict.fromkeys(MESH_AXES, 1)
    assert mesh.axis_types == (AxisType.Auto,) * len(MESH_AXES)


def test_a_mesh_that_does_not_fit_is_refused():
    one = jax.devices()[:1]
    assert refusal(make_mesh, ShardingError, "data=2,tensor=4", one) == (
        "cannot make mesh: {'data': 2, 'tensor': 4} needs 8 devices, expected at most "
        "1, which is what there is. Choose smaller sizes."
    )
    assert refusal(make_mesh, ShardingError, {"data": -1, "tensor": 3}, one) == (
        "cannot make mesh: {'data': -1, 'tensor': 3} has sizes whose product is 3, "
        "expected a divisor of 1, the devices to fill. Choose other sizes."
    )


def test_no_process_is_left_without_devices():
    devices = [types.SimpleNamespace(process_index=i // 4) for i in range(8)]
    assert refusal(make_mesh, ShardingError, "tensor=4", devices) == (
        "cannot make mesh: {'tensor': 4} takes 4 of 8 devices, which leaves a process "
        "without any, expected some of each. Choose larger sizes, or start fewer "
        "processes."
    )


def test_a_mapping_is_checked_like_text():
    assert refusal(make_mesh, ConfigError, {"model": 4}).startswith(
        "cannot parse mesh: 'model=4' in 'model=4', expected distinct axes of"
    )
    assert refusal(make_mesh, ConfigError, {"data": 0}).startswith(
        "cannot parse mesh: 'data=0' in 'data=0', expected a positive size or -1."
    )


def test_constrain_is_nothing_without_a_mesh_or_rules():
    x = jnp.ones((8, 4))
    assert constrain(x, ("batch", "embed"), RULES) is x
    with jax.set_mesh(make_mesh(devices=jax.devices()[:1])):
        assert constrain(x, ("batch", "embed"), RULES) is x
    text = jax.jit(lambda x: constrain(x, ("batch", "embed"), RULES)).lower(x).as_text()
    assert "sharding" not in text


ON_EIGHT_DEVICES = """
import jax, jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec as P
from jaxllm.core import ShardingError, ShardingRules, constrain, make_mesh

rules = ShardingRules()
names = ("batch", None, "heads", None)
x = jnp.arange(4 * 3 * 8 * 2.0).reshape(4, 3, 8, 2)
assert constrain(x, names, rules) is x

mesh = make_mesh("data=2,tensor=-1")
assert dict(mesh.shape) == dict(data=2, fsdp=1, tensor=4, expert=1, sequence=1)
assert set(mesh.axis_types) == {AxisType.Auto}
assert make_mesh().size == 1
assert make_mesh("tensor=3").size == 3
for sizes in ("data=3,tensor=-1", "data=16"):
    try:
        make_mesh(sizes)
    except ShardingError as error:
        print(error)

def shard_shape(y):
    return y.sharding.shard_shape(y.shape)

with jax.set_mesh(mesh):
    split = jax.jit(lambda x: constrain(2 * x, names, rules))
    y = split(x)
    assert shard_shape(y) == (2, 3, 2, 2), y.sharding
    assert (y == 2 * x).all()
    # Three rows and six heads: neither is divided, both are replicated.
    assert shard_shape(split(x[:3, :, :6])) == (3, 3, 6, 2)
    without = jax.jit(lambda x: constrain(2 * x, names, None))(x)
    assert shard_shape(without) == x.shape

placed = jax.device_put(x, rules.sharding(names, x.shape, mesh))
assert placed.sharding.spec == P("data", None, "tensor", None)
assert shard_shape(placed) == (2, 3, 2, 2)
"""


def test_constrain_splits_over_eight_devices(run_with_devices):
    assert run_with_devices(8, ON_EIGHT_DEVICES).splitlines() == [
        "cannot make mesh: {'data': 3, 'tensor': -1} has sizes whose product is 3, "
        "expected a divisor of 8, the devices to fill. Choose other sizes.",
        "cannot make mesh: {'data': 16} needs 16 devices, expected at most 8, which is "
        "what there is. Choose smaller sizes.",
    ]
