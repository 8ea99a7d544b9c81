"""Parameters to parameters, one file a method; `LEAVES` are the weights they make."""

from jaxllm.compression.lora import (
    TARGETS,
    LoraConfig,
    LoraFactors,
    LoraTensor,
    adapter_names,
    add_lora,
    in_adapter,
    layered,
    projections,
    trainable,
    with_adapter,
)
from jaxllm.compression.merging import merge, remove, select, unmerge

LEAVES = {
    "LoraTensor": LoraTensor,
}

__all__ = [
    "LEAVES",
    "TARGETS",
    "LoraConfig",
    "LoraFactors",
    "LoraTensor",
    "adapter_names",
    "add_lora",
    "in_adapter",
    "layered",
    "merge",
    "projections",
    "remove",
    "select",
    "trainable",
    "unmerge",
    "with_adapter",
]
