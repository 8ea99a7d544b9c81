"""The rejection rule against the exact distribution, beside rules that are wrong.

Models are tables of transition logits, so the distribution of the next three tokens is
known exactly. Every wrong rule has to fail the test that the right one passes; without
that the test would prove nothing.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from jaxllm.core.errors import ConfigError
from jaxllm.core.rng import row_keys
from jaxllm.decoding import make_sampler, reject, sampling, verify
from jaxllm.decoding.protocol import Committed, Draft
from tests.decoding.toys import Replay

V, ROWS, TOKENS = 6, 24_000, 3
OPTIONS = {"temperature": 0.8, "top_p": 0.85}
LENGTH = 2


def tables(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Logits of target and drafter after every token."""
    rng = np.random.default_rng(seed)
    target = rng.normal(size=(V, V)) * 1.5
    return target, target + rng.normal(size=(V, V))


def sampled(rows: int, **options):
    return make_sampler(rows, **options, verify="reject")


def drawn_draft(draft_logits, committed, sampler) -> Draft:
    """A chain drawn from the drafter's table."""
    tokens, log_q = [committed.pending_B], []
    for i in range(LENGTH):
        logits = jnp.asarray(draft_logits)[tokens[-1]][:, None]
        position = (committed.length_B + i)[:, None]
        token, q = sampling.draw(logits, position, committed.row_key_B, sampler)
        tokens.append(token[:, 0])
        log_q.append(q[:, 0])
    tokens_BM = jnp.stack(tokens, axis=1)
    log_q_BMV = jnp.stack([jnp.zeros_like(log_q[0]), *log_q], axis=1)
    return Draft(tokens_BM, jnp.ones_like(tokens_BM, bool), log_q_BMV=log_q_BMV)


def top_draft(draft_logits, committed, sampler) -> Draft:
    """The drafter's likeliest chain, passed off as drawn from its softmax."""
    draft = drawn_draft(draft_logits, committed, sampler)
    tokens, log_q = [committed.pending_B], []
    for _ in range(LENGTH):
        logits = jnp.asarray(draft_logits)[tokens[-1]]
        tokens.append(jnp.argmax(logits, axis=-1).astype(jnp.int32))
        log_q.append(sampling.log_probabilities(logits[:, None], sampler)[:, 0])
    log_q_BMV = jnp.stack([draft.log_q_BMV[:, 0], *log_q], axis=1)
    return Draft(jnp.stack(tokens, axis=1), draft.valid_BM, log_q_BMV=log_q_BMV)


def plain_draft(draft_logits, committed, sampler) -> Draft:
    """The drafter's likeliest chain, as what it is: not drawn at all."""
    draft = top_draft(draft_logits, committed, sampler)
    return Draft(draft.tokens_BM, draft.valid_BM)


def generate(target, draft_logits, propose=drawn_draft, judge=reject, options=OPTIONS):
    """The next tokens of many rows that all begin with token 0, and the verdicts."""
    sampler = sampled(ROWS, **options)
    committed = Committed(
        jnp.zeros((ROWS, TOKENS + LENGTH + 2), jnp.int32),
        jnp.ones((ROWS,), jnp.int32),
        row_keys(jnp.arange(ROWS)),
        sampler,
    )
    verdicts = []
    for _ in range(TOKENS):
        draft = propose(draft_logits, committed, sampler)
        logits = jnp.asarray(target)[draft.tokens_BM]
        verdict = judge(draft, logits, sampler, committed, depth=LENGTH)
        verdicts.append(verdict)
        block = jnp.where(
            jnp.arange(LENGTH + 1) < verdict.num_accepted_B[:, None],
            jnp.roll(draft.tokens_BM, -1, axis=1),
            verdict.next_token_B[:, None],
        )
        going = committed.length_B <= TOKENS
        count = jnp.where(going, verdict.num_accepted_B + 1, 0)
        committed = committed.extend(block, count)
    return np.asarray(committed.tokens_BS[:, 1 : TOKENS + 1]), verdicts


def exact(target, options=OPTIONS) -> np.ndarray:
    """The probability of every text of three tokens behind token 0."""
    sampler = sampled(V, **options)
    logits = jnp.asarray(target)[:, None]
    p = np.asarray(jnp.exp(sampling.log_probabilities(logits, sampler)))[:, 0]
    joint = np.einsum("a,ab,bc->abc", p[0], p, p).ravel().astype(np.float64)
    return joint / joint.sum()


def p_value(tokens: np.ndarray, expected: np.ndarray) -> float:
    """Of a chi-square test; cells that are expected too rarely are pooled."""
    cell = np.ravel_multi_index(tokens.T, (V,) * TOKENS)
    found = np.bincount(cell, minlength=V**TOKENS)
    assert found[expected == 0].sum() == 0, "a token that the filters exclude"
    often = expected * len(tokens) >= 5
    found = np.append(found[often], found[~often].sum())
    wanted = np.append(expected[often], expected[~often].sum()) * len(tokens)
    if wanted[-1] < 5:
        found, wanted = found[:-1], wanted[:-1]
    return float(stats.chisquare(found, wanted * found.sum() / wanted.sum()).pvalue)


