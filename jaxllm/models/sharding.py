"""Where a model's parameters live on a mesh.

The logical names come from the layers (`Model.axes`), the mesh axes from
`ShardingRules`; this module joins them with the sizes of the parameters.
"""

from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxllm.core.einsum import Leaf
from jaxllm.core.sharding import ShardingRules
from jaxllm.models.decoder import DecoderConfig
from jaxllm.models.freeze import Model, Params

__all__ = ["check_mesh", "param_shardings"]


def check_mesh(
    config: DecoderConfig, mesh: Mesh, rules: ShardingRules | None = None
) -> None:
    """Checks that a mesh divides a model, before anything is read or compiled.

    Key and value heads need not be divided, nor the vocabulary: grouped-query models
    have few heads, vocabularies are often odd (GPT-2's is 50257), and what does not
    divide is replicated.

    Args:
      config: The model.
      mesh: The mesh to be used.
      rules: Logical to mesh axes; the project's when None.

    Raises:
      ShardingError: Mesh axes do not divide the width, the query heads or the
        hidden width of the feed-forward block that they should split.
    """
    rules = ShardingRules() if rules is None else rules
    sizes = {
        "embed": config.width,
        "heads": config.attention.num_heads,
        "ffn": config.mlp.hidden,
    }
    rules.check(sizes, mesh)


def param_shardings(
    model: Model, params: Params, mesh: Mesh, rules: ShardingRules | None = None
) -> Params:
    """Returns the sharding of every array of a model's parameters.

    An axis of heads is split between heads, never inside one; it is replicated where
    the number of heads does not divide. The leading axis of a stack is replicated. An
    array inside a leaf is split like the axes of the weight whose sizes it shares,
    so a scale's axis of size 1 is replicated.

    Args:
      model: The model.
      params: Its tree; arrays, leaves or shapes.
      mesh: The mesh.
      rules: Logical to mesh axes; the project's when None.

    Returns:
      A tree like `params` with a `NamedSharding` for each array, as `jax.device_put`
      takes it. What the model does not name is replicated.

    Raises:
      ShardingError: The mesh does not divide the model, see `check_mesh`.
    """
    rules = ShardingRules() if rules is None else rules
    check_mesh(model.config, mesh, rules)
    layers = model.axes["layer"]
    ends = {name: axes for name, axes in model.axes.items() if name != "layer"}
    axes = {**ends, "stacks": (layers,) * len(params["stacks"])}
    head_dim = model.config.attention.head_dim

    def leaf(names: tuple[str | None, ...], weight: Any) -> Any:
        names = (None,) * (len(weight.shape) - len(names)) + names
        sizes = [
            size // head_dim if name in ("heads", "kv_heads") else size
            for name, size in zip(names, weight.shape, strict=True)
        ]
        return _like(weight, rules.spec(names, sizes, mesh), mesh)

    def walk(axes: Any, tree: Any) -> Any:
        if axes is None:
            return jax.tree.map(lambda _: NamedSharding(mesh, PartitionSpec()), tree)
        if isinstance(tree, Mapping):
            return {name: walk(axes.get(name), sub) for name, sub in tree.items()}
        if isinstance(tree, tuple):
            return tuple(walk(a, t) for a, t in zip(axes, tree, strict=True))
        return leaf(axes, tree)

    return walk(axes, params)


def _like(weight: Any, spec: PartitionSpec, mesh: Mesh) -> Any:
    """Returns the shardings of the arrays inside a weight that is split by `spec`."""

    def part(array: Any) -> NamedSharding:
        if array.ndim != len(weight.shape):
            return NamedSharding(mesh, PartitionSpec())
        same = [a == b for a, b in zip(array.shape, weight.shape, strict=True)]
        entries = (entry if s else None for entry, s in zip(spec, same, strict=True))
        return NamedSharding(mesh, PartitionSpec(*entries))

    if not isinstance(weight, Leaf):
        return NamedSharding(mesh, spec)
    return jax.tree.map(part, weight)
