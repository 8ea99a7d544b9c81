"""Low-rank adapters: a wrapper around any weight, and `params -> params` around it.

`W x` becomes `W x + strength * scaling * B (A x)`. The weight inside stays as it is, an
array or a leaf such as `IntTensor`; an adapter around an adapter adds to it, so several
are added by wrapping again, and weighted or switched by `select`.

To train one, `core.partition.split(params, trainable)` gives A and B apart from all
else. Dropout inside an adapter is not supported.

Letters: I and O input and output axis of a weight, R rank, l layers of a stack.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jaxllm.core.einsum import Leaf, contract, dense, einsum
from jaxllm.core.errors import ConfigError
from jaxllm.core.partition import TreePath, path_names
from jaxllm.core.pytree import pytree_dataclass, static
from jaxllm.core.registry import unknown_name
from jaxllm.models.stacks import stack_size

__all__ = [
    "TARGETS",
    "LoraConfig",
    "LoraFactors",
    "LoraTensor",
    "adapter_names",
    "add_lora",
    "in_adapter",
    "layered",
    "projections",
    "trainable",
    "with_adapter",
]

Params = dict[str, Any]

TARGETS = ("query", "key", "value", "output", "gate", "up", "down", "head")
"""Projections that can carry an adapter; the order fixes what each draws."""

_FACTORS = ("a_IR", "b_RO")


@pytree_dataclass
class LoraTensor:
    """A weight `[*stack, I, O]` plus a product of two thin matrices.

    Attributes:
      base: The weight inside: an array, a quantized leaf, another adapter.
      a_IR: `[*stack, I, R]`, A of the paper transposed.
      b_RO: `[*stack, R, O]`, B of the paper transposed.
      scaling: float32 `[*stack, 1, 1]`, the paper's alpha / R; part of the adapter.
      strength: float32 `[*stack, 1, 1]`, what the adapter counts now: 1 is all of it,
        0 switches it off. It is an array, so choosing compiles nothing.
      name: Of the adapter.

    Source: LoRA (arXiv 2106.09685), section 4.1.
    """

    base: Any
    a_IR: Array
    b_RO: Array
    scaling: Array
    strength: Array
    name: str = static(default="default")

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight."""
        return self.base.shape

    @property
    def nbytes(self) -> int:
        """Bytes of the weight inside and of the adapter."""
        return sum(
            math.prod(x.shape) * jnp.dtype(x.dtype).itemsize
            for x in jax.tree.leaves(self)
        )

    def einsum(self, eq: str, x: Array, out_dtype: Any) -> Array:
        """Contracts activations with the weight, then with the two thin matrices.

        Args:
          eq: Equation such as `"btd,df->btf"` or `"btd,vd->btv"`; one that does not
            sum exactly one of a matrix's two axes multiplies by the dense weight.
          x: Floating activations; the thin matrices are multiplied in their dtype.
          out_dtype: Dtype of the result.

        Returns:
          The contraction, summed in float32. While B is zero it is bit for bit that
          of the weight inside, but for the sign of a zero.
        """
        steps = _two_steps(eq)
        if steps is None:
            return contract(eq, x, self.dequantize(x.dtype), out_dtype)
        narrow, widen, is_transposed = steps
        first, second = self.a_IR, self.b_RO
        if is_transposed:
            first, second = second, first
        wide = jnp.promote_types(x.dtype, jnp.float32)
        y = einsum(eq, x, self.base, out_dtype=wide)
        low = contract(narrow, x, first.astype(x.dtype), wide)
        low = low * (self.scaling * self.strength).reshape(())
        added = contract(widen, low.astype(x.dtype), second.astype(x.dtype), wide)
        return (y + added).astype(out_dtype)

    def dequantize(self, dtype: Any) -> Array:
        """Returns the merged weight; the sum is rounded once, to `dtype`."""
        return (dense(self.base, jnp.float32) + self.difference()).astype(dtype)

    def difference(self) -> Array:
        """Returns what this adapter adds to its base, float32 `[*stack, I, O]`."""
        factors = (x.astype(jnp.float32) for x in (self.a_IR, self.b_RO))
        product = jnp.matmul(*factors, precision="highest")
        return product * (self.scaling * self.strength)


