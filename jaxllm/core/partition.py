"""A tree of parameters in two: what is trained, and what stays as it is.

Each side has the form of the whole, with None where an array belongs to the other. JAX
sees no leaf in a None, so a gradient by one side, and an optimizer's state for it, hold
nothing of the other.
"""

from collections.abc import Callable, Iterable
from typing import Any

import jax

__all__ = ["Predicate", "TreePath", "join", "path_names", "split"]

TreePath = tuple[str | int, ...]
Predicate = Callable[[TreePath, Any], bool]


def path_names(keys: Iterable[Any]) -> TreePath:
    """Returns a path of JAX's as names: keys of dicts, indices, fields of dataclasses.

    Args:
      keys: As `jax.tree_util.tree_flatten_with_path` gives them.

    Returns:
      Such as `("stacks", 0, "mlp", "up", "kernel", "values")`.
    """
    return tuple(
        next(
            getattr(key, kind) for kind in ("key", "idx", "name") if hasattr(key, kind)
        )
        for key in keys
    )


def split(tree: Any, predicate: Predicate) -> tuple[Any, Any]:
    """Splits a tree by what a predicate says of every array.

    Args:
      tree: Parameters; the arrays inside a leaf are judged one by one.
      predicate: Of an array's path and the array. `jax.grad` by the first side needs
        one that chooses floating arrays only.

    Returns:
      The tree of the chosen arrays and that of the others, None elsewhere.
    """
    found, structure = jax.tree_util.tree_flatten_with_path(tree)
    chosen = [predicate(path_names(keys), x) for keys, x in found]
    sides = []
    for side in (True, False):
        kept = [
            x if is_chosen == side else None
            for (_, x), is_chosen in zip(found, chosen, strict=True)
        ]
        sides.append(jax.tree.unflatten(structure, kept))
    return sides[0], sides[1]


def join(first: Any, second: Any) -> Any:
    """Joins what `split` split.

    Args:
      first: One side.
      second: The other, in the same form.

    Returns:
      The whole tree.

    Raises:
      ValueError: The forms differ, or both sides have an array in one place.
    """

    def either(x: Any, y: Any) -> Any:
        if x is not None and y is not None:
            raise ValueError("both sides have an array in one place")
        return y if x is None else x

    return jax.tree.map(either, first, second, is_leaf=lambda x: x is None)
