"""Running known tokens through a model until its cache holds them.

Letters: B rows, S slots, C chunk, D width.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import Array

from jaxllm.attention.cache import Cache
from jaxllm.attention.masks import CAUSAL
from jaxllm.models.freeze import Context, Model

__all__ = ["after", "feed", "feed_chunk"]

C = TypeVar("C", bound=Cache)
Keep = Callable[[Any, Array, Array, dict[str, Array]], Any]


def feed_chunk(
    model: Model,
    params: Any,
    tokens_BS: Array,
    cache: C,
    upto_B: Array,
    *,
    chunk: int,
    rope_length: int,
    stop: int | None = None,
    empty: bool = False,
    collect: tuple[str, ...] = (),
) -> tuple[C, Array, dict[str, Array]]:
    """Runs the next C tokens of every row, from where its cache ends.

    Args:
      model: The model.
      params: Its parameters.
      tokens_BS: int32 tokens of the rows.
      cache: What the model has seen of them.
      upto_B: int32, tokens that the cache shall hold at most.
      chunk: C.
      rope_length: As in `Context`.
      stop: Runs the layers before this one only.
      empty: Whether the cache is known to hold nothing, so that nobody looks.
      collect: As in `Context`.

    Returns:
      The grown cache, the residual stream `[B, C, D]` after the last layer run, and
      what was collected.
    """
    slot_BC = cache.length_B[:, None] + jnp.arange(chunk, dtype=jnp.int32)
    last = tokens_BS.shape[1] - 1
    tokens_BC = jnp.take_along_axis(tokens_BS, jnp.minimum(slot_BC, last), axis=1)
    context = Context(
        positions_BT=slot_BC,
        valid_BT=slot_BC < upto_B[:, None],
        mask=CAUSAL,
        cache=None if empty else cache,
        collect=collect,
        rope_length=rope_length,
    )
    x_BCD = model.embed(params, tokens_BC, context.positions_BT)
    x_BCD, new_kv, aux = model.run_layers(params, x_BCD, context, 0, stop)
    count_B = after(x_BCD, jnp.clip(upto_B - cache.length_B, 0, chunk))
    grown: Any = cache.append(new_kv, count_B=count_B)
    return grown, x_BCD, aux


def after(x: Array, count_B: Array) -> Array:
    """Returns the count, known only once `x` is.

    A cache is written in place where every layer has read it before. XLA sees that if
    what is written depends on the last layer, as behind a verifier; else it copies the
    whole cache first.
    """
    one = x.reshape(-1)[0]
    # True of no number at all, NaN included, which the compiler does not find out.
    never = (one > 1) & (one < 0)
    return jnp.where(never, 0, count_B)


def feed(
    model: Model,
    params: Any,
    tokens_BS: Array,
    cache: C,
    upto_B: Array,
    *,
    chunk: int,
    rope_length: int,
    stop: int | None = None,
    empty: bool = False,
    collect: tuple[str, ...] = (),
    keep: Keep = lambda kept, start_B, x_BCD, aux: kept,
    kept: Any = (),
) -> tuple[C, Any]:
    """Runs tokens in chunks of one compiled shape until every cache holds `upto_B`.

    Args:
      model: As for `feed_chunk`, like what is not named here.
      params: See there.
      tokens_BS: See there.
      cache: See there.
      upto_B: See there.
      chunk: See there.
      rope_length: See there.
      stop: See there.
      empty: Whether the cache holds nothing: the first chunk then sees only itself.
      collect: See there.
      keep: Takes `kept`, the slots `[B]` where a chunk starts, its residual stream and
        what it collected; returns the new `kept`.
      kept: What `keep` starts from.

    Returns:
      The grown cache, and what was kept.
    """

    def body(carry: tuple[C, Any], empty: bool = False) -> tuple[C, Any]:
        cache, kept = carry
        start_B = cache.length_B
        cache, x_BCD, aux = feed_chunk(
            model,
            params,
            tokens_BS,
            cache,
            upto_B,
            chunk=chunk,
            rope_length=rope_length,
            stop=stop,
            empty=empty,
            collect=collect,
        )
        return cache, keep(kept, start_B, x_BCD, aux)

    def more(carry: tuple[C, Any]) -> Array:
        return jnp.any(carry[0].length_B < upto_B)

    carry = (cache, kept)
    if empty:
        carry = body(carry, empty=True)
        if tokens_BS.shape[1] <= chunk:
            return carry
    return jax.lax.while_loop(more, body, carry)
