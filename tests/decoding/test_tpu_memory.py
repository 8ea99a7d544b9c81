"""The decode loop compiled for a TPU slice: the cache is never copied."""

import pytest

from jaxllm.analysis import Compilation, compile_ahead, find_config, parse_slice

DRAFT = "model=target,layers=2"
METHODS = (
    "autoregressive",
    "jacobi:window=8",
    "lookahead:window=2,ngram=3,pool=2",
    "prompt_lookup",
    "trigram",
    f"model:{DRAFT}",
    f"tree:{DRAFT}",
    f"horizontal:drafters=(model:{DRAFT},length=2)+(max_gram),lengths=2+4",
    f"vertical:{DRAFT},length=4,drafter=(max_gram)",
    "adaptive:drafter=(prompt_lookup)",
)


@pytest.mark.slow
def test_8b_loops_copy_no_cache_on_a_v5e_slice() -> None:
    pytest.importorskip("libtpu", reason="the TPU compiler is not installed")
    compilations = [
        Compilation(
            config=find_config("llama3-8b"),
            machine=parse_slice("v5e:2x4"),
            method=method,
            rows=16,
            context=8192,
        )
        for method in METHODS
    ]
    found = list(compile_ahead(compilations))
    assert [memory["method"] for memory in found] == list(METHODS)
    for memory in found:
        assert memory["cache_bytes"] == 2**31
        assert memory["alias_bytes"] >= memory["cache_bytes"], memory
        # 0.13 GB beside a cache of 2.1 GB a chip, and the logits of more nodes; a copy
        # of the cache would be seen.
        assert memory["temp_bytes"] < 0.3 * memory["cache_bytes"], memory
