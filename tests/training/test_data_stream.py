"""The order of a stream, and stopping and going on in it."""

import json
import subprocess
import sys
import threading

import numpy as np
import pytest

from jaxllm.core.errors import ConfigError
from jaxllm.training import data
from jaxllm.training.data import PACKINGS
from tests.training.small_data import (
    random_documents,
    same,
    stream_of,
    take,
)

TWO = {"a": random_documents([5, 9, 3] * 9), "b": random_documents([14, 2] * 8)}


# --- Order --------------------------------------------------------------------


@pytest.mark.parametrize("packing", PACKINGS)
def test_the_seed_decides_the_order(packing):
    documents = random_documents([5, 9, 3] * 9)
    first, again, other = (
        take(stream_of(documents, packing=packing, seed=seed), 9) for seed in (3, 3, 4)
    )
    assert all(map(same, first, again))
    assert not any(map(same, first, other))


def test_reading_ahead_changes_nothing():
    documents = random_documents([5, 9, 3] * 9)
    ahead = stream_of(documents, prefetch=3)
    assert all(map(same, take(ahead, 9), take(stream_of(documents), 9)))
    ahead.close()
    names = [thread.name for thread in threading.enumerate()]
    assert not [name for name in names if "prefetch" in name]


@pytest.mark.parametrize("packing", PACKINGS)
def test_the_end_of_a_finite_set_can_be_saved(packing):
    stream = stream_of(TWO["a"], packing=packing, epochs=1)
    assert len(list(stream)) > 1
    state = json.loads(json.dumps(stream.get_state()))
    again = stream_of(TWO["a"], packing=packing, epochs=1)
    again.set_state(state)
    assert next(again, None) is None
    assert next(stream, None) is None


def test_a_closed_stream_says_so():
    stream = stream_of(random_documents([16] * 4), prefetch=2)
    next(stream)
    stream.close()
    stream.close()
    with pytest.raises(ValueError, match="the stream was closed"):
        next(stream)


LEFT_OPEN = """
from tests.training.small_data import random_documents, stream_of
stream = stream_of(random_documents([16] * 4), prefetch=2)
next(stream)
"""


def test_a_stream_that_is_left_open_ends_quietly():
    child = subprocess.run(
        [sys.executable, "-c", LEFT_OPEN], capture_output=True, text=True, timeout=120
    )
    assert (child.returncode, child.stderr) == (0, "")


