"""What stands in batches: rows, weights, every token once."""

import collections
import dataclasses
import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxllm.core.errors import ConfigError, UserError
from jaxllm.training import Batch
from jaxllm.training.data import PACKINGS, DataConfig, open_data
from tests.decoding.toys import VOCABULARY, toy_model
from tests.training.small_data import (
    TOKENIZER,
    Lists,
    config_of,
    finite,
    numbered_documents,
    pieces,
    random_documents,
    same,
    stream_of,
    take,
)

# --- A batch ------------------------------------------------------------------


@pytest.mark.parametrize("packing", PACKINGS)
def test_a_batch_is_what_the_step_wants(packing):
    batch = next(stream_of(random_documents([5, 9, 3] * 9), packing=packing))
    assert isinstance(batch, Batch)
    assert all(type(leaf) is np.ndarray for leaf in jax.tree.leaves(batch))
    assert {leaf.shape for leaf in jax.tree.leaves(batch)} == {(4, 16)}
    assert batch.weight_BT.dtype == np.float32
    names = ("tokens_BT", "segment_BT", "position_BT")
    assert all(getattr(batch, name).dtype == np.int32 for name in names)


def test_documents_are_split_at_the_ends_of_rows():
    batch = next(finite([[1] * 6, [2] * 7, [3] * 9], row_length=8, batch_rows=3))
    assert batch.tokens_BT.tolist() == [
        [1, 1, 1, 1, 1, 1, 2, 2],
        [2, 2, 2, 2, 2, 3, 3, 3],
        [3, 3, 3, 3, 3, 3, 0, 0],
    ]
    assert batch.segment_BT.tolist() == [
        [1, 1, 1, 1, 1, 1, 2, 2],
        [1, 1, 1, 1, 1, 2, 2, 2],
        [1, 1, 1, 1, 1, 1, 0, 0],
    ]
    assert batch.position_BT.tolist() == [
        [0, 1, 2, 3, 4, 5, 0, 1],
        [0, 1, 2, 3, 4, 0, 1, 2],
        [0, 1, 2, 3, 4, 5, 0, 0],
    ]
    assert batch.weight_BT.tolist() == [
        [0, 1, 1, 1, 1, 1, 0, 1],
        [0, 1, 1, 1, 1, 0, 1, 1],
        [0, 1, 1, 1, 1, 1, 0, 0],
    ]


def test_documents_go_whole_into_the_first_row_with_room():
    documents = [[1] * 6, [2] * 7, [3] * 2, [4] * 1]
    batch = next(finite(documents, row_length=8, batch_rows=3, packing="first_fit"))
    assert batch.tokens_BT.tolist() == [
        [1, 1, 1, 1, 1, 1, 3, 3],
        [2, 2, 2, 2, 2, 2, 2, 4],
        [0] * 8,
    ]
    assert batch.segment_BT[:, -1].tolist() == [2, 2, 0]
    assert batch.weight_BT.sum(axis=1).tolist() == [6, 6, 0]


@pytest.mark.parametrize("packing", PACKINGS)
def test_prompts_are_not_learned(packing):
    masks = [[0, 0, 1, 1], [0, 1, 1, 0, 1]]
    documents = Lists([[1, 2, 3, 4], [5, 6, 7, 8, 9]], masks)
    batch = next(finite({"only": documents}, packing=packing, batch_rows=1))
    assert batch.tokens_BT[batch.weight_BT > 0].tolist() == [3, 4, 6, 7, 9]


# --- Packed equals unpacked ---------------------------------------------------


def loss_and_weight(batch):
    model, params = toy_model()
    return _loss_and_weight(model, params, batch)


@functools.partial(jax.jit, static_argnums=0)
def _loss_and_weight(model, params, batch):
    context = batch.context()
    logits_BTV = model(params, batch.tokens_BT, context).logits_BTV
    log_p_BTV = jax.nn.log_softmax(logits_BTV[:, :-1])
    targets_BT = batch.tokens_BT[:, 1:, None]
    nll_BT = -jnp.take_along_axis(log_p_BTV, targets_BT, axis=-1)[..., 0]
    weight_BT = batch.weight_BT[:, 1:]
    return (nll_BT * weight_BT).sum(), weight_BT.sum()


