"""The families: `config.json` to `DecoderConfig` and back, and the map of names.

A file of the Hub carries dozens of keys that change nothing here (initialisation,
dropout, token ids, versions of software), and new ones appear with every release of
transformers. So an unknown key is accepted; what is refused, with the key's name, is
a value that changes the computation in a way that is not implemented, of every key
that the reference implementations of these families read and of the switches that
derived models add. The settings of rotary positions are the exception: each of their
keys changes the computation, so an unknown one is refused.

A key that is absent has the reference implementation's default where files of the Hub
rely on it, and is an error where a guess would build another model. Sizes beyond any
real model are refused before anything is allocated.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from jaxllm.core import registry
from jaxllm.core.errors import ConfigError
from jaxllm.models import config_readers as read
from jaxllm.models import config_writers as write
from jaxllm.models.config_fields import FILE_NAME, Fields, shown
from jaxllm.models.decoder import DecoderConfig
from jaxllm.models.name_maps import (
    TensorRule,
    gemma3_rules,
    gpt2_rules,
    llama_rules,
    phi3_rules,
)

__all__ = ["FAMILIES", "Family", "TensorRule", "decoder_config", "family_of"]


@dataclasses.dataclass(frozen=True)
class Family:
    """One architecture of Hugging Face.

    Attributes:
      name: Its `model_type`.
      architectures: Class names that `config.json` may carry.
      to_config: From the content of `config.json`. Raises ConfigError.
      to_hf: Content of a `config.json` that transformers reads back to the same
        model. Raises ConfigError where the family cannot express the model. It may
        name another family (the decoder of a vision-language model is written as a
        text model); that family's rules then name the tensors.
      rules: Where every array comes from.
      prefixes: What may stand before the names of the decoder's tensors, beginning
        with what `rules` writes; a checkpoint of the bare decoder has none.
      ignored: Regular expression, searched in a name, of tensors that hold no
        parameter of the decoder: stored masks and frequencies, other modalities.
    """

    name: str
    architectures: tuple[str, ...]
    to_config: Callable[[Mapping[str, Any]], DecoderConfig]
    to_hf: Callable[[DecoderConfig], dict[str, Any]]
    rules: Callable[[DecoderConfig], tuple[TensorRule, ...]]
    prefixes: tuple[str, ...] = ("model.", "")
    ignored: str = r"rotary_emb\.inv_freq$"

    def sources(self, rule: TensorRule) -> tuple[str, ...]:
        """Returns the names that a rule's tensor may have, the usual one first."""
        first, *others = self.prefixes
        if not rule.source.startswith(first):
            return (rule.source,)
        rest = rule.source.removeprefix(first)
        return (rule.source, *(other + rest for other in others))


def family_of(config: Mapping[str, Any]) -> Family:
    """Returns the family of a configuration.

    Args:
      config: Content of `config.json`.

    Raises:
      ConfigError: `model_type` is unknown (the message lists the known ones and the
        nearest), absent without an architecture to tell it, or `architectures` names
        none of the family's classes.
    """
    fields = Fields(config)
    names = config.get("architectures") or []
    if not isinstance(names, list) or not all(isinstance(n, str) for n in names):
        raise fields.error("architectures", "a list of class names")
    model_type = config.get("model_type")
    if model_type is None:
        for family in FAMILIES.values():
            if set(names) & set(family.architectures):
                return family
    if not isinstance(model_type, str):
        raise fields.error("model_type", f"one of {', '.join(FAMILIES)}")
    if model_type not in FAMILIES:
        place = f"{FILE_NAME}: 'model_type'"
        raise registry.unknown_name("architecture", model_type, FAMILIES, of=place)
    family = FAMILIES[model_type]
    if names and not set(names) & set(family.architectures):
        raise fields.error(
            "architectures",
            f"one of {', '.join(family.architectures)} for model_type {model_type}",
            "Only these are implemented.",
        )
    return family


