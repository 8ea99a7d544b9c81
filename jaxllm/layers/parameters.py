"""How a layer declares a parameter, and reads it back.

A parameter is declared once with its logical axis names; at run time the module is
rebuilt around plain arrays or quantized leaves, and `weight` hands those over as they
are.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxllm.core.einsum import Weight

__all__ = ["constant", "matrix", "weight"]


def matrix(
    rngs: nnx.Rngs, shape: tuple[int, ...], axes: tuple[str | None, ...]
) -> nnx.Param:
    """Declares a matrix `[in, out]`, initialised from N(0, 0.02**2)."""
    draw: Callable[..., Any] = jax.random.normal
    return nnx.Param(draw(rngs.params(), shape, jnp.float32) * 0.02, axes=axes)


def constant(
    value: float, shape: tuple[int, ...], axes: tuple[str | None, ...]
) -> nnx.Param:
    """Declares a parameter that starts at one value (norm scales, biases)."""
    return nnx.Param(jnp.full(shape, value, jnp.float32), axes=axes)


def weight(parameter: nnx.Param) -> Weight:
    """Returns what a parameter holds: an array or a leaf."""
    return parameter.get_raw_value()
