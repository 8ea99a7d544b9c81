"""Small checkpoints in Hugging Face layout, written without any of the code to test."""

import json

import jax
import numpy as np

from jaxllm.checkpoints import write_weights
from jaxllm.models.families import family_of

_LLAMA = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 64,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": [2, 3],
    "torch_dtype": "float32",
}
_GEMMA = _LLAMA | {
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_activation": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 8,
    "sliding_window": 16,
    "tie_word_embeddings": True,
}

CONFIGS = {
    "llama": _LLAMA | {"architectures": ["LlamaForCausalLM"]},
    "mistral": _LLAMA
    | {"architectures": ["MistralForCausalLM"], "sliding_window": None},
    "qwen2": _LLAMA
    | {"architectures": ["Qwen2ForCausalLM"], "use_sliding_window": False},
    "qwen3": _LLAMA | {"architectures": ["Qwen3ForCausalLM"], "attention_bias": False},
    "phi3": _LLAMA
    | {
        "architectures": ["Phi3ForCausalLM"],
        "original_max_position_embeddings": 128,
        "pad_token_id": 0,
    },
    "gemma2": _GEMMA
    | {
        "architectures": ["Gemma2ForCausalLM"],
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
    },
    "gemma3_text": _GEMMA
    | {
        "architectures": ["Gemma3ForCausalLM"],
        "rope_local_base_freq": 10000.0,
        "sliding_window_pattern": 2,
    },
    "gpt2": {
        "architectures": ["GPT2LMHeadModel"],
        "n_embd": 32,
        "n_head": 4,
        "n_layer": 3,
        "n_positions": 128,
        "vocab_size": 64,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
}
CONFIGS = {name: config | {"model_type": name} for name, config in CONFIGS.items()}


def stored_shapes(hf_config):
    """Names and shapes of the tensors, worked out from the names."""
    config = family_of(hf_config).to_config(hf_config)
    D, F, V = config.width, config.mlp.hidden, config.vocabulary
    H = config.attention.head_dim
    N, K = config.attention.num_heads * H, config.attention.num_kv_heads * H
    ends = {
        "wte.weight": (V, D),
        "wpe.weight": (config.max_positions, D),
        "c_attn.weight": (D, N + 2 * K),
        "c_attn.bias": (N + 2 * K,),
        "attn.c_proj.weight": (N, D),
        "c_fc.weight": (D, F),
        "c_fc.bias": (F,),
        "mlp.c_proj.weight": (F, D),
        "embed_tokens.weight": (V, D),
        "lm_head.weight": (V, D),
        "q_proj.weight": (N, D),
        "q_proj.bias": (N,),
        "k_proj.weight": (K, D),
        "k_proj.bias": (K,),
        "v_proj.weight": (K, D),
        "v_proj.bias": (K,),
        "qkv_proj.weight": (N + 2 * K, D),
        "o_proj.weight": (D, N),
        "gate_proj.weight": (F, D),
        "up_proj.weight": (F, D),
        "gate_up_proj.weight": (2 * F, D),
        "down_proj.weight": (D, F),
        "q_norm.weight": (H,),
        "k_norm.weight": (H,),
    }
    shapes = {}
    for rule in family_of(hf_config).rules(config):
        found = [s for end, s in ends.items() if f".{rule.source}".endswith(f".{end}")]
        shapes[rule.source] = found[0] if found else (D,)
    return shapes


def make_tensors(hf_config, dtype=np.float32, seed=0):
    rng = np.random.default_rng(seed)
    return {
        name: (rng.standard_normal(shape) * 0.1).astype(dtype)
        for name, shape in stored_shapes(hf_config).items()
    }


def write_checkpoint(directory, hf_config, tensors=None, **options):
    """Writes config.json and the tensors; returns the tensors."""
    tensors = make_tensors(hf_config) if tensors is None else tensors
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(hf_config))
    write_weights(directory, tensors, **options)
    return tensors


def parameter(params, path):
    """One layer's array of a tree, by a path that counts layers singly."""
    if path[0] == "layers":
        layer, path = path[1], path[2:]
        for tree in params["stacks"]:
            size = next(iter(tree["mlp_norm"].values())).shape[0]
            if layer < size:
                break
            layer -= size
        for name in path:
            tree = tree[name]
        return np.asarray(tree)[layer]
    for name in path:
        params = params[name]
    return np.asarray(params)


def assert_equal_trees(a, b):
    """Asserts two trees of parameters equal, bit for bit."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype and (np.asarray(x) == np.asarray(y)).all()
