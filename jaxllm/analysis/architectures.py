"""Models by name, for analysis without their weights.

Sizes are those of the published `config.json` files; keys that change no computation
and no size are left out.
"""

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from jaxllm.checkpoints import read_config, resolve, shipped_models
from jaxllm.checkpoints.files import read_json_object
from jaxllm.checkpoints.source import HUB_PREFIX
from jaxllm.checkpoints.workdir import find_steps, open_workdir
from jaxllm.core import DTypePolicy, ShardingRules, registry
from jaxllm.core.errors import ConfigError
from jaxllm.models import DecoderConfig, Model, decoder_config, make_model
from jaxllm.quantization import METHODS, quantize_params

__all__ = ["ARCHITECTURES", "Target", "find_config", "make_target"]

_LLAMA3_SCALING = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def _llama3(
    width: int, layers: int, heads: int, hidden: int, **others: Any
) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": 8,
        "intermediate_size": hidden,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        **others,
    }


def _qwen3(
    width: int, layers: int, heads: int, hidden: int, **others: Any
) -> dict[str, Any]:
    return {
        "model_type": "qwen3",
        "vocab_size": 151936,
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "intermediate_size": hidden,
        "max_position_embeddings": 40960,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        **others,
    }


def _gemma2(width: int, layers: int, heads: int, **others: Any) -> dict[str, Any]:
    return {
        "model_type": "gemma2",
        "vocab_size": 256000,
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads // 2,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "sliding_window": 4096,
        **others,
    }


_LONG = {"max_position_embeddings": 131072, "rope_scaling": _LLAMA3_SCALING}
_SMALL = _LONG | {
    "rope_scaling": _LLAMA3_SCALING | {"factor": 32.0},
    "head_dim": 64,
    "tie_word_embeddings": True,
}

ARCHITECTURES: dict[str, Mapping[str, Any]] = {
    "llama3-8b": _llama3(4096, 32, 32, 14336),
    "llama3-70b": _llama3(8192, 80, 64, 28672),
    "llama3.1-8b": _llama3(4096, 32, 32, 14336, **_LONG),
    "llama3.1-70b": _llama3(8192, 80, 64, 28672, **_LONG),
    "llama3.2-1b": _llama3(2048, 16, 32, 8192, **_SMALL),
    "llama3.2-3b": _llama3(3072, 28, 24, 8192, **_SMALL | {"head_dim": 128}),
    "llama2-7b": _llama3(
        4096,
        32,
        32,
        11008,
        vocab_size=32000,
        num_key_value_heads=32,
        max_position_embeddings=4096,
        rope_theta=10000.0,
    ),
    "mistral-7b": {
        "model_type": "mistral",
        "vocab_size": 32768,
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "intermediate_size": 14336,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1000000.0,
        "sliding_window": None,
    },
    "qwen3-0.6b": _qwen3(1024, 28, 16, 3072, tie_word_embeddings=True),
    "qwen3-8b": _qwen3(4096, 36, 32, 12288),
    "qwen3-32b": _qwen3(5120, 64, 64, 25600),
    "gemma-2-2b": _gemma2(2304, 26, 8, intermediate_size=9216, head_dim=256),
    "gemma-2-9b": _gemma2(3584, 42, 16, intermediate_size=14336, head_dim=256),
    "gpt2": {
        "model_type": "gpt2",
        "vocab_size": 50257,
        "n_embd": 768,
        "n_layer": 12,
        "n_head": 12,
        "n_positions": 1024,
    },
}
"""What `config.json` of a public model says, by the model's name."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Target:
    """A model as shapes: what is analyzed or compiled.

    Attributes:
      name: What it was called.
      model: Pure functions; all layers of equal shape stand in one stack.
      params: Its tree of `jax.ShapeDtypeStruct`s and leaves of them.
    """

    name: str
    model: Model
    params: dict[str, Any]

    @property
    def config(self) -> DecoderConfig:
        """The architecture."""
        return self.model.config


def find_config(name: str) -> DecoderConfig:
    """Finds the architecture that a name stands for; reads no weights.

    Args:
      name: A name of `ARCHITECTURES`, a `config.json`, a directory of Hugging Face or
        of a training run, the name of a shipped model, or `hf:org/name`.

    Raises:
      UserError: There is no such thing, or it cannot be read.
    """
    path = Path(os.path.expanduser(name))
    if path.is_file():
        return decoder_config(read_json_object(path, "cannot read config"))
    if not path.is_dir():
        if name in ARCHITECTURES:
            return decoder_config(ARCHITECTURES[name])
        if name not in shipped_models() and not name.startswith(HUB_PREFIX):
            known = (*ARCHITECTURES, *shipped_models())
            raise registry.unknown_name("model", name, known)
    directory = resolve(name)
    if find_steps(directory):
        return open_workdir(directory).config
    return decoder_config(read_config(directory))


def make_target(
    config: DecoderConfig,
    *,
    name: str = "",
    dtype: str = "bfloat16",
    quantize: str | None = None,
    cache_dtype: str | None = None,
    compute_dtype: str | None = None,
) -> Target:
    """Makes a model as shapes.

    Args:
      config: The architecture.
      name: What to call it.
      dtype: Dtype of parameters.
      quantize: A method of `quantization.METHODS` by its string.
      cache_dtype: Dtype of keys and values; that of activations when None.
      compute_dtype: Dtype of activations; `dtype` when None.

    Raises:
      ConfigError: A dtype or the method string is wrong, or the method needs weights.
    """
    compute = compute_dtype or dtype
    policy = DTypePolicy(params=dtype, compute=compute, cache=cache_dtype or compute)
    # Layers are alike: one tells the shapes of all, and builds at once.
    single = dataclasses.replace(config, num_layers=1, layer_rope=(), layer_window=())
    model, params = make_model(
        single, policy=policy, rules=ShardingRules(), stacks=(1,)
    )
    model = dataclasses.replace(model, config=config)
    params["stacks"] = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((config.num_layers, *x.shape[1:]), x.dtype),
        params["stacks"],
    )
    if quantize is not None:
        quantizer: Any = registry.build(quantize, METHODS)
        try:
            params = jax.eval_shape(
                lambda tree: quantize_params(tree, quantizer), params
            )
        except jax.errors.ConcretizationTypeError:
            raise ConfigError(
                f"cannot analyze: quantize is {quantize!r}, whose form depends on the "
                "weights, expected a method whose form does not. Choose int8."
            ) from None
    return Target(name=name, model=model, params=params)
