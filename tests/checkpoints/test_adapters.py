"""Adapters in files: what is written is read, for every family and any stacks."""

import dataclasses
import json
import re

import jax
import numpy as np
import pytest

from jaxllm.checkpoints import (
    load_adapter,
    load_language_model,
    read_metadata,
    read_safetensors,
    save_adapter,
    save_language_model,
    save_workdir,
    write_safetensors,
)
from jaxllm.compression import (
    LoraTensor,
    adapter_names,
    merge,
    remove,
    trainable,
)
from jaxllm.core import CheckpointError, ConfigError
from jaxllm.core.partition import join, split
from jaxllm.models import restack
from tests.checkpoints.adapter_files import (
    PREFIX,
    draw,
    load,
    logits,
    query_tensors,
    with_random_lora,
    write_adapter,
)
from tests.checkpoints.small_checkpoint import (
    CONFIGS,
    assert_equal_trees,
    make_tensors,
    write_checkpoint,
)


@pytest.mark.parametrize(
    ("name", "stacks", "dtype"),
    [
        *((name, (1, 2), "float32") for name in CONFIGS),
        *(("phi3", stacks, "bfloat16") for stacks in ((1, 1, 1), (3,))),
        *(("llama", stacks, "bfloat16") for stacks in ((1, 1, 1), (3,))),
    ],
)
def test_what_is_written_is_read_bit_for_bit(tmp_path, name, stacks, dtype):
    lm = load(tmp_path / "model", name, stacks=stacks)
    ours = with_random_lora(lm, rank=4, alpha=6.0)
    factors, rest = split(ours.params, trainable)
    params = join(jax.tree.map(lambda x: x.astype(dtype), factors), rest)
    ours = dataclasses.replace(ours, params=params)
    save_adapter(ours, tmp_path / "adapter")
    again = load_adapter(tmp_path / "adapter", lm)
    assert_equal_trees(again.params, ours.params)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_other_stacks_read_the_same_adapter(tmp_path, name):
    ours = with_random_lora(load(tmp_path / "model", name, stacks=(1, 1, 1)))
    save_adapter(ours, tmp_path / "adapter")
    for stacks in ((3,), (2, 1)):
        other = load(tmp_path / "model", name, stacks=stacks)
        other = load_adapter(tmp_path / "adapter", other)
        wanted = restack(ours.params, stacks)
        assert_equal_trees(other.params, wanted)


@pytest.mark.parametrize("alpha", [16, 0.1, 7.31234])
@pytest.mark.parametrize("rank", [1, 3, 8])
@pytest.mark.parametrize("rslora", [False, True])
def test_what_an_adapter_counts_survives(tmp_path, alpha, rank, rslora):
    lm = load(tmp_path / "model")
    options = {"rank": rank, "alpha": alpha, "rslora": rslora}
    ours = with_random_lora(lm, ("query",), **options)
    save_adapter(ours, tmp_path / "adapter")
    again = load_adapter(tmp_path / "adapter", lm)
    assert_equal_trees(again.params, ours.params)
    content = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert content["r"] == rank and content["use_rslora"] is False
    assert rslora or content["lora_alpha"] == alpha
    assert content["rank_pattern"] == content["alpha_pattern"] == {}


def test_the_files_have_the_names_and_shapes_of_the_layout(tmp_path):
    lm = with_random_lora(load(tmp_path / "model"), ("query", "down"), rank=5)
    save_adapter(lm, tmp_path / "adapter")
    found = read_safetensors(tmp_path / "adapter" / "adapter_model.safetensors")
    wanted = {}
    for layer in range(3):
        stem = f"{PREFIX}model.layers.{layer}"
        wanted |= {
            f"{stem}.self_attn.q_proj.lora_A.weight": (5, 32),
            f"{stem}.self_attn.q_proj.lora_B.weight": (32, 5),
            f"{stem}.mlp.down_proj.lora_A.weight": (5, 48),
            f"{stem}.mlp.down_proj.lora_B.weight": (32, 5),
        }
    assert {key: tensor.shape for key, tensor in found.items()} == wanted
    content = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert sorted(content["target_modules"]) == ["down_proj", "q_proj"]
    assert content["peft_type"] == "LORA" and content["task_type"] == "CAUSAL_LM"
    assert content["base_model_name_or_path"] == str(tmp_path / "model")
    leaf = lm.params["stacks"][0]["mlp"]["down"]["kernel"]
    stored = found[f"{PREFIX}model.layers.0.mlp.down_proj.lora_A.weight"].read()
    np.testing.assert_array_equal(stored.T, leaf.a_IR[0])


