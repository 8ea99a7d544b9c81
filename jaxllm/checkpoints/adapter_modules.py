"""Which of our projections a module of the reference implementation stands for.

Where a family stores several projections as one tensor, it adapts them as one: one A,
and a B whose rows are cut. Projections that were adapted apart are fused with their
factors as blocks, which to any reader is the same function, of a higher rank.

Letters: I and O input and output axis of a module, R rank.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxllm.checkpoints.language_model import LanguageModel
from jaxllm.checkpoints.save import any_family
from jaxllm.compression import LoraFactors, projections
from jaxllm.core.partition import TreePath
from jaxllm.models.families import TensorRule, family_of

__all__ = ["AdapterModule", "Fused", "adapter_modules"]

# Where transformers keeps the decoder of a model that sees: tensors have older names.
_PREFIXES = {"gemma3": "model.language_model."}
_HEAD = ("head", "kernel")


@dataclasses.dataclass(frozen=True)
class Fused:
    """The adapter of a module.

    Attributes:
      a_RI: A.
      b_OR: B.
      scaling: What `B A` counts.
      blocks: Names of our projections and the rank of each, in order, where they have
        factors of their own; empty where all share A.
    """

    a_RI: np.ndarray
    b_OR: np.ndarray
    scaling: float
    blocks: Mapping[str, int] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class AdapterModule:
    """A module that can be adapted: one or several of our projections.

    Attributes:
      names: Paths that it may have in the reference implementation, the usual first.
      parts: Our projections, in the order of their rows of B: path and number of rows.
      inputs: I.
      is_transposed: Whether the reference implementation keeps it `[I, O]`.
    """

    names: tuple[str, ...]
    parts: tuple[tuple[TreePath, int], ...]
    inputs: int
    is_transposed: bool

    @property
    def name(self) -> str:
        """The usual path."""
        return self.names[0]

    @property
    def outputs(self) -> int:
        """O."""
        return sum(rows for _, rows in self.parts)

    def fuse(self, found: Mapping[TreePath, LoraFactors]) -> Fused:
        """Joins the factors of some or all of our projections.

        Args:
          found: Numpy factors by path, at least one.

        Returns:
          One A and B. They keep dtype and rank where all projections share A.
        """
        first, *others = found.values()
        is_shared = len(found) == len(self.parts) and all(
            np.array_equal(first.a_IR, other.a_IR) and first.scaling == other.scaling
            for other in others
        )
        ranks = {path: factors.a_IR.shape[1] for path, factors in found.items()}
        rank = first.a_IR.shape[1] if is_shared else sum(ranks.values())
        a_RI = np.zeros((rank, self.inputs), first.a_IR.dtype)
        b_OR = np.zeros((self.outputs, rank), first.b_RO.dtype)
        row = column = 0
        blocks = {}
        for path, rows in self.parts:
            if path in found:
                factors, stop = found[path], column + ranks[path]
                a_RI[column:stop] = factors.a_IR.T
                # Only adapters made by hand differ in what their parts count.
                ratio = b_OR.dtype.type(factors.scaling / first.scaling)
                b_OR[row : row + rows, column:stop] = factors.b_RO.T * ratio
                column = column if is_shared else stop
                blocks[str(path[-1])] = ranks[path]
            row += rows
        return Fused(a_RI, b_OR, first.scaling, {} if is_shared else blocks)

    def cut(self, fused: Fused) -> dict[TreePath, LoraFactors]:
        """Returns the factors of each of our projections, what `fuse` was given.

        Args:
          fused: A, B, and blocks that are believed only where they fit.
        """
        factors = {}
        row = column = 0
        rest_OR = fused.b_OR.copy()
        for path, rows in self.parts:
            span = slice(row, row + rows)
            row += rows
            if fused.blocks:
                rank = fused.blocks.get(str(path[-1]), 0)
                block = slice(column, column + rank)
                column += rank
            else:
                block = slice(None)
            a_RI, b_OR = fused.a_RI[block], fused.b_OR[span, block]
            rest_OR[span, block] = 0
            if len(a_RI):
                factors[path] = LoraFactors(a_RI.T, b_OR.T, fused.scaling)
        if fused.blocks and rest_OR.any():
            # Another program has changed the tensors, and they are what counts.
            return self.cut(dataclasses.replace(fused, blocks={}))
        return factors


def adapter_modules(lm: LanguageModel) -> list[AdapterModule]:
    """Returns every module of a model that can be adapted, the head last.

    Raises:
      ConfigError: The model was made here, and no family can express it.
    """
    family = family_of(lm.hf_config or any_family(lm.config))
    sizes = projections(lm.params)
    groups: dict[str, list[TensorRule]] = {}
    for rule in family.rules(lm.config):
        if rule.path[-1] == "kernel":
            groups.setdefault(rule.source, []).append(rule)
    usual = _PREFIXES.get(family.name, family.prefixes[0])
    return [
        _module(rules, family.sources(rules[0]), usual, sizes)
        for rules in sorted(groups.values(), key=lambda rules: rules[0].path == _HEAD)
    ]


def _module(
    rules: list[TensorRule],
    sources: Sequence[str],
    usual: str,
    sizes: Mapping[TreePath, tuple[int, int]],
) -> AdapterModule:
    names = [source.removesuffix(".weight") for source in sources]
    names.sort(key=lambda name: not name.startswith(usual))
    paths: list[Any] = [
        rule.path[:-1] for rule in sorted(rules, key=lambda rule: rule.part or (0, 0))
    ]
    return AdapterModule(
        names=tuple(names),
        parts=tuple((path, sizes[path][1]) for path in paths),
        inputs=sizes[paths[0]][0],
        is_transposed=not rules[0].transpose,
    )
