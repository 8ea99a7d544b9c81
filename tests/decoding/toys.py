"""A small random model and drafters with known behaviour, for tests of the engine."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from jaxllm.attention import GLOBAL_WINDOW, RopeConfig
from jaxllm.decoding import Draft, Drafter
from jaxllm.layers import AttentionConfig, MlpConfig
from jaxllm.models import DecoderConfig, make_model

VOCABULARY = 61

TEMPERATURES = [pytest.param(0.0, marks=pytest.mark.slow), 1.0]
"""Greedy decoding is another program; the sampled one takes the same ways and more."""


@functools.cache
def toy_model(vocabulary: int = VOCABULARY, positions: int = 2048, **kwargs: Any):
    """Returns a two-layer model with a sliding window, and its parameters.

    The weights are scaled up, so that choices differ between positions.
    """
    config = DecoderConfig(
        vocabulary=vocabulary,
        width=32,
        num_layers=2,
        max_positions=positions,
        attention=AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=8),
        mlp=MlpConfig(hidden=48),
        ropes=(RopeConfig(rotary_dim=8),),
        layer_window=(7, GLOBAL_WINDOW),
    )
    model, params = make_model(config, jax.random.key(3), **kwargs)
    return model, jax.tree.map(lambda x: x * 8 if x.ndim > 1 else x, params)


@dataclasses.dataclass(frozen=True)
class Replay(Drafter):
    """Proposes known continuations: a chain, or a tree with wrong siblings beside it.

    Attributes:
      answers: The tokens of each row after its prompt.
      prompts: The length of each row's prompt.
      depth: Proposals of a draft.
      tree: Whether every right node has a wrong sibling before it.
      shift: Added to the answers; 0 is always right, anything else always wrong.
    """

    answers: tuple[tuple[int, ...], ...]
    prompts: tuple[int, ...]
    depth: int = 3
    tree: bool = False
    shift: int = 0

    @property
    def nodes(self) -> int:
        return 1 + self.depth * (2 if self.tree else 1)

    def propose(self, params, state, committed):
        rows = committed.tokens_BS.shape[0]
        longest = max(map(len, self.answers))
        table = [(*a, *[0] * (longest - len(a))) for a in self.answers]
        table += [(0,) * longest] * (rows - len(table))
        lengths = [len(a) for a in self.answers] + [0] * (rows - len(self.answers))
        prompts = [*self.prompts, *[1] * (rows - len(self.prompts))]
        at = (committed.length_B - jnp.asarray(prompts))[:, None]
        at = at + jnp.arange(self.depth)
        right = jnp.take_along_axis(
            jnp.asarray(table), jnp.clip(at, 0, longest - 1), axis=1
        )
        right = (right + self.shift) % VOCABULARY
        known = (at >= 0) & (at < jnp.asarray(lengths)[:, None])
        pending = committed.pending_B[:, None]
        if not self.tree:
            tokens = jnp.concatenate([pending, right], axis=1)
            valid = jnp.concatenate([jnp.ones_like(pending, bool), known], axis=1)
            return state, Draft(tokens.astype(jnp.int32), valid)
        # Nodes 2d + 1 (wrong) and 2d + 2 (right) hang below node 2d.
        wrong = (right + 1) % VOCABULARY
        pairs = jnp.stack([wrong, right], axis=-1).reshape(rows, -1)
        tokens = jnp.concatenate([pending, pairs], axis=1)
        valid = jnp.concatenate(
            [jnp.ones_like(pending, bool), jnp.repeat(known, 2, axis=1)], axis=1
        )
        parents = [-1] + [2 * (i // 2) for i in range(2 * self.depth)]
        parents = jnp.broadcast_to(jnp.asarray(parents), tokens.shape)
        return state, Draft(tokens.astype(jnp.int32), valid, parents)
