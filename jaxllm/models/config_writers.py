"""From `DecoderConfig` to the `config.json` of each family.

A writer puts down what its family can say; `jaxllm.models.families` reads it back and
refuses where that gives another model.
"""

from typing import Any

from jaxllm.attention.masks import GLOBAL_WINDOW
from jaxllm.attention.rope import RopeConfig
from jaxllm.core.errors import ConfigError
from jaxllm.models.config_fields import FILE_NAME
from jaxllm.models.decoder import DecoderConfig
from jaxllm.models.rope_fields import LAYER_TYPES, write_layer_ropes, write_rope

__all__ = [
    "write_gemma2",
    "write_gemma3",
    "write_gpt2",
    "write_llama",
    "write_mistral",
    "write_phi3",
    "write_qwen2",
    "write_qwen3",
]

_ACTIVATIONS = {"gelu_tanh": "gelu_pytorch_tanh"}


def write_llama(config: DecoderConfig) -> dict[str, Any]:
    """Returns the content of a Llama's `config.json`."""
    return _body(config, "LlamaForCausalLM", "llama") | {
        "attention_bias": config.attention.qkv_bias,
        "mlp_bias": config.mlp.bias,
        **_rope(config),
    }


def write_mistral(config: DecoderConfig) -> dict[str, Any]:
    """Returns the content of a Mistral's `config.json`."""
    return _body(config, "MistralForCausalLM", "mistral") | {
        "sliding_window": _window(config),
        **_rope(config),
    }


def write_qwen2(config: DecoderConfig) -> dict[str, Any]:
    """Returns the content of a Qwen2's `config.json`."""
    return (
        _body(config, "Qwen2ForCausalLM", "qwen2")
        | _qwen_windows(config)
        | _rope(config)
    )


def write_qwen3(config: DecoderConfig) -> dict[str, Any]:
    """Returns the content of a Qwen3's `config.json`."""
    return (
        _body(config, "Qwen3ForCausalLM", "qwen3")
        | {"attention_bias": config.attention.qkv_bias}
        | _qwen_windows(config)
        | _rope(config)
    )


def write_phi3(config: DecoderConfig) -> dict[str, Any]:
    """Returns the content of a Phi-3's `config.json`."""
    return _body(config, "Phi3ForCausalLM", "phi3") | {
        "sliding_window": _window(config),
        **_rope(config),
    }


def write_gemma2(config: DecoderConfig) -> dict[str, Any]:
    """Returns the content of a Gemma 2's `config.json`."""
    return (
        _body(config, "Gemma2ForCausalLM", "gemma2")
        | _gemma(config)
        | {"attn_logit_softcapping": config.attention.softcap}
        | _rope(config)
    )


def write_gemma3(config: DecoderConfig) -> dict[str, Any]:
    """Returns the content of the `config.json` of a Gemma 3 without vision."""
    full, sliding = _ropes(config, 2)
    return (
        _body(config, "Gemma3ForCausalLM", "gemma3_text")
        | _gemma(config)
        | write_layer_ropes(full, sliding, config.max_positions)
    )


def write_gpt2(config: DecoderConfig) -> dict[str, Any]:
    """Returns the content of a GPT-2's `config.json`."""
    activation = config.mlp.activation
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": config.vocabulary,
        "n_embd": config.width,
        "n_layer": config.num_layers,
        "n_head": config.attention.num_heads,
        "n_inner": config.mlp.hidden,
        "n_positions": config.max_positions,
        "activation_function": "gelu_new" if activation == "gelu_tanh" else activation,
        "layer_norm_epsilon": config.norm.eps,
        "scale_attn_weights": config.attention.scale is None,
        "tie_word_embeddings": config.tied_head,
    }


def _body(config: DecoderConfig, architecture: str, model_type: str) -> dict[str, Any]:
    attention = config.attention
    return {
        "architectures": [architecture],
        "model_type": model_type,
        "vocab_size": config.vocabulary,
        "hidden_size": config.width,
        "intermediate_size": config.mlp.hidden,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": attention.num_heads,
        "num_key_value_heads": attention.num_kv_heads,
        "head_dim": attention.head_dim,
        "hidden_act": _activation(config),
        "max_position_embeddings": config.max_positions,
        "rms_norm_eps": config.norm.eps,
        "tie_word_embeddings": config.tied_head,
    }


def _activation(config: DecoderConfig) -> str:
    return _ACTIVATIONS.get(config.mlp.activation, config.mlp.activation)


def _ropes(config: DecoderConfig, count: int) -> tuple[RopeConfig, ...]:
    if len(config.ropes) != count:
        raise ConfigError(
            f"cannot write config: {FILE_NAME}: the model has {len(config.ropes)} "
            f"rotations, expected {count}. Save it as another family."
        )
    return config.ropes


def _rope(config: DecoderConfig) -> dict[str, Any]:
    (rope,) = _ropes(config, 1)
    return write_rope(rope, config.attention.head_dim, config.max_positions)


def _window(config: DecoderConfig) -> int | None:
    local = [w for w in config.layer_window if w != GLOBAL_WINDOW]
    return local[0] if local else None


def _layer_types(config: DecoderConfig) -> list[str]:
    return [LAYER_TYPES[w != GLOBAL_WINDOW] for w in config.layer_window]


def _qwen_windows(config: DecoderConfig) -> dict[str, Any]:
    window, types = _window(config), _layer_types(config)
    if window is None:
        return {"use_sliding_window": False, "sliding_window": None}
    return {
        "use_sliding_window": True,
        "sliding_window": window,
        "layer_types": types,
        # For readers that do not know `layer_types`.
        "max_window_layers": types.index(LAYER_TYPES[1]),
    }


def _gemma(config: DecoderConfig) -> dict[str, Any]:
    scale = config.attention.scale or config.attention.head_dim**-0.5
    scalar: float = scale**-2
    # An integer in every real file; the power above is off by a rounding.
    if round(scalar) ** -0.5 == scale:
        scalar = round(scalar)
    types = _layer_types(config)
    if len(config.ropes) == 2:
        types = [LAYER_TYPES[rope] for rope in config.layer_rope]
    return {
        "attention_bias": config.attention.qkv_bias,
        "hidden_activation": _activation(config),
        "query_pre_attn_scalar": scalar,
        "layer_types": types,
        # The reference asks for a window even where no layer uses it.
        "sliding_window": _window(config) or 4096,
        "final_logit_softcapping": config.final_softcap,
    }
