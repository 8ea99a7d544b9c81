"""What a second process finds of the first: compiled programs."""

import json
import os
import pathlib
import resource
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
CODE = """
import json, sys
import jax
counts = {}
def count(event, **_):
    counts[event] = counts.get(event, 0) + 1
jax.monitoring.register_event_listener(count)
from jaxllm.cli.main import main
code = main(sys.argv[1:])
print(json.dumps(counts))
sys.exit(code)
"""


@pytest.mark.slow
def test_a_second_process_compiles_nothing_and_is_soon_there(tmp_path):
    """The shipped model's first text: 15 s at first, 6 s with compiled programs.

    Seconds of a processor, because other work on the machine does not lengthen those.
    """

    def run():
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        flags = ["--prompt=Once upon a time", "--stream", "--stats"]
        child = subprocess.run(
            [sys.executable, "-c", CODE, "generate", *flags],
            env=os.environ | {"HOME": str(tmp_path), "JAX_PLATFORMS": "cpu"},
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=240,
        )
        assert child.returncode == 0, child.stderr
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        [totals] = child.stderr.splitlines()
        assert json.loads(totals)["new_tokens"] > 0
        text, counts = child.stdout.rsplit("\n", 2)[:2]
        spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        return text, json.loads(counts), spent

    first_text, first, first_spent = run()
    second_text, second, second_spent = run()
    assert first["/jax/compilation_cache/cache_misses"] > 0
    assert second.get("/jax/compilation_cache/cache_misses", 0) == 0
    assert second["/jax/compilation_cache/cache_hits"] > 0
    assert first_text == second_text and len(first_text) > 100
    assert first_spent < 15 and second_spent < 6
