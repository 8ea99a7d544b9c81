"""Mask descriptors: a kind and small arrays, never a T x S matrix.

A mask says which keys of one segment a query may see, by position; a segment adds its
own length and validity, and a layer its window. The boolean matrix exists inside
`attend_segment`, where the compiler fuses it away, and in tests.

Letters: B rows, T queries, S keys, M draft nodes, U users of a segment.
"""

import jax.numpy as jnp
from jax import Array

from jaxllm.core.pytree import pytree_dataclass, static

__all__ = [
    "CAUSAL",
    "FULL",
    "GLOBAL_WINDOW",
    "Mask",
    "allowed",
    "ancestor",
    "ancestors_of",
    "packed",
]

GLOBAL_WINDOW = 2**30
"""The window of a layer that sees everything."""


@pytree_dataclass
class Mask:
    """Which keys a query may see.

    Attributes:
      kind: `"full"`, `"causal"`, `"ancestor"`, `"packed"`, or `"all"` for the
        conjunction of several.
      arrays: What the kind needs: `(ancestor_BMM,)`; `(query_BT, key_BS)` segment ids;
        the masks that are joined.
    """

    kind: str = static()
    arrays: tuple = ()

    def __and__(self, other: "Mask") -> "Mask":
        return Mask("all", (self, other))


FULL = Mask("full")
CAUSAL = Mask("causal")


def ancestor(ancestor_BMM: Array) -> Mask:
    """Returns the mask of draft nodes that see their ancestors and themselves."""
    return Mask("ancestor", (ancestor_BMM,))


def packed(query_BT: Array, key_BS: Array) -> Mask:
    """Returns the causal mask of rows that hold several documents.

    Where there are as many keys as queries, key t is the token of query t and stands
    before query t + 1 in its document or in another: no query sees a key behind its
    own slot, and `attend_segment` does not look there.

    Args:
      query_BT: int32 document of each query, -1 for padding.
      key_BS: int32 document of each key.
    """
    return Mask("packed", (query_BT, key_BS))


def ancestors_of(parents_BM: Array) -> Array:
    """Returns the ancestor-or-self relation of a forest of draft nodes.

    Args:
      parents_BM: int32, the parent's index, smaller than the node's own; -1 at roots.

    Returns:
      bool `[B, M, M]`; entry (i, j) says that j is i or an ancestor of i.
    """
    nodes = parents_BM.shape[-1]
    reach = jnp.eye(nodes, dtype=bool) | (
        parents_BM[..., None] == jnp.arange(nodes)[None, None]
    )
    for _ in range(max(1, (nodes - 1).bit_length())):
        wide = reach.astype(jnp.float32)
        reach = jnp.einsum("bij,bjk->bik", wide, wide) > 0
    return reach


def allowed(mask: Mask, query_position_BT: Array, key_position_BS: Array) -> Array:
    """Returns the boolean form of a mask, broadcastable to `[B, T, S]`.

    Args:
      mask: The descriptor.
      query_position_BT: int32 absolute positions of the queries.
      key_position_BS: int32 absolute positions of the keys.
    """
    match mask.kind:
        case "full":
            return jnp.ones((1, 1, 1), bool)
        case "causal":
            return key_position_BS[:, None, :] <= query_position_BT[:, :, None]
        case "ancestor":
            return mask.arrays[0]
        case "packed":
            query_BT, key_BS = mask.arrays
            same = query_BT[:, :, None] == key_BS[:, None, :]
            causal = key_position_BS[:, None, :] <= query_position_BT[:, :, None]
            return same & causal & (query_BT[:, :, None] >= 0)
        case "all":
            first, *rest = (
                allowed(m, query_position_BT, key_position_BS) for m in mask.arrays
            )
            for other in rest:
                first = first & other
            return first
    raise AssertionError(mask.kind)