def test_a_fused_module_shares_a_and_cuts_b(tmp_path):
    lm = load(tmp_path / "model", "gpt2")
    tensors = {}
    for layer in range(3):
        module = f"{PREFIX}transformer.h.{layer}.attn.c_attn"
        tensors[f"{module}.lora_A.weight"] = draw((2, 32), layer)
        tensors[f"{module}.lora_B.weight"] = draw((96, 2), layer + 9)
    write_adapter(tmp_path / "adapter", tensors, target_modules=["c_attn"])
    ours = load_adapter(tmp_path / "adapter", lm)
    for layer, stack in enumerate(merge(ours.params)["stacks"]):
        low = tensors[f"{PREFIX}transformer.h.{layer}.attn.c_attn.lora_B.weight"]
        low = 2 * (
            low @ tensors[f"{PREFIX}transformer.h.{layer}.attn.c_attn.lora_A.weight"]
        )
        for third, name in enumerate(("query", "key", "value")):
            base = lm.params["stacks"][layer]["attention"][name]["kernel"][0]
            wanted = base + low[third * 32 : third * 32 + 32].T
            found = stack["attention"][name]["kernel"][0]
            np.testing.assert_allclose(found, wanted, atol=1e-6)
    # Written again while A is shared, the file is the same.
    save_adapter(ours, tmp_path / "again")
    again = read_safetensors(tmp_path / "again" / "adapter_model.safetensors")
    assert again.keys() == tensors.keys()
    for key, tensor in tensors.items():
        np.testing.assert_array_equal(again[key].read(), tensor)
    metadata = read_metadata(tmp_path / "again" / "adapter_model.safetensors")
    assert metadata == {"format": "pt"}


@pytest.mark.parametrize("name", ["gpt2", "phi3"])
@pytest.mark.parametrize("targets", [("query",), ("value", "query"), ("up", "key")])
def test_projections_adapted_apart_are_fused_as_blocks(tmp_path, name, targets):
    lm = load(tmp_path / "model", name)
    ours = with_random_lora(lm, targets)
    save_adapter(ours, tmp_path / "adapter")
    again = load_adapter(tmp_path / "adapter", lm)
    assert_equal_trees(again.params, ours.params)
    # To a reader that knows of no blocks it is the same function.
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    write_safetensors(path, read_safetensors(path))
    plain = load_adapter(tmp_path / "adapter", lm)
    assert jax.tree.structure(plain.params) != jax.tree.structure(ours.params)
    np.testing.assert_allclose(logits(plain), logits(ours), atol=1e-5)


@pytest.mark.parametrize(
    "blocks",
    [
        "{",
        "[]",
        '{"transformer.h.0.attn.c_attn": {"query": -1}}',
        '{"transformer.h.0.attn.c_attn": {"query": 2}}',
        '{"transformer.h.0.attn.c_attn": {"query": 3, "value": 3}}',
        '{"transformer.h.0.attn.c_attn": {"nobody": 6}}',
    ],
)
def test_blocks_are_believed_only_where_they_fit(tmp_path, blocks):
    lm = load(tmp_path / "model", "gpt2")
    tensors = {}
    for side, shape in (("A", (6, 32)), ("B", (96, 6))):
        key = f"{PREFIX}transformer.h.0.attn.c_attn.lora_{side}.weight"
        tensors[key] = draw(shape)
    write_adapter(tmp_path / "adapter", tensors, {"jaxllm_blocks": blocks}, r=6)
    found = load_adapter(tmp_path / "adapter", lm).params["stacks"][0]["attention"]
    for name in ("query", "key", "value"):
        assert found[name]["kernel"].a_IR.shape == (1, 32, 6)


def test_an_untied_head_and_a_bare_decoder_are_found(tmp_path):
    lm = load(tmp_path / "model")
    tensors = {
        f"{PREFIX}lm_head.lora_A.weight": draw((2, 32)),
        f"{PREFIX}lm_head.lora_B.weight": draw((64, 2)),
        f"{PREFIX}layers.1.mlp.up_proj.lora_A.weight": draw((2, 32)),
        f"{PREFIX}layers.1.mlp.up_proj.lora_B.weight": draw((48, 2)),
    }
    write_adapter(tmp_path / "adapter", tensors)
    found = load_adapter(tmp_path / "adapter", lm).params
    assert found["head"]["kernel"].b_RO.shape == (2, 64)
    assert isinstance(found["stacks"][1]["mlp"]["up"]["kernel"], LoraTensor)
    assert not isinstance(found["stacks"][0]["mlp"]["up"]["kernel"], LoraTensor)


