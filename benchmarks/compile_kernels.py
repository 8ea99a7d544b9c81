"""Compiles every TPU kernel at every shape for every TPU generation, without a TPU.

    pip install "jaxllm[aot]"
    python benchmarks/compile_kernels.py --output=runs/compile_kernels.json
    python benchmarks/compile_kernels.py --ops=decode_attention --generations=v5e,v6e

The shapes are those of `pallas_kernels/<op>/shapes.py`, which the tests use as well. A
shape that a kernel says it cannot run is listed with its reason; one that it accepts
has to compile, or the exit code is 1. Where an op leaves a shape to XLA no kernel
stands in the program, and the table says how often. Temporary bytes are those beside
arguments and results; many of them say that something is copied on the way in.
"""

import json
import math
import pathlib
import sys
import time
from collections import Counter
from typing import Any

# Started by its path, only this file's own folder is found.
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from absl import app, flags

from benchmarks.machine import environment
from jaxllm.analysis import aot, parse_slice
from jaxllm.core.errors import ConfigError, UserError
from pallas_kernels import dispatch, testing

KERNELS = tuple(op for op, names in dispatch.OPS.items() if "tpu" in names)

COMPILED, REFUSED, FAILED = "compiled", "refused", "failed"


def work(ops: list[str], generations: list[str]) -> list[tuple[str, str, str]]:
    """Returns op, shape and generation of everything that is to be compiled.

    Raises:
      ConfigError: There is no such kernel or generation.
    """
    for kind, asked, known in (
        ("kernel", ops, KERNELS),
        ("generation", generations, dispatch.GENERATIONS),
    ):
        for name in asked:
            if name not in known:
                raise ConfigError(
                    f"cannot compile: {name!r} is no {kind}, expected one of "
                    f"{', '.join(known)}. Choose one of these."
                )
    return [
        (op, name, generation)
        for op in ops
        for name, _, _ in testing.cases(op, "tpu")
        for generation in generations
    ]


def compile_case(case: tuple[str, str, str]) -> dict[str, Any]:
    """Compiles one kernel; runs in the compiler's process."""
    import jax
    import numpy as np
    from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

    from jaxllm.analysis.hlo import read_program

    op, name, generation = case
    row: dict[str, Any] = {"op": op, "shape": name, "generation": generation}
    reason = testing.obstacle(op, name, generation)
    if reason is not None:
        return {**row, "status": REFUSED, "reason": reason}
    function, arguments = next(
        (call, given)
        for found, call, given in testing.cases(op, "tpu")
        if found == name
    )
    devices = aot.topology_devices(parse_slice(generation))
    mesh = Mesh(np.asarray(devices[:1]), ("data",), axis_types=(AxisType.Auto,))
    sharding = NamedSharding(mesh, PartitionSpec())
    placed = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), arguments
    )
    begun = time.perf_counter()
    try:
        with jax.set_mesh(mesh):
            compiled = jax.jit(function).lower(*placed).compile()
    except Exception as cause:
        text = f"{type(cause).__name__}: {cause}"
        return {**row, "status": FAILED, "reason": " ".join(text.split())[:600]}
    seconds = time.perf_counter() - begun
    memory, program = compiled.memory_analysis(), read_program(compiled.as_text())
    leaves = jax.tree.leaves(arguments)
    return {
        **row,
        "status": COMPILED,
        "reason": None,
        "kernels": program.kernels,
        "argument_bytes": sum(math.prod(x.shape) * x.dtype.itemsize for x in leaves),
        "temp_bytes": memory.temp_size_in_bytes,
        "output_bytes": memory.output_size_in_bytes,
        "code_bytes": memory.generated_code_size_in_bytes,
        "largest_copy_bytes": program.largest_copy_bytes,
        "compile_seconds": round(seconds, 3),
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Returns a line for each op and generation, and what failed below."""
    heads = (COMPILED, "by XLA alone", REFUSED, FAILED, "largest temporaries")
    cells = [["op", "generation", *heads]]
    for op, generation in dict.fromkeys((r["op"], r["generation"]) for r in rows):
        here = [r for r in rows if (r["op"], r["generation"]) == (op, generation)]
        counts = Counter(r["status"] for r in here)
        most = max((r.get("temp_bytes", 0) for r in here), default=0)
        alone = sum(r["status"] == COMPILED and not r["kernels"] for r in here)
        figures = (counts[COMPILED], alone, counts[REFUSED], counts[FAILED])
        cells.append([op, generation, *map(str, figures), f"{most / 1e6:.2f} MB"])
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) for row in cells
    ]
    for row in rows:
        if row["status"] == FAILED:
            where = f"{row['op']} {row['shape']} on {row['generation']}"
            lines.append(f"FAILED {where}: {row['reason']}")
    return "\n".join(line.rstrip() for line in lines)


def report(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Returns the results as they are written."""
    return {
        "format": 1,
        "claim": "every kernel compiles for every TPU generation",
        "paper": None,
        "rows": rows,
        "environment": environment(),
    }


def main(_: list[str]) -> int:
    values = flags.FLAGS
    try:
        cases = work(values.ops, values.generations)
        rows = []
        answers = aot.in_compiler("benchmarks.compile_kernels:compile_case", cases)
        for row in answers:
            rows.append(row)
            print(row["op"], row["generation"], row["shape"], row["status"], flush=True)
    except UserError as cause:
        print(f"compile_kernels: {cause}", file=sys.stderr)
        return 2
    print(table(rows))
    if values.output:
        path = pathlib.Path(values.output)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(report(rows), indent=1) + "\n")
    return int(any(row["status"] == FAILED for row in rows))


if __name__ == "__main__":
    flags.DEFINE_string("output", None, "Where the results go, as JSON.")
    flags.DEFINE_list("ops", list(KERNELS), "Kernels to compile.")
    flags.DEFINE_list("generations", list(dispatch.GENERATIONS), "TPUs to compile for.")
    app.run(main)
