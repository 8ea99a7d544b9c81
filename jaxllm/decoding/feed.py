"""Running known tokens through a model until its cache holds them.

Letters: B rows, S slots, C chunk, D width.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import Array

from jaxllm.attention.cache import Cache
from jaxllm.attention.masks import CAUSAL
from jaxllm.models.freeze import Context, Model

__all__ = ["Feeder", "after"]

C = TypeVar("C", bound=Cache)
Keep = Callable[[Any, Array, Array, dict[str, Array]], Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Feeder:
    """Runs known tokens through a model, in chunks of one compiled shape.

    Attributes:
      model: The model.
      chunk: C.
      rope_length: As in `Context`.
      stop: Runs the layers before this one only.
      collect: As in `Context`.
    """

    model: Model
    chunk: int
    rope_length: int
    stop: int | None = None
    collect: tuple[str, ...] = ()

    def step(
        self,
        params: Any,
        tokens_BS: Array,
        cache: C,
        upto_B: Array,
        *,
        empty: bool = False,
    ) -> tuple[C, Array, dict[str, Array]]:
        """Runs the next C tokens of every row, from where its cache ends.

        Args:
          params: Of the model.
          tokens_BS: int32 tokens of the rows.
          cache: What the model has seen of them.
          upto_B: int32, tokens that the cache shall hold at most.
          empty: Whether the cache is known to hold nothing, so that nobody looks.

        Returns:
          The grown cache, the residual stream `[B, C, D]` after the last layer run, and
          what was collected.
        """
        slot_BC = cache.length_B[:, None] + jnp.arange(self.chunk, dtype=jnp.int32)
        last = tokens_BS.shape[1] - 1
        tokens_BC = jnp.take_along_axis(tokens_BS, jnp.minimum(slot_BC, last), axis=1)
        context = Context(
            positions_BT=slot_BC,
            valid_BT=slot_BC < upto_B[:, None],
            mask=CAUSAL,
            cache=None if empty else cache,
            collect=self.collect,
            rope_length=self.rope_length,
        )
        x_BCD = self.model.embed(params, tokens_BC, context.positions_BT)
        x_BCD, new_kv, aux = self.model.run_layers(params, x_BCD, context, 0, self.stop)
        count_B = after(x_BCD, jnp.clip(upto_B - cache.length_B, 0, self.chunk))
        grown: Any = cache.append(new_kv, count_B=count_B)
        return grown, x_BCD, aux

    def run(
        self,
        params: Any,
        tokens_BS: Array,
        cache: C,
        upto_B: Array,
        *,
        empty: bool = False,
        keep: Keep = lambda kept, start_B, x_BCD, aux: kept,
        kept: Any = (),
    ) -> tuple[C, Any]:
        """Runs chunk after chunk until every cache holds `upto_B`.

        Args:
          params: As for `step`, like what is not named here.
          tokens_BS: See there.
          cache: See there.
          upto_B: See there.
          empty: Whether the cache holds nothing: the first chunk then sees only itself.
          keep: Takes `kept`, the slots `[B]` where a chunk starts, its residual stream
            and what it collected; returns the new `kept`.
          kept: What `keep` starts from.

        Returns:
          The grown cache, and what was kept.
        """

        def body(carry: tuple[C, Any], empty: bool = False) -> tuple[C, Any]:
            cache, kept = carry
            start_B = cache.length_B
            cache, x_BCD, aux = self.step(params, tokens_BS, cache, upto_B, empty=empty)
            return cache, keep(kept, start_B, x_BCD, aux)

        def more(carry: tuple[C, Any]) -> Array:
            return jnp.any(carry[0].length_B < upto_B)

        carry = (cache, kept)
        if empty:
            carry = body(carry, empty=True)
            if tokens_BS.shape[1] <= self.chunk:
                return carry
        return jax.lax.while_loop(more, body, carry)


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