def alone(tokens, learn, length):
    """A document as a row of its own; what stands behind it is no document."""
    row = np.full((1, length), 7, np.int32)
    row[0, : len(tokens)] = tokens
    is_there = np.arange(length)[None] < len(tokens)
    weight = np.zeros((1, length), np.float32)
    weight[0, 1 : len(tokens)] = learn[1:]
    positions = np.broadcast_to(np.arange(length, dtype=np.int32), (1, length))
    return Batch(row, is_there.astype(np.int32), positions, weight)


@pytest.mark.parametrize("packing", PACKINGS)
def test_the_loss_of_packed_rows_is_that_of_the_documents_alone(packing):
    lengths = [3, 16, 9, 1, 12, 5, 7, 2, 30, 4, 11]
    documents = random_documents(lengths)
    if packing == "first_fit":
        documents = [d[:16] for d in documents]
    rng = np.random.default_rng(1)
    masks = [rng.integers(0, 2, len(d)) for d in documents]
    stream = finite({"only": Lists(documents, masks)}, packing=packing, batch_rows=3)
    packed = [loss_and_weight(batch) for batch in stream]
    if packing == "concat":
        ends = set(np.cumsum([len(d) for d in documents]).tolist())
        tokens, learn = np.concatenate(documents), np.concatenate(masks)
        borders = sorted(ends | set(range(0, len(tokens), 16)))
        spans = list(itertools.pairwise(borders))
        documents = [tokens[a:b] for a, b in spans]
        masks = [learn[a:b] for a, b in spans]
    rows = [alone(d, m, 16) for d, m in zip(documents, masks, strict=True)]
    single = loss_and_weight(
        jax.tree.map(lambda *leaves: np.concatenate(leaves), *rows)
    )
    nll, weight = np.sum(packed, axis=0)
    wanted, count = map(float, single)
    assert weight == count > 20
    assert nll / weight == pytest.approx(wanted / count, rel=1e-5)


@pytest.mark.parametrize("packing", PACKINGS)
def test_a_document_does_not_see_its_neighbours(packing):
    model, params = toy_model()
    documents = random_documents([5, 6, 5])

    def logits_of_second(documents):
        batch = next(finite(documents, packing=packing, batch_rows=1))
        batch = jax.tree.map(jnp.asarray, batch)
        assert int(batch.segment_BT.max()) == 3, "all three in one row"
        logits = model(params, batch.tokens_BT, batch.context()).logits_BTV
        return np.asarray(logits[0])[np.asarray(batch.segment_BT[0]) == 2]

    others = [(d + 1) % VOCABULARY for d in documents]
    wanted = logits_of_second(documents)
    found = logits_of_second([others[0], documents[1], others[2]])
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-6)
    own = logits_of_second([documents[0], others[1], documents[2]])
    assert np.abs(own - wanted).max() > 1e-2


# --- Nothing lost, nothing twice ----------------------------------------------


