"""ADED: searches and updates against plain ones, and what the table learns."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxllm
from jaxllm.core.errors import CheckpointError, ConfigError
from jaxllm.core.registry import build
from jaxllm.core.rng import position_gumbel, row_keys
from jaxllm.decoding import decode_chunks, drain, make_sampler
from jaxllm.decoding.bound import MEMORY
from jaxllm.decoding.protocol import Committed, Drafter, Verdict
from jaxllm.drafting import METHODS, Trigram
from jaxllm.drafting.ngram_counts import build_trigram
from jaxllm.drafting.ngrams import TrigramTable, empty_table, lookup_reference
from jaxllm.drafting.trigram import TrigramState, adapt, adapt_reference
from jaxllm.drafting.trigram_search import (
    Beliefs,
    best_first,
    best_first_reference,
    puct,
    puct_reference,
)
from jaxllm.models.freeze import Forward
from tests.decoding.test_engine import (
    assert_equals_reference,
    prompts_of,
    request_of,
)
from tests.decoding.toys import VOCABULARY, toy_model
from tests.drafting.repeating_target import repeats
from tests.drafting.toy_methods import ids, run, toy_lm, toy_prompts

V, H, R = 9, 23, 4
SEARCHES = {
    "best_first": (best_first, best_first_reference, {}),
    "puct": (puct, puct_reference, {"iterations": 20}),
}


def random_table(seed: int, vocabulary: int = V, slots: int = H) -> TrigramTable:
    rng = np.random.default_rng(seed)
    return build_trigram(rng.integers(0, vocabulary, 300), vocabulary, slots, R, 3)


def with_ties(table: TrigramTable) -> TrigramTable:
    """Every candidate as likely as its neighbour; all sums and products are exact."""
    return dataclasses.replace(
        table,
        next_HR=jnp.tile(jnp.arange(R, dtype=jnp.int32), (H, 1)),
        prob_HR=jnp.tile(jnp.asarray([0.25, 0.25, 0.125, 0.125]), (H, 1)),
        bigram_next_VR=jnp.tile(jnp.asarray([8, 3, 5]), (V, 1)),
        bigram_prob_VR=jnp.tile(jnp.asarray([0.5, 0.25, 0.25]), (V, 1)),
    )


def without_ties(table: TrigramTable) -> TrigramTable:
    """Some contexts are sure of one candidate, others of none."""
    rng = np.random.default_rng(0)

    def shake(prob_XR):
        power = rng.choice([0.3, 8.0], (len(prob_XR), 1))
        factor = rng.uniform(0, 1, prob_XR.shape) ** power
        return prob_XR * jnp.asarray(factor, jnp.float32)

    return dataclasses.replace(
        table,
        prob_HR=shake(table.prob_HR),
        bigram_prob_VR=shake(table.bigram_prob_VR),
    )


def committed_of(rows: int, **options) -> Committed:
    return Committed(
        jnp.zeros((rows, 16), jnp.int32),
        jnp.arange(rows) + 4,
        row_keys(np.arange(rows)),
        make_sampler(rows, **options),
    )


def every_context():
    """All pairs of a token, or none, and a token: int32 `[(V + 1) V]` each."""
    return (jnp.asarray(x.reshape(-1), jnp.int32) for x in np.mgrid[-1:V, 0:V])


def plain_beliefs(beliefs: Beliefs, depth: int):
    """Returns a function of row, tokens and depth that a plain search can ask."""
    rows = beliefs.temperature_B.shape[0]
    u_F, v_F = every_context()
    known = []
    for d in range(depth):
        u_BF, v_BF = (jnp.broadcast_to(x, (rows, x.size)) for x in (u_F, v_F))
        found = beliefs.about(u_BF, v_BF, jnp.full_like(u_BF, d))
        known.append([np.asarray(x) for x in found])

    def candidates(row: int, u: int, v: int, d: int):
        next_BFR, p_BFR = known[d]
        at = (u + 1) * V + v
        pairs = zip(next_BFR[row, at].tolist(), p_BFR[row, at], strict=True)
        return [(token, p) for token, p in pairs if token >= 0]

    return candidates


def valid_nodes(draft, row: int) -> list[tuple[int, int]]:
    """Tokens of the valid nodes, and the index of the parent among them."""
    columns = (draft.tokens_BM[row], draft.parents_BM[row], draft.valid_BM[row])
    tokens, parents, valid = (x.tolist() for x in columns)
    there = [i for i, ok in enumerate(valid) if ok]
    return [(tokens[i], there.index(parents[i]) if i else -1) for i in there]


@pytest.mark.parametrize(
    ("change", "temperature"),
    [(with_ties, 0.0), (without_ties, 0.0), (without_ties, 0.8)],
)
@pytest.mark.parametrize(("nodes", "depth"), [(8, 4), (5, 3), (2, 1)])
@pytest.mark.parametrize("search", SEARCHES)
def test_a_search_finds_what_a_plain_one_finds(
    search, nodes, depth, change, temperature
) -> None:
    fast, plain, more = SEARCHES[search]
    u_B, v_B = every_context()
    rows, size = u_B.size, {"nodes": nodes, "depth": depth, **more}
    committed = committed_of(rows, temperature=temperature)
    beliefs = Beliefs.of(change(random_table(nodes)), committed, depth)
    draft = jax.jit(functools.partial(fast, **size))(beliefs, u_B, v_B)
    assert draft.tokens_BM.shape == (rows, nodes)
    candidates = plain_beliefs(beliefs, depth)
    for row in range(rows):
        of_row = functools.partial(candidates, row)
        expected = plain(of_row, int(u_B[row]), int(v_B[row]), **size)
        assert valid_nodes(draft, row) == expected
    assert int(draft.depth_BM.max()) <= depth


def test_beliefs_share_the_list_and_follow_the_noise() -> None:
    rows, depth, table = 3, 2, random_table(5)
    temperatures = [0.0, 0.8, 1.5]
    committed = committed_of(rows, temperature=temperatures)
    candidates = plain_beliefs(Beliefs.of(table, committed, depth), depth)
    position_BD = committed.length_B[:, None] + jnp.arange(depth)
    noise_BDV = np.asarray(position_gumbel(committed.row_key_B, position_BD, V))
    for row, d, u, v in np.ndindex(rows, depth, V, V):
        found = lookup_reference(table, u, v)
        assert [t for t, _ in candidates(row, u, v, d)] == [t for t, _ in found]
        p = np.asarray([p for _, p in found], np.float64)
        wanted = p / p.sum()
        if row:
            power = 1 / temperatures[row]
            weight = p**power * np.exp(noise_BDV[row, d, [t for t, _ in found]])
            wanted = weight / (weight.sum() + max(1 - p.sum(), 1e-6) ** power)
        got = [p for _, p in candidates(row, u, v, d)]
        np.testing.assert_allclose(got, wanted, rtol=1e-4)


def random_updates(seed: int, count: int):
    """Contexts of few tokens, so that slots meet, with logits behind them."""
    rng = np.random.default_rng(seed)
    u_N, v_N = rng.integers(-1, 4, count), rng.integers(0, 4, count)
    return u_N, v_N, rng.normal(0, 2, (count, V)).astype(np.float32)


def update(table, u_N, v_N, logits_NV, valid_N, eta):
    arrays = (jnp.asarray(x) for x in (u_N, v_N, logits_NV, valid_N))
    return jax.jit(adapt, static_argnames="eta")(table, *arrays, eta=eta)


def assert_tables_agree(a: TrigramTable, b: TrigramTable) -> None:
    for name in (f.name for f in dataclasses.fields(TrigramTable)):
        x, y = np.asarray(getattr(a, name)), np.asarray(getattr(b, name))
        if x.dtype == np.int32:
            np.testing.assert_array_equal(x, y, name)
        else:
            np.testing.assert_allclose(x, y, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("start", ["counts", "empty"])
def test_updates_are_those_of_numpy_one_after_the_other(start, seed) -> None:
    table = random_table(seed) if start == "counts" else empty_table(V, 5, R, 3)
    u_N, v_N, logits_NV = random_updates(seed, 30)
    valid_N = np.random.default_rng(seed).random(30) < 0.8
    found = update(table, u_N, v_N, logits_NV, valid_N, 0.3)
    pairs = list(zip(u_N[valid_N].tolist(), v_N[valid_N].tolist(), strict=True))
    assert len(set(pairs)) < len(pairs)
    assert_tables_agree(
        found, adapt_reference(table, pairs, logits_NV[valid_N], eta=0.3)
    )


def test_logits_that_are_not_finite_teach_nothing() -> None:
    table = random_table(0)
    u_N, v_N, logits_NV = random_updates(0, 2)
    logits_NV[0, 3], logits_NV[1, 5] = np.nan, np.inf
    found = update(table, u_N, v_N, logits_NV, np.ones(2, bool), 0.3)
    assert_tables_agree(found, table)


def test_eta_one_takes_the_target_at_its_word() -> None:
    table = empty_table(V, H, R)
    logits_NV = np.full((2, V), -30.0, np.float32)
    logits_NV[:, 5] = 0
    found = update(table, [1, 1], [2, 2], logits_NV, np.ones(2, bool), 1.0)
    [(token, p)] = [x for x in lookup_reference(found, 1, 2) if x[1] > 0]
    assert (token, round(p, 5)) == (5, 1.0)


@pytest.mark.parametrize("learn", ["path", "tree"])
def test_a_step_learns_from_the_nodes_that_it_should(learn) -> None:
    # Node 0 is token 3 at position 2; nodes 1 (4), 2 (5) hang from it, 3 (6) from 2.
    drafter = Trigram(nodes=4, learn=learn, eta=0.5)
    table = empty_table(V, 64, R)
    tokens = jnp.asarray([[1, 2, 3, 5, 8, 0], [1, 2, 3, 0, 0, 0], [3, 4, 0, 0, 0, 0]])
    before_B, after_B = jnp.asarray([3, 3, 1]), jnp.asarray([5, 3, 2])
    keys = row_keys(np.arange(3))
    state = TrigramState(table, before_B)
    _, blank = drafter.propose({}, state, Committed(tokens, before_B, keys))
    draft = dataclasses.replace(
        blank,
        tokens_BM=jnp.asarray([[3, 4, 5, 6]] * 3),
        parents_BM=jnp.asarray([[-1, 0, 0, 2]] * 3),
        valid_BM=jnp.asarray([[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 0, 0]], bool),
    )
    verdict = Verdict(
        path_BJ=jnp.asarray([[0, 2, 2, 2], [0] * 4, [0] * 4]),
        num_accepted_B=jnp.asarray([1, 0, 0]),
        next_token_B=jnp.asarray([8, 1, 4]),
        chosen_BM=jnp.zeros((3, 4), jnp.int32),
    )
    logits_BMV = np.random.default_rng(0).normal(size=(3, 4, V)).astype(np.float32)
    forward = Forward(jnp.asarray(logits_BMV), jnp.zeros((3, 4, 1)), (), {})
    committed = Committed(tokens, after_B, keys)
    found = jax.jit(drafter.observe)({}, state, committed, draft, verdict, forward)
    assert found.length_B.tolist() == after_B.tolist()
    # Row 1 stands still: it has stopped. Row 2 has nothing before its only token.
    seen = {
        "path": [(2, 3, 0, 0), (3, 5, 0, 2), (-1, 3, 2, 0)],
        "tree": [(2, 3, 0, 0), (3, 4, 0, 1), (3, 5, 0, 2), (-1, 3, 2, 0), (3, 4, 2, 1)],
    }[learn]
    expected = adapt_reference(
        table,
        [(u, v) for u, v, _, _ in seen],
        [logits_BMV[row, node] for _, _, row, node in seen],
        eta=0.5,
    )
    assert_tables_agree(found.table, expected)


@pytest.mark.parametrize(
    ("setting", "temperature"),
    [
        pytest.param("", 0.0, marks=pytest.mark.slow),
        ("", 1.0),
        (":search=puct,iterations=9", 1.0),
        (":learn=tree,eta=0.9", 0.0),
        pytest.param(":nodes=2", 0.0, marks=pytest.mark.slow),
        pytest.param(":slots=1", 1.0, marks=pytest.mark.slow),
    ],
)
def test_tokens_are_those_of_plain_decoding(setting, temperature) -> None:
    drafter = build(f"trigram{setting}", METHODS, {Drafter: METHODS})
    bound, params = drafter.bind(toy_lm())
    options = {"temperature": temperature}
    request = request_of(prompts_of(1, 9, 4), 14, **options)
    outputs = decode_on(bound, params, request).outputs
    assert_equals_reference(outputs, request, options)


def garbage(table: TrigramTable, seed: int) -> TrigramTable:
    """Ids of no token, odd probabilities, and keys that are hit."""
    rng = np.random.default_rng(seed)

    def spoil(x):
        if x.dtype == jnp.int32:
            return jnp.asarray(rng.integers(-9, 2 * VOCABULARY, x.shape), jnp.int32)
        odd = rng.choice([np.nan, np.inf, -1.0, 0.0, 5.0, 0.3], x.shape)
        return jnp.asarray(odd, jnp.float32)

    return jax.tree.map(spoil, table)


@pytest.mark.parametrize(
    ("search", "temperature"),
    [
        pytest.param("best_first", 0.0, marks=pytest.mark.slow),
        ("best_first", 1.0),
        pytest.param("puct", 0.0, marks=pytest.mark.slow),
    ],
)
def test_a_table_of_garbage_changes_no_token(search, temperature) -> None:
    drafter, params = Trigram(search=search, slots=64, iterations=9).bind(toy_lm())
    options = {"temperature": temperature}
    request = request_of(prompts_of(2, 7), 14, **options)
    params = {MEMORY: garbage(params[MEMORY], 1)}
    outputs = decode_on(drafter, params, request).outputs
    assert_equals_reference(outputs, request, options)


@pytest.mark.slow
def test_without_learning_the_table_stays() -> None:
    assert not Trigram(eta=0.0).learns
    assert not Trigram(adapt=False).learns
    lm, prompts, learned = toy_lm(), toy_prompts(12, 7), []
    for adapt_too in (False, True):
        bound = jaxllm.bind(lm, Trigram(adapt=adapt_too, slots=64))
        jaxllm.generate(lm, prompts, drafter=bound, max_new_tokens=20)
        learned.append(bound.params[MEMORY])
    empty = {"drafter": {MEMORY: empty_table(VOCABULARY, 64)}}
    counts = Trigram(slots=64).init(empty, prompts_committed(prompts), None)
    assert_tables_agree(learned[0], counts.table)
    assert (learned[1].next_HR != learned[0].next_HR).any()


def prompts_committed(prompts) -> Committed:
    tokens_BS = np.zeros((len(prompts), 64), np.int32)
    for row, prompt in enumerate(prompts):
        tokens_BS[row, : len(prompt)] = prompt
    lengths = jnp.asarray([len(p) for p in prompts])
    return Committed(jnp.asarray(tokens_BS), lengths, row_keys(np.arange(len(prompts))))


@pytest.mark.parametrize("search", SEARCHES)
def test_a_repeating_text_is_learned_in_one_round(search) -> None:
    cycle = (3, 7, 7, 1, 9)
    # The prompt holds nothing to count: all is learned from the target.
    request = request_of([[3]], 41)
    drafter, params = Trigram(search=search, depth=4).bind(toy_lm())
    drafter = repeats(drafter, cycle)
    first = decode_on(drafter, params, request)
    assert [3, *first.outputs[0].token_ids] == (list(cycle) * 9)[:42]
    again = decode_on(drafter, first.drafter, request)
    # Only the first step, after a single token, has bigrams alone: token 7 is followed
    # by two tokens, and both fit into the tree.
    assert again.outputs[0].stats["target_passes"] <= -(-41 // 5) + 1
    assert again.outputs[0].stats["accepted"][4] >= 7


def decode_on(drafter, params, request):
    """What a batch gave, and the drafter's parameters after it."""
    model, target = toy_model()
    params = {"target": target, "drafter": params}
    return drain(decode_chunks(model, params, request, drafter=drafter))