def _two_steps(eq: str) -> tuple[str, str, bool] | None:
    """Returns the products with the thin matrices that an equation falls into.

    The third value is whether the weight's first axis is the one that stays, as of a
    tied head `[V, D]`: then B comes first. None where there are no such two products.
    """
    operands, result = eq.split("->")
    x_axes, w_axes = operands.split(",")
    summed = [axis for axis in w_axes if axis not in result]
    if len(w_axes) != 2 or len(summed) != 1 or summed[0] not in x_axes:
        return None
    is_transposed = summed[0] == w_axes[1]
    kept = w_axes[0] if is_transposed else w_axes[1]
    if kept in x_axes:
        return None
    rank = next(letter for letter in "rstuvwxyz" if letter not in eq)
    low_axes = x_axes.replace(summed[0], rank)
    thin = (rank + summed[0], kept + rank)
    if not is_transposed:
        thin = (summed[0] + rank, rank + kept)
    narrow, widen = f"{x_axes},{thin[0]}->{low_axes}", f"{low_axes},{thin[1]}->{result}"
    return narrow, widen, is_transposed


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """What adapters a model is given. Dropout is not supported.

    Attributes:
      rank: R.
      alpha: The adapter counts alpha / R.
      rslora: Whether it counts alpha / sqrt(R) instead, so that its effect does not
        shrink as the rank grows.
      targets: The projections, names of `TARGETS`.

    Source: LoRA (arXiv 2106.09685), section 4.1, where queries and values are adapted;
      rsLoRA (arXiv 2312.03732), section 3.
    """

    rank: int = 8
    alpha: float = 16.0
    rslora: bool = False
    targets: tuple[str, ...] = ("query", "value")

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ConfigError(
                f"cannot add LoRA: rank: {self.rank}, expected 1 or more. Correct it."
            )
        if not self.targets:
            raise ConfigError(
                "cannot add LoRA: targets: none is given, expected some of "
                f"{', '.join(TARGETS)}. Name one."
            )
        for target in self.targets:
            if target not in TARGETS:
                raise unknown_name("target", target, TARGETS)

    @property
    def scaling(self) -> float:
        """What the adapter counts, alpha / R or alpha / sqrt(R)."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


class LoraFactors(NamedTuple):
    """The adapter of one projection of one layer.

    Attributes:
      a_IR: A transposed.
      b_RO: B transposed.
      scaling: What their product counts.
    """

    a_IR: Any
    b_RO: Any
    scaling: float


def add_lora(
    params: Params, config: LoraConfig, key: Array, name: str = "default"
) -> Params:
    """Gives projections adapters that change nothing yet: B is zero.

    A is drawn from N(0, 1 / I), in float32 whatever the weights are, as training wants
    it. What a layer draws does not depend on the stacks.

    Args:
      params: The tree of a model; weights may be quantized or adapted already.
      config: Rank, scaling and projections.
      key: Draws A.
      name: Of the adapter; none of the tree has it.

    Returns:
      The tree with `LoraTensor` around the weights named.

    Raises:
      ConfigError: The model lacks a projection, or has an adapter of that name.

    Source: LoRA (arXiv 2106.09685), section 4.1: Gaussian A, zero B.
    """
    sizes = projections(params)
    for target in config.targets:
        if not any(path[-1] == target for path in sizes):
            there = sorted({str(path[-1]) for path in sizes} & set(TARGETS))
            raise ConfigError(
                f"cannot add LoRA: targets: the model has no {target!r}, expected "
                f"some of {', '.join(there)}. Leave it out."
            )
    factors = {}
    for path, (inputs, outputs) in sizes.items():
        if path[-1] not in config.targets:
            continue
        layer = int(path[1]) if path[0] == "layers" else 0
        own = jax.random.fold_in(key, layer)
        own = jax.random.fold_in(own, TARGETS.index(str(path[-1])))
        a_IR = jax.random.normal(own, (inputs, config.rank), jnp.float32)
        a_IR = a_IR / math.sqrt(inputs)
        b_RO = jnp.zeros((config.rank, outputs), jnp.float32)
        factors[path] = LoraFactors(a_IR, b_RO, config.scaling)
    return with_adapter(params, factors, name)


def projections(params: Params) -> dict[TreePath, tuple[int, int]]:
    """Returns every projection of a model and its sizes.

    Args:
      params: The tree.

    Returns:
      `(I, O)` by path; layers are counted singly, whatever the stacks:
      `("layers", 3, "attention", "query")`, `("head",)`.
    """
    sizes = {}
    for path, weight in _kernels(params):
        for single in _single_paths(params, path):
            sizes[single] = (weight.shape[-2], weight.shape[-1])
    return sizes


def with_adapter(
    params: Params, factors: Mapping[TreePath, LoraFactors], name: str = "default"
) -> Params:
    """Wraps projections into given adapters.

    Args:
      params: The tree of a model.
      factors: By path, as `projections` counts. Layers of one stack that have none, or
        a lower rank than others, get zeros.
      name: Of the adapter; none of the tree has it.

    Returns:
      The tree with `LoraTensor` around those weights, at strength 1.

    Raises:
      ConfigError: The tree has an adapter of that name.
    """
    if name in adapter_names(params):
        raise ConfigError(
            f"cannot add LoRA: name: the model has an adapter {name!r}, expected a new "
            "name. Choose another, or remove that one."
        )

    def wrapped(keys: Any, weight: Any) -> Any:
        path = path_names(keys)
        if path[-1] != "kernel":
            return weight
        found = [factors.get(single) for single in _single_paths(params, path)]
        if not any(found):
            return weight
        return _wrap(weight, found, name, is_stacked=path[0] == "stacks")

    return jax.tree_util.tree_map_with_path(wrapped, params, is_leaf=_is_leaf)


def _wrap(
    weight: Any, found: Sequence[LoraFactors | None], name: str, *, is_stacked: bool
) -> LoraTensor:
    inputs, outputs = weight.shape[-2:]
    given = [factors for factors in found if factors is not None]
    rank = max(factors.a_IR.shape[1] for factors in given)
    dtype = jnp.result_type(*(x.dtype for f in given for x in (f.a_IR, f.b_RO)))
    empty = jnp.zeros((inputs, 0)), jnp.zeros((0, outputs))
    nothing = LoraFactors(*empty, given[0].scaling)
    layers = [nothing if factors is None else factors for factors in found]

    def stacked(arrays: list[Any]) -> Array:
        return jnp.stack(arrays) if is_stacked else jnp.asarray(arrays[0])

    def padded(x: Any, axis: int) -> Array:
        pad = [(0, 0), (0, 0)]
        pad[axis] = (0, rank - x.shape[axis])
        return jnp.pad(jnp.asarray(x, dtype), pad)

    scaling = stacked([jnp.full((1, 1), f.scaling, jnp.float32) for f in layers])
    return LoraTensor(
        base=weight,
        a_IR=stacked([padded(f.a_IR, 1) for f in layers]),
        b_RO=stacked([padded(f.b_RO, 0) for f in layers]),
        scaling=scaling,
        strength=jnp.ones_like(scaling),
        name=name,
    )


def layered(weight: Any) -> list[LoraTensor]:
    """Returns the adapters around a weight, the outermost first."""
    found = []
    while isinstance(weight, LoraTensor):
        found.append(weight)
        weight = weight.base
    return found


def adapter_names(params: Params) -> tuple[str, ...]:
    """Returns the names of a tree's adapters in alphabetical order."""
    weights = jax.tree.leaves(params, is_leaf=_is_leaf)
    names = {adapter.name for weight in weights for adapter in layered(weight)}
    return tuple(sorted(names))


def trainable(path: TreePath, leaf: Any) -> bool:
    """Whether an array is A or B of an adapter, for `core.partition.split`.

    Of adapters around adapters all are; the outermost alone is where `"base"` is not in
    the path.
    """
    del leaf
    return path[-1] in _FACTORS


def in_adapter(path: TreePath, leaf: Any) -> bool:
    """Whether an array belongs to an adapter and not to the weight inside."""
    del leaf
    return path[-1] in (*_FACTORS, "scaling", "strength")


def _is_leaf(x: Any) -> bool:
    return isinstance(x, Leaf)


def _kernels(params: Params) -> Iterator[tuple[TreePath, Any]]:
    found = jax.tree_util.tree_leaves_with_path(params, is_leaf=_is_leaf)
    for keys, weight in found:
        path = path_names(keys)
        if path[-1] == "kernel":
            yield path, weight


def _single_paths(params: Params, path: TreePath) -> list[TreePath]:
    """Returns the projections that a stacked kernel holds."""
    if path[0] != "stacks":
        return [path[:-1]]
    sizes = [stack_size(stack) for stack in params["stacks"]]
    index = int(path[1])
    first = sum(sizes[:index])
    return [("layers", first + i, *path[2:-1]) for i in range(sizes[index])]
