"""The script that compiles every kernel for every TPU generation."""

import json

import pytest

from benchmarks import compile_kernels
from benchmarks.compile_kernels import COMPILED, FAILED, KERNELS, REFUSED
from jaxllm.analysis import in_compiler
from jaxllm.core.errors import ConfigError
from pallas_kernels import dispatch, testing


def test_all_shapes_of_all_kernels_are_work():
    found = compile_kernels.work(list(KERNELS), list(dispatch.GENERATIONS))
    shapes = [(op, name) for op in KERNELS for name, _, _ in testing.cases(op)]
    assert len(found) == len(set(found)) == 5 * len(shapes)
    assert {(op, name) for op, name, _ in found} == set(shapes)


@pytest.mark.parametrize(
    ("ops", "generations", "message"),
    [
        (["softmax"], ["v5e"], "'softmax' is no kernel, expected one of"),
        (["merge_lse"], ["v5e"], "'merge_lse' is no kernel"),
        ([KERNELS[0]], ["v3"], "'v3' is no generation, expected one of v4, v5e"),
    ],
)
def test_what_is_unknown_is_refused(ops, generations, message):
    with pytest.raises(ConfigError, match=message):
        compile_kernels.work(ops, generations)


def test_the_table_counts_and_names_what_failed():
    def row(status, **others):
        kernel = {"op": "a", "shape": "s", "generation": "v4", "status": status}
        return kernel | {"reason": "no"} | others

    rows = [
        row(COMPILED, temp_bytes=2_000_000, kernels={"a": 1}),
        row(COMPILED, kernels={}),
        row(REFUSED),
        row(FAILED),
    ]
    lines = compile_kernels.table(rows).splitlines()
    assert lines[1].split() == ["a", "v4", "2", "1", "1", "1", "2.00", "MB"]
    assert lines[2:] == ["FAILED a s on v4: no"]
    assert set(json.loads(json.dumps(compile_kernels.report(rows)))) == {
        *("format", "claim", "paper", "rows", "environment")
    }


@pytest.mark.slow
@pytest.mark.parametrize("op", KERNELS)
def test_a_kernel_compiles_for_every_generation(op):
    pytest.importorskip("libtpu", reason="the TPU compiler is not installed")
    every = compile_kernels.work([op], list(dispatch.GENERATIONS))
    cases = [
        next(c for c in every if c[2] == generation and testing.obstacle(*c) is None)
        for generation in dispatch.GENERATIONS
    ]
    rows = list(in_compiler("benchmarks.compile_kernels:compile_case", cases))
    assert [row["generation"] for row in rows] == list(dispatch.GENERATIONS)
    for row in rows:
        assert row["status"] == COMPILED, row["reason"]
    assert any(row["kernels"] for row in rows)
