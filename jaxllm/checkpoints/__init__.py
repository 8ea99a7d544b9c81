"""Checkpoints: directories of weights, configurations and tokenizers, in and out."""

from jaxllm.checkpoints.adapters import AdapterWarning, load_adapter, save_adapter
from jaxllm.checkpoints.directory import (
    GenerationDefaults,
    read_config,
    read_generation,
    refuse_remote_code,
)
from jaxllm.checkpoints.language_model import LanguageModel
from jaxllm.checkpoints.load import load_language_model
from jaxllm.checkpoints.safetensors import (
    LazyTensor,
    PendingTensor,
    read_metadata,
    read_safetensors,
    write_safetensors,
)
from jaxllm.checkpoints.save import save_language_model, save_workdir
from jaxllm.checkpoints.source import resolve, shipped_models
from jaxllm.checkpoints.text_stream import TextStream
from jaxllm.checkpoints.tokenizer import Tokenizer, load_tokenizer
from jaxllm.checkpoints.weights import open_weights, refuse_pickles, write_weights

__all__ = [
    "AdapterWarning",
    "GenerationDefaults",
    "LanguageModel",
    "LazyTensor",
    "PendingTensor",
    "TextStream",
    "Tokenizer",
    "load_adapter",
    "load_language_model",
    "load_tokenizer",
    "open_weights",
    "read_config",
    "read_generation",
    "read_metadata",
    "read_safetensors",
    "refuse_pickles",
    "refuse_remote_code",
    "resolve",
    "save_adapter",
    "save_language_model",
    "save_workdir",
    "shipped_models",
    "write_safetensors",
    "write_weights",
]
