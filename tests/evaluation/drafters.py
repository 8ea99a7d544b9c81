"""Drafters that are wrong, or learn, in known ways; and a model with a known tie."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

import jaxllm
from jaxllm.attention import RopeConfig
from jaxllm.core.dtypes import DTypePolicy
from jaxllm.decoding import Drafter
from jaxllm.drafting import Autoregressive
from jaxllm.layers import AttentionConfig, MlpConfig
from jaxllm.models import DecoderConfig, Model, make_model
from tests.decoding.toys import Replay

VOCABULARY = 61


@functools.cache
def tiny_lm(dtype="float32"):
    """A random model of one layer, which compiles soon, without a tokenizer."""
    config = DecoderConfig(
        vocabulary=VOCABULARY,
        width=16,
        num_layers=1,
        max_positions=256,
        attention=AttentionConfig(num_heads=2, num_kv_heads=1, head_dim=8),
        mlp=MlpConfig(hidden=24),
        ropes=(RopeConfig(rotary_dim=8),),
    )
    model, params = make_model(config, jax.random.key(3), policy=DTypePolicy.of(dtype))
    # Scaled up, so that choices differ between positions.
    params = jax.tree.map(lambda x: x * 8 if x.ndim > 1 else x, params)
    return jaxllm.LanguageModel(model=model, params=params, name="tiny")


def tied_lm(token, other, *, apart=0.0, dtype="float32"):
    """The tiny model, with logits of `other` that are `1 - apart` times `token`'s."""
    lm = tiny_lm(dtype)
    kernel = lm.params["head"]["kernel"]
    column = (kernel[:, token] * (1 - apart)).astype(kernel.dtype)
    head = {"kernel": kernel.at[:, other].set(column)}
    return dataclasses.replace(lm, params={**lm.params, "head": head})


SECOND_BEST = -1
EVERYWHERE = -1


@dataclasses.dataclass(frozen=True)
class Bent(Drafter):
    """Plain decoding through a forward of its own that favours a token.

    What bends it are parameters, so that all of them are one compiled program.

    Attributes:
      position: Absolute position of the choice that is bent, or all of them.
      token: Which token is favoured.
      push: Added to its logit.
    """

    position: int = dataclasses.field(default=EVERYWHERE, compare=False)
    token: int = dataclasses.field(default=SECOND_BEST, compare=False)
    push: float = dataclasses.field(default=1e4, compare=False)
    model: Model | None = None
    nodes = 1
    depth = 0

    def bind(self, lm):
        params = {"position": jnp.int32(self.position), "token": jnp.int32(self.token)}
        params["push"] = jnp.float32(self.push)
        return dataclasses.replace(self, model=lm.model), params

    def propose(self, params, state, committed):
        return Autoregressive().propose(params, state, committed)

    def forward(self, params, state, draft, context):
        forward = self.model(params["target"], draft.tokens_BM, context)
        logits, own = forward.logits_BTV, params["drafter"]
        _, best = jax.lax.top_k(logits, 2)
        token = jnp.where(own["token"] == SECOND_BEST, best[..., 1], own["token"])
        here = context.positions_BT == own["position"] - 1
        here = here | (own["position"] == EVERYWHERE)
        push = jax.nn.one_hot(token, logits.shape[-1]) * own["push"]
        logits = logits + jnp.where(here[..., None], push, 0.0)
        return dataclasses.replace(forward, logits_BTV=logits)


SEEN: list[int] = []
"""What every batch of a `Learner` began with."""


@dataclasses.dataclass(frozen=True)
class Learner(Replay):
    """Proposes wrong tokens until it has decoded a batch, and right ones from then."""

    def bind(self, lm):
        return self, {"memory": jnp.int32(0)}

    def init(self, params, committed, prefill):
        return params["drafter"]["memory"]

    def propose(self, params, state, committed):
        state, draft = super().propose(params, state, committed)
        right_BM = draft.tokens_BM
        wrong_BM = (right_BM + 1) % VOCABULARY
        root = jnp.arange(right_BM.shape[1]) == 0
        tokens_BM = jnp.where(root | (state > 0), right_BM, wrong_BM)
        return state, dataclasses.replace(draft, tokens_BM=tokens_BM)

    def learned(self, params: Any, state: Any) -> Any:
        SEEN.append(int(params["memory"]))
        return {"memory": params["memory"] + 1}


@dataclasses.dataclass(frozen=True)
class Counting(Replay):
    """Says of every step that an inner model ran twice, on five tokens."""

    def init(self, params, committed, prefill):
        return jnp.zeros((committed.length_B.shape[0], 2), jnp.int32)

    def observe(self, params, state, committed, draft, verdict, forward):
        return state + jnp.asarray([2, 5], jnp.int32)

    def counts(self, state):
        return {"inner": state}
