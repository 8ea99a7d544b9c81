"""Frozen dataclasses that JAX sees as trees.

Everything that crosses `jax.jit` in this project is such a dataclass: caches,
masks, drafts, decode state, quantized weights.
"""

import dataclasses
from typing import Any, TypeVar, dataclass_transform

import jax

__all__ = ["pytree_dataclass", "static"]

T = TypeVar("T")


def static(**kwargs: Any) -> Any:
    """Returns a field that is part of the tree's structure, not of its leaves.

    Args:
      **kwargs: As for `dataclasses.field`; the value must be hashable.
    """
    return dataclasses.field(metadata={"static": True}, **kwargs)


@dataclass_transform(frozen_default=True, field_specifiers=(static, dataclasses.field))
def pytree_dataclass(cls: type[T]) -> type[T]:
    """Makes a class a frozen dataclass and registers it as a JAX tree node.

    Fields are leaves or subtrees unless declared with `static`.
    """
    cls = dataclasses.dataclass(frozen=True)(cls)
    fields = dataclasses.fields(cls)  # type: ignore[arg-type]
    jax.tree_util.register_dataclass(
        cls,
        data_fields=[f.name for f in fields if not f.metadata.get("static")],
        meta_fields=[f.name for f in fields if f.metadata.get("static")],
    )
    return cls
