"""A smaller model drafts: its cache, its catch-up, its vocabulary."""

import jax
import jax.numpy as jnp
import pytest

import jaxllm
from jaxllm.core.errors import ConfigError
from jaxllm.core.rng import row_keys
from jaxllm.decoding import Committed, make_sampler
from jaxllm.drafting.draft_net import DraftNet
from tests.decoding.toys import TEMPERATURES, toy_model
from tests.drafting.toy_methods import ids, run, toy_lm, toy_prompts

WHOLE = "model:model=target,layers=2"  # all layers of the toy model: the target itself


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_the_target_as_its_own_draft_is_always_right(temperature) -> None:
    # Also right after drafts that were accepted whole, whose last token was not fed.
    for result in run(f"{WHOLE},length=3", temperature=temperature):
        stats = result.stats
        assert stats["target_passes"] == 24 // 4
        assert stats["accepted"] == [6, 6, 6, 6]
        assert stats["draft_passes"] == {"target[:2]": 6 * 3}
        # Two tokens of catch-up after the first step, then one for each later node.
        assert stats["draft_tokens"] == {"target[:2]": 6 * 3 + 5}


def test_length_zero_is_plain_decoding() -> None:
    plain, none = run("autoregressive"), run(f"{WHOLE},length=0")
    assert ids(plain) == ids(none)
    assert none[0].stats["target_passes"] == 24
    assert none[0].stats["draft_passes"] == {"target[:2]": 0}


@pytest.mark.slow
def test_drafts_are_those_of_a_model_that_starts_from_the_text() -> None:
    # Were anything stale in its cache it would draft otherwise, and need other steps.
    method, lm = "model:model=target,layers=1,length=3", toy_lm()
    bound = jaxllm.bind(lm, method)
    params, net = bound.arguments(), bound.drafter.net

    @jax.jit
    def from_scratch(tokens_BS, length_B):
        committed = Committed(tokens_BS, length_B, row_keys([3]), sampler)
        state = net.init(params, committed)
        return bound.drafter.propose(params, state, committed)[1].tokens_BM[0, 1:]

    sampler = make_sampler(1, temperature=0.7)
    [prompt] = toy_prompts(6)
    [result] = run(bound, lengths=(6,), temperature=0.7)
    known, at, passes = result.token_ids, 0, 0
    while at < len(known):
        text = prompt + known[:at]
        tokens_BS = (
            jnp.zeros((1, 64), jnp.int32).at[0, : len(text)].set(jnp.asarray(text))
        )
        draft = from_scratch(tokens_BS, jnp.asarray([len(text)])).tolist()
        right = 0
        while right < 3 and known[at + right : at + right + 1] == draft[right:][:1]:
            right += 1
        at, passes = at + right + 1, passes + 1
    assert passes == result.stats["target_passes"] < 24


def test_confidence_stops_a_draft_early() -> None:
    sure = run(f"{WHOLE},length=3,confidence=0.9999999")
    assert ids(sure) == ids(run("autoregressive:query_width=4"))
    for result in sure:
        # Nothing was sure enough: one forward a step, for the token that was not.
        passes = result.stats["target_passes"]
        assert result.stats["draft_passes"]["target[:2]"] <= 2 * passes
        assert result.stats["drafted"] < 3 * passes


def test_vocabularies_of_other_sizes_are_padded_and_cut() -> None:
    model, _ = toy_model()
    logits = jnp.arange(61.0).reshape(1, 1, 61)
    wide = DraftNet(model, 64, "draft")._fit(logits)
    assert wide.shape == (1, 1, 64)
    assert (wide[..., :61] == logits).all()
    assert (wide[..., 61:] == -jnp.inf).all()
    narrow = DraftNet(model, 50, "draft")._fit(logits)
    assert (narrow == logits[..., :50]).all()
    assert DraftNet(model, 64, "draft")._clip(jnp.asarray([60, 63])).tolist() == [
        60,
        60,
    ]


def test_refusals() -> None:
    lm = toy_lm()
    with pytest.raises(ConfigError, match=r"cheaper than the target\. Add layers=N"):
        jaxllm.bind(lm, "model:model=target")
    with pytest.raises(ConfigError, match="layers is 3, expected 1 to 2"):
        jaxllm.bind(lm, "model:model=target,layers=3")
    with pytest.raises(ConfigError, match="its tokens are not those of toy"):
        jaxllm.bind(lm, "model")
    with pytest.raises(ConfigError, match=r"model\.length is -1, expected 0 or more"):
        jaxllm.bind(lm, "model:length=-1")


def test_the_shipped_draft_speaks_the_tokens_of_demo() -> None:
    lm = jaxllm.load("demo", dtype="float32")
    [plain] = jaxllm.generate(lm, ["Once upon a time"], max_new_tokens=40)
    [fast] = jaxllm.generate(
        lm, ["Once upon a time"], decode="model", max_new_tokens=40
    )
    assert fast.token_ids == plain.token_ids
    assert fast.stats["tokens_per_pass"] > 1.5
