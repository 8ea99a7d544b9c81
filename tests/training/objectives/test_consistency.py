"""The consistency loss against separate forwards, and what must not reach it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.core.errors import ConfigError
from jaxllm.training import Batch
from jaxllm.training.objectives import Consistency, NextToken, TrajectoryBatch
from tests.drafting.toy_methods import toy_lm
from tests.training.objectives.cases import (
    END,
    VOCABULARY,
    distance,
    gradient_of,
    small_model,
    trajectory_batch,
)


def batch_of(prefix, fixed, iterate, follower=None, prompt=1, reach=99):
    """One row from lists of tokens."""
    follower = fixed if follower is None else follower
    rows = ([prefix], [len(prefix)], [prompt], [fixed], [iterate], [follower], [reach])
    return TrajectoryBatch(*(jnp.asarray(row, jnp.int32) for row in rows))


def texts_of(batch: TrajectoryBatch, row: int, block) -> list[int]:
    length = int(batch.length_B[row])
    return batch.prefix_BP[row, -length:].tolist() + np.asarray(block[row]).tolist()


def logits_behind(params, batch: TrajectoryBatch, block):
    """The logits of every token of a block, from a forward of its own, `[B, T, V]`."""
    texts = [texts_of(batch, row, block) for row in range(len(block))]
    width = batch.prefix_BP.shape[1] + block.shape[1]
    tokens_BS = jnp.asarray([text + [0] * (width - len(text)) for text in texts])
    index_BT = batch.length_B[:, None] - 1 + jnp.arange(block.shape[1])
    logits_BSV = forward(params, tokens_BS)
    return jnp.take_along_axis(logits_BSV, index_BT[..., None], axis=1)


@jax.jit
def forward(params, tokens_BS):
    return small_model()[0](params, tokens_BS).logits_BTV


def positions_that_count(iterate, goal, reach: int) -> list[int]:
    """Plain Python: behind the first mismatch, before any end token."""
    wrong = [i for i, (a, b) in enumerate(zip(iterate, goal, strict=True)) if a != b]
    if not wrong:
        return []
    ends = [i for y in (iterate, goal) for i, token in enumerate(y) if token == END]
    last = min([wrong[0] + reach, len(goal) - 1, *ends])
    return list(range(wrong[0] + 1, last + 1))


def plain_consistency(params, frozen, batch, goal, reach):
    """Teacher and student apart, position after position; the oracle."""
    goal_BT = batch.fixed_BT if goal == "fixed" else batch.next_BT
    log_p_BTV = jax.nn.log_softmax(logits_behind(params, batch, batch.iterate_BT))
    log_q_BTV = jax.nn.log_softmax(logits_behind(frozen, batch, goal_BT))
    kl_BT = (jnp.exp(log_q_BTV) * (log_q_BTV - log_p_BTV)).sum(axis=-1)
    pairs = zip(batch.iterate_BT.tolist(), goal_BT.tolist(), strict=True)
    terms = [
        kl_BT[row, i]
        for row, pair in enumerate(pairs)
        for i in positions_that_count(*pair, reach)
    ]
    return sum(terms) / len(terms)


@pytest.mark.parametrize(
    ("goal", "positions"), [("fixed", None), ("fixed", 2), ("next", None), ("next", 1)]
)
def test_it_is_the_divergence_of_separate_forwards(goal, positions) -> None:
    batch, (_, params) = trajectory_batch(), small_model()
    objective = Consistency(
        goal=goal, positions=positions, ar_weight=0.0, eos=(END,), chunk=3
    )
    found, value, metrics = gradient_of(objective, batch)
    # The teacher's parameters are another argument: no gradient goes through them.
    expected, wanted = jax.value_and_grad(plain_consistency)(
        params, params, batch, goal, positions or 99
    )
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    np.testing.assert_allclose(metrics["consistency"], expected, rtol=1e-5)
    assert distance(found, wanted) < 1e-5


@pytest.mark.parametrize(
    ("fixed", "iterate", "reach", "counted"),
    [
        ([1, 2, 3, 4, 5], [1, 9, 3, 4, 5], 99, [2, 3, 4]),
        ([1, 2, 3, 4, 5], [9, 2, 9, 4, 5], 2, [1, 2]),
        ([1, 2, 3, 4, 5], [1, 2, 3, 4, 9], 99, []),
        ([1, 2, 3, 4, 5], [1, 2, 3, 4, 5], 99, []),
        # Behind an end token stands no text: of the iterate, of the fixed point.
        ([1, 2, 3, 4, 5], [9, 2, END, 4, 5], 99, [1, 2]),
        ([1, END, 3, 4, 5], [9, 2, 3, 4, 5], 99, [1]),
        ([1, 2, 3, 4, 5], [END, 2, 3, 4, 5], 99, []),
    ],
)
def test_positions_behind_the_first_mismatch_count(
    fixed, iterate, reach, counted
) -> None:
    batch = batch_of([3, 4], fixed, iterate, reach=reach)
    objective = Consistency(positions=None, eos=(END,))
    assert float(objective.weights(batch)["consistency"]) == len(counted)
    assert positions_that_count(iterate, fixed, reach) == counted
    alike = dataclasses.replace(
        objective, positions=min(reach, 5), ar_weight=0.0, eos=(END,)
    )
    everywhere = dataclasses.replace(batch, reach_B=batch.reach_B * 0 + 99)
    np.testing.assert_array_equal(alike._counts(everywhere), objective._counts(batch))
    assert np.flatnonzero(objective._counts(batch)[0]).tolist() == counted


def test_at_the_fixed_point_there_is_no_loss_and_no_gradient() -> None:
    batch = trajectory_batch()
    still = dataclasses.replace(batch, iterate_BT=batch.fixed_BT)
    weights = {"consistency": jnp.float32(1), "ar": jnp.float32(1)}
    objective = Consistency(ar_weight=0.0, positions=None, eos=(END,))
    gradient, value, metrics = gradient_of(objective, still, weights)
    assert float(value) == 0 and float(metrics["consistency"]) == 0
    assert all((x == 0).all() for x in jax.tree.leaves(gradient))
    # Nor where every position counts and only the two contexts are the same.
    every = EveryPosition(ar_weight=0.0, eos=())
    gradient, value, _ = gradient_of(every, still, every.weights(still))
    assert abs(float(value)) < 1e-6
    moved, _, _ = gradient_of(every, batch, every.weights(batch))
    norm = [
        float(sum(jnp.square(x).sum() for x in jax.tree.leaves(g))) ** 0.5
        for g in (gradient, moved)
    ]
    assert norm[0] < 1e-5 * norm[1]


class EveryPosition(Consistency):
    """Counts every choice but the first, mismatch or not."""

    def _counts(self, batch):
        return jnp.ones(batch.fixed_BT.shape).at[:, 0].set(0.0)


def test_no_gradient_reaches_the_teacher() -> None:
    # Tokens that only the fixed point holds, so that only the teacher reads their rows.
    batch = batch_of([1, 2, 3], [10, 11, 12, 13], [4, 5, 6, 4])
    objective = Consistency(ar_weight=0.0, positions=None, eos=())
    gradient, value, _ = gradient_of(objective, batch)
    table_VD = np.asarray(gradient["embedder"]["table"])
    assert float(value) > 0
    assert (table_VD[[10, 11, 12, 13]] == 0).all()
    assert (np.abs(table_VD[[1, 2, 3, 4, 5, 6]]).sum(axis=1) > 0).all()
    # With the plain loss the fixed point is read, so the zeros above say something.
    gradient, _, _ = gradient_of(Consistency(ar_weight=1.0, eos=()), batch)
    table_VD = np.asarray(gradient["embedder"]["table"])
    assert (np.abs(table_VD[[10, 11, 12]]).sum(axis=1) > 0).all()


def test_the_plain_loss_is_that_of_the_same_texts_at_the_same_positions() -> None:
    batch = trajectory_batch()
    rows, slots = len(batch.length_B), batch.prefix_BP.shape[1] + 5
    tokens, learn = np.zeros((2, rows, slots), np.int32)
    segment = np.zeros((rows, slots), np.int32)
    for row in range(rows):
        text = texts_of(batch, row, batch.fixed_BT)
        tokens[row, : len(text)], segment[row, : len(text)] = text, 1
        block = batch.fixed_BT[row].tolist()
        ends = block.index(END) + 1 if END in block else len(block)
        start, prompt = int(batch.length_B[row]), int(batch.prompt_B[row])
        learn[row, prompt : start + ends] = 1
    position = np.broadcast_to(np.arange(slots), (rows, slots))
    packed = Batch(
        *map(jnp.asarray, (tokens, segment, position, learn.astype(np.float32)))
    )
    still = dataclasses.replace(batch, iterate_BT=batch.fixed_BT)
    objective = Consistency(ar_weight=2.0, label_smoothing=0.1, eos=(END,))
    weights = {**objective.weights(still), "consistency": jnp.float32(1)}
    found, value, metrics = gradient_of(objective, still, weights)
    wanted, expected, plain = gradient_of(NextToken(label_smoothing=0.1), packed)
    np.testing.assert_allclose(value, 2 * expected, rtol=1e-5)
    np.testing.assert_allclose(metrics["ar"], plain["nll"], rtol=1e-5)
    assert distance(found, jax.tree.map(lambda x: 2 * x, wanted)) < 1e-5
    # And nothing but that with a weight of 0, wherever the iterate is wrong.
    control = dataclasses.replace(objective, weight=0.0)
    found, value, _ = gradient_of(control, batch)
    np.testing.assert_allclose(value, 2 * expected, rtol=1e-5)
    assert distance(found, jax.tree.map(lambda x: 2 * x, wanted)) < 1e-5


def test_agreement_counts_equal_choices() -> None:
    batch, (_, params) = trajectory_batch(), small_model()
    _, _, metrics = gradient_of(Consistency(positions=None, eos=(END,)), batch)
    choices = [
        np.argmax(logits_behind(params, batch, block), axis=-1)
        for block in (batch.iterate_BT, batch.fixed_BT)
    ]
    pairs = zip(batch.iterate_BT.tolist(), batch.fixed_BT.tolist(), strict=True)
    same = [
        choices[0][row, i] == choices[1][row, i]
        for row, pair in enumerate(pairs)
        for i in positions_that_count(*pair, 99)
    ]
    np.testing.assert_allclose(metrics["agreement"], np.mean(same), rtol=1e-6)
    assert 0 < np.mean(same) < 1


def test_binding_takes_the_models_end_tokens() -> None:
    batch = trajectory_batch()
    with pytest.raises(ConfigError, match="does not know the end tokens"):
        Consistency().weights(batch)
    assert Consistency().bind(toy_lm(eos=(5, 6)))[0] == Consistency(eos=(5, 6))
    assert Consistency(eos=(1,)).bind(toy_lm(eos=(5,)))[0] == Consistency(eos=(1,))
    assert VOCABULARY > END