@settings(max_examples=60)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=60),
    row_length=st.sampled_from([2, 7, 16]),
    processes=st.integers(1, 3),
    shuffle=st.booleans(),
    epochs=st.integers(1, 2),
)
def test_concat_keeps_every_token(lengths, row_length, processes, shuffle, epochs):
    documents = numbered_documents(lengths)
    shape = {"row_length": row_length, "batch_rows": 6}
    streams = [
        list(
            stream_of(documents, p, processes, shuffle=shuffle, epochs=epochs, **shape)
        )
        for p in range(processes)
    ]
    assert len({len(batches) for batches in streams}) == 1, "some process would wait"
    assert all(b.tokens_BT.shape == (6 // processes, row_length) for b in streams[0])
    batches = [batch for batches in streams for batch in batches]
    found = collections.Counter(itertools.chain(*pieces(batches)))
    assert found == dict.fromkeys(range(sum(lengths)), epochs)
    used = sum(int((b.segment_BT > 0).sum()) for b in batches)
    rows = sum(int((b.segment_BT > 0).any(axis=1).sum()) for b in batches)
    assert rows == -(-used // row_length), "a row was not filled"


@settings(max_examples=60)
@given(
    lengths=st.lists(st.integers(1, 24), min_size=1, max_size=90),
    processes=st.integers(1, 3),
    shuffle=st.booleans(),
    epochs=st.integers(1, 2),
)
def test_first_fit_keeps_every_document_whole(lengths, processes, shuffle, epochs):
    documents = numbered_documents(lengths)
    memory = {"only": Lists(documents)}
    config = config_of(
        "only", packing="first_fit", row_length=24, batch_rows=6, epochs=epochs
    )
    config = dataclasses.replace(config, shuffle=shuffle)
    streams = [
        list(open_data(config, TOKENIZER, "unused", p, processes, memory))
        for p in range(processes)
    ]
    assert len({len(batches) for batches in streams}) == 1
    batches = [batch for batches in streams for batch in batches]
    found = collections.Counter(pieces(batches))
    assert found == collections.Counter([tuple(d.tolist()) for d in documents] * epochs)


@pytest.mark.parametrize("packing", PACKINGS)
def test_a_finite_set_is_the_same_for_any_number_of_processes(packing):
    documents = random_documents([5, 9, 3, 14, 8] * 5)
    shape = {"packing": packing, "epochs": 1, "batch_rows": 6}
    whole = list(stream_of(documents, **shape))
    parts = [list(stream_of(documents, p, 3, **shape)) for p in range(3)]
    assert len(whole) > 1
    for batch, *shares in zip(whole, *parts, strict=True):
        joined = jax.tree.map(lambda *leaves: np.concatenate(leaves), *shares)
        assert same(joined, batch)


def test_a_finite_set_takes_all_of_every_source():
    documents = {
        "a": numbered_documents([3] * 9),
        "b": [d + 100 for d in numbered_documents([7])],
    }
    found = sorted(itertools.chain(*pieces(finite(documents))))
    assert found == [*range(27), *range(100, 107)]


@pytest.mark.parametrize(("count", "processes"), [(12, 1), (12, 3), (13, 4), (7, 2)])
def test_processes_share_an_epoch(count, processes):
    # Rows of one document each, so that a stream can be read document by document.
    documents = [np.full(8, i) for i in range(count)]
    seen = []
    for process in range(processes):
        stream = stream_of(
            documents, process, processes, row_length=8, batch_rows=processes
        )
        own = len(range(process, count, processes))
        seen += [int(batch.tokens_BT[0, 0]) for batch in take(stream, own)]
    assert sorted(seen) == list(range(count))
    assert seen != sorted(seen)


# --- What a user can do wrong -------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"row_length": 1}, "row_length: 1, expected 2 or more"),
        ({"batch_rows": 0}, "batch_rows: 0, expected 1 or more"),
        ({"prefetch": -1}, "prefetch: -1, expected 0 or more"),
        ({"epochs": 0}, "epochs: 0, expected 1 or more, or None"),
        ({"seed": 2**32}, "seed: 4294967296, expected 0 to"),
        ({"packing": "first-fit"}, "unknown packing: 'first-fit', expected one of"),
        ({"weights": [0]}, "weight of only: 0, expected above 0"),
        ({"weights": [float("nan")]}, "weight of only: nan, expected above 0"),
        ({"processes": 3}, "4 rows for 3 processes, expected a multiple"),
        ({"process": 2, "processes": 2}, "process_index: 2, expected below 2"),
        ({"batch_rows": 400}, "40 documents of 200 tokens in all, expected enough"),
        (
            {"packing": "first_fit", "batch_rows": 41},
            "40 documents of 200 tokens in all, expected enough for a batch of 41",
        ),
    ],
)
def test_a_wrong_configuration_is_refused(changes, said):
    with pytest.raises(UserError, match=re.escape(said)) as raised:
        stream_of(random_documents([5] * 40), **changes)
    assert re.fullmatch(r"[a-z][^:\n]+: .+, expected .+[.?]", str(raised.value))


def test_sources_that_do_not_go_together_are_refused():
    with pytest.raises(ConfigError, match="sources: none, expected one at least"):
        open_data(DataConfig(sources=()), TOKENIZER, "unused")
    with pytest.raises(ConfigError, match="weight: differs between sources"):
        stream_of({"a": [[1]], "b": [[2]]}, weights=[1, 2], epochs=1)
    with pytest.raises(ConfigError, match="unknown source in memory: 'only'"):
        open_data(config_of("only"), TOKENIZER, "unused")
    with pytest.raises(ConfigError, match="only: 0 documents in memory, expected 1"):
        stream_of([])


def test_a_batch_size_may_equal_the_tokens_there_are():
    assert next(stream_of(random_documents([16] * 4))).segment_BT.min() == 1
