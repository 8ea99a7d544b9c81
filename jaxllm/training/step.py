"""One optimizer step: a jitted function from state and batch to state and metrics.

Letters: B rows.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array

from jaxllm.core.partition import join
from jaxllm.core.pytree import pytree_dataclass
from jaxllm.models import Model
from jaxllm.training.objectives import Objective

__all__ = ["Frozen", "TrainState", "gradients", "init_state", "train_step"]


@pytree_dataclass
class TrainState:
    """All that a step changes.

    Attributes:
      params: float32 parameters that are trained; None where one is not.
      optimizer: State of the optimizer.
      step: int32 steps done, those that were skipped included.
      skipped: int32 steps in a row, up to this one, whose gradients were not finite and
        that changed nothing.
    """

    params: Any
    optimizer: Any
    step: Array
    skipped: Array


@pytree_dataclass
class Frozen:
    """What a step reads and nobody trains.

    Attributes:
      params: The other parameters of the model; None where one is trained.
      objective: What the objective asked for, such as a teacher's parameters.
    """

    params: Any
    objective: Any


def init_state(params: Any, optimizer: optax.GradientTransformation) -> TrainState:
    """Returns the state before the first step."""
    return TrainState(params, optimizer.init(params), jnp.int32(0), jnp.int32(0))


def gradients(
    params: Any,
    batch: Any,
    key: Array,
    frozen: Frozen,
    *,
    model: Model,
    objective: Objective,
    parts: int = 1,
) -> tuple[Any, dict[str, Array]]:
    """Returns the gradients of a batch, computed part by part.

    They are those of the whole batch whatever the parts hold: every part's loss is
    divided by the weights of the batch, not by its own.

    Args:
      params: What is trained.
      batch: Every leaf has B rows on its first axis.
      key: Of the step.
      frozen: The rest.
      model: What is trained.
      objective: What is minimised.
      parts: How many forwards the rows are spread over; divides B.

    Returns:
      float32 gradients like `params`, and metrics, `loss` among them.
    """
    weights = objective.weights(batch)
    # A batch without anything to learn from gives zeros, not NaN.
    weights = {n: jnp.where(w > 0, w, 1.0) for n, w in weights.items()}

    def loss(params: Any, part: Any, key: Array) -> tuple[Array, dict[str, Array]]:
        whole = join(params, frozen.params)
        value, metrics = objective.loss(
            model, whole, part, weights, key, frozen.objective
        )
        return value, {"loss": value, **metrics}

    grad = jax.grad(loss, has_aux=True)
    if parts == 1:
        return grad(params, batch, key)

    def cut(x: Array) -> Array:
        # Row r goes to part r % parts, so that no row changes its device.
        return x.reshape(x.shape[0] // parts, parts, *x.shape[1:]).swapaxes(0, 1)

    def body(total: Any, part: Any) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, grad(params, *part)), None

    cuts = (jax.tree.map(cut, batch), jax.random.split(key, parts))
    shapes = jax.eval_shape(grad, params, *jax.tree.map(lambda x: x[0], cuts))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    total, _ = jax.lax.scan(body, zeros, cuts)
    return total


@functools.partial(
    jax.jit,
    static_argnames=("model", "objective", "optimizer", "parts"),
    donate_argnames=("state",),
)
def train_step(
    state: TrainState,
    batch: Any,
    key: Array,
    frozen: Frozen,
    *,
    model: Model,
    objective: Objective,
    optimizer: optax.GradientTransformation,
    parts: int = 1,
) -> tuple[TrainState, dict[str, Array]]:
    """Does one optimizer step.

    Args:
      state: Donated: never use it again.
      batch: Rows to learn from.
      key: Of the run; the step's own is folded from it and the step's number.
      frozen: What is not trained.
      model: What is trained.
      objective: What is minimised.
      optimizer: One object for the whole run, or every step compiles.
      parts: As for `gradients`.

    Returns:
      The new state; and float32 metrics: those of the objective, `loss`, `grad_norm`
      and `skipped`. Where loss or gradients are not finite, parameters and optimizer
      stay as they were.
    """
    grads, metrics = gradients(
        state.params,
        batch,
        jax.random.fold_in(key, state.step),
        frozen,
        model=model,
        objective=objective,
        parts=parts,
    )
    norm = optax.tree.norm(grads)
    finite = jnp.isfinite(norm) & jnp.isfinite(metrics["loss"])
    updates, optimizer_state = optimizer.update(grads, state.optimizer, state.params)
    params = optax.apply_updates(state.params, updates)

    def keep(new: Array, old: Array) -> Array:
        return jnp.where(finite, new, old)

    skipped = jnp.where(finite, 0, state.skipped + 1).astype(jnp.int32)
    new = TrainState(
        params=jax.tree.map(keep, params, state.params),
        optimizer=jax.tree.map(keep, optimizer_state, state.optimizer),
        step=state.step + 1,
        skipped=skipped,
    )
    return new, {**metrics, "grad_norm": norm, "skipped": skipped.astype(jnp.float32)}
