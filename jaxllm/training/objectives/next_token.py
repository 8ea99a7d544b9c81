"""Cross entropy of the next token.

Letters: B rows, T tokens, D width, V vocabulary.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jaxllm.core.errors import ConfigError
from jaxllm.models import Model
from jaxllm.training.batch import Batch
from jaxllm.training.objectives.objective import Objective
from jaxllm.training.objectives.readout import (
    at_labels,
    check_chunk,
    next_tokens,
    residual_stream,
    stretch,
    sum_over_time,
)

__all__ = ["NextToken", "check_smoothing", "cross_entropy"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class NextToken(Objective):
    """Plain language modelling on a `Batch`.

    Attributes:
      label_smoothing: Share of every label's mass that is spread over the vocabulary.
      z_loss: Weight of `log(Z)^2`, which keeps the logits from drifting.
      chunk: Tokens of a row whose logits exist at a time; when None as many as 16 MiB
        hold.

    Metrics: `nll`, nats a token without smoothing and z-loss; `accuracy`.

    Source: label smoothing: Rethinking the Inception Architecture (arXiv 1512.00567)
      section 7; z-loss: PaLM (arXiv 2204.02311) section 5.
    """

    label_smoothing: float = 0.0
    z_loss: float = 0.0
    chunk: int | None = None

    def __post_init__(self) -> None:
        check_smoothing(self.label_smoothing, "next_token")
        check_chunk(self.chunk, "next_token")
        if not 0 <= self.z_loss < 1:
            raise ConfigError(
                f"cannot train: next_token.z_loss is {self.z_loss}, expected 0 to 1. "
                f"1e-4 is usual."
            )

    def weights(self, batch: Batch) -> dict[str, Array]:
        """Returns the weight of all tokens."""
        return {"tokens": next_tokens(batch)[1].sum()}

    def loss(
        self,
        model: Model,
        params: Any,
        batch: Batch,
        weights: dict[str, Array],
        key: Array,
        frozen: Any,
    ) -> tuple[Array, dict[str, Array]]:
        """Returns the loss of a part of a batch; see `Objective`."""
        x_BTD = residual_stream(model, params, batch.tokens_BT, batch.context())
        label_BT, weight_BT = next_tokens(batch)
        sums = cross_entropy(
            model,
            params,
            (x_BTD, label_BT, weight_BT),
            label_smoothing=self.label_smoothing,
            z_loss=self.z_loss,
            chunk=self.chunk,
        )
        means = {name: x / weights["tokens"] for name, x in sums.items()}
        return means.pop("loss"), means


def check_smoothing(value: float, name: str) -> None:
    """Raises `ConfigError` when a label would lose all its mass."""
    if not 0 <= value < 1:
        raise ConfigError(
            f"cannot train: {name}.label_smoothing is {value}, expected 0 to below 1. "
            f"Correct it."
        )


def cross_entropy(
    model: Model,
    params: Any,
    streams: tuple[Array, Array, Array],
    *,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    chunk: int | None = None,
) -> dict[str, Array]:
    """Returns sums of losses over the slots of a residual stream.

    Args:
      model: The model whose head reads it.
      params: Its parameters.
      streams: The residual stream `[B, T, D]`; int32 labels and float32 weights
        `[B, T]`.
      label_smoothing: As for `NextToken`, like the rest.
      z_loss: See there.
      chunk: See there.

    Returns:
      float32 sums: `loss`, what is minimised; `nll`; `accuracy`, right choices.
    """

    def terms(part: Any, _: Array) -> dict[str, Array]:
        x_BTD, label_BT, weight_BT = part
        logits_BTV = model.unembed(params, x_BTD)
        log_z_BT = jax.nn.logsumexp(logits_BTV, axis=-1)
        label_logit_BT = at_labels(logits_BTV, label_BT)
        nll_BT = log_z_BT - label_logit_BT
        loss_BT = nll_BT
        if label_smoothing:
            flat_BT = log_z_BT - logits_BTV.mean(axis=-1)
            loss_BT = (1 - label_smoothing) * nll_BT + label_smoothing * flat_BT
        if z_loss:
            loss_BT += z_loss * jnp.square(log_z_BT)
        right_BT = label_logit_BT >= logits_BTV.max(axis=-1)
        return {
            "loss": (weight_BT * loss_BT).sum(),
            "nll": jax.lax.stop_gradient(weight_BT * nll_BT).sum(),
            "accuracy": (weight_BT * right_BT).sum(),
        }

    size = stretch(chunk, model.config.vocabulary)
    return sum_over_time(terms, streams, size, jax.random.key(0))
