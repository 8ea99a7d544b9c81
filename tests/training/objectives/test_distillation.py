"""Divergences against enumeration, and against the acceptance that they stand for."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

import jaxllm
from jaxllm.core.errors import ConfigError
from jaxllm.core.rng import row_keys
from jaxllm.decoding import Committed, Draft, make_sampler, reject, sampling
from jaxllm.training import Batch
from jaxllm.training.objectives import Distillation
from jaxllm.training.objectives.distillation import (
    forward_kl,
    reverse_kl,
    total_variation,
)
from tests.drafting.toy_methods import toy_lm
from tests.training.objectives.cases import (
    VOCABULARY,
    distance,
    gradient_of,
    packed_batch,
    small_model,
    taught,
)


def log_softmax_pair(seed: int = 0, shape: tuple[int, ...] = (3, 4, 9)):
    rng = np.random.default_rng(seed)
    logits = [jnp.asarray(rng.normal(size=shape) * 2, jnp.float32) for _ in range(2)]
    return [jax.nn.log_softmax(x, axis=-1) for x in logits]


def test_total_variation_goes_from_equal_to_disjoint() -> None:
    log_p, log_q = log_softmax_pair()
    tvd = total_variation(log_p, log_q)
    assert ((tvd > 0) & (tvd < 1)).all()
    np.testing.assert_array_equal(total_variation(log_p, log_p), 0)
    apart = jnp.asarray([[0.0, -1e4], [-1e4, 0.0]])
    assert float(total_variation(apart[:1], apart[1:])[0]) == 1
    # One minus the common mass, which is how acceptance is defined.
    common = jnp.minimum(jnp.exp(log_p), jnp.exp(log_q)).sum(axis=-1)
    np.testing.assert_allclose(tvd, 1 - common, atol=1e-6)


def test_divergences_are_those_of_float64() -> None:
    log_p, log_q = (np.asarray(x, np.float64) for x in log_softmax_pair())
    p, q = np.exp(log_p), np.exp(log_q)
    pair = tuple(map(jnp.float32, (log_p, log_q)))
    np.testing.assert_allclose(
        forward_kl(*pair), (q * (log_q - log_p)).sum(-1), rtol=1e-5
    )
    np.testing.assert_allclose(
        reverse_kl(*pair), (p * (log_p - log_q)).sum(-1), rtol=1e-5
    )
    np.testing.assert_array_equal(forward_kl(pair[0], pair[0]), 0)


def test_the_gradient_of_tvd_is_a_policy_gradient() -> None:
    rng = np.random.default_rng(1)
    logits_V, teacher_V = (jnp.asarray(rng.normal(size=7) * 2) for _ in range(2))
    log_q_V = jax.nn.log_softmax(teacher_V)
    found = jax.grad(lambda z: total_variation(jax.nn.log_softmax(z), log_q_V))(
        logits_V
    )
    # -E_p[r(x) grad log p(x)], one x after another.
    p_V = np.asarray(jax.nn.softmax(logits_V), np.float64)
    wanted = np.zeros(7)
    for x in range(7):
        reward = float(np.exp(log_q_V[x]) > p_V[x])
        score = np.eye(7)[x] - p_V
        wanted -= p_V[x] * reward * score
    np.testing.assert_allclose(found, wanted, atol=1e-7)
    assert np.abs(wanted).max() > 0.01


def distributions(batch: Batch) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Float64 p and q of every token but each row's first, and its weight."""
    found = []
    for model, params in (small_model(), small_model(1, VOCABULARY + 3)):
        logits_BTV = model(params, batch.tokens_BT, batch.context()).logits_BTV
        own = np.asarray(logits_BTV[:, :-1, :VOCABULARY], np.float64)
        found.append(scipy.special.softmax(own, axis=-1))
    return (*found, np.asarray(batch.weight_BT[:, 1:]))


@pytest.mark.parametrize("row", [0, 1])
def test_dense_tvdpp_is_tvd_over_its_deviation(row) -> None:
    batch = jax.tree.map(lambda x: x[row : row + 1], packed_batch())
    p_BTV, q_BTV, weight_BT = distributions(batch)
    reward_BTV = (q_BTV > p_BTV).astype(np.float64)
    # Weights in these batches are whole numbers: so many copies of the token.
    copies = np.repeat(reward_BTV[0], weight_BT[0].astype(int), axis=0)
    deviation = copies.std()
    assert 0.1 < deviation < 0.5
    plain, _, metrics = gradient_of(taught("tvd"), batch)
    found, value, same = gradient_of(taught("tvdpp"), batch)
    scaled = jax.tree.map(lambda x: x / deviation, plain)
    assert distance(found, scaled) < 1e-5
    np.testing.assert_allclose(metrics["acceptance"], 1 - metrics["tvd"], rtol=1e-5)
    np.testing.assert_allclose(same["acceptance"], metrics["acceptance"], rtol=1e-6)
    # The mean changes no gradient, but it is there.
    advantage_BTV = (reward_BTV - copies.mean()) / deviation
    surrogate_BT = -(p_BTV * advantage_BTV * np.log(p_BTV)).sum(axis=-1)
    expected = (weight_BT * surrogate_BT).sum() / weight_BT.sum()
    np.testing.assert_allclose(value, expected, rtol=1e-4)


def test_a_mixture_is_the_sum_of_its_shares() -> None:
    batch = packed_batch()
    shares = {"forward_kl": 0.3, "reverse_kl": 0.5, "tvd": 2.0}
    objective = taught(*shares, shares=tuple(shares.values()))
    found, value, metrics = gradient_of(objective, batch)
    total, wanted = 0.0, jax.tree.map(jnp.zeros_like, found)
    for kind, share in shares.items():
        gradient, alone, _ = gradient_of(taught(kind), batch)
        np.testing.assert_allclose(metrics[kind], alone, rtol=1e-5)
        total += share * alone
        wanted = jax.tree.map(lambda a, b, s=share: a + s * b, wanted, gradient)
    np.testing.assert_allclose(value, total, rtol=1e-5)
    assert distance(found, wanted) < 1e-5


