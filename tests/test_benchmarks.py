"""The benchmark runs, says what it did, and judges rightly; nothing about time."""

import json
import os
import pathlib
import subprocess
import sys
import time

import numpy as np
import pytest

from benchmarks import verdicts
from benchmarks.gguf_model import _interleaved
from benchmarks.machine import OtherWork
from benchmarks.random_llama import MODELS, random_prompts
from benchmarks.workers import ContenderError, _check

ROOT = pathlib.Path(__file__).resolve().parent.parent
DECODE = "decode float32 batch 1"


def decode_row(contender, decode, end_to_end, **more):
    return {
        "kind": "decode",
        "setting": DECODE,
        "contender": contender,
        "status": "measured",
        "other_cores": 0.1,
        "decode_tokens_per_second_samples": decode,
        "end_to_end_tokens_per_second_samples": end_to_end,
        "bandwidth_share_samples": [0.7] * len(decode),
        "parameter_bytes": 300_000_000,
        "peak_bytes": 900_000_000,
        **more,
    }


def bar(rows, name, judged=True):
    (found,) = [r for r in verdicts.bars(rows, judged=judged) if r["name"] == name]
    return found


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    """The JSON of a run of this project alone, started as the docstring says."""
    path = tmp_path_factory.mktemp("benchmark") / "new" / "decode.json"
    child = subprocess.run(
        [
            sys.executable,
            "benchmarks/decode.py",
            "--model=tiny",
            "--rounds=2",
            "--prompt=8",
            "--new=4",
            "--prefill=16",
            "--batches=1",
            "--dtypes=float32",
            "--contenders=jaxllm,llama.cpp",
            f"--output={path}",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert child.returncode == 0, child.stderr[-4000:]
    assert "float32 share of read bandwidth" in child.stdout
    return json.loads(path.read_text())


def test_the_file_has_the_shape_of_every_result(result):
    assert set(result) == {"format", "claim", "paper", "rows", "environment"}
    about = result["environment"]
    assert about["rounds"] == 2
    assert about["versions"]["jax"]
    assert about["model"]["parameters"] == MODELS["tiny"].parameters
    assert len(about["prompts_sha256"]) == 64
    for row in result["rows"]:
        assert not any(isinstance(value, dict) for value in row.values())


def test_every_setting_has_a_row_for_each_contender(result):
    rows = [r for r in result["rows"] if r["kind"] in ("decode", "prefill")]
    found = {(r["setting"], r["contender"]) for r in rows}
    names = DECODE, "prefill 16 float32"
    assert found == {(n, c) for n in names for c in ("jaxllm", "llama.cpp")}
    for row in rows:
        assert row["status"] == "measured" or row["reason"]


def test_a_measured_row_has_rates_samples_and_memory(result):
    (row,) = [
        r
        for r in result["rows"]
        if r["kind"] == "decode" and r["contender"] == "jaxllm"
    ]
    assert (row["prompt_tokens"], row["new_tokens"], row["batch"]) == (8, 4, 1)
    for name in (
        "decode_tokens_per_second",
        "end_to_end_tokens_per_second",
        "first_token_seconds",
        "bandwidth_share",
    ):
        assert len(row[f"{name}_samples"]) == 2
        assert 0 < row[f"{name}_low"] <= row[name] <= row[f"{name}_high"]
    assert row["compile_seconds"] >= 0
    assert row["peak_bytes"] > row["parameter_bytes"] > 0


def test_another_model_than_that_of_the_bars_is_not_judged(result):
    rows = {r["name"]: r for r in result["rows"] if r["kind"] == "bar"}
    share = rows["float32 share of read bandwidth"]
    assert share["value"] > 0
    assert share["met"] is None
    assert share["reason"] == "set for another model or shape"
    assert rows["float32 over HF eager"]["reason"] == "HF eager: did not take part"


def test_a_ratio_is_the_lower_of_decode_and_end_to_end():
    rows = [
        decode_row("jaxllm", [30.0, 28.0, 26.0], [20.0, 20.0, 20.0]),
        decode_row("HF eager", [10.0, 10.0, 10.0], [8.0, 8.0, 8.0]),
    ]
    found = bar(rows, "float32 over HF eager")
    assert (found["value"], found["decode"], found["end_to_end"]) == (2.5, 2.8, 2.5)
    assert found["met"] is True
    rows[0]["end_to_end_tokens_per_second_samples"] = [18.0, 18.0, 18.0]
    assert bar(rows, "float32 over HF eager")["met"] is False
    assert bar(rows, "float32 over HF eager", judged=False)["met"] is None


def test_ratios_are_taken_within_a_round():
    # The machine was three times as slow in the last round, for both.
    rows = [
        decode_row("jaxllm", [30.0, 30.0, 10.0], [30.0, 30.0, 10.0]),
        decode_row("HF eager", [12.0, 10.0, 4.0], [12.0, 10.0, 4.0]),
    ]
    found = bar(rows, "float32 over HF eager")
    assert (found["low"], found["value"], found["high"]) == (2.5, 2.5, 3.0)


def test_beside_other_work_only_memory_is_judged():
    row = decode_row("jaxllm", [1.0], [1.0], other_cores=0.7)
    share = bar([row], "float32 share of read bandwidth")
    assert share["met"] is None
    assert share["reason"] == "other work kept 0.7 cores busy"
    assert bar([row], "peak memory, float32")["met"] is True


def test_other_work_is_that_of_other_processes():
    busy = [sys.executable, "-c", "while True: pass"]
    with subprocess.Popen(busy) as child:
        try:
            ours, without = (
                OtherWork(own) for own in ([os.getpid(), child.pid], [os.getpid()])
            )
            time.sleep(0.5)
            ours, without = ours.cores(), without.cores()
        finally:
            child.kill()
    if ours is None:
        pytest.skip("this system does not tell")
    assert without > ours


def test_costs_have_an_upper_limit():
    rows = [
        decode_row("jaxllm", [17.0], [1.0]),
        decode_row("jaxllm wide", [10.0], [1.0]),
    ]
    name = "cost of 8 query rows over 1"
    assert bar(rows, name)["value"] == 1.7
    assert bar(rows, name)["met"] is True
    rows[1]["decode_tokens_per_second_samples"] = [9.0]
    assert bar(rows, name)["met"] is False


def test_memory_is_allowed_twice_the_parameters_and_400_megabytes():
    name = "peak memory, float32"
    for peak, met in ((1_000_000_000, True), (1_000_000_001, False)):
        row = decode_row("jaxllm", [1.0], [1.0], peak_bytes=peak)
        assert bar([row], name)["met"] is met


def test_the_first_difference_is_the_earliest_in_any_row():
    ours, theirs = [[1, 2, 3], [4, 5, 6]], [[1, 2, 9], [4, 9, 6]]
    assert verdicts.first_difference(ours, theirs) == {"row": 1, "index": 1}
    assert verdicts.first_difference(ours, ours) is None


def test_a_row_that_stopped_early_is_no_measurement():
    _check([4, 4], 2, 4)
    with pytest.raises(ContenderError, match=r"made \[4, 3\] tokens, expected 4"):
        _check([4, 3], 2, 4)


def test_prompts_of_a_batch_begin_with_the_prompt_of_one_row():
    one, eight = (random_prompts(256, rows, 16, seed=3) for rows in (1, 8))
    assert eight[0] == one[0]
    assert min(map(min, eight)) > 2  # no special tokens


def test_reordered_heads_rotate_alike():
    # Rotating neighbours of the reordered head equals rotating halves of the head.
    heads, size = 2, 6
    x = np.arange(heads * size, dtype=np.float32)[:, None]
    new = _interleaved(x, heads)[:, 0].reshape(heads, size // 2, 2)
    halves = x[:, 0].reshape(heads, 2, size // 2)
    np.testing.assert_array_equal(new[..., 0], halves[:, 0])
    np.testing.assert_array_equal(new[..., 1], halves[:, 1])
