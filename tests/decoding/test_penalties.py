"""Penalties: by hand, and drafted as decoded one by one."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.core.errors import ConfigError
from jaxllm.decoding import Committed, Draft, make_sampler
from jaxllm.decoding.penalties import penalize
from jaxllm.drafting import Autoregressive
from tests.decoding.byte_vocabulary import LENGTHS, run, tokens_of
from tests.decoding.test_constraints import drafts_of
from tests.decoding.toys import Replay

PENALTIES = {"repetition_penalty": 1.4, "presence_penalty": 0.7}


def committed_of(rows, prompts=None, slots=9):
    tokens_BS = np.full((len(rows), slots), 5)  # what stands behind the text is garbage
    for row, tokens in enumerate(rows):
        tokens_BS[row, : len(tokens)] = tokens
    return Committed(
        jnp.asarray(tokens_BS),
        jnp.asarray([len(tokens) for tokens in rows]),
        jnp.zeros((len(rows),)),
        prompt_B=None if prompts is None else jnp.asarray(prompts),
    )


def logits_of(rows, nodes, V=8):
    rng = np.random.default_rng(rows + nodes)
    return rng.normal(size=(rows, nodes, V)).astype(np.float32)


def chain_of(tokens_BM, valid_BM=None):
    tokens_BM = jnp.asarray(tokens_BM)
    valid = jnp.ones_like(tokens_BM, bool) if valid_BM is None else valid_BM
    return Draft(tokens_BM, jnp.asarray(valid))


def test_by_hand() -> None:
    # As in transformers, a negative logit is multiplied, and the prompt counts.
    logits = jnp.asarray([[[2.0, -2.0, 1.0, -1.0, 0.5, 0.0]]])
    sampler = make_sampler(1, repetition_penalty=2.0, presence_penalty=0.25)
    # Tokens 0 and 1 are the prompt, 2 and 3 the output, 4 and 5 are new.
    committed = committed_of([[0, 1, 2, 3]], [2], slots=4)
    found = penalize(logits, chain_of([[3]]), committed, sampler)
    expected = [[[1.0, -4.0, 0.5 - 0.25, -2.0 - 0.25, 0.5, 0.0]]]
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parity
def test_repetition_equals_transformers() -> None:
    torch = pytest.importorskip("torch", reason="compares with torch")
    from transformers import RepetitionPenaltyLogitsProcessor

    rows = [[1, 2, 3, 3], [7, 0]]
    logits = logits_of(2, 1)
    sampler = make_sampler(2, repetition_penalty=1.7)
    found = penalize(
        jnp.asarray(logits), chain_of([[3], [0]]), committed_of(rows), sampler
    )
    process = RepetitionPenaltyLogitsProcessor(1.7)
    for row, tokens in enumerate(rows):
        expected = process(torch.tensor([tokens]), torch.tensor(logits[row]))
        np.testing.assert_allclose(found[row], expected, rtol=1e-6)


def test_a_node_is_penalized_for_its_own_path_alone() -> None:
    logits = jnp.asarray(logits_of(2, 4))
    sampler = make_sampler(2, **PENALTIES)
    rows, prompts = [[1, 2], [6, 1, 4]], [1, 2]
    tokens = np.asarray([[2, 3, 0, 3], [4, 7, 7, 2]])
    valid = np.asarray([[True] * 4, [True, True, False, False]])
    found = penalize(
        logits, chain_of(tokens, valid), committed_of(rows, prompts), sampler
    )
    for row in range(2):
        for node in range(4):
            if not valid[row, node]:
                continue
            text = [*rows[row], *tokens[row, 1 : node + 1].tolist()]
            one = make_sampler(1, **PENALTIES)
            alone = penalize(
                logits[row : row + 1, node : node + 1],
                chain_of([[text[-1]]]),
                committed_of([text], [prompts[row]]),
                one,
            )
            np.testing.assert_array_equal(found[row, node], alone[0, 0])


def test_rows_have_their_own_penalties() -> None:
    logits = jnp.asarray(logits_of(3, 1))
    sampler = make_sampler(
        3, repetition_penalty=[1.0, 3.0, 1.0], presence_penalty=[0.0, 0.0, 2.0]
    )
    committed = committed_of([[1, 2]] * 3, [1] * 3)
    found = np.asarray(penalize(logits, chain_of([[2]] * 3), committed, sampler))
    changed = found != np.asarray(logits)
    assert [np.flatnonzero(row).tolist() for row in changed[:, 0]] == [[], [1, 2], [2]]


def test_drafted_equals_plain() -> None:
    # Below 1 and below 0 what was just drafted is the likeliest to come again.
    options = {
        "repetition_penalty": [0.6, 2.0],
        "presence_penalty": [-3.0, 5.0],
        "temperature": [1.5, 0.0],
    }
    free = tokens_of(run(None))
    drafts = drafts_of(tokens_of(run(None, **options)), free)
    width = Autoregressive(query_width=4)
    plain = run(None, drafter=width, copies=4, **options)
    outputs = run(None, drafter=Replay(drafts, LENGTHS * 4), copies=4, **options)
    assert tokens_of(outputs) == tokens_of(plain)
    assert tokens_of(plain)[:2] != free
    accepted = [sum(output.stats["accepted"][1:]) for output in outputs]
    right, halves, _, wrong = (sum(accepted[i : i + 2]) for i in range(0, 8, 2))
    assert right > halves > wrong == 0


def test_strong_penalties_never_repeat() -> None:
    for output in run(None, eos=(), presence_penalty=100.0):
        assert len(set(output.token_ids)) == len(output.token_ids) == 24


@pytest.mark.parametrize("name", sorted(PENALTIES))
def test_trees_are_refused(name) -> None:
    drafter = Replay(((1,), (2,)), LENGTHS, tree=True)
    with pytest.raises(ConfigError) as caught:
        run(None, drafter=drafter, **{name: PENALTIES[name]})
    # Replay is a class of both kinds; what counts is what it drafts.
    assert str(caught.value) == (
        "cannot penalize: Replay drafts trees, expected a chain: every node would need "
        "the counts of its own path. Choose a drafter of chains, or leave the "
        "penalties out."
    )
