"""The feed-forward block.

Letters: B rows, T tokens, D width, F hidden width.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from jaxllm.core.sharding import ShardingRules, constrain
from jaxllm.layers.linear import Linear

__all__ = ["ACTIVATIONS", "Mlp", "MlpConfig"]

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class MlpConfig:
    """The shape of the feed-forward block.

    Attributes:
      hidden: F.
      activation: A name of `ACTIVATIONS`.
      gated: Whether the activated gate multiplies a second projection (GLU).
      bias: Whether the projections have biases.
    """

    hidden: int
    activation: str = "silu"
    gated: bool = True
    bias: bool = False


class Mlp(nnx.Module):
    """`down(activation(gate(x)) * up(x))`, or `down(activation(up(x)))` ungated.

    Source: GLU variants (arXiv 2002.05202).
    """

    def __init__(self, config: MlpConfig, width: int, *, rngs: nnx.Rngs):
        self.config = config
        wide, axes = (width, config.hidden), ("embed", "ffn")
        bias = config.bias
        self.gate = Linear(wide, axes, bias=bias, rngs=rngs) if config.gated else None
        self.up = Linear(wide, axes, bias=bias, rngs=rngs)
        self.down = Linear(
            (config.hidden, width), ("ffn", "embed"), bias=bias, rngs=rngs
        )

    def __call__(self, x_BTD: Array, rules: ShardingRules | None = None) -> Array:
        """Maps `[B, T, D]` to `[B, T, D]`; the activation runs in float32."""
        activation = ACTIVATIONS[self.config.activation]
        h_BTF = self.up(x_BTD, jnp.float32)
        if self.gate is None:
            h_BTF = activation(h_BTF)
        else:
            h_BTF = activation(self.gate(x_BTD, jnp.float32)) * h_BTF
        h_BTF = constrain(h_BTF.astype(x_BTD.dtype), ("batch", "tokens", "ffn"), rules)
        return self.down(h_BTF)
