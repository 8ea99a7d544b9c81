"""Every registered method with options under which it runs on the toy model."""

import functools

import pytest

import jaxllm
from jaxllm.checkpoints import GenerationDefaults
from jaxllm.core.registry import build
from jaxllm.decoding import BoundDrafter
from jaxllm.decoding.protocol import Drafter
from jaxllm.drafting import METHODS
from jaxllm.quantization import Int8, quantize_params
from tests.decoding.toys import VOCABULARY, toy_model

DRAFT = "(model:model=target,layers=1,length=3)"
OPTIONS = {
    "adaptive": [f"drafter={DRAFT},widths=1+2+4", "drafter=(prompt_lookup)"],
    "fallback": [
        f"first=(model:model=target,layers=1,confidence=0.05),second={DRAFT}",
        f"first=(jacobi:window=3),second={DRAFT}",
        "first=(model:model=target,layers=1,confidence=0.05,length=2),"
        "second=(tree:model=target,layers=1)",
    ],
    "graph": [
        "model=target,layers=1",
        "model=target,layers=1,merge_order=1,frontier=4,nodes=12,node_threshold=0.05",
    ],
    "heads": ["heads={heads},nodes=5"],
    "horizontal": [
        f"drafters={DRAFT}+(model:model=target,layers=2,length=2),lengths=3+2",
        f"drafters=(jacobi:window=3)+{DRAFT},lengths=2+1",
    ],
    "jacobi": ["window=4", "window=4,mode=block", "window=1"],
    "model": [
        "model=target,layers=1",
        "model=target,layers=1,length=5,confidence=0.1",
        "model=target,quantize=int8,length=3",
        "model=target,layers=1,length=0",
    ],
    "prompt_lookup": ["", "lean=false", "branch=3,length=4"],
    "max_gram": ["", "length=3,min_ngram=2"],
    "trigram": [
        "",
        "search=puct,iterations=9",
        "learn=tree,eta=0.9,lean=false",
        "nodes=2",
    ],
    "tree": [
        "model=target,layers=1",
        "model=target,layers=1,shape=static,depth=3",
        "model=target,layers=1,depth=2,frontier=5,nodes=16",
    ],
    "vertical": [
        "model=target,layers=1,length=4,drafter=(autoregressive)",
        "model=target,layers=1,length=4,lenience=3,drafter=(jacobi:window=4)",
        f"model=target,quantize=int8,length=5,drafter={DRAFT}",
        "model=target,quantize=int8,length=3,drafter=(tree:model=target,layers=1)",
    ],
}


@functools.cache
def toy_lm(weights: str = "float32", eos: tuple[int, ...] = (), vocabulary=VOCABULARY):
    model, params = toy_model(vocabulary)
    if weights == "int8":
        params = quantize_params(params, Int8())
    return jaxllm.LanguageModel(
        model=model,
        params=params,
        generation=GenerationDefaults(eos_ids=eos),
        name="toy",
    )


def methods(fast: bool = True, every: bool = True) -> list:
    """Every registered method, with all its options or the first; that one is fast."""
    found = []
    for name in sorted(METHODS):
        chosen = OPTIONS.get(name, [""])
        for i, options in enumerate(chosen if every else chosen[:1]):
            marks = [] if fast and i == 0 else [pytest.mark.slow]
            text = f"{name}:{options}" if options else name
            found.append(pytest.param(text, marks=marks, id=text))
    return found


def bound(method: str, heads_file, lm) -> BoundDrafter:
    text = method.replace("{heads}", str(heads_file))
    return BoundDrafter(lm, build(text, METHODS, {Drafter: METHODS}))
