"""Configurations that are refused, with the exact words."""

import math

import pytest

from jaxllm.core.errors import ConfigError
from jaxllm.models.families import decoder_config
from tests.models.hub_configs import HUB, LLAMA3_SCALING, changed


def refusal(config):
    """The message with which a configuration is refused."""
    with pytest.raises(ConfigError) as caught:
        decoder_config(config)
    message = str(caught.value)
    assert "config.json" in message and len(message) < 500
    return message


def test_unknown_architecture():
    known = "gemma2, gemma3, gemma3_text, gpt2, llama, mistral, phi3, qwen2, qwen3"
    assert refusal({"model_type": "lama"}) == (
        f"unknown architecture: config.json: 'model_type': 'lama', expected one of "
        f"{known}. Did you mean 'llama'?"
    )
    assert refusal({"model_type": "t5"}).endswith("Choose one of these.")
    listed = "gpt2, llama, mistral, qwen2, qwen3, gemma2, gemma3_text, gemma3, phi3"
    assert refusal({"hidden_size": 8}) == (
        f"cannot read config: config.json: 'model_type' is missing, expected one of "
        f"{listed}. Correct the file."
    )
    assert refusal({"model_type": ["llama"]}).endswith(
        f"'model_type' is [\"llama\"], expected one of {listed}. Correct the file."
    )
    assert refusal(changed(architectures=["LlamaForSequenceClassification"])) == (
        "cannot read config: config.json: 'architectures' is "
        '["LlamaForSequenceClassification"], expected one of LlamaForCausalLM, '
        "LLaMAForCausalLM, LlamaModel for model_type llama. Only these are "
        "implemented."
    )
    assert "'architectures' is \"Llama\"" in refusal(changed(architectures="Llama"))


SIZE = "an integer from 1 to 1048576"


@pytest.mark.parametrize(
    ("values", "complaint"),
    [
        ({"hidden_size": ...}, f"'hidden_size' is missing, expected {SIZE}."),
        ({"hidden_size": None}, f"'hidden_size' is null, expected {SIZE}."),
        ({"hidden_size": "64"}, f"'hidden_size' is \"64\", expected {SIZE}."),
        ({"hidden_size": 64.0}, f"'hidden_size' is 64.0, expected {SIZE}."),
        ({"hidden_size": True}, f"'hidden_size' is true, expected {SIZE}."),
        ({"hidden_size": 0}, f"'hidden_size' is 0, expected {SIZE}."),
        (
            {"num_hidden_layers": 10**9},
            "'num_hidden_layers' is 1000000000, expected an integer from 1 to 1024.",
        ),
        (
            {"vocab_size": 10**5000},
            "'vocab_size' is a value of type int, expected an integer from 1 to "
            "16777216.",
        ),
        (
            {"rms_norm_eps": math.nan},
            "'rms_norm_eps' is NaN, expected a number from 0 to 1.",
        ),
        (
            {"rope_theta": math.inf},
            "'rope_theta' is Infinity, expected a number from 1.001 to 1e+12.",
        ),
        (
            {"rope_theta": 10**400},
            "'rope_theta' is 1" + "0" * 76 + "..., expected a number from 1.001 to "
            "1e+12.",
        ),
        (
            {"tie_word_embeddings": 1},
            "'tie_word_embeddings' is 1, expected true or false.",
        ),
        (
            {"num_attention_heads": 5},
            "'num_attention_heads' is 5, expected a multiple of "
            "'num_key_value_heads', 2.",
        ),
        (
            {"num_attention_heads": 6},
            "'hidden_size' is 64, expected a multiple of 'num_attention_heads', 6.",
        ),
        (
            {"head_dim": 15},
            "'head_dim' is 15, expected an even number, not 15.",
        ),
        (
            {"torch_dtype": 32},
            "'torch_dtype' is 32, expected the name of a dtype.",
        ),
        ({"rope_scaling": 2}, "'rope_scaling' is 2, expected an object {...}."),
        (
            {"sliding_window": 128},
            "'sliding_window' is 128, expected null for this model_type.",
        ),
    ],
)
def test_bad_values(values, complaint):
    assert refusal(changed(**values)) == (
        f"cannot read config: config.json: {complaint} Correct the file."
    )