@pytest.mark.parametrize("layout", ["language_model.model.", "model.language_model."])
def test_a_model_that_sees_has_its_decoder_under_two_names(tmp_path, layout):
    vision = {"model_type": "siglip_vision_model"}
    text = {k: v for k, v in CONFIGS["gemma3_text"].items() if k != "architectures"}
    config = {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "model_type": "gemma3",
        "text_config": text,
        "vision_config": vision,
    }
    tensors = {
        f"language_model.{key}": tensor
        for key, tensor in make_tensors(CONFIGS["gemma3_text"]).items()
    }
    write_checkpoint(tmp_path / "model", config, tensors)
    lm = load_language_model(tmp_path / "model", dtype="float32")
    adapter = {
        key.replace("model.layers", f"{layout}layers"): tensor
        for key, tensor in query_tensors().items()
    }
    write_adapter(tmp_path / "adapter", adapter, target_modules=["q_proj"])
    ours = load_adapter(tmp_path / "adapter", lm)
    save_adapter(ours, tmp_path / "again")
    again = read_safetensors(tmp_path / "again" / "adapter_model.safetensors")
    wanted = f"{PREFIX}model.language_model.layers.0.self_attn.q_proj.lora_A.weight"
    assert wanted in again and len(again) == 6


def test_ranks_and_alphas_of_single_modules(tmp_path):
    lm = load(tmp_path / "model", stacks=(3,))
    tensors = query_tensors() | {
        f"{PREFIX}model.layers.1.self_attn.q_proj.lora_A.weight": draw((5, 32)),
        f"{PREFIX}model.layers.1.self_attn.q_proj.lora_B.weight": draw((32, 5)),
    }
    config = {
        "rank_pattern": {"^model\\.layers\\.1\\.self_attn\\.q_proj$": 5},
        "alpha_pattern": {"layers.2.self_attn.q_proj": 12, "q_proj": 10},
        "use_rslora": True,
    }
    write_adapter(tmp_path / "adapter", tensors, **config)
    ours = load_adapter(tmp_path / "adapter", lm)
    leaf = ours.params["stacks"][0]["attention"]["query"]["kernel"]
    assert leaf.a_IR.shape == (3, 32, 5)
    scaling = [10 / np.sqrt(2), 10 / np.sqrt(5), 12 / np.sqrt(2)]
    np.testing.assert_allclose(leaf.scaling.ravel(), scaling, rtol=1e-6)
    for layer in range(3):
        stem = f"{PREFIX}model.layers.{layer}.self_attn.q_proj.lora_"
        wanted = (tensors[f"{stem}B.weight"] @ tensors[f"{stem}A.weight"]).T
        np.testing.assert_allclose(
            leaf.difference()[layer], wanted * scaling[layer], atol=1e-5
        )
    save_adapter(ours, tmp_path / "again")
    assert_equal_trees(load_adapter(tmp_path / "again", lm).params, ours.params)


