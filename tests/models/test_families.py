"""Configurations and names: what is read, what is written, and that it is the same."""

import copy
import dataclasses
import json
import math

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from jaxllm.attention import GLOBAL_WINDOW, RopeConfig, rope_tables
from jaxllm.core.errors import ConfigError
from jaxllm.layers import AttentionConfig, NormConfig
from jaxllm.models.families import FAMILIES, decoder_config, family_of
from tests.models.golden_files import VARIANTS, array_shapes, config_json, model_from
from tests.models.hub_configs import HUB, LLAMA, LLAMA3_SCALING, changed

# What is read


def test_llama():
    config = decoder_config(HUB["llama-3.1"])
    assert config.attention == AttentionConfig(
        num_heads=32, num_kv_heads=8, head_dim=128
    )
    assert (config.vocabulary, config.width, config.num_layers) == (128256, 4096, 32)
    assert (config.mlp.hidden, config.mlp.activation) == (14336, "silu")
    assert config.max_positions == 131072
    assert config.norm.eps == 1e-5
    assert not config.tied_head
    assert config.ropes == (
        RopeConfig(
            rotary_dim=128,
            theta=500000.0,
            kind="llama3",
            factor=8.0,
            original_length=8192,
        ),
    )


def test_gpt2():
    config = decoder_config(HUB["gpt2"])
    assert config.learned_positions and config.tied_head and not config.ropes
    assert config.mlp.hidden == 4 * 768 and config.mlp.activation == "gelu_tanh"
    assert not config.mlp.gated and config.mlp.bias
    assert config.norm.kind == "layer" and config.norm.bias
    unscaled = changed(HUB["gpt2"], scale_attn_weights=False)
    assert decoder_config(unscaled).attention.scale == 1.0


def test_windows():
    def windows(name, **values):
        return decoder_config(changed(HUB[name], **values)).layer_window

    none = GLOBAL_WINDOW
    assert windows("mistral-0.1") == (4096, 4096)
    assert windows("mistral-0.1", sliding_window=...) == (4096, 4096)
    assert windows("mistral-0.3") == (none, none)
    assert windows("phi-3.5") == (262144, 262144)
    assert windows("phi-3.5", sliding_window=...) == (none, none)
    assert windows("qwen2.5") == (none, none)
    local = {"use_sliding_window": True, "sliding_window": 8}
    assert windows("qwen2.5", **local, max_window_layers=1) == (none, 8)
    assert windows("qwen2.5", **local, max_window_layers=0) == (8, 8)
    assert windows("qwen2.5", **local) == (none, none)
    types = ["sliding_attention", "full_attention"]
    assert windows("qwen2.5", **local, layer_types=types) == (8, none)
    assert windows("gemma-2") == (128, none)
    assert windows("gemma-2", layer_types=types[::-1]) == (none, 128)
    assert windows("gemma-3-1b") == (512,) * 5 + (none, 512)


def test_gemma():
    second, third = (decoder_config(HUB[n]) for n in ("gemma-2", "gemma-3-1b"))
    assert second.attention.scale == 144**-0.5
    assert (second.attention.softcap, second.final_softcap) == (50.0, 30.0)
    assert second.attention.qk_norm is None and second.layer_rope == (0, 0)
    assert (third.attention.softcap, third.final_softcap) == (None, None)
    assert third.attention.qk_norm == third.norm == NormConfig(eps=1e-5, offset=1.0)
    assert third.layer_rope == (1, 1, 1, 1, 1, 0, 1)
    assert [rope.theta for rope in third.ropes] == [1e6, 1e4]
    for config in (second, third):
        assert config.post_norms and config.tied_head
        assert config.embedding_scale == 8.0
        assert config.mlp.activation == "gelu_tanh"


def test_gemma_with_a_vision_encoder():
    config = decoder_config(HUB["gemma-3-4b"])
    assert config.attention.num_heads == 8 and config.attention.num_kv_heads == 4
    assert config.attention.head_dim == 256 and config.vocabulary == 262208
    assert config.ropes[0].kind == "linear" and config.ropes[1].kind == "default"
    # It is written as a text model, which that family reads back.
    written = FAMILIES["gemma3"].to_hf(config)
    assert written["model_type"] == "gemma3_text"
    assert decoder_config(written) == config


def test_defaults_of_absent_keys():
    plain = decoder_config(changed(num_key_value_heads=..., rms_norm_eps=...))
    assert plain.attention.num_kv_heads == 4 and plain.attention.head_dim == 16
    assert plain.norm.eps == 1e-6
    assert plain.ropes == (RopeConfig(rotary_dim=16, theta=10000.0),)
    null = decoder_config(changed(head_dim=None, rope_scaling=None, rope_theta=None))
    assert null == decoder_config(LLAMA)


def test_rope_spellings_agree():
    old = changed(rope_theta=500000.0, rope_scaling=LLAMA3_SCALING)
    new = changed(rope_parameters=LLAMA3_SCALING | {"rope_theta": 500000.0})
    assert decoder_config(old) == decoder_config(new)
    assert decoder_config(old | new) == decoder_config(old)
    older = {"type": "linear", "factor": 2}
    linear = decoder_config(changed(rope_scaling=older)).ropes[0]
    assert (linear.kind, linear.factor) == ("linear", 2.0)
    phi = decoder_config(HUB["phi-4-mini"]).ropes[0]
    assert (phi.kind, phi.rotary_dim, phi.original_length) == ("longrope", 12, 64)
    assert phi.factor == 4.0
    # Of this family the reference knows the length, and takes no other.
    silent = changed(HUB["phi-4-mini"], original_max_position_embeddings=...)
    assert decoder_config(silent).ropes[0].original_length == 4096
    nested = {
        "full_attention": {"rope_type": "default", "rope_theta": 1000000},
        "sliding_attention": {"rope_type": "default", "rope_theta": 10000},
    }
    names = ("rope_theta", "rope_local_base_freq", "rope_scaling")
    gemma = changed(HUB["gemma-3-1b"], **dict.fromkeys(names, ...))
    gemma["rope_parameters"] = nested
    assert decoder_config(gemma) == decoder_config(HUB["gemma-3-1b"])