def decoder_config(config: Mapping[str, Any]) -> DecoderConfig:
    """Returns the architecture that a `config.json` describes.

    Args:
      config: Content of `config.json`, of any version of transformers.

    Raises:
      ConfigError: An unknown architecture; a key that is missing, has a wrong type or
        is out of range; sizes that do not divide; a value that is not implemented.
        The message names the file and the key.

    Source: the configuration and model classes of transformers 5.23.
    """
    return family_of(config).to_config(config)


def _exact(
    written: Callable[[DecoderConfig], dict[str, Any]],
) -> Callable[[DecoderConfig], dict[str, Any]]:
    """Returns the writer, made to refuse what its family cannot express."""

    def to_hf(config: DecoderConfig) -> dict[str, Any]:
        content = written(config)
        difference = _difference(config, decoder_config(content))
        if difference is not None:
            name, ours, theirs = difference
            raise ConfigError(
                f"cannot write config: {FILE_NAME}: '{name}' is {shown(ours)}, "
                f"expected {shown(theirs)} for model_type {content['model_type']}. "
                "Save the model as another family."
            )
        return content

    return to_hf


def _difference(ours: Any, theirs: Any, name: str = "") -> tuple[str, Any, Any] | None:
    """Returns the first field in which two configurations differ, and its values."""
    if not dataclasses.is_dataclass(ours) or type(ours) is not type(theirs):
        return None if ours == theirs else (name, ours, theirs)
    for field in dataclasses.fields(ours):
        found = _difference(
            getattr(ours, field.name),
            getattr(theirs, field.name),
            f"{name}.{field.name}" if name else field.name,
        )
        if found is not None:
            return found
    return None


FAMILIES: dict[str, Family] = {
    "gpt2": Family(
        name="gpt2",
        architectures=("GPT2LMHeadModel", "GPT2Model"),
        to_config=read.read_gpt2,
        to_hf=_exact(write.write_gpt2),
        rules=gpt2_rules,
        prefixes=("transformer.", ""),
        ignored=r"attn\.(masked_)?bias$",
    ),
    "llama": Family(
        name="llama",
        architectures=("LlamaForCausalLM", "LLaMAForCausalLM", "LlamaModel"),
        to_config=read.read_llama,
        to_hf=_exact(write.write_llama),
        rules=llama_rules,
    ),
    "mistral": Family(
        name="mistral",
        architectures=("MistralForCausalLM", "MistralModel"),
        to_config=read.read_mistral,
        to_hf=_exact(write.write_mistral),
        rules=llama_rules,
    ),
    "qwen2": Family(
        name="qwen2",
        architectures=("Qwen2ForCausalLM", "Qwen2Model"),
        to_config=read.read_qwen2,
        to_hf=_exact(write.write_qwen2),
        rules=llama_rules,
    ),
    "qwen3": Family(
        name="qwen3",
        architectures=("Qwen3ForCausalLM", "Qwen3Model"),
        to_config=read.read_qwen3,
        to_hf=_exact(write.write_qwen3),
        rules=llama_rules,
    ),
    "gemma2": Family(
        name="gemma2",
        architectures=("Gemma2ForCausalLM", "Gemma2Model"),
        to_config=read.read_gemma2,
        to_hf=_exact(write.write_gemma2),
        rules=llama_rules,
    ),
    "gemma3_text": Family(
        name="gemma3_text",
        architectures=("Gemma3ForCausalLM", "Gemma3TextModel"),
        to_config=read.read_gemma3_text,
        to_hf=_exact(write.write_gemma3),
        rules=llama_rules,
    ),
    "gemma3": Family(
        name="gemma3",
        architectures=("Gemma3ForConditionalGeneration",),
        to_config=read.read_gemma3,
        to_hf=_exact(write.write_gemma3),
        rules=gemma3_rules,
        prefixes=("language_model.model.", "model.language_model."),
        ignored=r"vision_tower\.|multi_modal_projector\.|rotary_emb\.inv_freq$",
    ),
    "phi3": Family(
        name="phi3",
        architectures=("Phi3ForCausalLM", "Phi3Model"),
        to_config=read.read_phi3,
        to_hf=_exact(write.write_phi3),
        rules=phi3_rules,
    ),
}
