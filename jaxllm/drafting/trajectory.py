"""Jacobi trajectories: what consistency training learns from.

Letters: B rows, S slots, C blocks, J iterates (T + 1), T tokens of a block, V
vocabulary, E end tokens.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxllm.attention.cache import Cache
from jaxllm.attention.masks import CAUSAL
from jaxllm.core.errors import ConfigError
from jaxllm.core.pytree import pytree_dataclass
from jaxllm.decoding.buckets import shapes_for
from jaxllm.decoding.decode import check_ids
from jaxllm.decoding.feed import Feeder
from jaxllm.decoding.protocol import Committed
from jaxllm.decoding.sampling import best
from jaxllm.drafting.jacobi import context_fillers
from jaxllm.models.freeze import Context, Model, NewKV

__all__ = ["TrajectorySet", "collect_trajectories"]


@pytree_dataclass
class TrajectorySet:
    """Every iterate of every block of some prompts.

    Attributes:
      tokens_BS: int32 prompts and outputs, left aligned.
      length_B: int32 length of prompt and output; the last block whole.
      start_BC: int32 length of each block's prefix, `tokens_BS[:, :start]`.
      iterates_BCJT: int32; iterate 0 is random, each one the model's choices after the
        one before, from `iterations_BC` on all are the fixed point.
      iterations_BC: int32, how many iterates change before the fixed point; 0 to T.
      valid_BC: Which blocks were run; a row stops behind the block of an end token.
    """

    tokens_BS: Array
    length_B: Array
    start_BC: Array
    iterates_BCJT: Array
    iterations_BC: Array
    valid_BC: Array

    @property
    def fixed_BCT(self) -> Array:
        """The fixed points: what plain greedy decoding writes."""
        return self.iterates_BCJT[:, :, -1]

    def repetitive_BC(self, run: int = 10) -> Array:
        """Returns which blocks hold so many equal tokens in a row; leave these out."""
        same = self.fixed_BCT[..., 1:] == self.fixed_BCT[..., :-1]
        streak = jnp.zeros(same.shape[:2], jnp.int32)
        longest = streak + 1
        for i in range(same.shape[-1]):
            streak = jnp.where(same[..., i], streak + 1, 0)
            longest = jnp.maximum(longest, streak + 1)
        return longest >= run

    def progress(self) -> dict[str, float]:
        """Returns how fast the iterates converge, as means over the blocks.

        Returns:
          `iterations` a block, the confirming one not counted; `fast_forward`, tokens
          by which the right beginning grows in an iteration; `stationary`, tokens of
          an iterate that are right behind its first wrong one.

        Source: CLLMs (arXiv 2403.00835), section 5.3.
        """
        data = jax.device_get((self.iterates_BCJT, self.iterations_BC, self.valid_BC))
        iterates, iterations, valid = data
        length = iterates.shape[-1]
        equal = iterates == iterates[:, :, -1:]
        right = np.cumprod(equal, axis=-1).sum(axis=-1)
        stationary = equal.sum(axis=-1) - right
        index_J = np.arange(length + 1)
        moving = (index_J < iterations[..., None]) & valid[..., None]
        steps = max(1, int(moving.sum()))
        gained = np.diff(right, axis=-1)[moving[..., :-1]].sum()
        return {
            "iterations": float(iterations[valid].mean()) if valid.any() else 0.0,
            "fast_forward": float(gained / steps),
            "stationary": float(stationary[moving].sum() / steps),
        }


def collect_trajectories(
    model: Model,
    params: Any,
    prompts: Sequence[Sequence[int]],
    *,
    n: int,
    max_new: int,
    key: Array,
    eos: Sequence[int] = (),
) -> TrajectorySet:
    """Runs greedy Jacobi iteration block after block and keeps every iterate.

    Args:
      model: The model.
      params: Its parameters.
      prompts: Ragged token ids, at least one each.
      n: T, tokens of a block.
      max_new: New tokens of a row, rounded up to whole blocks.
      key: Draws the first iterates, from tokens of the row; row i uses its own key.
      eos: Ids that end a row, behind the block that holds one.

    Returns:
      The trajectories of `ceil(max_new / n)` blocks.

    Raises:
      UserError: A prompt is empty or holds an id that the model lacks, or `n` or
        `max_new` is below 1.

    Source: CLLMs (arXiv 2403.00835), section 3.2.

    Differs from the paper: batched, with a cache, in one compiled call.
    """
    if n < 1 or max_new < 1:
        raise ConfigError(
            f"cannot collect trajectories: n is {n} and max_new {max_new}, expected "
            f"1 or more. Correct them."
        )
    for row, prompt in enumerate(prompts):
        if not len(prompt):
            raise ConfigError(
                f"cannot collect trajectories: prompt {row} is empty, expected at "
                f"least one token. Leave it out."
            )
        check_ids(prompt, model.config.vocabulary, row)
    blocks = -(-max_new // n)
    shapes = shapes_for([len(p) for p in prompts], blocks * n, n)
    tokens_BS = np.zeros((len(prompts), shapes.capacity), np.int32)
    for row, prompt in enumerate(prompts):
        tokens_BS[row, : len(prompt)] = prompt
    keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(len(prompts)))
    committed = Committed(
        jnp.asarray(tokens_BS),
        jnp.asarray([len(p) for p in prompts], jnp.int32),
        keys,
    )
    eos_E = jnp.asarray(tuple(eos) or (-1,), jnp.int32)
    return _collect(
        params,
        committed,
        eos_E,
        model=model,
        length=n,
        blocks=blocks,
        chunk=shapes.chunk,
    )


@functools.partial(jax.jit, static_argnames=("model", "length", "blocks", "chunk"))
def _collect(
    params: Any,
    committed: Committed,
    eos_E: Array,
    *,
    model: Model,
    length: int,
    blocks: int,
    chunk: int,
) -> TrajectorySet:
    rows, slots = committed.tokens_BS.shape
    empty: Any = model.init_cache(params, rows, slots)
    feeder = Feeder(model=model, chunk=chunk, rope_length=slots)
    cache, _ = feeder.run(
        params, committed.tokens_BS, empty, committed.length_B - 1, empty=True
    )

    def block(carry: Any, _: Any) -> Any:
        committed, cache, done_B = carry
        iterates, iterations_B, new_kv = _iterate(
            model, params, committed, cache, length
        )
        fixed_BT = iterates[:, -1]
        count_B = jnp.where(done_B, 0, length)
        grown = committed.extend(fixed_BT, count_B)
        cache = cache.append(new_kv, count_B=count_B)
        kept = (committed.length_B, iterates, iterations_B, ~done_B)
        done_B |= (fixed_BT[..., None] == eos_E).any(axis=(1, 2))
        return (grown, cache, done_B), kept

    carry = (committed, cache, jnp.zeros((rows,), bool))
    (committed, _, _), kept = jax.lax.scan(block, carry, length=blocks)
    start, iterates, iterations, valid = (jnp.swapaxes(x, 0, 1) for x in kept)
    return TrajectorySet(
        committed.tokens_BS, committed.length_B, start, iterates, iterations, valid
    )


def _iterate(
    model: Model, params: Any, committed: Committed, cache: Cache, length: int
) -> tuple[Array, Array, NewKV]:
    """Runs one block to its fixed point.

    Returns:
      The iterates `[B, J, T]`, how many of them change, and the keys and values of the
      pending token and all tokens of the block but the last.
    """
    index_T = jnp.arange(length, dtype=jnp.int32)
    position_BT = committed.length_B[:, None] + index_T
    rows, slots = committed.tokens_BS.shape

    def step(y_BT: Array) -> tuple[Array, NewKV]:
        tokens_BT = jnp.concatenate(
            [committed.pending_B[:, None], y_BT[:, :-1]], axis=1
        )
        context = Context(position_BT - 1, None, CAUSAL, cache, rope_length=slots)
        forward = model(params, tokens_BT, context)
        return best(forward.logits_BTV), forward.new_kv

    y_BT = context_fillers(committed, position_BT)
    iterates = jnp.broadcast_to(y_BT[:, None], (rows, length + 1, length))
    kv_shapes = jax.eval_shape(step, y_BT)[1]
    new_kv = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), kv_shapes)

    def more(carry: Any) -> Array:
        index, moving_B, *_ = carry
        return moving_B.any() & (index < length)

    def body(carry: Any) -> Any:
        index, _, iterations_B, iterates, y_BT, _ = carry
        chosen_BT, new_kv = step(y_BT)
        moving_B = (chosen_BT != y_BT).any(axis=1)
        # Every later iterate too: a row that stands still keeps its fixed point.
        later_J = (jnp.arange(length + 1) > index)[:, None]
        iterates = jnp.where(later_J, chosen_BT[:, None], iterates)
        return index + 1, moving_B, iterations_B + moving_B, iterates, chosen_BT, new_kv

    zero_B = jnp.zeros((rows,), jnp.int32)
    carry = (jnp.int32(0), zero_B == 0, zero_B, iterates, y_BT, new_kv)
    # After T steps the first T - 1 tokens of the input were right, so the last
    # forward's keys and values are those of the fixed point either way.
    _, _, iterations_B, iterates, _, new_kv = jax.lax.while_loop(more, body, carry)
    return iterates, iterations_B, new_kv
