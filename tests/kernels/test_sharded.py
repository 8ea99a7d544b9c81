"""The attention kernels on shards of rows and heads, with nothing to be exchanged."""

import pytest

CODE = """
import functools

import jax
from jax.sharding import AxisType, PartitionSpec

from pallas_kernels.decode_attention import decode_attention
from pallas_kernels.flash_attention import flash_attention
from pallas_kernels.operands import Keys
from pallas_kernels.prefix_attention import prefix_attention
from tests.kernels.attention_oracle import assert_same, dense, normal, poisoned

q = normal(0, 4, 3, 4, 128)
keys = poisoned(dense(1, 4, 2, 40, 128), [0, 7, 40, 33])
shared = Keys(keys.k[:, 3], keys.v[:, 3], keys.length[3], keys.layer)
mesh = jax.make_mesh((2, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
P = PartitionSpec
heads, rows = P("data", None, "tensor"), P("data")
cache, prefix = P(None, "data", "tensor"), P(None, "tensor")
CALLS = (
    (decode_attention, (q, keys), (heads, Keys(cache, cache, rows, P()))),
    (flash_attention, (q, keys), (heads, Keys(cache, cache, rows, P()))),
    (prefix_attention, (q, shared), (heads, Keys(prefix, prefix, P(), P()))),
)
for op, arguments, specs in CALLS:
    with jax.set_mesh(mesh):
        sharded = jax.jit(
            jax.shard_map(
                functools.partial(op, implementation="interpret"),
                in_specs=specs,
                out_specs=(heads, heads),
                check_vma=False,
            )
        )
        found = sharded(*arguments)
    assert_same(found, op(*arguments, implementation="reference"))
    print(op.__name__)
"""


@pytest.mark.slow
def test_shards_equal_the_whole(run_with_devices):
    said = run_with_devices(4, CODE).split()
    assert said == ["decode_attention", "flash_attention", "prefix_attention"]