@pytest.mark.parametrize(
    ("name", "values", "complaint"),
    [
        (
            "llama-3.1",
            {"hidden_act": "mish"},
            "'hidden_act' is \"mish\", expected one of silu, swish, gelu, gelu_python, "
            "gelu_new, gelu_pytorch_tanh, gelu_python_tanh, gelu_fast, gelu_accurate, "
            "relu. Only these are implemented.",
        ),
        (
            "llama-3.1",
            {"quantization_config": {"quant_method": "gptq", "bits": 4}},
            "'quantization_config' says that the weights were quantized by gptq, "
            "expected plain weights. Load the checkpoint that they were made from.",
        ),
        (
            "gpt2",
            {"scale_attn_by_inverse_layer_idx": True},
            "'scale_attn_by_inverse_layer_idx' is true, expected false. Nothing else "
            "is implemented.",
        ),
        (
            "qwen2.5",
            {"is_causal": False},
            "'is_causal' is false, expected true. Nothing else is implemented.",
        ),
        (
            "llama-3.1",
            {"num_local_experts": 8},
            "'num_local_experts' is 8, expected null. Nothing else is implemented.",
        ),
        (
            "mistral-0.1",
            {"attention_bias": True},
            "'attention_bias' is true, expected false for this model_type. Correct "
            "the file.",
        ),
        (
            "qwen2.5",
            {"attention_bias": False},
            "'attention_bias' is false, expected true for this model_type. Correct "
            "the file.",
        ),
        (
            "gemma-3-1b",
            {"attn_logit_softcapping": 50.0},
            "'attn_logit_softcapping' is 50.0, expected null for this model_type. "
            "Correct the file.",
        ),
        (
            "gemma-2",
            {"sliding_window": None},
            "'sliding_window' is null, expected an integer from 1 to 1073741823. "
            "Correct the file.",
        ),
        (
            "qwen2.5",
            {"layer_types": ["full_attention", "sliding_attention"]},
            '\'layer_types\' is ["full_attention", "sliding_attention"], expected no '
            "local layer without 'use_sliding_window' and a window. Correct the file.",
        ),
        (
            "gemma-2",
            {"layer_types": ["chunked_attention"] * 2},
            '\'layer_types\' is ["chunked_attention", "chunked_attention"], expected '
            "a list of 2 words out of full_attention, sliding_attention. Correct the "
            "file.",
        ),
        (
            "gemma-3-4b",
            {"text_config": {"hidden_size": "wide"}},
            "'text_config.num_hidden_layers' is missing, expected an integer from 1 "
            "to 1024. Correct the file.",
        ),
    ],
)
def test_what_is_not_implemented(name, values, complaint):
    assert refusal(changed(HUB[name], **values)) == (
        f"cannot read config: config.json: {complaint}"
    )


LINEAR = {"rope_type": "linear", "factor": 2.0}


@pytest.mark.parametrize(
    ("scaling", "complaint"),
    [
        (
            {"rope_type": "ntk"},
            "'rope_scaling.rope_type' is \"ntk\", expected one of default, linear, "
            "dynamic, yarn, llama3, longrope, su. Only these are implemented.",
        ),
        (
            {"type": "linear"},
            "'rope_scaling.factor' is missing, expected a number from 1 to 1e+06. "
            "Correct the file.",
        ),
        (
            LINEAR | {"factor": "2"},
            "'rope_scaling.factor' is \"2\", expected a number from 1 to 1e+06. "
            "Correct the file.",
        ),
        (
            LLAMA3_SCALING | {"high_freq_factor": 1.0},
            "'rope_scaling.high_freq_factor' is 1.0, expected more than "
            "'low_freq_factor', 1. Correct the file.",
        ),
        (
            {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [1.0]},
            "'rope_scaling.short_factor' is [1.0], expected a list of 8 numbers. "
            "Correct the file.",
        ),
        (
            LINEAR | {"partial_rotary_factor": 0.5},
            "'rope_scaling.partial_rotary_factor' is 0.5, expected 1. Only Phi-3 "
            "rotates a part.",
        ),
    ],
)
def test_bad_rotations(scaling, complaint):
    assert refusal(changed(rope_scaling=scaling)) == (
        f"cannot read config: config.json: {complaint}"
    )


def test_unknown_field_of_a_rotation():
    message = refusal(changed(rope_scaling=LINEAR | {"facter": 2.0}))
    assert message.startswith(
        "unknown field: config.json: rope_scaling: 'facter', expected one of "
    )
    assert message.endswith("Did you mean 'factor'?")


def test_spellings_that_differ():
    both = changed(rope_scaling=LINEAR, rope_parameters=LINEAR | {"factor": 4.0})
    assert refusal(both) == (
        'cannot read config: config.json: \'rope_scaling\' is {"rope_type": "linear", '
        "\"factor\": 2.0}, expected what 'rope_parameters' says. Remove one of the two."
    )
    lengths = HUB["phi-3.5"]["rope_scaling"] | {"original_max_position_embeddings": 32}
    assert refusal(changed(HUB["phi-3.5"], rope_scaling=lengths)) == (
        "cannot read config: config.json: "
        "'rope_scaling.original_max_position_embeddings' is 32, expected the same as "
        "at the top level, 64. Correct the file."
    )
