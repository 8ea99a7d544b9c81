"""Tables of n-grams: counting, looking up, and files."""

import collections
import dataclasses
import functools
import itertools
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxllm.checkpoints import write_safetensors
from jaxllm.core.errors import CheckpointError, ConfigError
from jaxllm.drafting.ngram_counts import build_trigram, count_prompts
from jaxllm.drafting.ngrams import (
    TrigramTable,
    empty_table,
    load_table,
    lookup,
    lookup_reference,
    resolve_table,
    save_table,
    shipped_tables,
    slot_of,
)

V, H, R, R2 = 7, 11, 3, 2
FIELDS = [f.name for f in dataclasses.fields(TrigramTable)]

texts = st.lists(st.integers(0, V - 1), min_size=1, max_size=60)


def slot(u: int, v: int, slots: int = H) -> int:
    return int(slot_of(np.asarray([u]), np.asarray([v]), slots)[0])


def top(counts: collections.Counter, rank: int) -> list[tuple[int, float]]:
    """The most frequent, of equals the smallest ids, with their shares."""
    order = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return [(token, n / counts.total()) for token, n in order[:rank]]


def assert_entries(next_R, prob_R, expected) -> None:
    count = len(expected)
    assert next_R.tolist() == [t for t, _ in expected] + [-1] * (len(next_R) - count)
    np.testing.assert_allclose(prob_R[:count], [p for _, p in expected], rtol=1e-6)
    assert not prob_R[count:].any()


def assert_tables_equal(a: TrigramTable, b: TrigramTable) -> None:
    for name in FIELDS:
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name), name)


@settings(max_examples=60)
@given(texts)
def test_a_table_holds_the_counts_of_a_text(text) -> None:
    table = jax.tree.map(np.asarray, build_trigram(text, V, H, R, R2))
    assert_entries(
        table.unigram_next_R, table.unigram_prob_R, top(collections.Counter(text), R)
    )
    two, three = (collections.defaultdict(collections.Counter) for _ in range(2))
    for a, b in itertools.pairwise(text):
        two[a][b] += 1
    for a, b, c in zip(text, text[1:], text[2:], strict=False):
        three[a, b][c] += 1
    for v in range(V):
        assert_entries(
            table.bigram_next_VR[v], table.bigram_prob_VR[v], top(two[v], R2)
        )
    for at in range(H):
        rivals = [key for key in three if slot(*key) == at]
        if not rivals:
            assert table.key_H2[at].tolist() == [-1, -1]
            assert_entries(table.next_HR[at], table.prob_HR[at], [])
            continue
        winner = min(rivals, key=lambda key: (-three[key].total(), key))
        assert table.key_H2[at].tolist() == list(winner)
        assert_entries(table.next_HR[at], table.prob_HR[at], top(three[winner], R))


count = jax.jit(count_prompts)


@settings(max_examples=60)
@given(texts)
def test_counting_on_the_device_gives_the_same(text) -> None:
    tokens_BS = np.ones((1, 60), np.int32)
    tokens_BS[0, : len(text)] = text
    found = count(
        empty_table(V, H, R, R2), jnp.asarray(tokens_BS), jnp.asarray([len(text)])
    )
    assert_tables_equal(found, build_trigram(text, V, H, R, R2))


def test_no_ngram_spans_two_prompts() -> None:
    tokens_BS = jnp.asarray([[0, 1, 2, 5], [3, 3, 3, 3], [4, 0, 0, 0]])
    table = count(empty_table(V, 64, R), tokens_BS, jnp.asarray([3, 4, 1]))
    pairs = {tuple(key) for key in table.key_H2.tolist()} - {(-1, -1)}
    assert pairs == {(0, 1), (3, 3)}
    assert lookup_reference(table, 0, 1) == [(2, 1.0)]
    assert table.bigram_next_VR[:, 0].tolist() == [1, 2, -1, 3, -1, -1, -1]
    assert table.unigram_next_R.tolist() == [3, 0, 1]


def test_counting_leaves_what_is_known() -> None:
    known = build_trigram([0, 1, 2, 0, 1, 2, 0, 1], V, 64, R)
    tokens_BS = jnp.asarray([[0, 1, 4, 5, 1]])
    table = count(known, tokens_BS, jnp.asarray([5]))
    for u, v in ((0, 1), (1, 2), (2, 0)):
        assert lookup_reference(table, u, v) == lookup_reference(known, u, v)
    assert lookup_reference(table, 1, 4) == [(5, 1.0)]
    assert lookup_reference(table, 4, 5) == [(1, 1.0)]
    assert table.bigram_next_VR[:2].tolist() == known.bigram_next_VR[:2].tolist()
    assert table.bigram_next_VR[4, 0] == 5
    assert table.unigram_next_R.tolist() == known.unigram_next_R.tolist()


@settings(max_examples=30)
@given(texts)
def test_lookup_backs_off(text) -> None:
    table = build_trigram(text, V, H, R, R2)
    u_BF, v_BF = (x.reshape(1, -1) for x in np.mgrid[-1:V, 0:V].astype(np.int32))
    next_BFR, prob_BFR = jax.jit(lookup)(table, jnp.asarray(u_BF), jnp.asarray(v_BF))
    for f in range(u_BF.size):
        expected = lookup_reference(table, int(u_BF[0, f]), int(v_BF[0, f]))
        assert_entries(np.asarray(next_BFR[0, f]), np.asarray(prob_BFR[0, f]), expected)


