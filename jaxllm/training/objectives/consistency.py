"""Consistency training: any iterate of a Jacobi trajectory to its fixed point at once.

Letters: B rows, P slots of a prefix, T tokens of a block, S slots of a forward
(P + 2 (T - 1), or 3 for 2), D width, V vocabulary.
"""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxllm.attention import ancestor
from jaxllm.checkpoints import LanguageModel
from jaxllm.core.errors import ConfigError
from jaxllm.core.pytree import pytree_dataclass
from jaxllm.decoding.sampling import best
from jaxllm.models import Context, Model
from jaxllm.training.objectives.distillation import forward_kl
from jaxllm.training.objectives.next_token import check_smoothing, cross_entropy
from jaxllm.training.objectives.objective import Objective
from jaxllm.training.objectives.readout import (
    check_chunk,
    residual_stream,
    stretch,
    sum_over_time,
)

__all__ = ["Consistency", "TrajectoryBatch"]


@pytree_dataclass
class TrajectoryBatch:
    """Blocks of Jacobi trajectories, a row each; every leaf has rows on its first axis.

    Attributes:
      prefix_BP: int32 tokens before the block, right aligned: the prompt and what was
        decoded since. Slots before them hold padding.
      length_B: int32 tokens of the prefix, 1 to P.
      prompt_B: int32, how many of these are the prompt, 1 or more.
      fixed_BT: int32 fixed point of the block.
      iterate_BT: int32 iterate to learn from.
      next_BT: int32, the one after it.
      reach_B: int32, logit positions behind the first mismatch that may count.
    """

    prefix_BP: Array
    length_B: Array
    prompt_B: Array
    fixed_BT: Array
    iterate_BT: Array
    next_BT: Array
    reach_B: Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class Consistency(Objective):
    """Trains a model whose Jacobi iteration converges in few steps.

    What the model says after an iterate is drawn to what it says itself, now, after the
    fixed point: a teacher that no gradient reaches. Beside it the plain loss on the
    same texts at the same positions keeps the model what it was. Taken from other
    texts or other positions it keeps the model only there, and what it decodes behind
    the prompts falls apart while perplexity and speed still look fine: select
    checkpoints by what they write.

    Attributes:
      goal: `fixed` (global consistency) or `next`, the iterate after (local).
      weight: Of the consistency term. 0 leaves plain fine-tuning on the same texts: the
        control that says how much of a gain is consistency's.
      ar_weight: Weight of the plain loss on prompt, answer so far and fixed point.
      positions: Logit positions behind the first mismatch that count; all of the block
        when None. Far ones are nearly unpredictable at first: `reach_B` phases them in.
      label_smoothing: Of the plain loss.
      eos: Ids that end a text; those of the model when None.
      chunk: Tokens of a row whose logits exist at a time; when None as many as 16 MiB
        hold.

    Metrics: `consistency` and `ar`, nats; `agreement`, how often the choice at a
    position that counts is the goal's.

    Source: CLLMs (arXiv 2403.00835), section 3.2.

    Differs from the paper: iterate and fixed point share one pass over their prefix;
      the teacher's entropy is subtracted, which changes no gradient; `positions`.
    """

    goal: Literal["fixed", "next"] = "fixed"
    weight: float = 1.0
    ar_weight: float = 5.0
    positions: int | None = 4
    label_smoothing: float = 0.0
    eos: tuple[int, ...] | None = None
    chunk: int | None = None

    def __post_init__(self) -> None:
        check_smoothing(self.label_smoothing, "consistency")
        check_chunk(self.chunk, "consistency")
        for name in ("weight", "ar_weight"):
            if getattr(self, name) < 0:
                raise ConfigError(
                    f"cannot train: consistency.{name} is {getattr(self, name)}, "
                    f"expected 0 or more. Correct it."
                )
        if self.positions is not None and self.positions < 1:
            raise ConfigError(
                f"cannot train: consistency.positions is {self.positions}, expected 1 "
                f"or more. Correct it, or write None for all."
            )

    def bind(self, lm: LanguageModel) -> tuple[Objective, Any]:
        """Takes the model's end tokens unless there are others."""
        eos = tuple(lm.generation.eos_ids) if self.eos is None else self.eos
        return dataclasses.replace(self, eos=eos), {}

    def weights(self, batch: TrajectoryBatch) -> dict[str, Array]:
        """Returns how many positions count in either term."""
        return {
            "consistency": self._counts(batch).sum(),
            "ar": self._labels(batch)[1].sum(),
        }

    def loss(
        self,
        model: Model,
        params: Any,
        batch: TrajectoryBatch,
        weights: dict[str, Array],
        key: Array,
        frozen: Any,
    ) -> tuple[Array, dict[str, Array]]:
        """Returns the loss of a part of a batch; see `Objective`."""
        x_BSD = self._run(model, params, batch)
        prefix, fed = batch.prefix_BP.shape[1], batch.fixed_BT.shape[1] - 1

        def block(index: int) -> Array:
            start = prefix + index * fed
            return x_BSD[:, start : start + fed]

        teacher_BTD = block(0 if self.goal == "fixed" else 2)
        sums = _divergence(
            model,
            params,
            (block(1), teacher_BTD, self._counts(batch)[:, 1:]),
            stretch(self.chunk, model.config.vocabulary),
        )
        sums = {name: x / weights["consistency"] for name, x in sums.items()}
        plain = cross_entropy(
            model,
            params,
            (x_BSD[:, : prefix + fed], *self._labels(batch)),
            label_smoothing=self.label_smoothing,
            chunk=self.chunk,
        )
        total = (
            self.weight * sums["consistency"]
            + self.ar_weight * plain["loss"] / weights["ar"]
        )
        metrics = {**sums, "ar": plain["nll"] / weights["ar"]}
        return total, jax.lax.stop_gradient(metrics)

    def _run(self, model: Model, params: Any, batch: TrajectoryBatch) -> Array:
        """Runs every prefix with its blocks side by side behind it, `[B, S, D]`."""
        blocks = [batch.fixed_BT, batch.iterate_BT]
        blocks += [batch.next_BT] if self.goal == "next" else []
        # What follows a block's last token is not asked.
        tokens_BS = jnp.concatenate([batch.prefix_BP, *(x[:, :-1] for x in blocks)], 1)
        prefix, fed = batch.prefix_BP.shape[1], batch.fixed_BT.shape[1] - 1
        before_BP = jnp.arange(prefix) - (prefix - batch.length_B[:, None])
        behind_BT = batch.length_B[:, None] + jnp.arange(fed)
        positions_BS = jnp.concatenate([before_BP, *[behind_BT] * len(blocks)], axis=1)
        context = Context(
            positions_BT=jnp.maximum(positions_BS, 0).astype(jnp.int32),
            valid_BT=positions_BS >= 0,
            mask=ancestor(jnp.asarray(_sees(prefix, fed, len(blocks)))[None]),
            rope_length=prefix + fed,
        )
        return residual_stream(model, params, tokens_BS, context)

    def _counts(self, batch: TrajectoryBatch) -> Array:
        """Returns float32 1 where the choice of a block's token counts, `[B, T]`."""
        goal_BT = batch.fixed_BT if self.goal == "fixed" else batch.next_BT
        wrong_BT = batch.iterate_BT != goal_BT
        T = wrong_BT.shape[1]
        first_B = jnp.where(wrong_BT.any(axis=1), jnp.argmax(wrong_BT, axis=1), T)
        # Up to the first mismatch the two contexts are the same, and so is the choice.
        behind_BT = jnp.arange(T) - first_B[:, None]
        reach_B = jnp.minimum(batch.reach_B, self.positions or T)
        counts_BT = (behind_BT >= 1) & (behind_BT <= reach_B[:, None])
        counts_BT &= self._open(batch.iterate_BT) & self._open(goal_BT)
        return counts_BT.astype(jnp.float32)

    def _labels(self, batch: TrajectoryBatch) -> tuple[Array, Array]:
        """Returns the plain loss's labels and weights, `[B, P + T - 1]`."""
        prefix = batch.prefix_BP.shape[1]
        text_BS = jnp.concatenate([batch.prefix_BP, batch.fixed_BT], axis=1)
        first_B = prefix - batch.length_B + batch.prompt_B
        answer_BS = jnp.arange(text_BS.shape[1]) >= first_B[:, None]
        whole_BP = jnp.ones_like(batch.prefix_BP, bool)
        answer_BS &= jnp.concatenate([whole_BP, self._open(batch.fixed_BT)], axis=1)
        return text_BS[:, 1:], answer_BS[:, 1:].astype(jnp.float32)

    def _open(self, tokens_BT: Array) -> Array:
        """Returns where no end token stands before, `[B, T]`."""
        if self.eos is None:
            raise ConfigError(
                "cannot train: consistency does not know the end tokens yet, expected "
                "a bound objective. Call its bind."
            )
        ends_BT = jnp.isin(tokens_BT, jnp.asarray(self.eos, jnp.int32)).astype(int)
        return jnp.cumsum(ends_BT, axis=1) - ends_BT == 0


