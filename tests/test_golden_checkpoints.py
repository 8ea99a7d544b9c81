"""Real trained checkpoints: greedy ids equal those of the reference implementation.

The golden files stand beside the development checkpoints; `tests/parity` compares with
the reference itself.
"""

import gzip
import json

import numpy as np
import pytest

import jaxllm

MODELS = ["stories260K", "babyllama105"]


def load(data_dir, name):
    directory = data_dir / "models" / name
    golden = json.loads((directory / "golden.json").read_text("utf-8"))
    return jaxllm.load(str(directory), dtype="float32"), golden


@pytest.mark.parametrize("name", MODELS)
def test_greedy_ids_equal_the_golden_file(data_dir, name) -> None:
    lm, golden = load(data_dir, name)
    cases = golden["prompts"]
    texts = [case["text"] for case in cases]
    assert [lm.tokenizer.encode(t) for t in texts] == [c["ids"] for c in cases]
    results = jaxllm.generate(lm, texts, max_new_tokens=64)
    for case, result in zip(cases, results, strict=True):
        assert result.token_ids == case["greedy_64"]
        assert result.text == case["greedy_text"]


@pytest.mark.parametrize("name", MODELS)
def test_top_logits_equal_the_golden_file(data_dir, name) -> None:
    lm, golden = load(data_dir, name)
    cases = golden["prompts"]
    found = jaxllm.logits(lm, [case["ids"] for case in cases])
    for case, logits in zip(cases, found, strict=True):
        for token, value in case["top5_last"]:
            assert abs(float(logits[-1, token]) - value) < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_perplexity_equals_the_golden_file(data_dir, name) -> None:
    lm, golden = load(data_dir, name)
    valid = golden["valid"]
    path = data_dir / "text" / valid["file"]
    text = gzip.open(path, "rt", encoding="utf-8").read()[: valid["chars"]]
    ids, window = lm.tokenizer.encode(text), valid["window"]
    assert len(ids) - 1 == valid["tokens"]
    # A window's inputs predict the token after each, the next window's first included.
    starts = range(0, len(ids) - 1, window)
    scores = jaxllm.score(
        lm,
        [[ids[s]] for s in starts],
        [ids[s + 1 : s + window] for s in starts],
    )
    last = jaxllm.logits(lm, [ids[s : s + window] for s in starts])
    total = sum(score.total for score in scores)
    for s, logits in zip(starts, last, strict=True):
        if s + window < len(ids):
            row = logits[-1].astype(np.float64)
            total += row[ids[s + window]] - np.logaddexp.reduce(row)
    assert -total / (len(ids) - 1) == pytest.approx(valid["nll_per_token"], abs=2e-4)
