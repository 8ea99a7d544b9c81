"""Learning from a teacher's distribution: divergences, and acceptance itself.

A drafter's token is accepted with probability `sum(min(p, q)) = 1 - TVD(p, q)`, so the
total variation distance is what a drafter should minimise.

Letters: B rows, T tokens, K samples, D width, V vocabulary that both models have. Here
q is the teacher and p is what is trained.
"""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import Array

from jaxllm.checkpoints import LanguageModel, load_language_model
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

__all__ = [
    "Distillation",
    "forward_kl",
    "reverse_kl",
    "total_variation",
]

Kind = Literal[
    "next_token", "forward_kl", "reverse_kl", "tvd", "tvdpp", "tvdpp_sampled"
]

_LOWEST_DEVIATION = 1e-6


def forward_kl(log_p_BTV: Array, log_q_BTV: Array) -> Array:
    """Returns `KL(q || p)` in nats, `[B, T]`: p covers what the teacher says."""
    return (jnp.exp(log_q_BTV) * (log_q_BTV - log_p_BTV)).sum(axis=-1)


def reverse_kl(log_p_BTV: Array, log_q_BTV: Array) -> Array:
    """Returns `KL(p || q)` in nats, `[B, T]`: p says nothing the teacher would not."""
    return (jnp.exp(log_p_BTV) * (log_p_BTV - log_q_BTV)).sum(axis=-1)