@pytest.mark.parametrize("few", [0, 4096])
def test_every_epoch_has_an_order_of_its_own(few, monkeypatch):
    monkeypatch.setattr(data, "_FEW", few)
    documents = [np.full(8, i) for i in range(40)]
    rows = stream_of(documents, row_length=8, batch_rows=1)
    order = [int(next(rows).tokens_BT[0, 0]) for _ in range(120)]
    epochs = [order[:40], order[40:80], order[80:]]
    assert all(sorted(epoch) == list(range(40)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    # Neighbouring seeds must not be the same orders one epoch later.
    rows = stream_of(documents, row_length=8, batch_rows=1, seed=1)
    assert [int(next(rows).tokens_BT[0, 0]) for _ in range(40)] not in epochs


def test_documents_in_order_when_they_are_not_shuffled():
    documents = [np.full(8, i) for i in range(5)]
    rows = stream_of(documents, row_length=8, batch_rows=1, shuffle=False)
    assert [int(next(rows).tokens_BT[0, 0]) for _ in range(7)] == [0, 1, 2, 3, 4, 0, 1]


@pytest.mark.parametrize("packing", PACKINGS)
def test_one_document_is_enough_for_a_stream(packing):
    rows = stream_of([np.arange(16)], batch_rows=1, packing=packing)
    assert all(same(batch, next(rows)) for batch in take(rows, 3))


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("processes", [1, 4])
def test_weights_are_shares_of_tokens_in_every_process(packing, processes):
    # One of b's documents for thirty of a's would be the natural rhythm.
    rng = np.random.default_rng(0)
    documents = {
        "a": [np.full(n, 1) for n in rng.integers(2, 6, 400)],
        "b": [np.full(n, 2) for n in rng.integers(30, 60, 50)],
    }
    for process in range(processes):
        stream = stream_of(
            documents, process, processes, weights=[3, 1], packing=packing,
            row_length=64, batch_rows=8 * processes,
        )  # fmt: skip
        tokens = np.concatenate([b.tokens_BT for b in take(stream, 20)])
        share = (tokens == 2).sum() / (tokens > 0).sum()
        assert share == pytest.approx(0.25, abs=0.03)
        assert [source.share for source in stream.sources] == [0.75, 0.25]


@pytest.mark.parametrize("process", range(4))
def test_no_process_reads_one_source_only(process):
    # Three documents of a for one of b: every fourth would always be of b.
    documents = {"a": [np.full(4, 1)] * 30, "b": [np.full(12, 2)] * 30}
    stream = stream_of(documents, process, 4, row_length=24)
    tokens = np.concatenate([b.tokens_BT for b in take(stream, 30)])
    assert (tokens == 2).mean() == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize(("packing", "least"), [("concat", 1.0), ("first_fit", 0.9)])
def test_rows_are_well_filled(packing, least):
    lengths = np.random.default_rng(0).integers(3, 40, 900)
    stream = stream_of(random_documents(lengths), packing=packing, row_length=64)
    filled = np.mean([batch.segment_BT > 0 for batch in take(stream, 60)])
    assert filled >= least


# --- Stop and go on -----------------------------------------------------------


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize(
    ("documents", "options"),
    [
        (TWO["a"], {}),
        (random_documents([16] * 9), {}),  # no document is ever split
        (random_documents([50, 70, 33, 41, 18]), {}),  # and here all of them are
        (TWO, {"weights": [1, 3]}),
        (TWO, {"epochs": 3, "prefetch": 2}),
        (TWO["a"], {"process": 1, "processes": 2, "prefetch": 2}),
    ],
)
def test_a_stream_goes_on_where_it_stopped(packing, documents, options):
    if packing == "first_fit" and not isinstance(documents, dict):
        documents = [d[:16] for d in documents]

    def opened():
        return stream_of(documents, packing=packing, **options)

    stream, batches, states = opened(), [], []
    for _ in range(9):
        states.append(json.dumps(stream.get_state()))
        batch = next(stream, None)
        if batch is None:
            break
        batches.append(batch)
    assert len(batches) > 4
    used = opened()
    for number, state in enumerate(states):
        fresh = opened()
        for again in (fresh, used):
            again.set_state(json.loads(state))
            assert again.get_state() == json.loads(state)
            rest = take(again, len(batches) - number)
            assert len(rest) == len(batches) - number
            assert all(map(same, rest, batches[number:]))
        fresh.close()
        assert len(state) < 400
    used.close()
    stream.close()


def test_a_position_of_other_data_is_refused():
    documents = random_documents([5, 9, 3] * 9)
    state = stream_of(documents).get_state()
    for other in (
        stream_of(documents, seed=1),
        stream_of(documents, row_length=8),
        stream_of(documents[:-1]),
        stream_of({"other": documents}),
    ):
        with pytest.raises(ConfigError, match=r"cannot resume data: data: the saved"):
            other.set_state(state)
    with pytest.raises(ConfigError, match=r"processes: the saved position has 1, exp"):
        stream_of(documents, 0, 2).set_state(state)
    with pytest.raises(ConfigError, match="version: the saved position has None"):
        stream_of(documents).set_state({})
    state = stream_of(documents, 0, 2).get_state()
    with pytest.raises(ConfigError, match="process: the saved position has 0"):
        stream_of(documents, 1, 2).set_state(state)


def test_reading_ahead_may_change_on_resume():
    documents = random_documents([5, 9, 3] * 9)
    stream = stream_of(documents)
    take(stream, 3)
    ahead = stream_of(documents, prefetch=2)
    ahead.set_state(stream.get_state())
    assert all(map(same, take(ahead, 5), take(stream, 5)))
    ahead.close()
