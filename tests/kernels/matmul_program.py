"""Compiles the matmul kernels for TPUs that are not here.

Run as a script in a process of its own, since the TPU compiler is chosen before jax is
imported: `python tests/kernels/matmul_program.py OP ...`. Prints a line for each shape
and generation; small shapes are compiled for one generation only.
"""

import json
import math
import re
import sys

import jax
from jax.experimental import topologies
from jax.sharding import AxisType

from pallas_kernels import dispatch, testing
from tests.kernels.tpu_program import TOPOLOGIES, compiled

HLO_NAMES = {"int8": "s8", "uint8": "u8", "bfloat16": "bf16", "float32": "f32"}
LARGE = 2**21


def rewritten(text, weight):
    """What writes an array of the shape of a weight, or of a layer, to memory.

    A prefetch into the memory on the chip (`copy-start`) is none, it reads once.
    """
    dtype = HLO_NAMES[weight.dtype.name]
    shape = ",".join(map(str, weight.shape[-2:]))
    made = re.compile(rf"= {dtype}\[(?:\d+,)*{shape}\][^ ]* ([a-z-]+)\(")
    writes = {"copy", "fusion", "pad", "dynamic-slice", "slice", "convert"}
    return [name for name in made.findall(text) if name in writes]


def main() -> None:
    """Compiles with the kernel by name, or says why it cannot run."""
    for generation in dispatch.GENERATIONS:
        topology = topologies.get_topology_desc(
            platform="tpu", topology_name=TOPOLOGIES[generation]
        )
        mesh = jax.make_mesh(
            (1,), ("x",), devices=topology.devices[:1], axis_types=(AxisType.Auto,)
        )
        for op in sys.argv[1:]:
            for name, function, arguments in testing.cases(op, "tpu"):
                weight = jax.tree.leaves(arguments[1])[0]
                large = math.prod(weight.shape[-2:]) >= LARGE
                if not large and generation != "v5e":
                    continue
                found = {"op": op, "shape": name, "generation": generation}
                found["obstacle"] = testing.obstacle(op, name, generation)
                if found["obstacle"] is None:
                    text = compiled(mesh, function, arguments).as_text()
                    found["kernels"] = text.count("tpu_custom_call")
                    found["rewritten"] = rewritten(text, weight) if large else []
                print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
