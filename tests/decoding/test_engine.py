"""The engine against a plain loop without cache, batch or drafter."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.core.errors import CapacityError, ConfigError, UserError
from jaxllm.decoding import Request, decode, locate_nonfinite, make_sampler
from jaxllm.decoding.reference import decode_reference
from jaxllm.drafting import Autoregressive
from tests.decoding.toys import VOCABULARY, Replay, toy_model

GAP = 1e-4


def prompts_of(*lengths: int) -> list[list[int]]:
    rng = np.random.default_rng(sum(lengths))
    return [rng.integers(0, VOCABULARY, n).tolist() for n in lengths]


def request_of(prompts, new, *, eos=(), seeds=None, **options) -> Request:
    rows = len(prompts)
    return Request(
        prompts=prompts,
        max_new_tokens=[new] * rows if isinstance(new, int) else new,
        sampler=make_sampler(rows, **options),
        seeds=list(range(rows)) if seeds is None else seeds,
        eos=eos,
        steps_per_call=5,
    )


def run(request, drafter=None, model_params=None):
    model, params = toy_model() if model_params is None else model_params
    return decode(
        model,
        {"target": params, "drafter": {}},
        request,
        drafter=drafter or Autoregressive(),
    )


def assert_equals_reference(outputs, request, options=None, model_params=None) -> None:
    """Asserts equality, or that the first difference is a near tie."""
    model, params = toy_model() if model_params is None else model_params
    for row, output in enumerate(outputs):
        expected, gaps = decode_reference(
            model,
            params,
            request.prompts[row],
            request.max_new_tokens[row],
            sampler=make_sampler(1, **(options or {})),
            seed=request.seeds[row],
            eos=request.eos,
        )
        if output.token_ids != expected:
            first = next(
                i
                for i, (a, b) in enumerate(
                    zip(output.token_ids, expected, strict=False)
                )
                if a != b
            )
            assert gaps[first] < GAP, (row, first, gaps[first])


SAMPLING = [
    {},
    {"temperature": 1.0},
    {"temperature": 0.7, "top_k": 5},
    {"temperature": 1.3, "top_p": 0.8},
    {"temperature": 1.0, "min_p": 0.2, "top_k": 20, "top_p": 0.9},
]


@pytest.mark.parametrize("options", SAMPLING)
def test_ragged_batch_equals_reference(options) -> None:
    request = request_of(prompts_of(1, 9, 4), 12, **options)
    assert_equals_reference(run(request), request, options)


@pytest.mark.parametrize("new", [1, 2, 7])
def test_limits_are_exact(new) -> None:
    request = request_of(prompts_of(3, 5), [new, new + 1])
    outputs = run(request)
    assert [len(o.token_ids) for o in outputs] == [new, new + 1]
    assert [o.stats["emitted"] for o in outputs] == [new, new + 1]
    assert [o.stats["target_passes"] for o in outputs] == [new, new + 1]


def test_no_new_tokens() -> None:
    outputs = run(request_of(prompts_of(3, 5), [0, 4]))
    assert [len(o.token_ids) for o in outputs] == [0, 4]
    assert outputs[0].stats["target_passes"] == 0


def test_long_prompt_runs_in_chunks() -> None:
    request = request_of(prompts_of(700, 513, 512, 2), 3)
    assert_equals_reference(run(request), request)


def test_alone_equals_in_a_batch() -> None:
    options = {"temperature": 1.0}
    prompts = prompts_of(6, 2, 11)
    together = run(request_of(prompts, 10, seeds=[7, 8, 9], **options))
    for row, prompt in enumerate(prompts):
        (alone,) = run(request_of([prompt], 10, seeds=[7 + row], **options))
        assert alone.token_ids == together[row].token_ids


def test_permuting_rows_permutes_outputs_bitwise() -> None:
    prompts = prompts_of(6, 2, 11, 5)
    first = run(request_of(prompts, 10, seeds=[1, 2, 3, 4], temperature=1.0))
    second = run(request_of(prompts[::-1], 10, seeds=[4, 3, 2, 1], temperature=1.0))
    for a, b in zip(first, second[::-1], strict=True):
        assert a.token_ids == b.token_ids
        assert a.logprobs == b.logprobs


def test_greedy_rows_beside_sampled_rows() -> None:
    prompts = prompts_of(4, 4)
    mixed = run(request_of(prompts, 8, temperature=[0.0, 1.0]))
    greedy = run(request_of(prompts, 8))
    assert mixed[0].token_ids == greedy[0].token_ids
    assert mixed[1].token_ids != greedy[1].token_ids


def test_eos_ends_a_row_and_stays_in_it() -> None:
    prompts = prompts_of(4, 6)
    plain = run(request_of(prompts, 12))
    end = plain[0].token_ids[5]
    outputs = run(request_of(prompts, 12, eos=(end, VOCABULARY + 5)))
    cut = plain[0].token_ids.index(end) + 1
    assert outputs[0].token_ids == plain[0].token_ids[:cut]
    assert outputs[0].ended
    assert outputs[0].stats["target_passes"] == cut


def test_logprobs_are_those_of_a_whole_forward() -> None:
    model, params = toy_model()
    prompts = prompts_of(5)
    (output,) = run(request_of(prompts, 9, temperature=0.8, top_k=4))
    ids = jnp.asarray([prompts[0] + output.token_ids])
    logprobs = jax.nn.log_softmax(jax.jit(model)(params, ids).logits_BTV[0])
    expected = [
        float(logprobs[len(prompts[0]) - 1 + i, t])
        for i, t in enumerate(output.token_ids)
    ]
    np.testing.assert_allclose(output.logprobs, expected, atol=1e-4)


@pytest.mark.parametrize("tree", [False, True])
@pytest.mark.parametrize("options", [{}, {"temperature": 1.0, "top_p": 0.9}])
def test_right_drafts_are_accepted_whole(tree, options) -> None:
    prompts = prompts_of(3, 8)
    request = request_of(prompts, 12, **options)
    plain = run(request)
    answers = tuple(tuple(o.token_ids) for o in plain)
    drafter = Replay(answers, (3, 8), depth=3, tree=tree)
    outputs = run(request, drafter)
    for a, b in zip(outputs, plain, strict=True):
        assert a.token_ids == b.token_ids
        np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-4)
        assert a.stats["target_passes"] == 3
        assert a.stats["accepted"] == [3, 3, 3, 3]


@pytest.mark.parametrize("tree", [False, True])
def test_wrong_drafts_change_nothing(tree) -> None:
    prompts = prompts_of(3, 8)
    request = request_of(prompts, 9, temperature=1.0)
    plain = run(request)
    answers = tuple(tuple(o.token_ids) for o in plain)
    # Shifted by 2, neither a node nor its sibling is right.
    outputs = run(request, Replay(answers, (3, 8), depth=2, tree=tree, shift=2))
    for a, b in zip(outputs, plain, strict=True):
        assert a.token_ids == b.token_ids
        assert a.stats["target_passes"] == 9
        assert a.stats["accepted"][1:] == [0, 0]
        assert a.stats["tested"][1] == a.stats["target_passes"]


@pytest.mark.parametrize("new", [1, 2, 5, 6, 7, 8])
def test_blocks_are_cut_at_the_limit(new) -> None:
    prompts = prompts_of(4)
    answer = tuple(run(request_of(prompts, 16))[0].token_ids)
    (output,) = run(request_of(prompts, new), Replay((answer,), (4,), depth=3))
    assert tuple(output.token_ids) == answer[:new]
    assert output.stats["emitted"] == new


def test_eos_inside_an_accepted_block() -> None:
    prompts = prompts_of(4)
    answer = tuple(run(request_of(prompts, 16))[0].token_ids)
    for at in range(5):
        end = answer[at]
        request = request_of(prompts, 16, eos=(end,))
        (output,) = run(request, Replay((answer,), (4,), depth=3))
        cut = answer.index(end) + 1
        assert tuple(output.token_ids) == answer[:cut]
        assert output.ended


def test_width_pads_without_changing_tokens() -> None:
    request = request_of(prompts_of(3, 8), 12, temperature=1.0)
    plain, wide = run(request), run(request, Autoregressive(query_width=8))
    for a, b in zip(plain, wide, strict=True):
        assert a.token_ids == b.token_ids
        assert b.stats["drafted"] == 0


def test_chain_equals_plain_decoding_of_its_width() -> None:
    prompts = prompts_of(3, 8)
    request = request_of(prompts, 12)
    wide = run(request, Autoregressive(query_width=4))
    answers = tuple(tuple(o.token_ids) for o in wide)
    drafted = run(request, Replay(answers, (3, 8), depth=3))
    for a, b in zip(drafted, wide, strict=True):
        assert a.token_ids == b.token_ids
        np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-5)


BAD = [
    (
        lambda: request_of([[]], 4),
        CapacityError,
        "cannot generate: prompt 0 is empty, expected at least one token. Write a "
        "prompt; this tokenizer has no start token to put in its place.",
    ),
    (
        lambda: request_of([[1], [1] * 2040], 16),
        CapacityError,
        "cannot generate: prompt 1 has 2040 tokens, expected at most 2032 (the "
        "model's 2048 positions less 16 new tokens). Shorten it or lower "
        "--max_new_tokens.",
    ),
    (
        lambda: request_of([[1, 61]], 4),
        CapacityError,
        "cannot embed: prompt 0 has id 61 at index 1, expected 0 to 60. Use the "
        "model's own tokenizer.",
    ),
    (
        lambda: request_of([[-1]], 4),
        CapacityError,
        "cannot embed: prompt 0 has id -1 at index 0, expected 0 to 60. Use the "
        "model's own tokenizer.",
    ),
    (
        lambda: request_of([[1]], -1),
        ConfigError,
        "cannot generate: max_new_tokens is -1, expected 0 or more. Correct "
        "--max_new_tokens.",
    ),
]


@pytest.mark.parametrize(("make", "error", "message"), BAD)
def test_bad_requests_are_refused(make, error, message) -> None:
    with pytest.raises(error) as caught:
        run(make())
    assert str(caught.value) == message


@pytest.mark.parametrize("layer", [0, 1])
def test_logits_that_are_not_finite_are_located(layer) -> None:
    model, params = toy_model()
    stacks = list(params["stacks"])
    kernel = stacks[layer]["mlp"]["up"]["kernel"]
    stacks[layer] = {
        **stacks[layer],
        "mlp": {
            **stacks[layer]["mlp"],
            "up": {"kernel": kernel.at[0, 3, 5].set(jnp.nan)},
        },
    }
    broken = {**params, "stacks": tuple(stacks)}
    with pytest.raises(UserError) as caught:
        run(request_of(prompts_of(4), 5), model_params=(model, broken))
    assert str(caught.value) == (
        f"cannot decode: logits of row 0 at position 4 are not finite: layer {layer} "
        f"of 0-1 gives the first such value, expected finite numbers. Check the "
        f"weights, or compute in float32 with --dtype=float32."
    )


def test_not_finite_embedding_and_head_are_named() -> None:
    model, params = toy_model()
    ids = jnp.asarray([[1, 2, 3]])
    table = params["embedder"]["table"].at[2].set(jnp.inf)
    broken = {**params, "embedder": {"table": table}}
    assert locate_nonfinite(model, broken, ids) == "the embedding"
    head = params["head"]["kernel"].at[0, 0].set(jnp.nan)
    assert locate_nonfinite(model, {**params, "head": {"kernel": head}}, ids) == (
        "the head"
    )
