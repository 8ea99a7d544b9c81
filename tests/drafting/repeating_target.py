"""A target that repeats a cycle for ever, so that what a drafter gains is known."""

import dataclasses

import jax
import jax.numpy as jnp

from tests.decoding.toys import VOCABULARY, toy_model


def repeats(drafter, cycle: tuple[int, ...]):
    """Returns a drafter whose target says token t of the cycle at position t."""

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Repeats(type(drafter)):
        def forward(self, params, state, draft, context):
            model, _ = toy_model()
            out = model(params["target"], draft.tokens_BM, context)
            at_BM = (context.positions_BT + 1) % len(cycle)
            logits_BMV = jax.nn.one_hot(jnp.asarray(cycle)[at_BM], VOCABULARY) * 9
            return dataclasses.replace(out, logits_BTV=logits_BMV)

    fields = {f.name: getattr(drafter, f.name) for f in dataclasses.fields(drafter)}
    return Repeats(**fields)
