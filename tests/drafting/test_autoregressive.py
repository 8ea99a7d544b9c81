"""Plain decoding: one valid node, padded to any width."""

import jax.numpy as jnp
import pytest

from jaxllm.core.registry import build
from jaxllm.core.rng import row_keys
from jaxllm.decoding.protocol import Committed, Drafter
from jaxllm.drafting import METHODS, Autoregressive


@pytest.mark.parametrize("width", [1, 3])
def test_proposes_the_pending_token_alone(width) -> None:
    committed = Committed(
        jnp.asarray([[4, 5, 6, 9], [7, 9, 9, 9]]),
        jnp.asarray([3, 1]),
        row_keys(jnp.arange(2)),
    )
    drafter = Autoregressive(query_width=width)
    _, draft = drafter.propose({}, (), committed)
    assert draft.tokens_BM.shape == (2, width) == (2, drafter.nodes)
    assert draft.tokens_BM[:, 0].tolist() == [6, 7]
    assert draft.valid_BM.sum(axis=1).tolist() == [1, 1]
    assert draft.depth_BM.max() == width - 1
    assert drafter.depth == 0


def test_is_registered_under_its_name() -> None:
    built = build("autoregressive:query_width=4", METHODS, {Drafter: METHODS})
    assert built == Autoregressive(query_width=4)
    assert hash(built) == hash(Autoregressive(query_width=4))
