"""Heads on the last hidden state: alignment, files and refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxllm
from jaxllm.core.errors import CheckpointError, ConfigError
from jaxllm.drafting.heads import head_logits, load_heads, save_heads
from tests.drafting.toy_methods import ids, run, toy_lm

ACCURACY = [[0.5, 0.2], [0.4, 0.1]]


def toy_heads(tmp_path, width=32, kernel=None):
    path = tmp_path / "heads.safetensors"
    if kernel is None:
        kernel = np.asarray(jax.random.normal(jax.random.key(1), (2, width, width)))
    save_heads(path, kernel, ACCURACY)
    return path


def test_empty_heads_say_what_the_target_says() -> None:
    lm = toy_lm()
    tokens_BT = jnp.asarray([[3, 1, 4]])
    forward = lm.model(lm.params, tokens_BT)
    kernel = jnp.zeros((2, lm.config.width, lm.config.width))
    logits = head_logits(lm.model, lm.params, kernel, forward.hidden_BTD[0])
    for k in range(2):
        assert (logits[:, k] == forward.logits_BTV[0]).all()


def test_a_prompt_of_one_token_drafts_nothing_at_first(tmp_path) -> None:
    method = f"heads:heads={toy_heads(tmp_path)},nodes=4"
    [short] = run(method, lengths=(1,), max_new_tokens=1)
    assert short.stats["drafted"] == 0
    [longer] = run(method, lengths=(2,), max_new_tokens=1)
    assert longer.stats["drafted"] == 3


def test_the_shipped_heads_guess_what_follows_the_pending_token() -> None:
    # Heads that were off by one place would be right about one time in twenty.
    lm = jaxllm.load("demo", dtype="float32")
    prompts = ["Once upon a time", "One day, a boy named Tim went to the park."]
    results = jaxllm.generate(lm, prompts, decode="heads", max_new_tokens=60)
    plain = jaxllm.generate(lm, prompts, max_new_tokens=60)
    assert ids(results) == ids(plain)
    for result in results:
        assert result.stats["acceptance_by_depth"][0] > 0.35


def test_files(tmp_path) -> None:
    path = toy_heads(tmp_path)
    kernel, accuracy = load_heads(str(path))
    assert kernel.shape == (2, 32, 32)
    assert accuracy == ACCURACY
    with pytest.raises(CheckpointError, match="no such file or shipped heads"):
        load_heads("nowhere")
    other = toy_heads(tmp_path, width=16)
    with pytest.raises(ConfigError, match="heads have width 16, expected 32"):
        jaxllm.bind(toy_lm(), f"heads:heads={other}")
    save_heads(path, np.zeros((3, 32, 32), np.float32), ACCURACY)
    with pytest.raises(CheckpointError, match="accuracies of 2, expected"):
        load_heads(str(path))