def test_garbage_does_not_come_out() -> None:
    table = empty_table(V, 1, 6)
    table = dataclasses.replace(
        table,
        key_H2=jnp.asarray([[2, 3]]),
        next_HR=jnp.asarray([[1, -5, V, 2**30, 4, 5]]),
        prob_HR=jnp.asarray([[jnp.nan, 0.5, 0.5, 0.5, 7.0, -1.0]]),
    )
    next_BFR, prob_BFR = lookup(table, jnp.asarray([[2]]), jnp.asarray([[3]]))
    assert next_BFR.tolist() == [[[1, -1, -1, -1, 4, 5]]]
    assert prob_BFR.tolist() == [[[0.0, 0.0, 0.0, 0.0, 1.0, 0.0]]]


def test_bytes_are_counted_exactly() -> None:
    table = build_trigram(np.arange(50) % V, V, 32, rank=8, bigram_rank=4)
    assert table.nbytes == 32 * (8 + 8 * 8) + 8 * (V * 4 + 8)
    assert table.nbytes == sum(x.nbytes for x in jax.tree.leaves(table))
    assert (table.slots, table.rank, table.bigram_rank) == (32, 8, 4)


@pytest.mark.parametrize("vocabulary", [V, 70_000])
def test_a_file_gives_the_table_back(tmp_path, vocabulary) -> None:
    path = tmp_path / "t.safetensors"
    text = np.random.default_rng(1).integers(0, vocabulary, 500)
    table = build_trigram(text, vocabulary, H, R, R2)
    save_table(path, table)
    back = load_table(str(path), vocabulary)
    for name in FIELDS:
        a, b = getattr(table, name), getattr(back, name)
        assert a.dtype == b.dtype
        if a.dtype == jnp.int32:
            np.testing.assert_array_equal(a, b, name)
        else:
            np.testing.assert_allclose(a, b, rtol=1e-3, err_msg=name)


def test_bad_files_are_refused(tmp_path) -> None:
    path = tmp_path / "t.safetensors"
    table = empty_table(V, H, R)
    save_table(path, table)
    with pytest.raises(CheckpointError) as caught:
        load_table(str(path), 8)
    assert str(caught.value) == (
        f"cannot read n-gram table: {path}: counts 7 tokens, expected the model's 8. "
        f"Build one with the model's own tokenizer."
    )
    write_safetensors(path, {"x": np.zeros(3)})
    with pytest.raises(CheckpointError, match="has tensors x, expected a table of"):
        load_table(str(path), V)
    save_table(path, dataclasses.replace(table, prob_HR=jnp.zeros((H, R + 1))))
    with pytest.raises(CheckpointError, match="has tensors of shapes"):
        load_table(str(path), V)
    with pytest.raises(CheckpointError) as caught:
        resolve_table("demo-ngram")
    assert str(caught.value).startswith(
        "cannot find n-gram table: 'demo-ngram': no such file or shipped table, "
        "expected a file or one of "
    )
    assert str(caught.value).endswith(" Did you mean 'demo-ngrams'?")


@pytest.mark.parametrize(
    "make",
    [
        functools.partial(build_trigram, [0, V], V, H),
        functools.partial(build_trigram, [[0, 1]], V, H),
        functools.partial(build_trigram, [-1, 1], V, H),
    ],
)
def test_bad_tokens_are_refused(make) -> None:
    with pytest.raises(ConfigError, match="cannot count n-grams: tokens have shape"):
        make()


@pytest.mark.parametrize("sizes", [(0, 4), (8, 0)])
def test_bad_sizes_are_refused(sizes) -> None:
    with pytest.raises(ConfigError, match="cannot make an n-gram table"):
        empty_table(V, *sizes)


def test_the_shipped_table_is_small_and_whole() -> None:
    path = shipped_tables()["demo-ngrams"]
    assert path.stat().st_size < 1_000_000
    table = jax.tree.map(np.asarray, load_table("demo-ngrams", 2048))
    used = table.key_H2[:, 0] >= 0
    assert used.mean() > 0.9
    u, v = table.key_H2[used].T
    np.testing.assert_array_equal(slot_of(u, v, table.slots), np.flatnonzero(used))
    for next_XR, prob_XR in (
        (table.next_HR, table.prob_HR),
        (table.bigram_next_VR, table.bigram_prob_VR),
    ):
        assert next_XR.min() >= -1
        assert next_XR.max() < 2048
        assert ((next_XR >= 0) == (prob_XR > 0)).all()
        assert prob_XR.sum(axis=1).max() < 1.002


@pytest.mark.slow
@pytest.mark.data
def test_the_shipped_table_is_what_the_script_builds(data_dir, tmp_path) -> None:
    built = tmp_path / "built.safetensors"
    command = [sys.executable, "-m", "experiments.build_ngrams"]
    command += [f"--data={data_dir / 'text'}", f"--output={built}"]
    subprocess.run(command, check=True, capture_output=True)
    assert built.read_bytes() == shipped_tables()["demo-ngrams"].read_bytes()
