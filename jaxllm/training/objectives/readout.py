"""From a residual stream to sums of losses, without all logits at a time.

The logits of a batch are its largest array: `[B, T, V]` float32, several times over in
the backward pass. Here they exist for a stretch of every row only, and are computed
once more for its gradient.

Letters: B rows, T tokens, C tokens of a stretch, D width, V vocabulary.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jaxllm.core.errors import ConfigError
from jaxllm.models import Context, Model
from jaxllm.training.batch import Batch

__all__ = [
    "at_labels",
    "check_chunk",
    "next_tokens",
    "residual_stream",
    "stretch",
    "sum_over_time",
]

# Logits of one row that may exist at a time: 16 MiB.
_ROW_LOGITS = 2**22


def residual_stream(
    model: Model, params: Any, tokens_BT: Array, context: Context
) -> Array:
    """Returns the residual stream `[B, T, D]` after the last layer."""
    x_BTD = model.embed(params, tokens_BT, context.positions_BT)
    return model.run_layers(params, x_BTD, context)[0]


def next_tokens(batch: Batch) -> tuple[Array, Array]:
    """Returns what the logits of every slot are to predict, and what that counts.

    Returns:
      int32 and float32 `[B, T]`; nothing follows the last slot, so it counts 0.
    """
    # A row's first token stands behind nothing, whatever its weight says.
    weight_BT = batch.weight_BT.at[:, 0].set(0.0)
    return (
        jnp.roll(batch.tokens_BT, -1, axis=1),
        jnp.roll(weight_BT, -1, axis=1).astype(jnp.float32),
    )


def at_labels(x_BTV: Array, label_BT: Array) -> Array:
    """Returns every slot's value at its label, `[B, T]`.

    A sum over a mask, not a gather: its gradient is no scatter, and the vocabulary may
    be sharded.
    """
    mask_BTV = jnp.arange(x_BTV.shape[-1]) == label_BT[..., None]
    return jnp.where(mask_BTV, x_BTV, 0.0).sum(axis=-1)


def check_chunk(chunk: int | None, name: str) -> None:
    """Raises `ConfigError` when a stretch has no tokens."""
    if chunk is not None and chunk < 1:
        raise ConfigError(
            f"cannot train: {name}.chunk is {chunk}, expected 1 or more. Correct it, "
            f"or leave it out."
        )


def stretch(chunk: int | None, vocabulary: int) -> int:
    """Returns C: the one asked for, or the power of two whose logits take 16 MiB."""
    if chunk is not None:
        return chunk
    return 1 << (max(1, _ROW_LOGITS // vocabulary).bit_length() - 1)


def sum_over_time(
    terms: Callable[[Any, Array], Any], streams: Any, chunk: int, key: Array
) -> Any:
    """Sums a function of stretches of time, whose inner arrays are not kept.

    Args:
      terms: Takes the streams of a stretch and a key of its own; returns a tree of
        arrays that are sums over the stretch, and 0 of a slot whose streams are 0.
      streams: A tree of arrays `[B, T, ...]`.
      chunk: C. From T on there is one stretch, and nothing is computed twice.
      key: Split over the stretches.

    Returns:
      The sum of what `terms` returns.
    """
    rows, tokens = jax.tree.leaves(streams)[0].shape[:2]
    if tokens <= chunk:
        return terms(streams, key)
    count = -(-tokens // chunk)

    def cut(x: Array) -> Array:
        padding = [(0, 0), (0, count * chunk - tokens)] + [(0, 0)] * (x.ndim - 2)
        parts = jnp.pad(x, padding).reshape(rows, count, chunk, *x.shape[2:])
        return jnp.moveaxis(parts, 1, 0)

    body = jax.checkpoint(terms)
    parts = (jax.tree.map(cut, streams), jax.random.split(key, count))
    _, sums = jax.lax.scan(lambda none, part: (none, body(*part)), None, parts)
    return jax.tree.map(lambda x: x.sum(axis=0), sums)