def test_a_second_call_starts_from_what_the_first_learned(tmp_path) -> None:
    lm, path = toy_lm(), tmp_path / "memory.safetensors"
    options = {"max_new_tokens": 24}
    bound = jaxllm.bind(lm, "trigram")
    first = run(bound, **options)
    bound.save_memory(path)
    second = run(bound, **options)
    fresh = jaxllm.bind(lm, "trigram")
    fresh.load_memory(path)
    warm = run(fresh, **options)
    assert ids(first) == ids(second) == ids(warm)

    def passes(results):
        return [r.stats["target_passes"] for r in results]

    assert passes(second) == passes(warm)
    assert sum(passes(warm)) < sum(passes(first))
    assert_tables_agree(fresh.params[MEMORY], bound.params[MEMORY])
    other = jaxllm.bind(lm, "trigram:slots=32")
    with pytest.raises(CheckpointError, match="cannot warm-start"):
        other.load_memory(path)


def test_the_loop_holds_no_copy_of_the_table() -> None:
    lm = toy_lm()
    sizes = []
    for slots in (2**10, 2**16):
        bound = jaxllm.bind(lm, Trigram(slots=slots))
        sizes.append(step_bytes(bound))
    # The tables differ by megabytes, what a step needs beside them by nothing.
    assert sizes[1] - sizes[0] < 2**16


