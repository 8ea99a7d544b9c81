"""Makes the golden files: small random models of every family, and what they answer.

    python tests/golden/make_golden.py [VARIANT ...]

needs the extra `parity` (torch). Every variant is a directory that any loader reads,
`config.json` and `model.safetensors`, with `golden.npz` beside them:

    tokens [2, T]            two rows without padding
    logits [2, T, V]         their logits, float32
    length []                how much of row 1 the ragged batch keeps, n
    right, left [n, V]       logits of row 1, cut to n tokens and padded on that side
    greedy [2, T - PROMPT]   ids that follow the first PROMPT tokens of each row
    gaps [2, T - PROMPT]     distance of the two largest logits at each of them

Every parameter is drawn anew, norm scales and biases too, and the epsilon of norms is
large, so that no term of the computation hides; all parameters are exact in float16,
which is how they are stored.
`rope.json` holds the frequencies that transformers computes for every scaling rule.
"""

import json
import pathlib
import sys
import zlib

import numpy as np

DIRECTORY = pathlib.Path(__file__).resolve().parent
TOKENS, KEPT, PROMPT = 36, 21, 20
# One with which no greedy choice of any variant is close.
SEED = 0

_SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "rms_norm_eps": 0.02,
}
_LLAMA = {"model_type": "llama", **_SIZES}
_GEMMA = {
    "num_hidden_layers": 3,
    "head_dim": 12,
    "query_pre_attn_scalar": 10,
    "sliding_window": 7,
}
_PHI3 = {
    "model_type": "phi3",
    **_SIZES,
    # A quarter of a head passes through: 6 of 8 dims are rotated.
    "partial_rotary_factor": 0.75,
}


def _longrope(original, positions):
    return {
        "max_position_embeddings": positions,
        "original_max_position_embeddings": original,
        "rope_scaling": {
            "rope_type": "longrope",
            "short_factor": [1.0, 1.1, 1.4],
            "long_factor": [1.2, 2.5, 5.0],
        },
    }


VARIANTS = {
    "gpt2": {
        "model_type": "gpt2",
        "vocab_size": 96,
        "n_embd": 32,
        "n_inner": 48,
        "n_layer": 3,
        "n_head": 4,
        "n_positions": 40,
        "layer_norm_epsilon": 0.02,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "llama": _LLAMA | {"num_hidden_layers": 3},
    "llama-linear": _LLAMA
    | {
        # Biases everywhere, and the head tied, are tested on the way.
        "attention_bias": True,
        "mlp_bias": True,
        "tie_word_embeddings": True,
        "rope_scaling": {"rope_type": "linear", "factor": 2.5},
    },
    "llama-dynamic": _LLAMA
    | {
        "max_position_embeddings": 16,
        "rope_scaling": {"rope_type": "dynamic", "factor": 3.0},
    },
    "llama-yarn": _LLAMA
    | {
        "rope_theta": 500.0,
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 16,
            "beta_fast": 4.0,
        },
    },
    "llama-llama3": _LLAMA
    | {
        # Multi-query, with heads that are narrower than the width's share.
        "num_key_value_heads": 1,
        "head_dim": 12,
        "rope_theta": 1000.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    },
    "mistral": {"model_type": "mistral", **_SIZES, "sliding_window": 7},
    "qwen2": {
        "model_type": "qwen2",
        **_SIZES,
        "num_hidden_layers": 3,
        "rope_theta": 200.0,
        "use_sliding_window": True,
        "sliding_window": 9,
        "max_window_layers": 1,
    },
    "qwen3": {"model_type": "qwen3", **_SIZES, "head_dim": 12, "rope_theta": 300.0},
    "gemma2": {
        "model_type": "gemma2",
        **_SIZES,
        **_GEMMA,
        "attn_logit_softcapping": 3.0,
        "final_logit_softcapping": 5.0,
    },
    "gemma3": {
        "model_type": "gemma3_text",
        **_SIZES,
        **_GEMMA,
        "num_hidden_layers": 4,
        "sliding_window_pattern": 3,
        "rope_theta": 5000.0,
        "rope_local_base_freq": 300.0,
        "rope_scaling": {"rope_type": "linear", "factor": 4.0},
    },
    # The whole test lies within the original context, or passes it.
    "phi3": _PHI3 | _longrope(48, 96) | {"sliding_window": 9},
    "phi3-long": _PHI3 | _longrope(12, 96),
}

_YARN = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 4096}
_LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
_LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0 + 0.05 * i for i in range(16)],
    "long_factor": [1.0 + 0.9 * i for i in range(16)],
    "original_max_position_embeddings": 4096,
}
# Name: rope_scaling, other keys, and the length of the sequence.
ROPES = {
    "default": (None, {"rope_theta": 500000.0}, None),
    "linear": ({"rope_type": "linear", "factor": 4.0}, {}, None),
    "dynamic, within": ({"rope_type": "dynamic", "factor": 4.0}, {}, 1000),
    "dynamic, at the end": ({"rope_type": "dynamic", "factor": 4.0}, {}, 32768),
    "dynamic, beyond": ({"rope_type": "dynamic", "factor": 4.0}, {}, 100000),
    "yarn": (_YARN, {}, None),
    "yarn, attention_factor": (_YARN | {"attention_factor": 0.7}, {}, None),
    "yarn, mscale": (_YARN | {"mscale": 0.8, "mscale_all_dim": 0.5}, {}, None),
    "yarn, betas": (_YARN | {"beta_fast": 20.0, "beta_slow": 2.0}, {}, None),
    "yarn, not truncated": (_YARN | {"truncate": False}, {}, None),
    "yarn, no factor": (_YARN | {"factor": None}, {}, None),
    "llama3": (_LLAMA3, {"rope_theta": 500000.0}, None),
    "llama3.2": (_LLAMA3 | {"factor": 32.0}, {"rope_theta": 500000.0}, None),
    "longrope, within": (_LONGROPE, {}, 4096),
    "longrope, beyond": (_LONGROPE, {}, 4097),
    "longrope, factor": (_LONGROPE | {"factor": 2.0}, {}, 5000),
    "longrope, attention_factor": (_LONGROPE | {"attention_factor": 1.3}, {}, 5000),
}
ROPE_MODEL = _LLAMA | {"head_dim": 32, "max_position_embeddings": 32768}


