"""Compiles decode loops for a TPU slice that is not here, and prints their memory.

Run as a script in a process of its own, since the TPU compiler is chosen before jax is
imported: `python tests/decoding/tpu_program.py METHOD ...`.
"""

import json
import sys

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec

import jaxllm
from jaxllm.attention import RopeConfig
from jaxllm.core import DTypePolicy, ShardingRules, make_mesh, row_keys
from jaxllm.decoding import Committed, advance, make_sampler, prefill
from jaxllm.layers import AttentionConfig, MlpConfig
from jaxllm.models import DecoderConfig, make_model
from jaxllm.models.sharding import param_shardings

ROWS, SLOTS = 16, 8192


def llama_8b():
    """Returns an 8B Llama as shapes, all layers in one stack."""
    config = DecoderConfig(
        vocabulary=128256,
        width=4096,
        num_layers=32,
        max_positions=SLOTS,
        attention=AttentionConfig(num_heads=32, num_kv_heads=8, head_dim=128),
        mlp=MlpConfig(hidden=14336),
        ropes=(RopeConfig(rotary_dim=128, theta=5e5),),
    )
    return make_model(config, policy=DTypePolicy(), rules=ShardingRules(), stacks=(32,))


def lower(lm, method, mesh):
    """Returns the state's shapes and the loop of a method, not compiled yet."""
    replicated = NamedSharding(mesh, PartitionSpec())
    heads = NamedSharding(mesh, PartitionSpec(None, None, "tensor", None, None))
    bound = jaxllm.bind(lm, method)
    weights = param_shardings(lm.model, lm.params, mesh)

    def placed(tree, where=None):
        # Caches have five axes, the target's as those of drafting models.
        def place(x, sharding):
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

        if where is None:
            where = jax.tree.map(lambda x: heads if x.ndim == 5 else replicated, tree)
        return jax.tree.map(place, tree, where)

    params = {
        "target": placed(lm.params, weights),
        "drafter": placed(jax.eval_shape(lambda: bound.params)),
    }
    sampler = jax.eval_shape(lambda: make_sampler(ROWS))

    def start(params, sampler):
        committed = Committed(
            jnp.zeros((ROWS, SLOTS), jnp.int32),
            jnp.ones((ROWS,), jnp.int32),
            row_keys(jnp.arange(ROWS)),
            sampler,
            jnp.ones((ROWS,), jnp.int32),
        )
        return prefill(
            params,
            committed,
            lm.model.init_cache(params["target"], ROWS, SLOTS),
            jnp.ones((ROWS,), jnp.int32),
            jnp.zeros((ROWS,), bool),
            model=lm.model,
            drafter=bound.drafter,
            chunk=128,
        )

    state = jax.eval_shape(start, params, sampler)
    with jax.set_mesh(mesh):
        return state, advance.lower(
            params,
            placed(state),
            placed(sampler),
            jax.ShapeDtypeStruct((1,), jnp.int32, sharding=replicated),
            jax.ShapeDtypeStruct((), jnp.int32, sharding=replicated),
            model=lm.model,
            drafter=bound.drafter,
        )


def main() -> None:
    """Compiles the loops of the methods named for v5e 2x4, tensor parallelism 8."""
    topology = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x4")
    mesh = make_mesh("tensor=8", devices=topology.devices)
    model, params = llama_8b()
    lm = jaxllm.LanguageModel(model=model, params=params, name="llama-8b")
    for method in sys.argv[1:]:
        state, lowered = lower(lm, method, mesh)
        compiled = lowered.compile()
        memory = compiled.memory_analysis()
        layers = (*state.cache.k, *state.cache.v)
        found = {
            "method": method,
            "cache_bytes": sum(x.size * x.dtype.itemsize for x in layers) // 8,
            "temp_bytes": memory.temp_size_in_bytes,
            "argument_bytes": memory.argument_size_in_bytes,
            "alias_bytes": memory.alias_size_in_bytes,
            "all_gathers": compiled.as_text().count("all-gather("),
        }
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
