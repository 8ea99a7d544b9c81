"""Flax layers: declared once, rebuilt around plain arrays at run time."""

from jaxllm.layers.attention import Attention, AttentionConfig, LayerContext
from jaxllm.layers.embeddings import Embedder, Head, tied_logits
from jaxllm.layers.linear import Linear
from jaxllm.layers.mlp import ACTIVATIONS, Mlp, MlpConfig
from jaxllm.layers.norms import Norm, NormConfig
from jaxllm.layers.parameters import constant, matrix, weight

__all__ = [
    "ACTIVATIONS",
    "Attention",
    "AttentionConfig",
    "Embedder",
    "Head",
    "LayerContext",
    "Linear",
    "Mlp",
    "MlpConfig",
    "Norm",
    "NormConfig",
    "constant",
    "matrix",
    "tied_logits",
    "weight",
]
