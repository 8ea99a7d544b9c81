"""Compiles a decode loop for a TPU slice that is not here, and prints its memory.

Run as a script in a process of its own, since the TPU compiler is chosen before jax is
imported: `python tests/decoding/tpu_program.py`.
"""

import json

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec

from jaxllm.attention import DenseCache, RopeConfig
from jaxllm.core import DTypePolicy, ShardingRules, make_mesh, row_keys
from jaxllm.decoding import advance, make_sampler
from jaxllm.decoding.engine import DecodeState, no_stats
from jaxllm.decoding.protocol import Committed
from jaxllm.drafting import Autoregressive
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


def main() -> None:
    """Compiles the loop for v5e 2x4 with tensor parallelism 8."""
    topology = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x4")
    mesh = make_mesh("tensor=8", devices=topology.devices)
    model, params = llama_8b()
    drafter = Autoregressive()

    def placed(tree, shardings):
        return jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
            tree,
            shardings,
        )

    def state(params):
        return DecodeState(
            committed=Committed(
                jnp.zeros((ROWS, SLOTS), jnp.int32),
                jnp.ones((ROWS,), jnp.int32),
                row_keys(jnp.arange(ROWS)),
            ),
            cache=model.init_cache(params, ROWS, SLOTS),
            drafter=(),
            limit_B=jnp.ones((ROWS,), jnp.int32),
            done_B=jnp.zeros((ROWS,), bool),
            finite_B=jnp.ones((ROWS,), bool),
            logprob_BS=jnp.zeros((ROWS, SLOTS)),
            stats=no_stats(ROWS, 1),
        )

    replicated = NamedSharding(mesh, PartitionSpec())
    heads = NamedSharding(mesh, PartitionSpec(None, None, "tensor", None, None))
    shapes = jax.eval_shape(state, params)
    where = jax.tree.map(lambda x: replicated, shapes)
    split = DenseCache((heads,), (heads,), replicated)
    where = DecodeState(**{**vars(where), "cache": split})
    sampler = jax.eval_shape(lambda: make_sampler(ROWS))
    scalar = jax.ShapeDtypeStruct((), jnp.int32, sharding=replicated)
    with jax.set_mesh(mesh):
        compiled = advance.lower(
            {
                "target": placed(params, param_shardings(model, params, mesh)),
                "drafter": {},
            },
            placed(shapes, where),
            placed(sampler, jax.tree.map(lambda x: replicated, sampler)),
            jax.ShapeDtypeStruct((1,), jnp.int32, sharding=replicated),
            scalar,
            model=model,
            drafter=drafter,
        ).compile()
    memory = compiled.memory_analysis()
    cache = sum(x.size * x.dtype.itemsize for x in (*shapes.cache.k, *shapes.cache.v))
    print(
        json.dumps(
            {
                "cache_bytes": cache // 8,
                "temp_bytes": memory.temp_size_in_bytes,
                "argument_bytes": memory.argument_size_in_bytes,
                "alias_bytes": memory.alias_size_in_bytes,
                "all_gathers": compiled.as_text().count("all-gather("),
            }
        )
    )


if __name__ == "__main__":
    main()
