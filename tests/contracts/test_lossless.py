"""Every registered method gives the tokens of plain decoding: the lossless contract.

A new line in `drafting.METHODS` is enrolled here by itself. Chains are compared with
plain decoding at their own width, token for token; the other cases of the contract
(eos inside a block, limits, prompts of one token) are rows of the same batch.
"""

import functools

import numpy as np
import pytest

import jaxllm
from jaxllm.checkpoints import GenerationDefaults
from jaxllm.core.registry import build
from jaxllm.decoding.protocol import Drafter
from jaxllm.drafting import METHODS, Autoregressive
from jaxllm.quantization import Int8, quantize_params
from tests.decoding.toys import VOCABULARY, toy_model

PROMPT_LENGTHS = (1, 9, 4)


@functools.cache
def toy_lm(weights: str, eos: tuple[int, ...] = ()):
    model, params = toy_model()
    if weights == "int8":
        params = quantize_params(params, Int8())
    return jaxllm.LanguageModel(
        model=model,
        params=params,
        generation=GenerationDefaults(eos_ids=eos),
        name="toy",
    )


def prompts(rows: int) -> list[list[int]]:
    rng = np.random.default_rng(rows)
    return [rng.integers(0, VOCABULARY, n).tolist() for n in PROMPT_LENGTHS[:rows]]


@pytest.mark.parametrize("weights", ["float32", "int8"])
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("name", sorted(METHODS))
def test_tokens_are_those_of_plain_decoding(name, temperature, rows, weights) -> None:
    drafter = build(name, METHODS, {Drafter: METHODS})
    options = {"max_new_tokens": 13, "temperature": temperature, "seed": 5}
    lm = toy_lm(weights)
    plain = Autoregressive(query_width=drafter.bind(lm)[0].nodes)
    expected = jaxllm.generate(lm, prompts(rows), drafter=plain, **options)
    found = jaxllm.generate(lm, prompts(rows), decode=name, **options)
    assert [r.token_ids for r in found] == [r.token_ids for r in expected]
    # An end token somewhere inside: nothing of the block after it may stand.
    end = expected[0].token_ids[6]
    cut = jaxllm.generate(
        toy_lm(weights, (end,)), prompts(rows), decode=name, **options
    )
    for row, whole in zip(cut, expected, strict=True):
        ids = whole.token_ids
        stop = ids.index(end) + 1 if end in ids else len(ids)
        assert row.token_ids == ids[:stop]
        assert row.finish_reason == ("eos" if end in ids else "length")
