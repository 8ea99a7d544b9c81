"""The oracle of `merge_lse`, and the form that every device runs."""

import functools
from collections.abc import Sequence

import jax.numpy as jnp
from jax import Array

__all__ = ["merge_lse_reference"]


def merge_lse_reference(
    outs: Sequence[Array], lses: Sequence[Array]
) -> tuple[Array, Array]:
    """Returns the joined output and log-sum-exp; arguments as for `merge_lse`.

    The parts are never stacked, which would copy them.
    """
    top = functools.reduce(jnp.maximum, lses)
    seen = ~jnp.isneginf(top)
    top = jnp.where(seen, top, 0.0)  # -inf - -inf is NaN
    weights = [jnp.exp(lse - top) for lse in lses]
    total = jnp.where(seen, functools.reduce(jnp.add, weights), 1.0)
    scaled = [o * (w / total)[..., None] for o, w in zip(outs, weights, strict=True)]
    out = functools.reduce(jnp.add, scaled)
    return out, jnp.where(seen, top + jnp.log(total), -jnp.inf)
