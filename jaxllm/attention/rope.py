"""Rotary position embedding and every scaling rule found in checkpoints.

Letters: B rows, T tokens, N heads, H head dim, R rotated dims (R <= H).
"""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxllm.core.errors import ConfigError

__all__ = ["RopeConfig", "apply_rope", "rope_tables", "rotate_angles"]

KINDS = ("default", "linear", "dynamic", "yarn", "llama3", "longrope")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """How positions turn into angles.

    Attributes:
      rotary_dim: R, the leading dims of a head that are rotated; even.
      theta: Base of the frequencies.
      kind: Scaling rule, one of `KINDS`.
      factor: How many times the context was extended.
      original_length: Positions of the pretraining context (L0).
      attention_factor: Multiplies cos and sin; the kind's own default when None.
      beta_fast: YaRN, rotations above which a frequency is kept.
      beta_slow: YaRN, rotations below which a frequency is interpolated.
      mscale: YaRN, weight of the logarithm in the attention factor (DeepSeek).
      mscale_all_dim: YaRN, the same for the denominator.
      truncate: YaRN, whether the ramp's ends are rounded to whole dims.
      low_frequency_factor: Llama 3, wavelengths above L0 over this are scaled.
      high_frequency_factor: Llama 3, wavelengths below L0 over this are kept.
      short_factors: LongRoPE, `R/2` divisors within the original context.
      long_factors: LongRoPE, `R/2` divisors beyond it.
    """

    rotary_dim: int
    theta: float = 10000.0
    kind: str = "default"
    factor: float = 1.0
    original_length: int = 0
    attention_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True
    low_frequency_factor: float = 1.0
    high_frequency_factor: float = 4.0
    short_factors: tuple[float, ...] = ()
    long_factors: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ConfigError(
                f"cannot scale rotary positions: rope_type {self.kind!r} is unknown, "
                f"expected one of {', '.join(KINDS)}. Check rope_scaling in "
                f"config.json."
            )
        if self.rotary_dim % 2 or self.rotary_dim <= 0:
            raise ConfigError(
                f"cannot rotate: rotary dim is {self.rotary_dim}, expected a positive "
                f"even number. Check head_dim and partial_rotary_factor."
            )
        if self.kind == "longrope":
            for name in ("short_factors", "long_factors"):
                if len(getattr(self, name)) != self.rotary_dim // 2:
                    raise ConfigError(
                        f"cannot scale rotary positions: {name} has "
                        f"{len(getattr(self, name))} values, expected "
                        f"{self.rotary_dim // 2}. Check rope_scaling in config.json."
                    )

    @property
    def depends_on_length(self) -> bool:
        """Whether frequencies change once a sequence passes the original context."""
        return self.kind in ("dynamic", "longrope")


def rope_tables(config: RopeConfig, length: int = 0) -> tuple[np.ndarray, float]:
    """Returns frequencies and the factor on cos and sin.

    Keys are cached rotated, so a table must not change while a sequence grows; hence
    `length` is static: the longest length that the sequence may reach.

    Args:
      config: The rule.
      length: Longest length in tokens, for the kinds that depend on it; 0 means
        within the original context.

    Returns:
      `(inverse_frequency [R/2] float32, attention factor)`.

    Source: RoFormer (arXiv 2104.09864) eq. 15; position interpolation
      (arXiv 2306.15595); YaRN (arXiv 2309.00071) eq. 19-22; Llama 3.1 (model card);
      LongRoPE (arXiv 2402.13753).
    """
    half, dim = config.rotary_dim // 2, config.rotary_dim
    theta = config.theta
    if config.kind == "dynamic" and dim > 2:
        original = config.original_length
        longest = max(length, original)
        stretch = config.factor * longest / original - (config.factor - 1)
        theta = theta * stretch ** (dim / (dim - 2))
    inverse = 1.0 / theta ** (np.arange(half, dtype=np.float64) * 2 / dim)
    attention = 1.0 if config.attention_factor is None else config.attention_factor
    match config.kind:
        case "linear":
            inverse = inverse / config.factor
        case "llama3":
            inverse = _llama3(config, inverse)
        case "yarn":
            inverse = _yarn(config, inverse)
            if config.attention_factor is None:
                attention = _yarn_attention(config)
        case "longrope":
            long = length > config.original_length
            inverse = inverse / np.asarray(
                config.long_factors if long else config.short_factors
            )
            if config.attention_factor is None and config.factor > 1:
                attention = math.sqrt(
                    1 + math.log(config.factor) / math.log(config.original_length)
                )
    return inverse.astype(np.float32), float(attention)


def _llama3(config: RopeConfig, inverse: np.ndarray) -> np.ndarray:
    low, high = config.low_frequency_factor, config.high_frequency_factor
    turns = config.original_length * inverse / (2 * np.pi)
    # One expression serves all three bands: the ramp is 0 below `low`, 1 above `high`.
    ramp = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return (1 - ramp) * inverse / config.factor + ramp * inverse


def _yarn(config: RopeConfig, inverse: np.ndarray) -> np.ndarray:
    dim = config.rotary_dim

    def turned(rotations: float) -> float:
        return (
            dim
            * math.log(config.original_length / (rotations * 2 * math.pi))
            / (2 * math.log(config.theta))
        )

    low, high = turned(config.beta_fast), turned(config.beta_slow)
    if config.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    width = high - low if high != low else 0.001
    ramp = np.clip((np.arange(dim // 2) - low) / width, 0.0, 1.0)
    return inverse / config.factor * ramp + inverse * (1 - ramp)


def _yarn_attention(config: RopeConfig) -> float:
    def scale(weight: float) -> float:
        if config.factor <= 1:
            return 1.0
        return 0.1 * weight * math.log(config.factor) + 1.0

    if config.mscale and config.mscale_all_dim:
        return scale(config.mscale) / scale(config.mscale_all_dim)
    return scale(1.0)


def rotate_angles(
    positions_BT: Array, inverse: Array | np.ndarray, factor: Array | float
) -> tuple[Array, Array]:
    """Returns cos and sin of every position's angles.

    Args:
      positions_BT: int32 absolute positions.
      inverse: `[R/2]` float32 frequencies.
      factor: Attention factor.

    Returns:
      Two float32 arrays `[B, T, 1, R/2]`. Angles are float32: positions are exact to
      2**24.
    """
    angle = positions_BT.astype(jnp.float32)[..., None, None] * inverse
    return jnp.cos(angle) * factor, jnp.sin(angle) * factor


def apply_rope(x_BTNH: Array, cos: Array, sin: Array) -> Array:
    """Rotates the leading `2 * cos.shape[-1]` dims of every head, halves paired.

    Args:
      x_BTNH: Queries or keys.
      cos: `[B, T, 1, R/2]`.
      sin: The same.

    Returns:
      The rotated heads in their own dtype; dims from R on pass through.
    """
    half = cos.shape[-1]
    x = x_BTNH.astype(jnp.float32)
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    turned = [first * cos - second * sin, second * cos + first * sin]
    if rest.shape[-1]:
        turned.append(rest)
    return jnp.concatenate(turned, axis=-1).astype(x_BTNH.dtype)
