"""The Python door, on a random model with the shipped tokenizer, and on `demo`."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxllm
from jaxllm.checkpoints import GenerationDefaults, load_tokenizer, resolve
from jaxllm.core.errors import CapacityError, ConfigError, UserError
from jaxllm.drafting import Autoregressive
from tests.decoding.toys import toy_model

PROMPTS = ["Once upon a time", "The cat", "Lily had a red ball and a"]


@functools.cache
def toy_lm(eos: tuple[int, ...] = (), stop: tuple[str, ...] = ()):
    model, params = toy_model(vocabulary=2048)
    return jaxllm.LanguageModel(
        model=model,
        params=params,
        tokenizer=load_tokenizer(resolve("demo"), 2048),
        generation=GenerationDefaults(eos_ids=eos, stop_strings=stop),
        name="toy",
    )


def test_logits_are_ragged_in_and_out() -> None:
    lm = toy_lm()
    rows = [[5, 6, 7], [], [9] * 20, [1]]
    found = jaxllm.logits(lm, rows)
    assert [x.shape for x in found] == [(3, 2048), (0, 2048), (20, 2048), (1, 2048)]
    for ids, logits in zip(rows, found, strict=True):
        assert logits.dtype == np.float32
        if ids:
            alone = jax.jit(lm.model)(lm.params, jnp.asarray([ids])).logits_BTV[0]
            np.testing.assert_allclose(logits, alone, atol=1e-5)


def test_generate_takes_texts_and_ids() -> None:
    lm = toy_lm()
    results = jaxllm.generate(lm, PROMPTS, max_new_tokens=9)
    ids = [lm.tokenizer.encode(p) for p in PROMPTS]
    again = jaxllm.generate(lm, ids, max_new_tokens=9)
    for a, b in zip(results, again, strict=True):
        assert a.token_ids == b.token_ids
        assert a.text == lm.tokenizer.decode(a.token_ids)
        assert a.finish_reason == "length"
        assert len(a.logprobs) == len(a.token_ids) == 9
        assert a.stats["target_passes"] == a.stats["emitted"] == 9
        assert a.stats["tokens_per_pass"] == 1.0


def test_a_drafter_made_in_python_takes_the_place_of_a_method() -> None:
    lm = toy_lm()
    by_name = jaxllm.generate(
        lm, PROMPTS[:1], decode="autoregressive:query_width=4", max_new_tokens=9
    )
    by_object = jaxllm.generate(
        lm, PROMPTS[:1], drafter=Autoregressive(query_width=4), max_new_tokens=9
    )
    assert by_name[0].token_ids == by_object[0].token_ids


def test_rows_keep_their_seed_in_any_batch() -> None:
    lm = toy_lm()
    options = {"max_new_tokens": 9, "temperature": 1.0}
    together = jaxllm.generate(lm, PROMPTS, seed=10, **options)
    for row, prompt in enumerate(PROMPTS):
        (alone,) = jaxllm.generate(lm, [prompt], seed=10 + row, **options)
        assert alone.token_ids == together[row].token_ids
    own = jaxllm.generate(lm, PROMPTS[::-1], seed=[12, 11, 10], **options)
    assert [r.token_ids for r in own[::-1]] == [r.token_ids for r in together]


def test_rows_may_have_their_own_options() -> None:
    lm = toy_lm()
    results = jaxllm.generate(
        lm, PROMPTS, max_new_tokens=[3, 0, 9], temperature=[0.0, 0.0, 1.0]
    )
    assert [len(r.token_ids) for r in results] == [3, 0, 9]
    plain = jaxllm.generate(lm, PROMPTS, max_new_tokens=9)
    assert plain[0].token_ids[:3] == results[0].token_ids


def test_stop_strings_cut_text_and_tokens() -> None:
    lm = toy_lm()
    (plain,) = jaxllm.generate(lm, PROMPTS[:1], max_new_tokens=30)
    stop = plain.text[11:15]
    (cut,) = jaxllm.generate(lm, PROMPTS[:1], max_new_tokens=30, stop=[stop])
    assert cut.finish_reason == "stop"
    assert cut.text == plain.text[: plain.text.find(stop)]
    assert cut.token_ids == plain.token_ids[: len(cut.token_ids)]
    assert stop in lm.tokenizer.decode(cut.token_ids)
    assert stop not in lm.tokenizer.decode(cut.token_ids[:-1])
    assert len(cut.logprobs) == len(cut.token_ids)
    # A stop string of the checkpoint's own holds without being asked for.
    (own,) = jaxllm.generate(toy_lm(stop=(stop,)), PROMPTS[:1], max_new_tokens=30)
    assert own.text == cut.text


def test_eos_of_the_checkpoint_ends_a_row() -> None:
    (plain,) = jaxllm.generate(toy_lm(), PROMPTS[:1], max_new_tokens=12)
    end = plain.token_ids[4]
    (cut,) = jaxllm.generate(toy_lm(eos=(end,)), PROMPTS[:1], max_new_tokens=12)
    assert cut.finish_reason == "eos"
    assert cut.token_ids == plain.token_ids[: plain.token_ids.index(end) + 1]


@pytest.mark.parametrize("stop", [(), ("e",)])
def test_stream_gives_the_text_of_generate(stop) -> None:
    lm = toy_lm()
    options = {"max_new_tokens": 20, "temperature": 0.9, "seed": 3, "stop": stop}
    (result,) = jaxllm.generate(lm, PROMPTS[:1], **options)
    pieces = list(jaxllm.stream(lm, PROMPTS[0], **options))
    assert "".join(pieces) == result.text
    if not stop:
        assert len(pieces) > 1


def test_score_equals_a_direct_sum() -> None:
    lm = toy_lm()
    scores = jaxllm.score(lm, PROMPTS[:2], [" there was", " sat."])
    for prompt, text, score in zip(
        PROMPTS, [" there was", " sat."], scores, strict=False
    ):
        head = lm.tokenizer.encode(prompt)
        whole = lm.tokenizer.encode(prompt + text)
        assert whole == head + score.token_ids
        logits = jax.jit(lm.model)(lm.params, jnp.asarray([whole])).logits_BTV[0]
        logprobs = jax.nn.log_softmax(logits)
        expected = [
            float(logprobs[len(head) - 1 + i, t]) for i, t in enumerate(score.token_ids)
        ]
        np.testing.assert_allclose(score.logprobs, expected, atol=1e-4)
        assert score.total == pytest.approx(sum(expected), abs=1e-3)
        assert not score.is_greedy


def test_greedy_continuations_are_recognised() -> None:
    lm = toy_lm()
    (result,) = jaxllm.generate(lm, PROMPTS[:1], max_new_tokens=5)
    ids = lm.tokenizer.encode(PROMPTS[0])
    (score,) = jaxllm.score(lm, [ids], [result.token_ids])
    assert score.is_greedy
    np.testing.assert_allclose(score.logprobs, result.logprobs, atol=1e-4)


def test_a_model_without_tokenizer_takes_ids() -> None:
    model, params = toy_model()
    lm = jaxllm.LanguageModel(model=model, params=params, name="bare")
    (result,) = jaxllm.generate(lm, [[1, 2, 3]], max_new_tokens=4)
    assert result.text == "" and len(result.token_ids) == 4
    with pytest.raises(UserError) as caught:
        jaxllm.generate(lm, ["text"])
    assert str(caught.value) == (
        "cannot encode: prompt 0 is text, expected token ids: bare has no tokenizer. "
        "Pass lists of ids."
    )
    with pytest.raises(UserError, match=r"^cannot stream: bare has no tokenizer"):
        next(jaxllm.stream(lm, [1, 2]))
    with pytest.raises(UserError, match=r"^cannot stop at strings: bare has no"):
        jaxllm.generate(lm, [[1]], stop="x")


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda lm: jaxllm.generate(lm, "text"),
            UserError,
            "cannot generate: prompts is one string, expected a list of prompts. "
            "Write [prompt].",
        ),
        (
            lambda lm: jaxllm.generate(lm, ["a", "b"], temperature=[1.0]),
            ConfigError,
            "cannot generate: temperature has 1 values, expected 2, one for each "
            "prompt. Give one value, or one for each.",
        ),
        (
            lambda lm: jaxllm.generate(lm, ["a"], seed=-1),
            ConfigError,
            "cannot sample: seed is -1, expected an integer from 0 to 4294967295. "
            "Choose another.",
        ),
        (
            lambda lm: jaxllm.logits(lm, [[1], [2048]]),
            CapacityError,
            "cannot embed: prompt 1 has id 2048 at index 0, expected 0 to 2047. Use "
            "the model's own tokenizer.",
        ),
        (
            lambda lm: jaxllm.logits(lm, [[1] * 2049]),
            UserError,
            "cannot run: sequence 0 has 2049 tokens, expected at most 2048, the "
            "model's positions. Shorten it.",
        ),
        (
            lambda lm: jaxllm.score(lm, ["a"], []),
            UserError,
            "cannot score: 0 continuations, expected 1, one for each prompt. Pass "
            "equal numbers.",
        ),
        (
            lambda lm: jaxllm.score(lm, ["a"], [""]),
            UserError,
            "cannot score: continuation 0 has no tokens, expected at least one. "
            "Write some text.",
        ),
        (
            lambda lm: list(jaxllm.stream(lm, "a", tempature=1.0)),
            UserError,
            "cannot stream: option 'tempature' is unknown, expected an option of "
            "generate. Remove it.",
        ),
    ],
)
def test_mistakes_are_explained(call, error, message) -> None:
    with pytest.raises(error) as caught:
        call(toy_lm())
    assert str(caught.value) == message


def test_no_prompts_give_no_results() -> None:
    assert jaxllm.generate(toy_lm(), []) == []
    assert jaxllm.logits(toy_lm(), []) == []


def test_demo_writes_sentences_and_survives_saving(tmp_path) -> None:
    lm = jaxllm.load("demo", dtype="float32")
    (result,) = jaxllm.generate(lm, ["Once upon a time"], max_new_tokens=40)
    assert len(result.text.split()) > 20
    jaxllm.save(lm, str(tmp_path / "saved"))
    again = jaxllm.load(str(tmp_path / "saved"), dtype="float32")
    for a, b in zip(
        jax.tree.leaves(lm.params), jax.tree.leaves(again.params), strict=True
    ):
        np.testing.assert_array_equal(a, b)
    (same,) = jaxllm.generate(again, ["Once upon a time"], max_new_tokens=40)
    assert same.token_ids == result.token_ids
