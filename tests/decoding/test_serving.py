"""Rows that come and go give the tokens of rows alone; nothing is lost on the way."""

import dataclasses

import numpy as np
import pytest

from jaxllm.core.errors import CapacityError, ConfigError
from jaxllm.decoding import Request, decode, make_sampler
from jaxllm.decoding.service import Arrival, Service
from jaxllm.decoding.serving import Server, serve
from jaxllm.drafting import Adaptive, Autoregressive, PromptLookup
from tests.decoding.toys import VOCABULARY, toy_model

MODEL, TARGET = toy_model()
PARAMS = {"target": TARGET, "drafter": {}}
RNG = np.random.default_rng(0)
SERVICE = Service(rows=3, capacity=96, page_slots=4, steps=3)


def some(count):
    return RNG.integers(1, VOCABULARY, count).tolist()


SYSTEM = some(30)
ARRIVALS = [
    Arrival(
        prompt=prompt,
        max_new_tokens=new,
        seed=seed,
        sampling={"temperature": 1.0} if seed % 3 else {},
    )
    for seed, (prompt, new) in enumerate(
        [
            (some(5), 9),
            (some(20), 30),
            (some(1), 4),
            (SYSTEM + some(3), 12),
            (some(9), 0),
            (SYSTEM + some(9), 7),
            (SYSTEM + some(2), 20),
            (some(40), 3),
            (SYSTEM, 11),
        ]
    )
]


def alone(arrival, drafter=None, eos=()):
    request = Request(
        prompts=[arrival.prompt],
        max_new_tokens=[arrival.max_new_tokens],
        sampler=make_sampler(1, **arrival.sampling),
        seeds=[arrival.seed],
        eos=eos,
    )
    drafter = Autoregressive() if drafter is None else drafter
    return decode(MODEL, PARAMS, request, drafter=drafter)[0]


EXPECTED = [alone(arrival) for arrival in ARRIVALS]


def assert_served(server_options, expected=EXPECTED, arrivals=ARRIVALS):
    found = dict(serve(MODEL, PARAMS, arrivals, **server_options))
    assert sorted(found) == list(range(len(arrivals)))
    for i, output in found.items():
        assert output.token_ids == expected[i].token_ids, i
        np.testing.assert_allclose(output.logprobs, expected[i].logprobs, atol=2e-4)
        assert output.ended == expected[i].ended
        assert output.stats["emitted"] == len(output.token_ids)
    return found


DRAFTERS = {
    "chain of 1": Autoregressive(),
    "chain of 4": PromptLookup(length=3),
    "several widths": Adaptive(drafter=PromptLookup(length=3), widths=(1, 2, 4)),
}


@pytest.mark.parametrize(
    "drafter",
    [
        pytest.param(drafter, id=name, marks=[] if i == 0 else pytest.mark.slow)
        for i, (name, drafter) in enumerate(DRAFTERS.items())
    ],
)
def test_rows_that_come_and_go_give_the_tokens_of_rows_alone(drafter):
    assert_served({"drafter": drafter, "service": SERVICE})


def run(server, arrivals):
    """Steps a server until it is idle; returns outputs by number."""
    for arrival in arrivals:
        server.submit(arrival)
    found = {}
    while not server.idle:
        found |= dict(server.step())
    return found


def test_where_pages_run_out_rows_wait_and_nothing_is_lost():
    # Fourteen pages hold the longest row and little else.
    service = dataclasses.replace(SERVICE, pages=14)
    server = Server(MODEL, PARAMS, drafter=Autoregressive(), service=service)
    found = run(server, ARRIVALS)
    assert server.preemptions > 0
    assert server.pool.free == 14
    for i, output in found.items():
        assert output.token_ids == EXPECTED[i].token_ids, i
        np.testing.assert_allclose(output.logprobs, EXPECTED[i].logprobs, atol=2e-4)
        assert output.stats["emitted"] == len(output.token_ids)


def test_pages_of_a_common_beginning_are_read_not_computed():
    server = Server(MODEL, PARAMS, drafter=Autoregressive(), service=SERVICE)
    same = [dataclasses.replace(ARRIVALS[3], seed=seed) for seed in (1, 2, 3)]
    for arrival in same:
        server.submit(arrival)
    server.step()
    first, second, third = server.places
    # All but the last two tokens of 33, which end inside a page.
    assert first.pages[:7] == second.pages[:7] == third.pages[:7]
    assert len({first.pages[7], second.pages[7], third.pages[7]}) == 3
    assert server.pool.readers(first.pages[0]) == 3
    found = {}
    while not server.idle:
        found |= dict(server.step())
    for i, arrival in enumerate(same):
        assert found[i].token_ids == alone(arrival).token_ids
    assert server.pool.free == SERVICE.pool


def test_an_end_token_frees_a_place():
    end = EXPECTED[1].token_ids[4]
    expected = [alone(arrival, eos=(end,)) for arrival in ARRIVALS]
    assert any(output.ended for output in expected)
    options = {"drafter": Autoregressive(), "service": SERVICE, "eos": (end,)}
    assert_served(options, expected)


def test_an_endless_stream_is_read_as_far_as_places_are_free():
    read = []

    def endless():
        while True:
            read.append(len(read))
            yield ARRIVALS[0]

    stream = serve(MODEL, PARAMS, endless(), drafter=Autoregressive(), service=SERVICE)
    for _ in range(4):
        _, output = next(stream)
        assert output.token_ids == EXPECTED[0].token_ids
    assert len(read) <= 4 + 2 * SERVICE.rows


def test_a_row_that_can_never_fit_is_refused():
    server = Server(MODEL, PARAMS, drafter=Autoregressive(), service=SERVICE)
    with pytest.raises(CapacityError, match=r"row 0 needs 97 slots .* at most 96"):
        server.submit(Arrival(prompt=some(90), max_new_tokens=7))
    small = dataclasses.replace(SERVICE, pages=3)
    server = Server(MODEL, PARAMS, drafter=Autoregressive(), service=small)
    with pytest.raises(CapacityError, match=r"needs 13 slots .* at most 12"):
        server.submit(Arrival(prompt=some(9), max_new_tokens=4))
    with pytest.raises(ConfigError, match="top_p is 2"):
        server.submit(Arrival(prompt=[1], max_new_tokens=1, sampling={"top_p": 2}))
    with pytest.raises(ConfigError, match="sampling has 'verify', expected one of"):
        server.submit(
            Arrival(prompt=[1], max_new_tokens=1, sampling={"verify": "reject"})
        )
    with pytest.raises(ConfigError, match="cannot serve: rows is 0"):
        Service(rows=0)
    assert server.idle and server.step() == []