def total_variation(log_p_BTV: Array, log_q_BTV: Array) -> Array:
    """Returns half the absolute difference, `[B, T]`, from 0 (equal) to 1 (disjoint).

    Source: Direct Alignment of Draft Model (arXiv 2403.00858); that 1 - TVD is the
      acceptance: arXiv 2211.17192, corollary 3.6.
    """
    return 0.5 * jnp.abs(jnp.exp(log_p_BTV) - jnp.exp(log_q_BTV)).sum(axis=-1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Distillation(Objective):
    """Distils a teacher into a model of the same tokens, on a `Batch`.

    `tvdpp` replaces the reward `r = [q > p]` in the gradient of the TVD,
    `-E_p[r grad log p]`, by `(r - mean) / deviation`. Over the whole vocabulary that is
    the gradient of the TVD divided by the deviation: subtracting a constant changes
    nothing there, it lowers the variance of the sampled form. Start from `forward_kl`:
    where the two models hardly overlap, the TVD has almost no gradient.

    Attributes:
      teacher: What `jaxllm.load` takes: a directory, `hf:org/name`, a shipped name.
      loss_kinds: What is summed: `forward_kl`, `reverse_kl`, `tvd`, `tvdpp` (dense),
        `tvdpp_sampled`, and `next_token`, the cross entropy of the batch's own tokens.
      shares: The weight of each of them; one number holds for all.
      samples: K, tokens that `tvdpp_sampled` draws at a position.
      chunk: Tokens of a row whose logits exist at a time, of both models; when None as
        many as 16 MiB hold.
      teacher_model: The teacher, once bound.

    Metrics: every kind by its name, in its own unit (of `tvdpp` the TVD's surrogate,
    whose value means nothing), and `acceptance`, `1 - TVD`.

    Source: Direct Alignment of Draft Model for Speculative Decoding (arXiv
      2403.00858).

    Differs from the paper: mean and deviation of the reward are those of a row, not of
      the batch, so that a batch may be cut into parts. The sampled form has those of
      the whole vocabulary too, so that its mean is the dense gradient.
    """

    teacher: str
    loss_kinds: tuple[Kind, ...] = ("forward_kl",)
    shares: tuple[float, ...] = (1.0,)
    samples: int = 4
    chunk: int | None = None
    teacher_model: Model | None = dataclasses.field(default=None, init=False)

    def __post_init__(self) -> None:
        check_chunk(self.chunk, "distillation")
        if len(self.shares) not in (1, len(self.loss_kinds)):
            raise ConfigError(
                f"cannot distil: distillation.shares has {len(self.shares)} numbers, "
                f"expected {len(self.loss_kinds)}, one for each of loss_kinds, or one. "
                f"Correct it."
            )
        if len(set(self.loss_kinds)) < len(self.loss_kinds) or not self.loss_kinds:
            raise ConfigError(
                f"cannot distil: distillation.loss_kinds is "
                f"{'+'.join(self.loss_kinds)!r}, expected different names. Give each "
                f"once."
            )
        if self.samples < 1:
            raise ConfigError(
                f"cannot distil: distillation.samples is {self.samples}, expected 1 or "
                f"more. Correct it."
            )

    def bind(self, lm: LanguageModel) -> tuple[Objective, Any]:
        """Loads the teacher and checks that its tokens are the model's.

        Raises:
          ConfigError: They are not.
        """
        teacher = load_language_model(
            self.teacher, dtype=lm.model.policy.compute, mesh=lm.mesh
        )
        if not lm.shares_tokens(teacher):
            raise ConfigError(
                f"cannot distil: {self.teacher}: its tokens are not those of "
                f"{lm.name or 'the model'}, expected one vocabulary, id for id. Choose "
                f"a teacher with the tokenizer of the model."
            )
        return self.taught_by(teacher.model), teacher.params

    def taught_by(self, model: Model) -> "Distillation":
        """Returns the objective with a teacher that is at hand."""
        bound = dataclasses.replace(self)
        object.__setattr__(bound, "teacher_model", model)
        return bound

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
        """Returns the loss of a part of a batch; see `Objective`.

        Raises:
          ConfigError: The objective is not bound.
        """
        teacher = self._bound_teacher()
        label_BT, weight_BT = next_tokens(batch)
        context = batch.context()
        streams = {
            "p": residual_stream(model, params, batch.tokens_BT, context),
            "q": residual_stream(teacher, frozen, batch.tokens_BT, context),
            "label": label_BT,
            "weight": weight_BT,
        }
        V = min(model.config.vocabulary, teacher.config.vocabulary)

        def terms(part: Any, key: Array) -> dict[str, Array]:
            logits_BTV = model.unembed(params, part["p"])[..., :V]
            teacher_BTV = teacher.unembed(frozen, part["q"])[..., :V]
            pair = (
                jax.nn.log_softmax(logits_BTV, axis=-1),
                jax.lax.stop_gradient(jax.nn.log_softmax(teacher_BTV, axis=-1)),
            )
            found = self._terms(*pair, part["label"], key)
            return {name: (part["weight"] * x).sum(1) for name, x in found.items()}

        largest = max(model.config.vocabulary, teacher.config.vocabulary)
        sums = sum_over_time(terms, streams, stretch(self.chunk, largest), key)
        return self._total(sums, weight_BT.sum(axis=1), weights["tokens"])

    def _bound_teacher(self) -> Model:
        if self.teacher_model is None:
            raise ConfigError(
                f"cannot distil: {self.teacher} is not loaded yet, expected a bound "
                f"objective. Call its bind."
            )
        return self.teacher_model

    def _terms(
        self, log_p_BTV: Array, log_q_BTV: Array, label_BT: Array, key: Array
    ) -> dict[str, Array]:
        """Returns what is summed over a row's tokens, each `[B, T]`."""
        log_p, log_q = log_p_BTV, log_q_BTV
        tvd_BT = total_variation(log_p, log_q)
        found = {"acceptance": jax.lax.stop_gradient(1 - tvd_BT)}
        for kind in self.loss_kinds:
            match kind:
                case "next_token":
                    found[kind] = -at_labels(log_p, label_BT)
                case "forward_kl":
                    found[kind] = forward_kl(log_p, log_q)
                case "reverse_kl":
                    found[kind] = reverse_kl(log_p, log_q)
                case "tvd":
                    found[kind] = tvd_BT
                case "tvdpp":
                    found |= _named(kind, _dense(log_p, log_q))
                case "tvdpp_sampled":
                    found |= _named(kind, _sampled(log_p, log_q, key, self.samples))
        return found

    def _total(
        self, sums: dict[str, Array], row_weight_B: Array, tokens: Array
    ) -> tuple[Array, dict[str, Array]]:
        """Returns the loss and the metrics from the sums of every row, `[B]`."""
        shares = self.shares * (len(self.loss_kinds) // len(self.shares))
        total = jnp.float32(0)
        metrics: dict[str, Array] = {}
        for kind, share in zip(self.loss_kinds, shares, strict=True):
            if kind in sums:
                value = sums[kind].sum() / tokens
            else:
                value = _advantage(sums, kind, row_weight_B) / tokens
            total += share * value
            metrics[kind] = jax.lax.stop_gradient(value)
        metrics["acceptance"] = sums["acceptance"].sum() / tokens
        return total, metrics


def _named(kind: str, parts: tuple[Array, Array, Array]) -> dict[str, Array]:
    names = ("gain", "whole", "reward")
    return {f"{kind}/{name}": x for name, x in zip(names, parts, strict=True)}


def _dense(log_p_BTV: Array, log_q_BTV: Array) -> tuple[Array, Array, Array]:
    """Returns `-E_p[r log p]`, `-E_p[log p]` and the vocabulary's mean of r, `[B, T]`.

    The expectations are over a p that does not move.
    """
    p_BTV = jax.lax.stop_gradient(jnp.exp(log_p_BTV))
    reward_BTV = (log_q_BTV > log_p_BTV).astype(jnp.float32)
    gain_BT = -(p_BTV * reward_BTV * log_p_BTV).sum(axis=-1)
    whole_BT = -(p_BTV * log_p_BTV).sum(axis=-1)
    return gain_BT, whole_BT, reward_BTV.mean(axis=-1)


def _sampled(
    log_p_BTV: Array, log_q_BTV: Array, key: Array, samples: int
) -> tuple[Array, Array, Array]:
    """Returns estimates of what `_dense` returns, from K tokens drawn from p."""

    def one(key: Array) -> tuple[Array, Array]:
        drawn_BT = jax.random.categorical(key, jax.lax.stop_gradient(log_p_BTV))
        log_p_BT = _at(log_p_BTV, drawn_BT)
        reward_BT = _at(log_q_BTV, drawn_BT) > log_p_BT
        return -reward_BT.astype(jnp.float32) * log_p_BT, -log_p_BT

    # One after another: the noise of a draw is as large as the logits.
    gain_KBT, whole_KBT = jax.lax.map(one, jax.random.split(key, samples))
    mean_BT = (log_q_BTV > log_p_BTV).astype(jnp.float32).mean(axis=-1)
    return gain_KBT.mean(axis=0), whole_KBT.mean(axis=0), mean_BT


def _at(x_BTV: Array, index_BT: Array) -> Array:
    return jnp.take_along_axis(x_BTV, index_BT[..., None], axis=-1)[..., 0]


def _advantage(sums: dict[str, Array], kind: str, row_weight_B: Array) -> Array:
    """Returns the sum over rows of `-E_p[(r - mean) / deviation log p]`."""
    gain_B, whole_B, reward_B = (
        sums[f"{kind}/{name}"] for name in ("gain", "whole", "reward")
    )
    # A row that counts nothing has sums of 0.
    mean_B = reward_B / jnp.where(row_weight_B > 0, row_weight_B, 1.0)
    deviation_B = jnp.sqrt(jnp.maximum(mean_B * (1 - mean_B), 0.0))
    deviation_B = jnp.maximum(deviation_B, _LOWEST_DEVIATION)
    mean_B, deviation_B = jax.lax.stop_gradient((mean_B, deviation_B))
    return ((gain_B - mean_B * whole_B) / deviation_B).sum()
