"""The payoff model against closed forms and against dice."""

import numpy as np
import pytest

from jaxllm.core.errors import ConfigError
from jaxllm.decoding.payoff import (
    DEFAULT_COSTS,
    Payoff,
    Roofline,
    cost_at,
    expected_tokens,
    expected_tokens_of_tree,
    node_probabilities,
    plan,
    plan_tree,
    speedup,
)

CPU = DEFAULT_COSTS["cpu"]


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.8, 1.0])
@pytest.mark.parametrize("length", [0, 1, 4, 9])
def test_a_chain_has_the_closed_form(alpha, length) -> None:
    closed = length + 1 if alpha == 1 else (1 - alpha ** (length + 1)) / (1 - alpha)
    assert expected_tokens(alpha, length) == pytest.approx(closed)
    # One acceptance a depth says the same; the last holds beyond.
    assert expected_tokens([alpha] * 3, length) == pytest.approx(closed)


def test_a_chain_with_acceptance_by_depth_agrees_with_dice() -> None:
    chances = [0.9, 0.5, 0.7, 0.2]
    dice = np.random.default_rng(0).random((200_000, 4)) < chances
    emitted = 1 + np.cumprod(dice, axis=1).sum(axis=1)
    wanted = expected_tokens(chances, 4)
    assert emitted.mean() == pytest.approx(wanted, abs=4 * emitted.std() / 200_000**0.5)
    assert wanted == pytest.approx(1 + 0.9 + 0.45 + 0.315 + 0.063)


def test_a_tree_agrees_with_dice() -> None:
    parents = [-1, 0, 0, 1, 1, 2, 3]
    # Of siblings at most one is right: their chances share one die.
    chances = [1.0, 0.6, 0.3, 0.5, 0.4, 0.8, 0.9]
    rng, total, trials = np.random.default_rng(1), 0, 50_000
    for _ in range(trials):
        node = 0
        while node >= 0:
            total += 1
            die, below = rng.random(), [i for i in range(7) if parents[i] == node]
            node = -1
            for child in below:
                if die < chances[child]:
                    node = child
                    break
                die -= chances[child]
    probability = node_probabilities(chances, parents)
    assert probability == pytest.approx([1, 0.6, 0.3, 0.3, 0.24, 0.24, 0.27])
    assert total / trials == pytest.approx(
        expected_tokens_of_tree(probability), abs=0.03
    )


def test_costs_run_straight_between_entries() -> None:
    table = {1: 1.0, 4: 1.6, 8: 2.0}
    assert cost_at(table, 4) == 1.6
    assert cost_at(table, 2) == pytest.approx(1.2)
    assert cost_at(table, 6) == pytest.approx(1.8)
    assert cost_at(table, 16) == pytest.approx(2.8)
    assert cost_at({1: 1.0}, 5) == 1.0
    with pytest.raises(ConfigError, match="cost of 1 nodes"):
        cost_at({2: 1.0}, 1)


def test_speedup_is_tokens_over_costs() -> None:
    found = speedup(
        3.0, nodes=4, costs={1: 1.0, 4: 1.5}, drafted=3, draft_cost=0.1, overhead=0.2
    )
    assert found == pytest.approx(3 / (0.3 + 1.5 + 0.2))


def test_the_plan_is_the_best_of_all() -> None:
    options = {"costs": CPU, "draft_cost": 0.05, "overhead": 0.02}
    for acceptance in (0.5, 0.8, [0.9, 0.8, 0.3], 0.97):
        gains = {
            n: expected_tokens(acceptance, n) / (n * 0.05 + cost_at(CPU, n + 1) + 0.02)
            for n in range(1, 17)
        }
        best = max(gains, key=gains.__getitem__)
        found = plan(acceptance, **options)
        if gains[best] < 1.02:
            assert found == Payoff(1, 1.0, 1.0)
        else:
            assert (found.length, found.speedup) == (best, pytest.approx(gains[best]))
    assert plan(0.97, **options).length > plan(0.8, **options).length


def test_what_hardly_pays_is_not_done() -> None:
    costs = {1: 1.0, 2: 1.5}
    assert plan(0.529, costs=costs, lengths=[1]) == Payoff(1, 1.0, 1.0)
    assert plan(0.531, costs=costs, lengths=[1]).nodes == 2
    assert plan(0.6, costs=costs, lengths=[1], threshold=1.1).nodes == 1
    assert plan(1.0, costs=costs, lengths=[]).nodes == 1
    assert plan(0.0, costs={1: 1.0, 2: 1.0}).length == 0


def test_a_tree_is_cut_where_nodes_cost_more_than_they_bring() -> None:
    probability = [1.0, 0.6, 0.4, 0.3, 0.05, 0.01]
    costs = {1: 1.0, 6: 1.5}
    found = plan_tree(probability, costs=costs)
    gains = [sum(probability[:n]) / (1 + 0.1 * (n - 1)) for n in range(1, 7)]
    assert found.nodes == 1 + int(np.argmax(gains)) == 4
    assert found.tokens == pytest.approx(2.3)
    assert plan_tree(probability, costs=costs, widths=[2, 3]).nodes == 3
    assert plan_tree(probability, costs=costs, draft_cost=1.0).nodes == 1


def test_bad_acceptances_are_refused() -> None:
    for bad in (-0.1, 1.1, [0.5, 2.0]):
        with pytest.raises(ConfigError, match="expected a probability"):
            expected_tokens(bad, 2)
    with pytest.raises(ConfigError, match="there is no acceptance"):
        expected_tokens([], 2)
    assert expected_tokens([], 0) == 1.0


def test_a_roofline_is_flat_up_to_its_ridge() -> None:
    v5e = Roofline(flops=197e12, bandwidth=0.82e12)
    assert v5e.ridge == pytest.approx(240, rel=0.01)
    assert v5e.cost(64) == 1.0
    assert v5e.cost(480) == pytest.approx(480 / v5e.ridge)
    # Narrow weights and wide batches eat the headroom.
    int4 = Roofline(flops=197e12, bandwidth=0.82e12, weight_bytes=0.5)
    assert int4.ridge == pytest.approx(v5e.ridge / 4)
    full = Roofline(flops=197e12, bandwidth=0.82e12, rows=512)
    assert full.table([1, 8]) == {1: 1.0, 8: pytest.approx(8.0)}


def test_experts_make_width_cost_bytes() -> None:
    sparse = Roofline(
        flops=1e18, bandwidth=1e12, experts=128, active=8, expert_share=0.9
    )
    one = 0.1 + 0.9 * 8 / 128
    eight = 0.1 + 0.9 * (1 - (1 - 8 / 128) ** 8)
    assert sparse.cost(8) == pytest.approx(eight / one)