def make_model(variant):
    """The reference model of a variant, float32, with its parameters drawn anew."""
    import torch
    import transformers

    settings = dict(VARIANTS[variant])
    config = transformers.AutoConfig.for_model(settings.pop("model_type"), **settings)
    # The plain implementation: it alone has soft caps.
    model = transformers.AutoModelForCausalLM.from_config(
        config, attn_implementation="eager", dtype=torch.float32
    )
    draw = np.random.default_rng(zlib.crc32(f"{SEED} {variant}".encode()))
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            noise = draw.standard_normal(parameter.shape)
            if parameter.ndim == 1:
                # Around 1 or 0, where norm scales and biases begin.
                value = parameter.numpy() + 0.3 * noise
            else:
                value = (0.5 if "embed" in name or "wte" in name else 0.25) * noise
            exact = value.astype(np.float16).astype(np.float32)
            parameter.copy_(torch.from_numpy(exact))
    return model.eval()


def logits_of(model, tokens, valid=None, positions=None):
    """Logits of the reference in one forward, without a cache."""
    import torch

    padding = {}
    if valid is not None:
        padding = {
            "attention_mask": torch.from_numpy(valid.astype(np.int64)),
            "position_ids": torch.from_numpy(positions),
        }
    with torch.no_grad():
        ids = torch.from_numpy(tokens.astype(np.int64))
        return model(ids, use_cache=False, **padding).logits.numpy()


def ragged(tokens, side):
    """The batch whose row 1 has `KEPT` tokens and padding on one side.

    Returns tokens, validity and positions, each [2, T]; padding is token 0 at
    position 0.
    """
    tokens, valid = tokens.copy(), np.ones(tokens.shape, bool)
    positions = np.tile(np.arange(TOKENS), (2, 1))
    own = slice(0, KEPT) if side == "right" else slice(TOKENS - KEPT, TOKENS)
    row, place = np.zeros(TOKENS, tokens.dtype), np.zeros(TOKENS, positions.dtype)
    row[own], place[own] = tokens[1, :KEPT], np.arange(KEPT)
    valid[1] = False
    valid[1, own] = True
    tokens[1], positions[1] = row, place
    return tokens, valid, positions


def golden_arrays(variant, model):
    """What `golden.npz` holds."""
    draw = np.random.default_rng(zlib.crc32(f"{SEED} {variant} tokens".encode()))
    tokens = draw.integers(3, 96, (2, TOKENS), dtype=np.int32)
    arrays = {"tokens": tokens, "length": np.int32(KEPT)}
    # The whole length first: frequencies that depend on it keep it from here on.
    arrays["logits"] = logits_of(model, tokens)
    for side in ("right", "left"):
        batch, valid, positions = ragged(tokens, side)
        arrays[side] = logits_of(model, batch, valid, positions)[1][valid[1]]
    rows, gaps = tokens[:, :PROMPT], []
    while rows.shape[1] < TOKENS:
        last = logits_of(model, rows)[:, -1]
        first, second = np.sort(last, axis=-1)[:, :-3:-1].T
        gaps.append(first - second)
        chosen = last.argmax(-1).astype(np.int32)
        rows = np.concatenate([rows, chosen[:, None]], axis=1)
    return arrays | {"greedy": rows[:, PROMPT:], "gaps": np.stack(gaps, axis=1)}


def rope_tables():
    """What `rope.json` holds: for each case its settings and the reference's table."""
    import transformers
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    tables = {}
    for name, (scaling, others, length) in ROPES.items():
        settings = ROPE_MODEL | others | {"rope_scaling": scaling}
        # transformers changes the dictionary that it is given.
        own = json.loads(json.dumps(settings))
        config = transformers.LlamaConfig(**own)
        if scaling is None:
            embedding = LlamaRotaryEmbedding(config)
            inverse, factor = embedding.inv_freq, embedding.attention_scaling
        else:
            compute = ROPE_INIT_FUNCTIONS[scaling["rope_type"]]
            inverse, factor = compute(config, seq_len=length)
        tables[name] = {
            "config": settings,
            "length": length or 0,
            "inverse_frequency": [float(x) for x in inverse],
            "attention_factor": float(factor),
        }
    return tables


def write(variant):
    """Writes the directory of a variant."""
    import torch

    directory = DIRECTORY / variant
    model = make_model(variant)
    arrays = golden_arrays(variant, model)
    model.to(torch.float16).save_pretrained(directory)
    # No model of these is sampled, and its version would change with the library's.
    (directory / "generation_config.json").unlink(missing_ok=True)
    (directory / "model.safetensors").chmod(0o644)
    np.savez_compressed(directory / "golden.npz", **arrays)


def main(variants):
    """Writes the named variants, or all of them and the rope tables."""
    for variant in variants or VARIANTS:
        write(variant)
    if not variants:
        content = json.dumps(rope_tables(), indent=1)
        (DIRECTORY / "rope.json").write_text(content + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
