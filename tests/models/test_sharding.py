"""Where parameters go on a mesh: from names and sizes alone, so one device will do."""

import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxllm.attention.rope import RopeConfig
from jaxllm.core import ShardingError, ShardingRules
from jaxllm.core.sharding import MESH_AXES
from jaxllm.layers import AttentionConfig, MlpConfig, NormConfig
from jaxllm.models import DecoderConfig, make_model
from jaxllm.models.sharding import check_mesh, param_shardings
from jaxllm.quantization import Int8, IntTensor, quantize_params


def make(heads=8, kv_heads=4, vocabulary=64, hidden=96, stacks=(1, 2)):
    config = DecoderConfig(
        vocabulary=vocabulary,
        width=32,
        num_layers=sum(stacks),
        max_positions=16,
        attention=AttentionConfig(
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=8,
            qkv_bias=True,
            qk_norm=NormConfig(),
        ),
        mlp=MlpConfig(hidden=hidden),
        ropes=(RopeConfig(rotary_dim=8),),
        learned_positions=True,
    )
    return make_model(config, stacks=stacks)


def mesh_of(**sizes):
    return AbstractMesh(tuple(sizes.get(a, 1) for a in MESH_AXES), MESH_AXES)


def specs(model, params, **sizes):
    shardings = param_shardings(model, params, mesh_of(**sizes))
    assert jax.tree.structure(shardings) == jax.tree.structure(params)
    return jax.tree.map(lambda s: tuple(s.spec), shardings)


def test_every_axis_is_split_as_its_name_says():
    model, params = make()
    found = specs(model, params, fsdp=2, tensor=4)
    assert found["embedder"]["table"] == ("tensor", "fsdp")
    assert found["embedder"]["positions"] == (None, "fsdp")
    assert found["head"]["kernel"] == ("fsdp", "tensor")
    assert found["final_norm"]["scale"] == (None,)
    for stack in found["stacks"]:
        attention = stack["attention"]
        assert attention["query"]["kernel"] == (None, "fsdp", "tensor")
        assert attention["query"]["bias"] == (None, "tensor")
        assert attention["key"]["kernel"] == (None, "fsdp", "tensor")
        assert attention["output"]["kernel"] == (None, "tensor", "fsdp")
        assert attention["query_norm"]["scale"] == (None, None)
        assert stack["mlp"]["up"]["kernel"] == (None, "fsdp", "tensor")
        assert stack["mlp"]["down"]["kernel"] == (None, "tensor", "fsdp")
        assert stack["mlp_norm"]["scale"] == (None, None)


@pytest.mark.parametrize(
    ("kv_heads", "ways", "split"), [(4, 4, True), (4, 8, False), (1, 8, False)]
)
def test_heads_of_keys_are_never_cut(kv_heads, ways, split):
    # 4 heads of 8 dims make an axis of 32, which 8 divides; 4 does not.
    model, params = make(kv_heads=kv_heads)
    found = specs(model, params, tensor=ways)["stacks"][0]["attention"]
    axis = "tensor" if split else None
    assert found["key"]["kernel"] == (None, None, axis)
    assert found["value"]["bias"] == (None, axis)
    assert found["query"]["kernel"] == (None, None, "tensor")


def test_a_scale_is_split_with_its_channels():
    model, params = make()
    params = jax.eval_shape(lambda p: quantize_params(p, Int8()), params)
    found = specs(model, params, fsdp=2, tensor=4)
    assert found["embedder"]["table"] == IntTensor(("tensor", "fsdp"), ("tensor", None))
    mlp = found["stacks"][1]["mlp"]
    up, down = (None, "fsdp", "tensor"), (None, "tensor", "fsdp")
    assert mlp["up"]["kernel"] == IntTensor(up, (None, None, "tensor"))
    assert mlp["down"]["kernel"] == IntTensor(down, (None, None, "fsdp"))
    assert found["stacks"][0]["attention"]["key"]["bias"] == (None, "tensor")


def test_what_the_model_does_not_name_is_replicated():
    model, params = make()
    params = params | {"extra": {"kernel": jnp.zeros((8, 8))}}
    assert specs(model, params, tensor=4)["extra"]["kernel"] == ()


def test_other_rules_are_followed():
    model, params = make()
    rules = ShardingRules((("ffn", ("data",)),))
    found = param_shardings(model, params, mesh_of(data=2, tensor=4), rules)
    kernel = found["stacks"][0]["mlp"]["up"]["kernel"]
    assert isinstance(kernel, NamedSharding) and kernel.spec == P(None, None, "data")
    assert found["head"]["kernel"].spec == P(None, None)


def test_a_vocabulary_that_does_not_divide_is_replicated():
    model, params = make(vocabulary=62)
    found = param_shardings(model, params, mesh_of(tensor=4))
    assert found["head"]["kernel"].spec == P(None, None)


@pytest.mark.parametrize(
    ("options", "sizes", "message"),
    [
        (
            {"heads": 6, "kv_heads": 2},
            {"tensor": 4},
            "axis 'heads' has size 6, expected a multiple of 4 (mesh axes tensor)",
        ),
        (
            {"hidden": 90},
            {"tensor": 4},
            "axis 'ffn' has size 90, expected a multiple of 4 (mesh axes tensor)",
        ),
        (
            {},
            {"fsdp": 3},
            "axis 'embed' has size 32, expected a multiple of 3 (mesh axes fsdp)",
        ),
    ],
)
def test_a_mesh_that_does_not_divide_is_refused(options, sizes, message):
    model, params = make(**options)
    message = f"cannot shard: {message}. Choose mesh sizes that divide it."
    for check in (
        lambda: check_mesh(model.config, mesh_of(**sizes)),
        lambda: param_shardings(model, params, mesh_of(**sizes)),
    ):
        with pytest.raises(ShardingError, match=f"^{re.escape(message)}$"):
            check()
    check_mesh(model.config, mesh_of(data=8))
