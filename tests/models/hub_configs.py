"""Contents of `config.json` as real checkpoints have them, some sizes made smaller."""

import copy

from jaxllm.models.families import FAMILIES

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "max_position_embeddings": 256,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-05,
    "vocab_size": 100,
}
LLAMA3_SCALING = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}
# The keys that count, as files of the Hub had them before transformers 5.
HUB = {
    "gpt2": {
        "model_type": "gpt2",
        "activation_function": "gelu_new",
        "attn_pdrop": 0.1,
        "layer_norm_epsilon": 1e-05,
        "n_ctx": 1024,
        "n_embd": 768,
        "n_head": 12,
        "n_layer": 12,
        "n_positions": 1024,
        "summary_type": "cls_index",
        "vocab_size": 50257,
    },
    "llama-3.1": LLAMA
    | {
        "attention_bias": False,
        "hidden_act": "silu",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "max_position_embeddings": 131072,
        "mlp_bias": False,
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "pretraining_tp": 1,
        "rope_scaling": LLAMA3_SCALING,
        "rope_theta": 500000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "vocab_size": 128256,
    },
    "mistral-0.1": LLAMA | {"model_type": "mistral", "sliding_window": 4096},
    "mistral-0.3": LLAMA | {"model_type": "mistral", "sliding_window": None},
    "qwen2.5": LLAMA
    | {
        "model_type": "qwen2",
        "max_window_layers": 28,
        "sliding_window": 131072,
        "use_mrope": False,
        "use_sliding_window": False,
        "rope_theta": 1000000.0,
    },
    "qwen3": LLAMA
    | {
        "model_type": "qwen3",
        "head_dim": 128,
        "max_window_layers": 28,
        "sliding_window": None,
        "use_sliding_window": False,
        "tie_word_embeddings": True,
    },
    "gemma-2": LLAMA
    | {
        "model_type": "gemma2",
        "attn_logit_softcapping": 50.0,
        "cache_implementation": "hybrid",
        "final_logit_softcapping": 30.0,
        "head_dim": 16,
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": 144,
        "sliding_window": 128,
    },
    "gemma-3-1b": LLAMA
    | {
        "model_type": "gemma3_text",
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
        "head_dim": 16,
        "hidden_activation": "gelu_pytorch_tanh",
        "num_hidden_layers": 7,
        "query_pre_attn_scalar": 256,
        "rope_local_base_freq": 10000,
        "rope_scaling": None,
        "rope_theta": 1000000,
        "sliding_window": 512,
        "sliding_window_pattern": 6,
    },
    "gemma-3-4b": {
        "model_type": "gemma3",
        "image_token_index": 262144,
        "text_config": {
            "hidden_size": 2560,
            "intermediate_size": 10240,
            "model_type": "gemma3_text",
            "num_hidden_layers": 34,
            "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
            "sliding_window": 1024,
        },
        "vision_config": {"hidden_size": 1152, "model_type": "siglip_vision_model"},
    },
    "phi-3.5": LLAMA
    | {
        "model_type": "phi3",
        "attention_bias": False,
        "auto_map": {"AutoConfig": "configuration_phi3.Phi3Config"},
        "original_max_position_embeddings": 64,
        "rope_scaling": {
            "long_factor": [2.0] * 8,
            "short_factor": [1.0] * 8,
            "type": "longrope",
        },
        "sliding_window": 262144,
    },
    "phi-4-mini": LLAMA
    | {
        "model_type": "phi3",
        "lm_head_bias": False,
        "original_max_position_embeddings": 64,
        "partial_rotary_factor": 0.75,
        "rope_scaling": {
            "long_factor": [2.0] * 6,
            "short_factor": [1.0] * 6,
            "type": "su",
        },
        "tie_word_embeddings": True,
    },
}
for _file in HUB.values():
    _file["architectures"] = [FAMILIES[_file["model_type"]].architectures[0]]


def changed(base=LLAMA, **values):
    """A configuration with some keys set; `...` removes one."""
    config = copy.deepcopy(base) | values
    return {key: value for key, value in config.items() if value is not ...}
