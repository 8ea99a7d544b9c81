"""The matmul kernels on TPUs that are not here, and on several devices."""

import importlib
import json
import os
import pathlib
import subprocess
import sys

import pytest

from pallas_kernels import dispatch

PROGRAM = pathlib.Path(__file__).with_name("matmul_program.py")
SHARDED = """
import functools

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec as P

from pallas_kernels.codebook_matmul import codebook_matmul
from pallas_kernels.codebook_matmul.shapes import Shape as Codebook
from pallas_kernels.grouped_matmul import grouped_matmul
from pallas_kernels.quant_matmul import IntWeight, quant_matmul
from pallas_kernels.quant_matmul.shapes import Shape as Matrix
from tests.kernels.drawn import difference, drawn

mesh = jax.make_mesh((2,), ("tensor",), axis_types=(AxisType.Auto,))


def check(op, args, specs, combined=lambda y: y, out=P(None, "tensor")):
    def local(*args):
        return combined(op(*args, implementation="interpret"))

    mapped = jax.shard_map(
        local, mesh=mesh, in_specs=specs, out_specs=out, check_vma=False
    )
    expected = op(*args, implementation="reference")
    print(op.__name__, difference(jax.jit(mapped)(*args), expected) < 1e-5)


columns, rows = P(None, "tensor"), P("tensor")
x, w, _ = drawn(
    Matrix(
        rows=4, depth=512, features=256, groups=4, bits=4, dtype="float32"
    ).arguments()
)
check(quant_matmul, (x, w), (P(), IntWeight(columns, columns)))
# Along the contracted axis whole packed blocks go to a device.
check(
    quant_matmul,
    (x, w),
    (columns, IntWeight(rows, rows)),
    lambda y: jax.lax.psum(y, "tensor"),
    P(),
)
x, w = drawn([jax.ShapeDtypeStruct(s, jnp.float32) for s in ((9, 40), (3, 40, 256))])
sizes = jnp.array([4, 0, 3])
check(grouped_matmul, (x, w, sizes), (P(), P(None, None, "tensor"), P()))
shape = Codebook(
    rows=4, depth=256, features=256, codebook=(1, 2, 200, 2), dtype="float32"
)
x, w, _ = drawn(shape.arguments())
w = w._replace(codes=w.codes % 200)
check(codebook_matmul, (x, w), (P(), type(w)(columns, columns)))
"""


@pytest.mark.slow
def test_shards_equal_the_whole(run_with_devices):
    said = run_with_devices(2, SHARDED).split()
    ops = ["quant_matmul", "quant_matmul", "grouped_matmul", "codebook_matmul"]
    assert said == [word for op in ops for word in (op, "True")]


@pytest.mark.slow
@pytest.mark.parametrize("op", ["quant_matmul", "grouped_matmul", "codebook_matmul"])
def test_kernels_compile_for_every_generation_and_copy_no_weight(op):
    pytest.importorskip("libtpu", reason="the TPU compiler is not installed")
    environment = os.environ | {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": "v5litepod-8",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # beside another test's compiler
        "JAX_PLATFORMS": "cpu",
    }
    run = subprocess.run(
        [sys.executable, str(PROGRAM), op],
        env=environment,
        capture_output=True,
        text=True,
        timeout=1800,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    found = [json.loads(line) for line in run.stdout.splitlines()]
    names = {
        s.name for s in importlib.import_module(f"pallas_kernels.{op}.shapes").SHAPES
    }
    assert {x["shape"] for x in found} == names
    assert {x["generation"] for x in found} == set(dispatch.GENERATIONS)
    for x in found:
        if x["obstacle"] is not None:
            assert x["generation"] == "v4" and "int8" in x["obstacle"], x
            continue
        # XLA multiplies small groups of floats by other means than a kernel.
        assert x["kernels"] >= ("-w16-" not in x["shape"]), x
        assert not x["rewritten"], x