def test_architecture_without_model_type():
    assert family_of(changed(model_type=...)) is FAMILIES["llama"]


def test_harmless_keys_are_accepted():
    harmless = {"use_cache": True, "initializer_range": 0.1, "transformers.js": {}}
    assert decoder_config(LLAMA | harmless) == decoder_config(LLAMA)


# What is written


@pytest.mark.parametrize("name", [*HUB, *VARIANTS])
def test_round_trip(name):
    source = HUB[name] if name in HUB else config_json(name)
    config = decoder_config(source)
    written = family_of(source).to_hf(config)
    assert decoder_config(json.loads(json.dumps(written))) == config


def test_the_family_must_express_the_model():
    config = decoder_config(HUB["gemma-2"])
    with pytest.raises(ConfigError) as caught:
        FAMILIES["llama"].to_hf(config)
    assert str(caught.value) == (
        "cannot write config: config.json: 'attention.scale' is 0.08333333333333333, "
        "expected null for model_type llama. Save the model as another family."
    )
    with pytest.raises(ConfigError) as caught:
        FAMILIES["gemma3_text"].to_hf(config)
    assert str(caught.value) == (
        "cannot write config: config.json: the model has 1 rotations, expected 2. "
        "Save it as another family."
    )


@pytest.mark.parametrize("head_dim", [8, 80, 96, 100, 128, 256])
def test_partial_rotations_are_written_exactly(head_dim):
    plain = changed(HUB["phi-3.5"], head_dim=head_dim, rope_scaling=...)
    config = decoder_config(plain)
    for rotary_dim in range(2, head_dim + 1, 2):
        rope = dataclasses.replace(config.ropes[0], rotary_dim=rotary_dim)
        part = dataclasses.replace(config, ropes=(rope,))
        assert decoder_config(FAMILIES["phi3"].to_hf(part)) == part


# Names


def test_names_of_a_vision_language_checkpoint():
    """The decoder's tensors are found under either prefix, and fill every place."""
    config = copy.deepcopy(HUB["gemma-3-4b"])
    small = {
        "num_hidden_layers": 1,
        "hidden_size": 8,
        "intermediate_size": 4,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 4,
        "vocab_size": 6,
    }
    config["text_config"] |= small
    family = family_of(config)
    architecture = family.to_config(config)
    shapes = array_shapes(architecture)
    for prefix in ("language_model.model.", "model.language_model."):
        tensors = {}
        for rule in family.rules(architecture):
            name = rule.source.replace("language_model.model.", prefix)
            shape = shapes[rule.path]
            tensors[name] = np.zeros(shape[::-1] if rule.transpose else shape)
        model_from(config, tensors)


def test_names_without_the_head():
    family = FAMILIES["gpt2"]
    config = decoder_config(HUB["gpt2"])
    rule = next(r for r in family.rules(config) if r.path[-2:] == ("key", "bias"))
    assert family.sources(rule) == (
        "transformer.h.0.attn.c_attn.bias",
        "h.0.attn.c_attn.bias",
    )
    assert rule.part == (768, 1536) and not rule.transpose


# Anything at all


def places(value, path=()):
    """Every place in a JSON value, as paths of keys."""
    if path:
        yield path
    if isinstance(value, dict):
        for key, item in value.items():
            yield from places(item, (*path, key))
    elif isinstance(value, list):
        for i, item in enumerate(value):
            yield from places(item, (*path, i))


SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-4, 300),
    st.sampled_from([2**31, 2**63, 10**9, 10**30, -(10**400)]),
    st.floats(),
    st.text(max_size=5),
    st.sampled_from(["linear", "dynamic", "yarn", "llama3", "longrope", "default"]),
)
ANY_JSON = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.dictionaries(st.text(max_size=5), inner, max_size=3),
    ),
    max_leaves=5,
)
SOURCES = [*HUB.values(), *map(config_json, VARIANTS)]


@hypothesis.settings(max_examples=600)
@hypothesis.given(st.sampled_from(SOURCES), st.data())
def test_any_edit_is_read_or_refused(source, data):
    config = copy.deepcopy(source)
    for _ in range(data.draw(st.integers(1, 3))):
        *above, key = data.draw(st.sampled_from(list(places(config))))
        holder = config
        for step in above:
            holder = holder[step]
        if data.draw(st.booleans()):
            holder[key] = data.draw(ANY_JSON)
        else:
            del holder[key]
        if not config:
            return
    try:
        read = decoder_config(config)
    except ConfigError as error:
        # A word that a file holds may have any sign in it, but is cut short.
        assert len(str(error)) < 700
        return
    family = family_of(config)
    assert len({rule.path for rule in family.rules(read)}) == len(family.rules(read))
    for rope in read.ropes:
        for length in (0, 5000):
            inverse, factor = rope_tables(rope, length)
            assert np.isfinite(inverse).all() and math.isfinite(factor)
    assert decoder_config(family.to_hf(read)) == read
