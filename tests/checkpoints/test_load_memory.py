"""Loading a gigabyte needs little more memory than the parameters themselves."""

import json
import subprocess
import sys

import pytest

from tests.conftest import ROOT


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    "case",
    ["bfloat16", "float32>bfloat16", "bfloat16,stacks,int8", "bfloat16,devices=8"],
)
def test_peak_memory_is_that_of_the_parameters(tmp_path, case):
    output = tmp_path / "load.json"
    script = ROOT / "experiments" / "measure_load.py"
    child = subprocess.run(
        [sys.executable, str(script), f"--case={case}", f"--output={output}"],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert child.returncode == 0, child.stdout + child.stderr[-2000:]
    (row,) = json.loads(output.read_text())["rows"]
    assert row["final"] > (0.45e9 if "int8" in case else 0.9e9)
    assert 0.9 < row["ratio"] < 1.3