def test_one_of_several_adapters_is_written(tmp_path):
    lm = load(tmp_path / "model")
    both = with_random_lora(with_random_lora(lm, ("up",)), ("up", "query"), "second")
    message = (
        "cannot save adapter: name: the model has 2 adapters (default, second), "
        "expected one. Give the name of one."
    )
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        save_adapter(both, tmp_path / "adapter")
    with pytest.raises(ConfigError, match="Did you mean 'second'"):
        save_adapter(both, tmp_path / "adapter", name="secnd")
    with pytest.raises(ConfigError, match=r"0 adapters \(none\).*add_lora\.$"):
        save_adapter(lm, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()
    for name in adapter_names(both.params):
        save_adapter(both, tmp_path / name, name=name)
    again = load_adapter(tmp_path / "default", lm)
    again = load_adapter(tmp_path / "second", again, name="second")
    assert_equal_trees(again.params, both.params)
    with pytest.raises(ConfigError, match="has an adapter 'second'"):
        load_adapter(tmp_path / "default", again, name="second")


def test_an_adapter_goes_around_quantized_weights(tmp_path):
    lm = load(tmp_path / "model")
    save_adapter(with_random_lora(lm), tmp_path / "adapter")
    quantized = load(tmp_path / "model", quantize="int8")
    found = load_adapter(tmp_path / "adapter", quantized)
    assert_equal_trees(remove(found.params), quantized.params)
    off = np.abs(logits(found) - logits(load_adapter(tmp_path / "adapter", lm)))
    assert 0 < off.max() < 0.2


def test_saving_a_model_refuses_adapters_or_merges_them(tmp_path):
    lm = with_random_lora(load(tmp_path / "model"), ("query", "up"))
    count = 2 * len(lm.params["stacks"])
    message = (
        f"cannot save model: {count} weights carry adapters, expected plain arrays. "
        "Pass merge=True to write them merged, write the adapter alone with "
        "save_adapter, or save an Orbax workdir."
    )
    with pytest.raises(CheckpointError, match=f"^{re.escape(message)}$"):
        save_language_model(lm, tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
    save_language_model(lm, tmp_path / "saved", merge=True)
    again = load_language_model(tmp_path / "saved", dtype="float32")
    assert_equal_trees(again.params, merge(lm.params))
    options = {"quantize": "int8", "stacks": (1, 1, 1)}
    quantized = with_random_lora(load(tmp_path / "model", **options))
    # Seven in each layer, the table and the head.
    with pytest.raises(CheckpointError, match="23 weights are IntTensor, expected"):
        save_language_model(quantized, tmp_path / "int8", merge=True)
    save_language_model(quantized, tmp_path / "int8", merge=True, dequantize=True)
    again = load_language_model(tmp_path / "int8", dtype="float32")
    np.testing.assert_allclose(logits(again), logits(quantized), atol=1e-5)


def test_a_workdir_checks_the_dtype_inside_an_adapter(tmp_path):
    lm = load(tmp_path / "model", dtype="bfloat16", stacks=(3,))
    params = with_random_lora(lm, ("up",)).params
    up = params["stacks"][0]["mlp"]["up"]
    wide = up["kernel"].base.astype("float32")
    up["kernel"] = dataclasses.replace(up["kernel"], base=wide)
    save_workdir(dataclasses.replace(lm, params=params), tmp_path / "w")
    message = "'stacks.0.mlp.up.kernel' has dtype float32, expected bfloat16"
    with pytest.raises(CheckpointError, match=message):
        load_language_model(tmp_path / "w", dtype="bfloat16", stacks=(3,))


@pytest.mark.parametrize("quantize", [None, "int8"])
def test_a_workdir_keeps_adapters(tmp_path, quantize):
    options = {"quantize": quantize, "stacks": (1, 2)}
    lm = with_random_lora(load(tmp_path / "model", **options), ("query", "up"))
    save_workdir(lm, tmp_path / "w")
    again = load_language_model(tmp_path / "w", dtype="float32", stacks=(1, 2))
    assert_equal_trees(again.params, lm.params)
    other = load_language_model(tmp_path / "w", dtype="float32", stacks=(3,))
    np.testing.assert_allclose(logits(other), logits(lm), atol=1e-5)
    if quantize is None:
        # What is inside is not quantized yet, so it can be.
        int8 = load_language_model(tmp_path / "w", dtype="float32", quantize="int8")
        wanted = with_random_lora(
            load(tmp_path / "model", quantize="int8"), ("query", "up")
        )
        assert jax.tree.structure(int8.params) == jax.tree.structure(wanted.params)


def test_some_layers_only_are_read_where_the_file_says_so(tmp_path):
    lm = load(tmp_path / "model")
    tensors = query_tensors(layers=1)
    config = {"target_modules": ["q_proj"], "layers_to_transform": 0}
    write_adapter(tmp_path / "a", tensors, **config)
    ours = load_adapter(tmp_path / "a", lm)
    save_adapter(ours, tmp_path / "again")
    content = json.loads((tmp_path / "again" / "adapter_config.json").read_text())
    assert content["target_modules"] == ["model.layers.0.self_attn.q_proj"]
    assert_equal_trees(load_adapter(tmp_path / "again", lm).params, ours.params)


def test_an_adapter_lives_on_a_mesh(tmp_path, run_with_devices):
    lm = load(tmp_path / "model", stacks=(3,))
    ours = with_random_lora(lm)
    save_adapter(ours, tmp_path / "adapter")
    np.save(tmp_path / "logits.npy", logits(ours))
    code = f"""
import jax, jax.numpy as jnp, numpy as np
from jaxllm.checkpoints import load_adapter, load_language_model, save_adapter
directory = {str(tmp_path)!r}
lm = load_language_model(
    directory + "/model", dtype="float32", mesh="fsdp=4,tensor=2", stacks=(3,)
)
lm = load_adapter(directory + "/adapter", lm)
leaf = lm.params["stacks"][0]["attention"]["query"]["kernel"]
specs = [tuple(x.sharding.spec) for x in (leaf.base, leaf.a_IR, leaf.b_RO)]
wanted = [(None, "fsdp", "tensor"), (None, "fsdp", None), (None, None, "tensor")]
assert specs == wanted, specs
tokens = jnp.asarray(np.random.default_rng(1).integers(4, 64, (2, 12)))
with jax.set_mesh(lm.mesh):
    found = jax.jit(lm.model)(lm.params, tokens).logits_BTV
assert np.abs(found - np.load(directory + "/logits.npy")).max() < 1e-5
save_adapter(lm, directory + "/again")
"""
    run_with_devices(8, code)
    first, second = (
        (tmp_path / name / "adapter_model.safetensors").read_bytes()
        for name in ("adapter", "again")
    )
    assert first == second
