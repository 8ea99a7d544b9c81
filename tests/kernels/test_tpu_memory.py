"""The kernels compiled for every TPU generation: what they take beside operands."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from pallas_kernels import dispatch

# The most that a kernel may take beside its operands and results, in bytes. Logits of
# the prefix shape would be 134 MB; a copy of the cache 2.1 GB, of one layer 0.5 GB.
LIMITS = {
    "decode_attention": 4e6,
    "prefix_attention": 4e6,
    # Queries and outputs change places of heads and tokens.
    "flash_attention": 1e8,
    "narrow heads": 4e6,
    "decode loop": 2e7,
}
PROGRAM = pathlib.Path(__file__).with_name("tpu_program.py")


@pytest.mark.slow
def test_kernels_compile_for_every_generation_and_copy_no_cache() -> None:
    pytest.importorskip("libtpu", reason="the TPU compiler is not installed")
    environment = os.environ | {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": "v5litepod-8",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "JAX_PLATFORMS": "cpu",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # beside another test's compiler
    }
    run = subprocess.run(
        [sys.executable, str(PROGRAM), *dispatch.GENERATIONS],
        env=environment,
        capture_output=True,
        text=True,
        timeout=1800,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    found = [json.loads(line) for line in run.stdout.splitlines()]
    ops = ("merge_lse", *LIMITS)
    assert [(x["generation"], x["op"]) for x in found] == [
        (generation, op) for generation in dispatch.GENERATIONS for op in ops
    ]
    for x in found:
        assert x["temp_bytes"] <= LIMITS.get(x["op"], 0), x
        assert x["kernels"] == (x["op"] in LIMITS), x
        if x["op"] == "decode loop":
            assert x["alias_bytes"] >= x["argument_bytes"], x
