"""Root-mean-square and layer normalisation, in float32.

Letters: D width of the normalised axis.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from jaxllm.core.einsum import dense
from jaxllm.layers.parameters import constant, weight

__all__ = ["Norm", "NormConfig"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class NormConfig:
    """What kind of normalisation.

    Attributes:
      kind: `"rms"` or `"layer"` (mean removed).
      eps: Added to the variance.
      offset: Added to the stored scale; 1 for Gemma, whose scales are stored around 0.
      bias: Whether a bias is added.
    """

    kind: str = "rms"
    eps: float = 1e-6
    offset: float = 0.0
    bias: bool = False


class Norm(nnx.Module):
    """Normalises the last axis.

    Source: RMSNorm (arXiv 1910.07467); layer normalisation (arXiv 1607.06450).
    """

    def __init__(self, config: NormConfig, width: int, axis: str | None = None):
        self.config = config
        self.scale = constant(1.0 - config.offset, (width,), (axis,))
        self.bias = constant(0.0, (width,), (axis,)) if config.bias else None

    def __call__(self, x: Array) -> Array:
        """Returns the normalised `[..., D]` in the dtype of `x`."""
        wide = x.astype(jnp.float32)
        if self.config.kind == "layer":
            wide = wide - jnp.mean(wide, axis=-1, keepdims=True)
        variance = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
        wide = wide * jax.lax.rsqrt(variance + self.config.eps)
        scale = dense(weight(self.scale), jnp.float32)
        wide = wide * (scale + self.config.offset)
        if self.bias is not None:
            wide = wide + dense(weight(self.bias), jnp.float32)
        return wide.astype(x.dtype)
