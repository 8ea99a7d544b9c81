"""Efficient LLM inference in JAX: every method on the same checkpoint, proven exact."""

from typing import TYPE_CHECKING, Any

from jaxllm.version import __version__

if TYPE_CHECKING:
    from jaxllm.api import (
        LanguageModel,
        Result,
        Score,
        bind,
        generate,
        load,
        logits,
        save,
        score,
        stream,
    )

__all__ = [
    "LanguageModel",
    "Result",
    "Score",
    "__version__",
    "bind",
    "generate",
    "load",
    "logits",
    "save",
    "score",
    "stream",
]


def __getattr__(name: str) -> Any:
    # Lazily, so that `jaxllm --help` does not wait for jax.
    if name not in __all__:
        raise AttributeError(f"module 'jaxllm' has no attribute {name!r}")
    from jaxllm import api

    return getattr(api, name)
