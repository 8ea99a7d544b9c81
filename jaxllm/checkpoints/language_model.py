"""A loaded model with everything that belongs to it."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from jax.sharding import Mesh

from jaxllm.checkpoints.directory import GenerationDefaults
from jaxllm.checkpoints.tokenizer import Tokenizer
from jaxllm.models import DecoderConfig, Model

__all__ = ["LanguageModel"]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class LanguageModel:
    """A model, its parameters and its tokenizer. Not a tree: never pass it to jit.

    Attributes:
      model: Pure functions.
      params: Their tree of arrays and leaves.
      tokenizer: None where the checkpoint has none.
      hf_config: The content of the checkpoint's `config.json`; empty for a model that
        was made here.
      generation: What ends a text.
      name: What the model was called when it was loaded.
      mesh: Where the parameters live; None for the default device.
    """

    model: Model
    params: dict[str, Any]
    tokenizer: Tokenizer | None = None
    hf_config: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    generation: GenerationDefaults = dataclasses.field(
        default_factory=GenerationDefaults
    )
    name: str = ""
    mesh: Mesh | None = None

    @property
    def config(self) -> DecoderConfig:
        """The architecture."""
        return self.model.config

    def shares_tokens(self, other: "LanguageModel") -> bool:
        """Returns whether both models have the same tokens, id for id.

        Where one has no tokenizer only the sizes of the vocabularies can tell.
        """
        if self.tokenizer is None or other.tokenizer is None:
            return self.config.vocabulary == other.config.vocabulary
        return self.tokenizer.fingerprint() == other.tokenizer.fingerprint()

    def __repr__(self) -> str:
        """The name and size; the parameters would fill pages."""
        config = self.config
        return (
            f"LanguageModel({self.name!r}, {config.num_layers} layers of width "
            f"{config.width}, vocabulary {config.vocabulary})"
        )