@pytest.mark.parametrize("propose", [drawn_draft, plain_draft])
@pytest.mark.parametrize("seed", [0, 1])
def test_the_output_has_the_targets_distribution(seed, propose) -> None:
    target, draft = tables(seed)
    tokens, _ = generate(target, draft, propose)
    assert p_value(tokens, exact(target)) > 1e-3


def test_mixed_rows_keep_greedy_rows_greedy() -> None:
    target, draft = tables()
    mixed = {"temperature": [0.0, 1.0] * (ROWS // 2)}
    tokens, _ = generate(target, draft, options=mixed)
    greedy, token = [], 0
    for _ in range(TOKENS):
        token = int(np.argmax(target[token]))
        greedy.append(token)
    assert (tokens[::2] == greedy).all()


def unnormalized(draft, logits_BMV, sampler, committed, *, depth, monkeypatch):
    """Draws from max(p - q, 0) as if it summed to 1."""

    def draw_residual(rest, position, key):
        total = jnp.cumsum(rest, axis=-1)
        u = jax.vmap(jax.random.uniform)(key)[:, None]
        return jnp.minimum((total < u).sum(-1), V - 1).astype(jnp.int32)

    monkeypatch.setattr(verify, "_draw_residual", draw_residual)
    return reject(draft, logits_BMV, sampler, committed, depth=depth)


def unwarped(draft, logits_BMV, sampler, committed, *, depth, monkeypatch):
    """Tests against the target's softmax without the filters."""
    bare = sampled(ROWS, temperature=OPTIONS["temperature"])
    return reject(draft, logits_BMV, bare, committed, depth=depth)


def shared(draft, logits_BMV, sampler, committed, *, depth, monkeypatch):
    """Tests with the very noise that the tokens were drawn with."""

    def uniform(key, position_BM):
        key = sampling.stream_keys(committed.row_key_B, sampling.DRAFT_STREAM)
        noise = sampling.position_gumbel(key, position_BM, V)
        token = draft.tokens_BM[:, 1:, None]
        g = jnp.take_along_axis(noise, token, axis=2)[..., 0]
        return jnp.exp(-jnp.exp(-g))

    monkeypatch.setattr(verify, "_uniform", uniform)
    return reject(draft, logits_BMV, sampler, committed, depth=depth)


@pytest.mark.parametrize("wrong", [unnormalized, unwarped, shared])
def test_a_wrong_rule_fails(wrong, monkeypatch) -> None:
    target, draft = tables()
    judge = functools.partial(wrong, monkeypatch=monkeypatch)
    tokens, _ = generate(target, draft, judge=judge)
    try:
        assert p_value(tokens, exact(target)) < 1e-6
    except AssertionError as error:
        assert "exclude" in str(error)


def test_top_tokens_with_the_drafters_softmax_fail() -> None:
    target, draft = tables()
    tokens, _ = generate(target, draft, top_draft)
    assert p_value(tokens, exact(target)) < 1e-6


def test_equal_models_accept_everything() -> None:
    target, _ = tables()
    _, verdicts = generate(target, target)
    assert (np.asarray(verdicts[0].num_accepted_B) == LENGTH).all()


def test_acceptance_is_the_overlap() -> None:
    target, draft = tables()
    sampler = sampled(V, **OPTIONS)
    p, q = (
        np.asarray(
            jnp.exp(sampling.log_probabilities(jnp.asarray(t)[:, None], sampler))
        )
        for t in (target, draft)
    )
    overlap = np.minimum(p, q).sum(axis=-1)[0, 0]
    _, verdicts = generate(target, draft)
    found = float((np.asarray(verdicts[0].num_accepted_B) >= 1).mean())
    assert abs(found - overlap) < 3 * np.sqrt(overlap * (1 - overlap) / ROWS)


@pytest.mark.parametrize("alpha", [0.3, 0.7, 0.9])
def test_tokens_per_pass_follow_the_formula(alpha) -> None:
    # The drafter is right with chance alpha after every token alike: p lives on the
    # first half of the vocabulary, q is alpha p and something else.
    p = np.concatenate([np.full(V // 2, 2 / V), np.zeros(V // 2)])
    q = alpha * p + (1 - alpha) * p[::-1]
    with np.errstate(divide="ignore"):
        target, draft = (np.tile(np.log(x), (V, 1)) for x in (p, q))
    _, verdicts = generate(target, draft, options={"temperature": 1.0})
    found = float(np.asarray(verdicts[0].num_accepted_B).mean()) + 1
    formula = (1 - alpha ** (LENGTH + 1)) / (1 - alpha)
    assert abs(found / formula - 1) < 0.03


def test_trees_are_refused() -> None:
    tree = Replay(answers=((1,),), prompts=(1,), tree=True)
    with pytest.raises(ConfigError, match="Replay drafts trees, expected a chain"):
        verify.check_verifier(tree, sampled(1, temperature=1.0))


def test_greedy_rejection_is_matching() -> None:
    assert not sampled(2, temperature=0.0).rejects
