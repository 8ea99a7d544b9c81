"""Compiles the kernels for TPUs that are not here, and prints what memory they take.

Run as a script in a process of its own, since the TPU compiler is chosen before jax is
imported: `python tests/kernels/tpu_program.py GENERATION ...`.

Letters: B rows, T queries, N query heads, K kv heads, H head dim, S slots, L layers.
"""

import dataclasses
import json
import sys

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxllm.attention.cache import write
from pallas_kernels import testing
from pallas_kernels.decode_attention import decode_attention
from pallas_kernels.decode_attention.shapes import SHAPES
from pallas_kernels.merge_lse import merge_lse
from pallas_kernels.operands import Keys, NodeKeys

OPS = ("merge_lse", "decode_attention", "prefix_attention", "flash_attention")
TOPOLOGIES = {
    "v4": "v4:2x2x1",
    "v5e": "v5e:2x2",
    "v5p": "v5p:2x2x1",
    "v6e": "v6e:2x2",
    "tpu7x": "tpu7x:2x2x1",
}


def compiled(mesh, function, arguments, donated=()):
    """Returns a program of one device of the mesh, whose calls are kernels."""
    place = NamedSharding(mesh, PartitionSpec())
    arguments = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), arguments
    )
    specs = PartitionSpec()
    with jax.set_mesh(mesh):
        mapped = jax.shard_map(
            function, in_specs=specs, out_specs=specs, check_vma=False
        )
        return jax.jit(mapped, donate_argnums=donated).lower(*arguments).compile()


def nbytes(tree):
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def decode_loop(query, keys, nodes):
    """64 steps over all layers, each of which reads a stacked cache and appends to it.

    Draft nodes among themselves are a second part of each layer, so that the loop holds
    what a step of verification holds.
    """
    layers, tokens = keys.k.shape[0], query.shape[1]

    def layer(state, index):
        here = Keys(held[0], held[1], state[1], index)
        parts = [decode_attention(state[0], x) for x in (here, nodes)]
        out, _ = merge_lse(*zip(*parts, strict=True))
        new_BKTH = out[:, :, :: out.shape[2] // here.k.shape[2]].swapaxes(1, 2)
        return (state[0] + out.astype(query.dtype), state[1]), new_BKTH

    def step(state):
        nonlocal held
        count, q_BTNH, k, v, length_B = state
        held = (k, v)
        (q_BTNH, _), new_LBKTH = jax.lax.scan(
            layer, (q_BTNH, length_B), jnp.arange(layers)
        )
        slot_BT = length_B[:, None] + jnp.arange(tokens)
        k, v = (write(x, new_LBKTH, slot_BT) for x in (k, v))
        return count + 1, q_BTNH, k, v, length_B + tokens

    held = (keys.k, keys.v)
    first = (jnp.int32(0), query, keys.k, keys.v, keys.length)
    return jax.lax.while_loop(lambda state: state[0] < 64, step, first)


def main() -> None:
    """Prints a line for the first shape of each op, and two of decoding."""
    for generation in sys.argv[1:]:
        topology = topologies.get_topology_desc(
            platform="tpu", topology_name=TOPOLOGIES[generation]
        )
        mesh = jax.make_mesh(
            (1,), ("x",), devices=topology.devices[:1], axis_types=(AxisType.Auto,)
        )
        for op in OPS:
            name, function, arguments = next(testing.cases(op))
            program = compiled(mesh, function, arguments)
            report(generation, op, name, program, nbytes(arguments))
        narrow = dataclasses.replace(SHAPES[0], head_dim=64)
        arguments = narrow.arguments()
        program = compiled(mesh, decode_attention, arguments)
        report(generation, "narrow heads", narrow.name, program, nbytes(arguments))
        shape = dataclasses.replace(SHAPES[0], queries=8)
        query, keys, *_ = shape.arguments()
        node = jax.ShapeDtypeStruct(
            (shape.rows, shape.kv_heads, shape.queries, shape.head_dim), jnp.bfloat16
        )
        seen = jax.ShapeDtypeStruct((shape.rows, shape.queries, shape.queries), bool)
        program = compiled(
            mesh, decode_loop, (query, keys, NodeKeys(node, node, seen)), (1,)
        )
        report(generation, "decode loop", shape.name, program, nbytes((keys.k, keys.v)))


def report(generation, op, name, program, argument_bytes) -> None:
    memory = program.memory_analysis()
    found = {
        "generation": generation,
        "op": op,
        "shape": name,
        "temp_bytes": memory.temp_size_in_bytes,
        "alias_bytes": memory.alias_size_in_bytes,
        "argument_bytes": argument_bytes,
        "kernels": program.as_text().count("tpu_custom_call"),
    }
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