def test_the_sampled_form_has_the_dense_one_as_its_mean() -> None:
    batch, keys = packed_batch(), jax.random.split(jax.random.key(5), 1500)
    (model, params), (_, frozen) = small_model(), small_model(1, VOCABULARY + 3)
    dense, sampled = taught("tvdpp"), taught("tvdpp_sampled", samples=2)
    weights = dense.weights(batch)

    def gradient(objective, key):
        def loss(part):
            whole = {**params, "final_norm": part}
            return objective.loss(model, whole, batch, weights, key, frozen)[0]

        # The last norm's scale stands for all: everything above depends on it alike.
        [found] = jax.tree.leaves(jax.grad(loss)(params["final_norm"]))
        return found

    wanted = np.asarray(gradient(dense, keys[0]), np.float64)
    found = np.asarray(
        jax.jit(jax.vmap(lambda key: gradient(sampled, key)))(keys), np.float64
    )
    error = found.std(axis=0) / len(keys) ** 0.5
    score = (found.mean(axis=0) - wanted) / error
    assert np.abs(score).max() < 3
    # It would notice a bias: the gradient itself is many errors away from zero.
    assert np.abs(wanted / error).max() > 10


@jax.jit
def accepted_of(draft_B1V, target_B1V):
    """How many of one drafted token the rejection rule accepts, row after row."""
    rows = draft_B1V.shape[0]
    sampler = make_sampler(rows, temperature=1.0, verify="reject")
    key_B, length_B = row_keys(jnp.arange(rows)), jnp.full((rows,), 4, jnp.int32)
    committed = Committed(jnp.zeros((rows, 8), jnp.int32), length_B, key_B)
    token_B1, log_q_B1V = sampling.draw(draft_B1V, length_B[:, None], key_B, sampler)
    tokens_BM = jnp.concatenate([committed.pending_B[:, None], token_B1], axis=1)
    log_q_BMV = jnp.concatenate([log_q_B1V, log_q_B1V], axis=1)
    draft = Draft(tokens_BM, jnp.ones_like(tokens_BM, bool), log_q_BMV=log_q_BMV)
    target_BMV = jnp.concatenate([target_B1V, target_B1V], axis=1)
    return reject(draft, target_BMV, sampler, committed, depth=1).num_accepted_B


def test_one_minus_tvd_is_the_acceptance_of_the_rejection_rule() -> None:
    contexts, repeats = 16, 1500
    rng = np.random.default_rng(2)
    tokens_BT = jnp.asarray(rng.integers(0, VOCABULARY, (contexts, 5)), jnp.int32)
    # The last token counts, so what is measured is the choice behind the fourth.
    weight_BT = jnp.zeros((contexts, 5)).at[:, -1].set(1.0)
    position_BT = jnp.broadcast_to(jnp.arange(5), tokens_BT.shape)
    batch = Batch(tokens_BT, jnp.ones_like(tokens_BT), position_BT, weight_BT)
    _, _, metrics = gradient_of(taught("tvd"), batch)

    def logits(model, params):
        found = model(params, tokens_BT[:, :4]).logits_BTV[:, -1:, :VOCABULARY]
        return jnp.repeat(found, repeats, axis=0)

    draft_B1V = logits(*small_model())
    target_B1V = logits(*small_model(1, VOCABULARY + 3))
    accepted = np.asarray(accepted_of(draft_B1V, target_B1V), np.float64)
    rows = contexts * repeats
    error = accepted.std() / rows**0.5
    assert error < 0.005
    assert abs(accepted.mean() - float(metrics["acceptance"])) < 3 * error


def test_a_student_like_its_teacher_has_nothing_to_learn() -> None:
    batch = packed_batch()
    model, params = small_model()
    key = jax.random.key(0)
    kinds = ("forward_kl", "reverse_kl", "tvd")
    objective = Distillation(teacher="itself", loss_kinds=kinds).taught_by(model)
    weights = objective.weights(batch)
    value, metrics = objective.loss(model, params, batch, weights, key, params)
    np.testing.assert_allclose(value, 0, atol=1e-6)
    np.testing.assert_allclose(metrics["acceptance"], 1, atol=1e-6)


def test_the_teacher_is_loaded_by_name_and_its_tokens_are_checked() -> None:
    draft = jaxllm.load("demo-draft", dtype="float32")
    objective, frozen = Distillation(teacher="demo", loss_kinds=("tvd",)).bind(draft)
    tokens_BT = jnp.arange(6)[None]
    ones = jnp.ones((1, 6), jnp.int32)
    batch = Batch(tokens_BT, ones, tokens_BT, ones.at[:, 0].set(0).astype(jnp.float32))
    weights = objective.weights(batch)
    value, _ = objective.loss(
        draft.model, draft.params, batch, weights, jax.random.key(0), frozen
    )
    assert 0 < float(value) < 1
    assert hash(objective) is not None, "jit takes it as a static argument"
    with pytest.raises(ConfigError, match="demo: its tokens are not those of toy"):
        Distillation(teacher="demo").bind(toy_lm())
    same = dataclasses.replace(draft, tokenizer=None)
    assert Distillation(teacher="demo").bind(same)[1] is not None


def test_an_unbound_objective_says_so() -> None:
    batch = packed_batch()
    with pytest.raises(ConfigError, match="demo is not loaded yet"):
        gradient_of(Distillation(teacher="demo"), batch)
