"""Small models with adapters, and adapter files of any content."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.checkpoints import load_language_model, write_safetensors
from jaxllm.compression import LoraConfig, add_lora, projections, trainable
from jaxllm.core.partition import join, split
from tests.checkpoints.small_checkpoint import CONFIGS, write_checkpoint

PREFIX = "base_model.model."


def draw(shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32) * 0.1


def load(directory, name="llama", **options):
    if not directory.exists():
        write_checkpoint(directory, CONFIGS[name])
    return load_language_model(directory, **({"dtype": "float32"} | options))


def with_random_lora(lm, targets=None, name="default", **options):
    """A model with an adapter whose A and B are both random, apart everywhere."""
    targets = targets or tuple(dict.fromkeys(p[-1] for p in projections(lm.params)))
    config = LoraConfig(**({"rank": 3, "targets": targets} | options))
    params = add_lora(lm.params, config, jax.random.key(0), name)
    factors, rest = split(params, lambda p, x: trainable(p, x) and "base" not in p)
    leaves, structure = jax.tree.flatten(factors)
    leaves = [jnp.asarray(draw(x.shape, i), x.dtype) for i, x in enumerate(leaves)]
    return dataclasses.replace(
        lm, params=join(jax.tree.unflatten(structure, leaves), rest)
    )


def logits(lm):
    tokens = np.random.default_rng(1).integers(4, 64, (2, 12))
    return np.asarray(jax.jit(lm.model)(lm.params, jnp.asarray(tokens)).logits_BTV)


def write_adapter(directory, tensors, metadata=None, **config):
    content = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": []}
    directory.mkdir(parents=True)
    (directory / "adapter_config.json").write_text(json.dumps(content | config))
    write_safetensors(directory / "adapter_model.safetensors", tensors, metadata)


def query_tensors(rank=2, layers=3, last="self_attn.q_proj", inputs=32, outputs=32):
    tensors = {}
    for layer in range(layers):
        module = f"{PREFIX}model.layers.{layer}.{last}"
        tensors[f"{module}.lora_A.weight"] = draw((rank, inputs), layer)
        tensors[f"{module}.lora_B.weight"] = draw((outputs, rank), layer + 9)
    return tensors
