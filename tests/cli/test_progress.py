"""The totals of a run."""

import time

import jax
import pytest

from jaxllm.api import Result
from jaxllm.cli.progress import Meter


def result(passes, accepted, tested, new=3, emitted=4):
    stats = {
        "target_passes": passes,
        "emitted": emitted,
        "drafted": 2,
        "accepted": accepted,
        "tested": tested,
    }
    return Result("", [7] * new, "stop", [], stats)


def test_totals_are_sums_over_rows():
    meter = Meter()
    meter.add(5, result(2, [2, 1], [2, 2]))
    meter.add(6, result(3, [3, 2, 0], [3, 2, 0]))
    meter.failed += 1
    totals = meter.totals()
    assert totals["rows"] == 2 and totals["failed"] == 1
    assert totals["prompt_tokens"] == 11
    assert totals["new_tokens"] == 6 and totals["emitted"] == 8
    assert totals["drafted"] == 4
    assert totals["target_passes"] == 5
    assert totals["tokens_per_pass"] == 8 / 5
    assert totals["acceptance_by_depth"] == [0.75, 0.0]


def test_nothing_is_counted_before_anything_ran():
    totals = Meter().totals()
    assert totals["tokens_per_pass"] == totals["tokens_per_second"] == 0
    assert totals["seconds"] == 0


def test_compiling_is_counted_inside_and_not_elsewhere():
    meter = Meter()
    with meter:
        jax.jit(lambda x: x * 3 + 1)(1.0)
    counted = meter.totals()
    assert 0 < counted["compile_seconds"] < counted["seconds"]
    jax.jit(lambda x: x * 5 + 1)(1.0)
    assert meter.totals()["compile_seconds"] == counted["compile_seconds"]


def test_compiling_is_left_out_of_the_speed():
    meter = Meter()
    meter.add(1, result(1, [1], [1], new=100))
    with meter:
        jax.jit(lambda x: x * 7 + 1)(1.0)
        time.sleep(0.1)
    totals = meter.totals()
    running = totals["seconds"] - totals["compile_seconds"]
    assert totals["tokens_per_second"] == pytest.approx(100 / running, rel=0.1)
