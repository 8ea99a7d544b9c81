"""What every objective promises: parts add up, stretches change nothing, masks hold."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.core.errors import ConfigError
from jaxllm.core.registry import build
from jaxllm.training.objectives import (
    OBJECTIVES,
    Consistency,
    Distillation,
    NextToken,
    Objective,
)
from tests.training.objectives.cases import (
    CASES,
    batch_of,
    distance,
    gradient_of,
    packed_batch,
    trajectory_batch,
)


def with_chunk(objective: Objective, chunk: int) -> Objective:
    changed = dataclasses.replace(objective, chunk=chunk)
    if isinstance(objective, Distillation):
        return changed.taught_by(objective.teacher_model)
    return changed


every_case = pytest.mark.parametrize("case", CASES)


def test_every_registered_objective_is_among_the_cases() -> None:
    assert {type(objective) for objective in CASES.values()} == set(OBJECTIVES.values())


@every_case
def test_any_split_of_a_batch_has_the_gradient_of_the_whole(case) -> None:
    objective = CASES[case]
    batch = batch_of(objective)
    weights = objective.weights(batch)
    whole, value, metrics = gradient_of(objective, batch)
    parts = [jax.tree.map(lambda x, s=s: x[s], batch) for s in (slice(1), slice(1, 5))]
    shares = [sum(objective.weights(part).values()) for part in parts]
    assert not jnp.isclose(shares[0] * 4, shares[1], rtol=0.1), "weights are unequal"
    found = [gradient_of(objective, part, weights) for part in parts]
    summed = jax.tree.map(jnp.add, found[0][0], found[1][0])
    assert distance(summed, whole) < 1e-6
    np.testing.assert_allclose(found[0][1] + found[1][1], value, rtol=1e-5)
    for name in metrics:
        added = found[0][2][name] + found[1][2][name]
        np.testing.assert_allclose(added, metrics[name], rtol=1e-5, atol=1e-7)


@every_case
def test_stretches_of_time_change_nothing(case) -> None:
    objective = CASES[case]
    batch = batch_of(objective)
    plain = gradient_of(objective, batch)
    # It divides neither 11 tokens nor those of a block.
    cut = gradient_of(with_chunk(objective, 3), batch)
    assert distance(cut[0], plain[0]) < 1e-5
    np.testing.assert_allclose(cut[1], plain[1], rtol=1e-5)
    for name, value in plain[2].items():
        np.testing.assert_allclose(cut[2][name], value, rtol=1e-5, atol=1e-7)


@every_case
def test_what_is_masked_contributes_nothing(case) -> None:
    objective = CASES[case]
    if isinstance(objective, Consistency):
        batch = trajectory_batch()
        slot_P = jnp.arange(batch.prefix_BP.shape[1])
        padding_BP = slot_P < len(slot_P) - batch.length_B[:, None]
        assert padding_BP.any()
        other_BP = jnp.where(padding_BP, batch.prefix_BP + 1, batch.prefix_BP)
        changed = dataclasses.replace(batch, prefix_BP=other_BP % 23)
    else:
        batch = packed_batch()
        # What no token that counts is, and none sees.
        counts_BT = batch.weight_BT > 0
        later_BT = jnp.flip(jnp.cumsum(jnp.flip(counts_BT, 1), 1), 1)
        free_BT = (later_BT == 0) | (batch.segment_BT == 0)
        assert free_BT.any()
        other_BT = jnp.where(free_BT, batch.tokens_BT + 1, batch.tokens_BT)
        changed = dataclasses.replace(batch, tokens_BT=other_BT % 23)
    first, value, metrics = gradient_of(objective, batch)
    second, same_value, same_metrics = gradient_of(objective, changed)
    assert distance(second, first) < 1e-6
    np.testing.assert_allclose(same_value, value, rtol=1e-6)
    for name in metrics:
        np.testing.assert_allclose(same_metrics[name], metrics[name], rtol=1e-6)


@every_case
def test_a_batch_that_counts_nothing_has_no_gradient(case) -> None:
    objective = CASES[case]
    batch = batch_of(objective)
    weights = objective.weights(batch)
    if isinstance(objective, Consistency):
        objective = dataclasses.replace(objective, ar_weight=0.0)
        batch = dataclasses.replace(batch, reach_B=batch.reach_B * 0)
    else:
        batch = dataclasses.replace(batch, weight_BT=batch.weight_BT * 0)
    gradient, value, _ = gradient_of(objective, batch, weights)
    assert float(value) == 0
    assert all((x == 0).all() for x in jax.tree.leaves(gradient))


def test_objectives_are_built_from_text() -> None:
    def made(text: str) -> Objective:
        return build(text, OBJECTIVES, {Objective: OBJECTIVES})

    assert made("next_token:z_loss=1e-4") == NextToken(z_loss=1e-4)
    assert made(
        "distillation:teacher=demo,loss_kinds=forward_kl+tvd,shares=1+0.5"
    ) == Distillation(
        teacher="demo", loss_kinds=("forward_kl", "tvd"), shares=(1.0, 0.5)
    )
    assert made("consistency:goal=next,positions=None,eos=2") == Consistency(
        goal="next", positions=None, eos=(2,)
    )
    with pytest.raises(ConfigError, match=r"forward_kl.*tvdpp_sampled"):
        made("distillation:teacher=demo,loss_kinds=backward_kl")
    with pytest.raises(ConfigError, match="no value for teacher"):
        made("distillation")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: NextToken(label_smoothing=1.0), "label_smoothing is 1.0"),
        (lambda: NextToken(z_loss=-1.0), "z_loss is -1.0"),
        (lambda: NextToken(chunk=0), "next_token.chunk is 0"),
        (lambda: Consistency(positions=0), "positions is 0"),
        (lambda: Consistency(ar_weight=-1.0), "ar_weight is -1.0"),
        (lambda: Consistency(weight=-1.0), "weight is -1.0"),
        (lambda: Distillation(teacher="x", samples=0), "samples is 0"),
        (lambda: Distillation(teacher="x", shares=(1.0, 2.0)), "has 2 numbers"),
        (lambda: Distillation(teacher="x", loss_kinds=()), "expected different"),
    ],
)
def test_bad_options_are_refused(make, message) -> None:
    with pytest.raises(ConfigError, match=message):
        make()
