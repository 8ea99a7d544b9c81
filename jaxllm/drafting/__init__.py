"""Drafters, one a file; `METHODS` is what `--decode` names."""

from jaxllm.core.registry import MethodSpec, build
from jaxllm.decoding.protocol import Drafter
from jaxllm.drafting.adaptive import Adaptive
from jaxllm.drafting.autoregressive import Autoregressive
from jaxllm.drafting.cascade import Horizontal, Vertical
from jaxllm.drafting.fallback import Fallback
from jaxllm.drafting.graph import GraphDrafter
from jaxllm.drafting.heads import HeadsDrafter
from jaxllm.drafting.jacobi import Jacobi
from jaxllm.drafting.lookahead import Lookahead
from jaxllm.drafting.max_gram import MaxGram
from jaxllm.drafting.model import ModelDrafter
from jaxllm.drafting.prompt_lookup import PromptLookup
from jaxllm.drafting.tree import TreeDrafter
from jaxllm.drafting.trigram import Trigram

METHODS = {
    "adaptive": Adaptive,
    "autoregressive": Autoregressive,
    "fallback": Fallback,
    "graph": GraphDrafter,
    "heads": HeadsDrafter,
    "horizontal": Horizontal,
    "jacobi": Jacobi,
    "lookahead": Lookahead,
    "max_gram": MaxGram,
    "model": ModelDrafter,
    "prompt_lookup": PromptLookup,
    "tree": TreeDrafter,
    "trigram": Trigram,
    "vertical": Vertical,
}

__all__ = [
    "METHODS",
    "Adaptive",
    "Autoregressive",
    "Fallback",
    "GraphDrafter",
    "HeadsDrafter",
    "Horizontal",
    "Jacobi",
    "Lookahead",
    "MaxGram",
    "ModelDrafter",
    "PromptLookup",
    "TreeDrafter",
    "Trigram",
    "Vertical",
    "make_drafter",
]


def make_drafter(decode: str | MethodSpec) -> Drafter:
    """Returns the drafter that a method names, such as `"jacobi:window=16"`.

    Raises:
      ConfigError: There is no such method, or it has no such option.
    """
    drafter: Drafter = build(decode, METHODS, {Drafter: METHODS})
    return drafter