def _sees(prefix: int, fed: int, blocks: int) -> np.ndarray:
    """Returns which slots see which, `[S, S]`: a block sees the prefix and itself."""
    block_S = np.repeat(np.arange(blocks + 1), [prefix] + [fed] * blocks)
    slot_S = np.arange(len(block_S))
    mine = (block_S == 0)[None] | (block_S[:, None] == block_S[None])
    return mine & (slot_S[None] <= slot_S[:, None])


def _divergence(
    model: Model, params: Any, streams: tuple[Array, Array, Array], chunk: int
) -> dict[str, Array]:
    """Returns the sum of `KL(teacher || student)` and of equal choices.

    Args:
      model: The model.
      params: Its parameters.
      streams: Residual streams `[B, T, D]` of student and teacher, weights `[B, T]`.
      chunk: Tokens of a row whose logits exist at a time.
    """

    def terms(part: Any, _: Array) -> dict[str, Array]:
        student_BTD, teacher_BTD, weight_BT = part
        p_logits_BTV = model.unembed(params, student_BTD)
        # Here ends the teacher's whole forward, prefix and head included.
        q_logits_BTV = jax.lax.stop_gradient(model.unembed(params, teacher_BTD))
        log_p_BTV = jax.nn.log_softmax(p_logits_BTV, axis=-1)
        log_q_BTV = jax.nn.log_softmax(q_logits_BTV, axis=-1)
        same_BT = best(log_p_BTV) == best(log_q_BTV)
        return {
            "consistency": (weight_BT * forward_kl(log_p_BTV, log_q_BTV)).sum(),
            "agreement": (weight_BT * same_BT).sum(),
        }

    return sum_over_time(terms, streams, chunk, jax.random.key(0))
