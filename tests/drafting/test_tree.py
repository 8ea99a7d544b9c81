"""A drafting model's tree: what it has to equal."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxllm
from jaxllm.core.errors import ConfigError
from jaxllm.core.rng import row_keys
from jaxllm.decoding import make_sampler
from jaxllm.decoding.protocol import Committed
from tests.drafting.toy_methods import ids, run, steps, toy_lm

EARLY = "model=target,layers=1"
WHOLE = "model=target,layers=2"


@pytest.mark.parametrize(
    "shape", [pytest.param("dynamic", marks=pytest.mark.slow), "static"]
)
def test_one_candidate_a_node_is_a_chain(shape) -> None:
    chain = run(f"model:{EARLY},length=3", temperature=1.0)
    options = "width=1" if shape == "dynamic" else "shape=static,accuracy=0.5"
    tree = run(f"tree:{EARLY},depth=3,nodes=4,{options}", temperature=1.0)
    assert ids(chain) == ids(tree)
    assert steps(chain) == steps(tree)


@pytest.mark.parametrize(
    "options",
    [
        pytest.param("width=2,frontier=4,nodes=15", marks=pytest.mark.slow),
        "shape=static,nodes=8",
    ],
)
def test_the_target_as_its_own_draft_is_always_right(options) -> None:
    # Where the tree has room for the best child of every node.
    method = f"tree:{WHOLE},depth=3,{options}"
    for temperature in (0.0, 1.0):
        assert_always_right(run(method, temperature=temperature))


def assert_always_right(results) -> None:
    for result in results:
        assert result.stats["target_passes"] == 24 // 4


@pytest.mark.slow
def test_node_logits_are_those_of_the_node_s_own_text() -> None:
    # Every node of the tree has to be what the model would say after its own path.
    lm = toy_lm()
    bound = jaxllm.bind(lm, f"tree:{WHOLE},depth=3,nodes=12,width=3,frontier=4")
    text = [3, 1, 4, 1, 5]
    tokens_BS = jnp.zeros((1, 32), jnp.int32).at[0, : len(text)].set(jnp.asarray(text))
    committed = Committed(
        tokens_BS, jnp.asarray([len(text)]), row_keys([0]), make_sampler(1)
    )
    params = bound.arguments()
    state = bound.drafter.net.init(params, committed)
    _, draft = bound.drafter.propose(params, state, committed)
    token, parent = np.asarray(draft.tokens_BM[0]), np.asarray(draft.parents_BM[0])
    assert np.asarray(draft.valid_BM).all()

    def path(i):
        return [] if i == 0 else [*path(parent[i]), int(token[i])]

    for i in range(1, len(token)):
        before = text + path(parent[i])
        logits = jaxllm.logits(lm, [before])[0][-1]
        rank = int((logits > logits[token[i]]).sum())
        assert rank < 3, (i, path(i), rank)
        siblings = [token[j] for j in range(1, len(token)) if parent[j] == parent[i]]
        assert len(set(siblings)) == len(siblings)
        # Better candidates of the same parent are in the tree too.
        better = [int(x) for x in jax.lax.top_k(jnp.asarray(logits), rank)[1]]
        assert set(better) <= set(siblings)


def test_refusals() -> None:
    with pytest.raises(ConfigError, match=r"tree\.nodes is 1, expected 2 or more"):
        jaxllm.bind(toy_lm(), "tree:nodes=1")
