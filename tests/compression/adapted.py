"""Toy models of every family with adapters that do something."""

import jax
import numpy as np

from jaxllm.compression import LoraConfig, add_lora, projections, trainable
from jaxllm.core.partition import join, split
from tests.models.golden_files import golden, golden_model

FAMILIES = (
    "gpt2",
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma2",
    "gemma3",
    "phi3",
)


def targets_of(params):
    """All that the model can adapt."""
    return tuple(dict.fromkeys(str(path[-1]) for path in projections(params)))


def drawn(params, seed=0, size=0.03):
    """The same adapters with random A and B, as training would leave them."""
    factors, rest = split(params, trainable)
    leaves, structure = jax.tree.flatten(factors)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    leaves = [
        size * jax.random.normal(key, x.shape, x.dtype)
        for key, x in zip(keys, leaves, strict=True)
    ]
    return join(jax.tree.unflatten(structure, leaves), rest)


def adapted(params, seed=0, name="default", **options):
    """The tree with one more adapter of random factors around every projection."""
    options = {"rank": 4, "targets": targets_of(params)} | options
    bare = add_lora(params, LoraConfig(**options), jax.random.key(seed), name)
    if name == "default":
        return drawn(bare, seed)
    factors, rest = split(bare, lambda p, x: trainable(p, x) and "base" not in p)
    return join(drawn(factors, seed), rest)


def model_of(family):
    """`(model, params, tokens)` of a family: float32, stacks of one layer."""
    model, params = golden_model(family)
    return model, params, golden(family)["tokens"]


def assert_close(found, wanted):
    """Asserts logits equal but for float32 rounding: 1e-5 of the largest of them."""
    off = np.abs(np.asarray(found) - np.asarray(wanted)).max()
    assert off <= 1e-5 * max(1.0, np.abs(wanted).max()), off


def logits(model, params, tokens):
    """Logits of all tokens, compiled."""
    return jax.jit(model)(params, tokens).logits_BTV
