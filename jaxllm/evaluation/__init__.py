"""Evaluation: what a model, or a way to run it, achieves."""

from jaxllm.evaluation.comparison import (
    DEFAULT_METHODS,
    DEMO_METHODS,
    Comparison,
    Cost,
    Figures,
    MethodResult,
    Step,
    Watcher,
    compare,
)
from jaxllm.evaluation.entrants import Settings, build_methods
from jaxllm.evaluation.prompts import (
    PromptRow,
    PromptSet,
    default_prompts,
    read_prompts,
)

__all__ = [
    "DEFAULT_METHODS",
    "DEMO_METHODS",
    "Comparison",
    "Cost",
    "Figures",
    "MethodResult",
    "PromptRow",
    "PromptSet",
    "Settings",
    "Step",
    "Watcher",
    "build_methods",
    "compare",
    "default_prompts",
    "read_prompts",
]
