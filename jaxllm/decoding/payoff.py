"""When drafting pays: expected tokens of a pass against what the pass costs.

Costs are relative to a step of plain decoding: `draft_cost` (c) a drafted token's,
`costs` (v) a target pass's by its number of nodes, `overhead` (o) whatever else.
Plain Python, nothing runs on a device.

Letters: M draft nodes.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence

from jaxllm.core.errors import ConfigError

__all__ = [
    "DEFAULT_COSTS",
    "Payoff",
    "Roofline",
    "acceptance_by_depth",
    "cost_at",
    "expected_tokens",
    "expected_tokens_of_tree",
    "node_probabilities",
    "plan",
    "plan_tree",
    "speedup",
]

PAYS = 1.02
"""Predicted speed-up below which drafting is not worth its risk."""

DEFAULT_COSTS: dict[str, dict[int, float]] = {
    # 110M parameters in float32, cache 512, two cores: design, section 7.
    "cpu": {1: 1.0, 2: 1.37, 4: 1.54, 8: 1.71, 16: 2.6, 32: 3.9, 64: 5.5},
}
"""Measured v by platform. Elsewhere width is taken to be free: a device that waits for
its memory runs tens of nodes in the time of one; `Roofline` says how many."""


def acceptance_by_depth(accepted: Sequence[int], tested: Sequence[int]) -> list[float]:
    """Returns how often a proposal was accepted at each depth where one was tested.

    Args:
      accepted: Counts by depth; entry 0 counts passes.
      tested: The same.
    """
    pairs = zip(accepted[1:], tested[1:], strict=True)
    return [a / t if t else 0.0 for a, t in pairs]


def expected_tokens(acceptance: float | Sequence[float], length: int) -> float:
    """Returns the tokens that a pass over a chain emits on average.

    Args:
      acceptance: Chance that a drafted token is accepted when all before it are: one
        number for every depth, or one for each depth (the last holds beyond).
      length: Drafted tokens, 0 or more.

    Source: Fast Inference from Transformers via Speculative Decoding (arXiv
      2211.17192), equation 1; the sum over depths is the same without its assumption.
    """
    chances = _chances(acceptance, length)
    reached, total = 1.0, 1.0
    for chance in chances:
        reached *= chance
        total += reached
    return total


def _chances(acceptance: float | Sequence[float], length: int) -> list[float]:
    given = [acceptance] if isinstance(acceptance, int | float) else list(acceptance)
    for chance in given:
        if not 0 <= chance <= 1:
            raise ConfigError(
                f"cannot plan: an acceptance is {chance}, expected a probability. "
                f"Measure it again."
            )
    if not given and length:
        raise ConfigError(
            "cannot plan: there is no acceptance, expected one or more. Measure some."
        )
    return [given[min(i, len(given) - 1)] for i in range(length)]


def node_probabilities(
    acceptance_M: Sequence[float], parents_M: Sequence[int]
) -> list[float]:
    """Returns the chance of every node of a tree to be on the accepted path.

    Args:
      acceptance_M: Chance of every node given that its parent is accepted; node 0's is
        not looked at.
      parents_M: The parent of every node, smaller than its own index; -1 for node 0.
    """
    found = [1.0]
    for i in range(1, len(parents_M)):
        found.append(found[parents_M[i]] * acceptance_M[i])
    return found


def expected_tokens_of_tree(probability_M: Sequence[float]) -> float:
    """Returns the tokens that a pass over a tree emits on average.

    Args:
      probability_M: Chance of every node to be on the accepted path; node 0's is 1.

    Source: Sequoia (arXiv 2402.12374), section 3.1.
    """
    return 1.0 + math.fsum(probability_M[1:])


def cost_at(costs: Mapping[int, float], nodes: int) -> float:
    """Returns v at a number of nodes, from a table.

    Between entries it runs straight; beyond the last along the last two.

    Args:
      costs: Nodes to cost, one entry or more, in steps of plain decoding.
      nodes: M, not below the first entry.

    Raises:
      ConfigError: It is.
    """
    if nodes in costs:
        return costs[nodes]
    known = sorted(costs)
    if not known or nodes < known[0]:
        raise ConfigError(
            f"cannot plan: the cost of {nodes} nodes is asked of a table that begins "
            f"at {known[0] if known else 'nothing'}, expected an entry at or below. "
            f"Measure that width too."
        )
    if len(known) == 1:
        return costs[known[0]]
    above = next((i for i, width in enumerate(known) if width > nodes), len(known) - 1)
    low, high = known[above - 1], known[above]
    slope = (costs[high] - costs[low]) / (high - low)
    return costs[low] + slope * (nodes - low)


def speedup(
    tokens: float,
    *,
    nodes: int,
    costs: Mapping[int, float],
    drafted: float = 0,
    draft_cost: float = 0.0,
    overhead: float = 0.0,
) -> float:
    """Returns how many times faster than plain decoding a step is.

    Args:
      tokens: Tokens that it emits on average.
      nodes: M, nodes that the target runs.
      costs: v.
      drafted: Tokens (or levels of a tree) that the drafter pays for.
      draft_cost: c, for each of these.
      overhead: o.

    Source: Fast Inference from Transformers via Speculative Decoding (arXiv
      2211.17192), theorem 3.8, with v in place of 1 and the overhead.
    """
    return tokens / (drafted * draft_cost + cost_at(costs, nodes) + overhead)


@dataclasses.dataclass(frozen=True)
class Payoff:
    """What to draft.

    Attributes:
      nodes: M, the pending token included; 1 says: do not speculate.
      tokens: Expected tokens of a pass.
      speedup: Predicted, against plain decoding.
    """

    nodes: int
    tokens: float
    speedup: float

    @property
    def length(self) -> int:
        """Drafted tokens of a chain."""
        return self.nodes - 1

    @property
    def speculate(self) -> bool:
        """Whether drafting pays."""
        return self.nodes > 1


def plan(
    acceptance: float | Sequence[float],
    *,
    costs: Mapping[int, float],
    lengths: Sequence[int] = tuple(range(1, 17)),
    draft_cost: float = 0.0,
    overhead: float = 0.0,
    threshold: float = PAYS,
) -> Payoff:
    """Returns the length of a chain that is fastest.

    Args:
      acceptance: As for `expected_tokens`.
      costs: v.
      lengths: Lengths to choose from.
      draft_cost: c.
      overhead: o, of every step that drafts.
      threshold: Least predicted speed-up that is worth drafting.

    Returns:
      The best choice; plain decoding when none reaches the threshold.
    """
    choices = []
    for length in lengths:
        tokens = expected_tokens(acceptance, length)
        gain = speedup(
            tokens,
            nodes=length + 1,
            costs=costs,
            drafted=length,
            draft_cost=draft_cost,
            overhead=overhead,
        )
        choices.append(Payoff(length + 1, tokens, gain))
    return _best(choices, threshold)


def plan_tree(
    probability_M: Sequence[float],
    *,
    costs: Mapping[int, float],
    widths: Sequence[int] | None = None,
    draft_cost: float = 0.0,
    overhead: float = 0.0,
    threshold: float = PAYS,
) -> Payoff:
    """Returns how many nodes of a tree to keep.

    Args:
      probability_M: Chance of every node to be accepted, in the order in which nodes
        are kept: best first, so that a parent stands before its children.
      costs: v.
      widths: Numbers of nodes to choose from; all when None.
      draft_cost: Of the tree, whatever is kept of it.
      overhead: o.
      threshold: As for `plan`.

    Returns:
      The best choice; plain decoding when none reaches the threshold.
    """
    widths = range(2, len(probability_M) + 1) if widths is None else widths
    choices = []
    for nodes in widths:
        tokens = expected_tokens_of_tree(probability_M[:nodes])
        gain = speedup(
            tokens,
            nodes=nodes,
            costs=costs,
            drafted=1,
            draft_cost=draft_cost,
            overhead=overhead,
        )
        choices.append(Payoff(nodes, tokens, gain))
    return _best(choices, threshold)


def _best(choices: list[Payoff], threshold: float) -> Payoff:
    # Of equally fast ones the narrowest: it keeps less memory busy.
    best = max(choices, key=lambda c: (c.speedup, -c.nodes), default=None)
    if best is None or best.speedup < threshold:
        return Payoff(1, 1.0, 1.0)
    return best


@dataclasses.dataclass(frozen=True, kw_only=True)
class Roofline:
    """The cost of width where nothing was measured: bytes or arithmetic, whichever.

    Attributes:
      flops: Peak arithmetic of the device, operations a second.
      bandwidth: Bytes a second from its memory.
      weight_bytes: Bytes of a weight, 0.5 for int4.
      rows: B; a batch eats the same headroom that drafts live on.
      experts: E experts of a layer, of which `active` run for a token; 0 for a dense
        model.
      active: X.
      expert_share: Share of the weights that lies in experts.

    Source: Roofline (Williams et al. 2009); the count of distinct experts is that of
      independent choices.
    """

    flops: float
    bandwidth: float
    weight_bytes: float = 2.0
    rows: int = 1
    experts: int = 0
    active: int = 0
    expert_share: float = 0.0

    @property
    def ridge(self) -> float:
        """Tokens of a pass at which arithmetic takes as long as reading a weight."""
        return self.flops / self.bandwidth * self.weight_bytes / 2

    def cost(self, nodes: int) -> float:
        """Returns v at a number of nodes."""
        return self._time(nodes) / self._time(1)

    def table(self, widths: Sequence[int]) -> dict[int, float]:
        """Returns v at some numbers of nodes."""
        return {nodes: self.cost(nodes) for nodes in widths}

    def _time(self, nodes: int) -> float:
        tokens = self.rows * nodes
        share = self.expert_share if self.experts else 0.0
        touched = active = 1.0
        if self.experts:
            active = self.active / self.experts
            touched = 1 - (1 - active) ** tokens
        read = (1 - share) + share * touched
        worked = ((1 - share) + share * active) * tokens / self.ridge
        return max(read, worked)
