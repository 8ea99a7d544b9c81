"""Models as pure functions over plain trees."""

from jaxllm.models.decoder import Decoder, DecoderConfig, DecoderLayer, make_decoder
from jaxllm.models.families import FAMILIES, Family, decoder_config, family_of
from jaxllm.models.freeze import (
    Context,
    Forward,
    Model,
    freeze,
    join_kv,
    make_model,
)
from jaxllm.models.stacks import restack

__all__ = [
    "FAMILIES",
    "Context",
    "Decoder",
    "DecoderConfig",
    "DecoderLayer",
    "Family",
    "Forward",
    "Model",
    "decoder_config",
    "family_of",
    "freeze",
    "join_kv",
    "make_decoder",
    "make_model",
    "restack",
]
