"""Optimizers and learning rates by name; everything in them is optax's.

A learning rate is a function of the step, so that a resumed run needs no history.
"""

import dataclasses
import importlib
import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from jax import Array

from jaxllm.core.errors import ConfigError

__all__ = ["OptimizerConfig", "make_optimizer", "make_schedule"]

_WARMUP_FLOOR = 1e-3


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """What turns gradients into steps.

    Attributes:
      name: `adamw`, `muon` (matrices by Muon, the rest by Adam), `adafactor`, `sgd`, or
        the dotted name of any function `rate -> optax.GradientTransformation`.
      rate: Peak learning rate.
      other_rate: Rate of what is no matrix under `muon`, as a share of `rate`.
      warmup: Share of the steps in which the rate rises.
      schedule: `cosine` falls to `floor` after the warm-up; `linear` falls to it from
        `decay_from` on and is constant before; `constant` never falls.
      decay_from: Share of the steps from which `linear` falls.
      floor: Last rate, as a share of `rate`.
      clip: Largest global norm of the gradients; 0 for no limit.
      weight_decay: Of matrices; never of norms, biases, scales and embeddings.
      b1: Of Adam; the momentum of `sgd` where it is not 0.
      b2: Of Adam.
      eps: Of Adam.
    """

    name: str = "adamw"
    rate: float = 1e-3
    other_rate: float = 1.0
    warmup: float = 0.03
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    decay_from: float = 0.0
    floor: float = 0.1
    clip: float = 1.0
    weight_decay: float = 0.1
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8

    def __post_init__(self) -> None:
        shares = ("warmup", "decay_from", "floor", "b1", "b2")
        for name in shares:
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(
                    f"cannot train: optimizer.{name} is {getattr(self, name)}, "
                    f"expected a share from 0 to 1. Correct it."
                )
        for name in ("rate", "clip", "weight_decay", "eps"):
            value = getattr(self, name)
            if not (value >= 0 and math.isfinite(value)):
                raise ConfigError(
                    f"cannot train: optimizer.{name} is {value}, expected a finite "
                    f"number of 0 or more. Correct it."
                )


def make_schedule(config: OptimizerConfig, steps: int) -> Callable[[Array], Array]:
    """Returns the learning rate as a function of the step.

    Args:
      config: The options.
      steps: Of the whole run.
    """
    rise = config.warmup * steps

    def rate(step: Array) -> Array:
        step = jnp.asarray(step, jnp.float32)
        done = step / max(steps, 1)
        rising = jnp.clip((step + 1) / max(rise, 1.0), _WARMUP_FLOOR, 1.0)
        start = config.decay_from if config.schedule == "linear" else config.warmup
        part = jnp.clip((done - start) / max(1.0 - start, 1e-9), 0.0, 1.0)
        if config.schedule == "cosine":
            part = 0.5 * (1 - jnp.cos(jnp.pi * part))
        if config.schedule == "constant":
            part = jnp.zeros_like(part)
        falling = 1 - (1 - config.floor) * part
        return config.rate * jnp.minimum(rising, falling)

    return rate


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """Returns the transformation from gradients to updates.

    Args:
      config: The options.
      steps: Of the whole run.

    Raises:
      ConfigError: There is no such optimizer.
    """
    schedule = make_schedule(config, steps)
    parts = [optax.clip_by_global_norm(config.clip)] if config.clip else []
    return optax.chain(*parts, _rule(config, schedule))


def _rule(
    config: OptimizerConfig, schedule: Callable[[Array], Array]
) -> optax.GradientTransformation:
    adam = {"b1": config.b1, "b2": config.b2, "eps": config.eps}
    match config.name:
        case "adamw":
            return optax.adamw(
                schedule, weight_decay=config.weight_decay, mask=_is_matrix, **adam
            )
        case "muon":
            return optax.contrib.muon(
                schedule,
                adam_learning_rate=lambda step: config.other_rate * schedule(step),
                weight_decay=config.weight_decay,
                weight_decay_mask=_is_matrix,
                adam_b1=config.b1,
                adam_b2=config.b2,
                consistent_rms=0.2,
                muon_weight_dimension_numbers=_muon_axes,
            )
        case "adafactor":
            return optax.adafactor(
                schedule,
                weight_decay_rate=config.weight_decay or None,
                weight_decay_mask=_is_matrix,
            )
        case "sgd":
            return optax.sgd(schedule, momentum=config.b1 or None)
    module, _, name = config.name.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)(schedule)
    except (ImportError, AttributeError, ValueError):
        raise ConfigError(
            f"cannot train: optimizer.name is {config.name!r}, expected adamw, muon, "
            f"adafactor, sgd or a dotted name such as optax.lion. Correct it."
        ) from None


def _name(path: tuple[Any, ...]) -> str:
    return str(getattr(path[-1], "key", getattr(path[-1], "name", "")))


def _is_matrix(params: Any) -> Any:
    """Returns which parameters are kernels; adapters' factors count as such."""
    return jax.tree_util.tree_map_with_path(
        lambda path, x: _name(path) != "table" and x.ndim >= 3, params
    )


def _muon_axes(params: Any) -> Any:
    # Layers stand in stacks, `[l, in, out]`; the embedding table has two axes.
    axes = optax.contrib.MuonDimensionNumbers(reduction_axis=-2, output_axis=-1)
    return jax.tree.map(lambda matrix: axes if matrix else None, _is_matrix(params))