def step_bytes(bound) -> int:
    """Temporary bytes of a loop of proposing and observing, its state donated."""
    drafter, V = bound.drafter, VOCABULARY
    committed = prompts_committed([[1, 2, 3]])
    state = TrigramState(bound.params[MEMORY], committed.length_B)

    def step(_, carry):
        state, committed = carry
        state, draft = drafter.propose({}, state, committed)
        grown = committed.extend(draft.tokens_BM[:, 1:2], jnp.ones((1,), jnp.int32))
        logits_BMV = jax.nn.one_hot(draft.tokens_BM, V) * state.table.prob_HR[0, 0]
        forward = Forward(logits_BMV, logits_BMV, (), {})
        verdict = Verdict(
            jnp.zeros((1, 5), jnp.int32),
            jnp.zeros((1,), jnp.int32),
            grown.pending_B,
            draft.tokens_BM,
        )
        return drafter.observe({}, state, grown, draft, verdict, forward), grown

    def loop(state, committed):
        return jax.lax.fori_loop(0, 9, step, (state, committed))

    compiled = jax.jit(loop, donate_argnums=0).lower(state, committed).compile()
    return compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            "nodes=1",
            "cannot draft: trigram has nodes 1, depth 4 and eta 0.3, expected nodes of "
            "2 or more, a depth of 1 or more and an eta from 0 to 1. Correct them.",
        ),
        (
            "search=puct,iterations=6",
            "cannot draft: trigram.iterations is 6, expected at least 7, one for each "
            "node. Correct it.",
        ),
    ],
)
def test_bad_options_are_refused(options, message) -> None:
    with pytest.raises(ConfigError) as caught:
        build(f"trigram:{options}", METHODS, {Drafter: METHODS})
    assert str(caught.value) == message


def test_a_path_is_no_longer_than_the_nodes_allow() -> None:
    assert Trigram(nodes=3).depth == 2
    assert Trigram(nodes=9, depth=6).depth == 6
