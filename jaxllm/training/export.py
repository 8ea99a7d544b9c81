"""A trained model as a Hugging Face directory."""

import dataclasses
from pathlib import Path
from typing import Any

import jax

from jaxllm.checkpoints import LanguageModel, save_adapter, save_language_model
from jaxllm.compression import adapter_names
from jaxllm.core.dtypes import DTypePolicy

__all__ = ["export"]


def export(lm: LanguageModel, directory: str | Path, dtype: Any = "bfloat16") -> None:
    """Writes a model, or the adapter alone where it has one.

    Args:
      lm: The model.
      directory: Absent or empty.
      dtype: Of the stored weights; an adapter is stored as it is.

    Raises:
      CheckpointError: The directory is not empty or cannot be written.
    """
    if adapter_names(lm.params):
        save_adapter(lm, directory)
        return
    policy = DTypePolicy.of(dtype)

    def cast(x: jax.Array) -> jax.Array:
        return x.astype(policy.params)

    model = dataclasses.replace(lm.model, policy=policy, remat="none")
    params = jax.tree.map(cast, lm.params)
    save_language_model(dataclasses.replace(lm, model=model, params=params), directory)
