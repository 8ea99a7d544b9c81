"""Jacobi decoding and its trajectories, against plain loops and plain Python."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.core.errors import ConfigError
from jaxllm.core.registry import build
from jaxllm.core.rng import row_keys
from jaxllm.decoding import Committed, Draft, Drafter, Verdict
from jaxllm.drafting import METHODS, Autoregressive
from jaxllm.drafting.jacobi import Jacobi, context_fillers
from jaxllm.drafting.trajectory import collect_trajectories
from tests.decoding.test_engine import prompts_of, request_of, run
from tests.decoding.toys import VOCABULARY, toy_model

NEW = 14


@dataclasses.dataclass(frozen=True, kw_only=True)
class Oracle(Jacobi):
    """Fills with the tokens that plain decoding gives, shifted when it shall err."""

    answers: tuple[tuple[int, ...], ...]
    prompts: tuple[int, ...]

    def fillers(self, committed, known_BG, kept_B):
        table = jnp.asarray(self.answers)
        at = committed.length_B - jnp.asarray(self.prompts)
        at = at[:, None] + jnp.arange(self.depth)
        return jnp.take_along_axis(table, jnp.minimum(at, table.shape[1] - 1), axis=1)


def plain_answers(prompts, new, width, **options):
    request = request_of(prompts, new, **options)
    outputs = run(request, Autoregressive(query_width=width))
    return request, tuple(tuple(o.token_ids) for o in outputs)


# The contract over the registry runs the defaults.
@pytest.mark.parametrize(
    ("mode", "fill", "temperature"),
    [("slide", "ngram", 1.0), ("block", "context", 0.0), ("block", "ngram", 1.0)],
)
def test_tokens_are_those_of_plain_decoding_of_its_width(mode, fill, temperature):
    request, answers = plain_answers(
        prompts_of(1, 9, 4), NEW, 5, temperature=temperature
    )
    outputs = run(request, Jacobi(window=5, mode=mode, fill=fill))
    assert tuple(tuple(o.token_ids) for o in outputs) == answers
    assert all(o.stats["target_passes"] <= NEW for o in outputs)


def test_window_one_is_plain_decoding() -> None:
    request, answers = plain_answers(prompts_of(3, 6), 7, 1)
    outputs = run(request, Jacobi(window=1, mode="block", fill="ngram"))
    assert tuple(tuple(o.token_ids) for o in outputs) == answers
    assert [o.stats["target_passes"] for o in outputs] == [7, 7]
    assert [o.stats["drafted"] for o in outputs] == [0, 0]


@pytest.mark.parametrize(("mode", "temperature"), [("slide", 0.0), ("block", 1.0)])
def test_right_fillers_give_a_window_a_pass(mode, temperature) -> None:
    prompts = prompts_of(3, 6)
    request, answers = plain_answers(prompts, 20, 4, temperature=temperature)
    drafter = Oracle(window=4, mode=mode, answers=answers, prompts=(3, 6))
    outputs = run(dataclasses.replace(request, max_new_tokens=[12, 16]), drafter)
    assert [tuple(o.token_ids) for o in outputs] == [answers[0][:12], answers[1][:16]]
    assert [o.stats["target_passes"] for o in outputs] == [3, 4]


def committed_of(*rows, sampler=None, slots=24):
    tokens = np.zeros((len(rows), slots), np.int32)
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = row
    lengths = jnp.asarray([len(row) for row in rows], jnp.int32)
    return Committed(jnp.asarray(tokens), lengths, row_keys(np.arange(len(rows))))


def start(drafter, committed):
    return jax.jit(drafter.init)({}, committed, None)


def propose(drafter, state, committed):
    return jax.jit(drafter.propose)({}, state, committed)


def after(committed, drafter, state, draft, chosen, accepted):
    """Lets the drafter see a step in which each row accepted so many guesses."""
    return jax.jit(_after, static_argnums=1)(
        committed, drafter, state, draft, jnp.asarray(chosen), jnp.asarray(accepted)
    )


def _after(committed, drafter, state, draft, chosen, accepted):
    path = jnp.minimum(jnp.arange(drafter.nodes), accepted[:, None])
    last = jnp.take_along_axis(chosen, accepted[:, None], axis=1)[:, 0]
    verdict = Verdict(path, accepted, last, chosen)
    grown = committed.extend(chosen, accepted + 1)
    return grown, drafter.observe({}, state, grown, draft, verdict, None)


def test_the_next_guess_is_the_iterate_behind_what_was_accepted() -> None:
    drafter = Jacobi(window=4)
    committed = committed_of([5, 6, 7], [8])
    state = start(drafter, committed)
    state, draft = propose(drafter, state, committed)
    assert draft.tokens_BM[:, 0].tolist() == [7, 8]
    chosen = [[10, 11, 12, 13], [20, 21, 22, 23]]
    grown, state = after(committed, drafter, state, draft, chosen, [0, 2])
    _, draft = propose(drafter, state, grown)
    assert draft.tokens_BM[0].tolist() == [10, 11, 12, 13]
    assert draft.tokens_BM[1, :2].tolist() == [22, 23]
    # Two fresh ones, of the row's own tokens.
    assert set(draft.tokens_BM[1, 2:].tolist()) <= {8, 20, 21, 22}
    assert draft.valid_BM.all()


def test_a_block_shrinks_and_is_followed_by_a_fresh_one() -> None:
    drafter = Jacobi(window=4, mode="block")
    committed = committed_of([5, 6, 7], [8])
    state = start(drafter, committed)
    state, draft = propose(drafter, state, committed)
    assert draft.valid_BM.all()
    chosen = [[10, 11, 12, 13], [20, 21, 22, 23]]
    committed, state = after(committed, drafter, state, draft, chosen, [0, 1])
    state, draft = propose(drafter, state, committed)
    assert draft.tokens_BM[0, :3].tolist() == [10, 11, 12]
    assert draft.tokens_BM[1, :2].tolist() == [21, 22]
    assert draft.valid_BM.sum(axis=1).tolist() == [3, 2]
    # Row 0 accepts the rest of its block; row 1 ends its block by the next token.
    chosen = [[11, 12, 30, 0], [40, 0, 0, 0]]
    committed, state = after(committed, drafter, state, draft, chosen, [2, 0])
    _, draft = propose(drafter, state, committed)
    assert draft.tokens_BM[:, 0].tolist() == [30, 40]
    assert draft.valid_BM.all()
    assert set(draft.tokens_BM[0, 1:].tolist()) <= {5, 6, 7, 10, 11, 12, 30}


def test_guesses_that_were_not_tested_stay() -> None:
    drafter = Jacobi(window=4)
    committed = committed_of([5, 6, 7])
    state = start(drafter, committed)
    state = dataclasses.replace(state, guess_BG=jnp.asarray([[1, 2, 3]]))
    state, draft = propose(drafter, state, committed)
    short = Draft(draft.tokens_BM, jnp.asarray([[True, True, False, False]]))
    chosen = [[50, 51, 0, 0]]
    grown, state = after(committed, drafter, state, short, chosen, [0])
    assert grown.pending_B.tolist() == [50]
    assert state.guess_BG[0, :2].tolist() == [51, 3]


def test_a_state_follows_rows_that_grew_elsewhere() -> None:
    drafter = Jacobi(window=4)
    committed = committed_of([5, 6, 7])
    state = start(drafter, committed)
    state = dataclasses.replace(state, guess_BG=jnp.asarray([[1, 2, 3]]))
    grown = committed.extend(jnp.asarray([[1, 2]]), jnp.asarray([2]))
    _, draft = propose(drafter, state, grown)
    assert draft.tokens_BM[0, :2].tolist() == [2, 3]


def test_ngram_fillers_repeat_what_followed_before() -> None:
    drafter = Jacobi(window=6, fill="ngram")
    committed = committed_of([1, 2, 3, 4, 1, 2, 9, 9, 1, 2, 3], [7, 7], [4, 5, 6])
    state = start(drafter, committed)
    # After 1 2 3 came 4 1 2 9 9; a match with itself is continued periodically.
    assert state.guess_BG[0].tolist() == [4, 1, 2, 9, 9]
    assert state.guess_BG[1].tolist() == [7] * 5
    assert set(state.guess_BG[2].tolist()) <= {4, 5, 6}
    # Behind guesses that stand, the match begins with them.
    known_BG, kept_B = jnp.asarray([[4, 1, 0, 0, 0]] * 3), jnp.asarray([2, 0, 0])
    fresh = jax.jit(drafter.fillers)(committed, known_BG, kept_B)
    assert fresh[0, 2:].tolist() == [2, 9, 9]


def test_fillers_depend_on_row_and_position_alone() -> None:
    together = committed_of([5, 6, 7, 8, 9], [1, 2, 3])
    at = jnp.arange(40) + jnp.asarray([[5], [3]])
    fillers = jax.jit(context_fillers)
    both = fillers(together, at)
    for row in range(2):
        alone = jax.tree.map(lambda x, row=row: x[row : row + 1], together)
        same = fillers(alone, at[row : row + 1])
        assert same[0].tolist() == both[row].tolist()
    assert set(both[0].tolist()) == {5, 6, 7, 8, 9}
    assert set(both[1].tolist()) == {1, 2, 3}
    later = fillers(together, at + 3)
    assert later[0, :-3].tolist() == both[0, 3:].tolist()


def test_options_are_checked_and_read_from_text() -> None:
    with pytest.raises(ConfigError, match=r"jacobi\.window is 0, expected 1 or more"):
        Jacobi(window=0)
    built = build("jacobi:window=8,mode=block,fill=ngram", METHODS, {Drafter: METHODS})
    assert built == Jacobi(window=8, mode="block", fill="ngram")


@functools.cache
def trajectories(n, max_new, **options):
    model, params = toy_model()
    prompts = prompts_of(1, 9, 4)
    key = jax.random.key(0)
    found = collect_trajectories(
        model, params, prompts, n=n, max_new=max_new, key=key, **options
    )
    return prompts, jax.device_get(found)


def test_trajectories_end_in_plain_decoding_at_their_width() -> None:
    n, max_new = 4, 12
    prompts, found = trajectories(n, max_new)
    _, answers = plain_answers(prompts, max_new, n)
    for row, prompt in enumerate(prompts):
        whole = found.tokens_BS[row, : found.length_B[row]].tolist()
        assert whole == prompt + list(answers[row])
        fixed = found.fixed_BCT[row]
        assert fixed.reshape(-1).tolist() == list(answers[row])
        assert found.start_BC[row].tolist() == [len(prompt) + n * c for c in range(3)]
    assert found.valid_BC.all()
    assert (found.iterations_BC <= n).all()
    assert (found.iterations_BC > 0).any()


def test_every_iterate_follows_from_the_one_before() -> None:
    model, params = toy_model()
    whole, n, width = jax.jit(model), 4, 24
    prompts, found = trajectories(n, 12)
    for row in range(len(prompts)):
        for block in range(3):
            start = int(found.start_BC[row, block])
            prefix = found.tokens_BS[row, :start].tolist()
            iterates = found.iterates_BCJT[row, block]
            assert set(iterates[0].tolist()) <= set(prefix)
            count = int(found.iterations_BC[row, block])
            for j in range(n):
                ids = prefix + iterates[j].tolist()
                padded = jnp.asarray([ids + [0] * (width - len(ids))])
                logits = whole(params, padded).logits_BTV[0, start - 1 :][:n]
                assert np.argmax(logits, axis=-1).tolist() == iterates[j + 1].tolist()
                changed = bool((iterates[j] != iterates[j + 1]).any())
                assert changed == (j < count)


def test_a_row_stops_behind_the_block_with_its_end() -> None:
    prompts, whole = trajectories(4, 12)
    end = int(whole.fixed_BCT[1, 1, 2])
    _, found = trajectories(4, 12, eos=(end,))
    for row, prompt in enumerate(prompts):
        blocks = whole.fixed_BCT[row].tolist()
        stop = next((c for c, block in enumerate(blocks) if end in block), 2)
        assert found.valid_BC[row].tolist() == [c <= stop for c in range(3)]
        assert found.length_B[row] == len(prompt) + 4 * (stop + 1)
        np.testing.assert_array_equal(
            found.fixed_BCT[row, : stop + 1], whole.fixed_BCT[row, : stop + 1]
        )


def test_progress_and_repetitions_are_counted() -> None:
    _, found = trajectories(4, 12)
    # The right beginnings of the iterates: 0, 1, 4 and 2, 4; one token right behind.
    first = [[9, 9, 9, 9], [1, 9, 3, 9], [1, 2, 3, 4], [1, 2, 3, 4], [1, 2, 3, 4]]
    second = [[5, 5, 9, 5], [5, 5, 5, 5], [5, 5, 5, 5], [5, 5, 5, 5], [5, 5, 5, 5]]
    blank = [[0] * 4] * 5
    made = dataclasses.replace(
        found,
        iterates_BCJT=np.asarray([[first, second], [second, blank]]),
        iterations_BC=np.asarray([[2, 1], [1, 0]]),
        valid_BC=np.asarray([[True, True], [False, False]]),
    )
    assert made.progress() == {
        "iterations": 1.5,
        "fast_forward": pytest.approx((1 + 3 + 2) / 3),
        "stationary": pytest.approx((0 + 1 + 1) / 3),
    }
    assert made.repetitive_BC(4).tolist() == [[False, True], [True, True]]
    assert not made.repetitive_BC(5).any()


def test_bad_trajectory_options_are_refused() -> None:
    model, params = toy_model()
    key = jax.random.key(0)
    for prompts, n, match in [
        ([[1]], 0, "n is 0 and max_new 4"),
        ([[]], 2, "prompt 0 is empty"),
        ([[VOCABULARY]], 2, f"has id {VOCABULARY}"),
    ]:
        with pytest.raises(ValueError, match=match):
            collect_trajectories(model, params, prompts, n=n, max_new=4, key=key)
