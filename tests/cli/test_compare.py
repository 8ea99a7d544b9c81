"""`jaxllm compare`, called in this process on small models."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from matplotlib import image

from jaxllm.drafting import METHODS
from jaxllm.evaluation import DEMO_METHODS, divergence
from tests.cli.conftest import POSITIONS, write_rows
from tests.evaluation.drafters import Bent

SHORT = ("--max_new_tokens=4", "--runs=1")
ROWS = [
    {"id": "a", "prompt": "Hello", "category": "x"},
    {"id": "b", "turns": ["Hello Tom"], "category": "y"},
    {"id": "c", "question": "Hi", "category": "x"},
]


@pytest.fixture
def compare(jaxllm, checkpoint, tmp_path):
    """`jaxllm compare` with the tiny model and three prompts of two categories."""
    prompts = write_rows(tmp_path / "rows.jsonl", ROWS)

    def run(*arguments, model=checkpoint, prompts=prompts):
        flags = ("--model", model, "--prompts", prompts, "--output", tmp_path / "out")
        return jaxllm("compare", *flags, *SHORT, *arguments)

    return run


def results(folder):
    return json.loads((folder / "results.json").read_text())


def assert_refused(found, message):
    assert (found.code, found.out) == (2, "")
    assert found.err == f"jaxllm compare: {message}\n"


@pytest.mark.slow
def test_no_arguments_compare_the_shipped_model(jaxllm, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = jaxllm("compare", *SHORT, "--limit=1")
    assert found.code == 0, found.err
    folder = tmp_path / "comparison"
    assert sorted(p.name for p in folder.iterdir()) == [
        "comparison.png",
        "results.json",
    ]
    whole = results(folder)
    assert whole["model"] == "demo" and whole["dtype"] == "float32"
    assert whole["prompts"]["count"] == 3
    assert [m["name"] for m in whole["methods"]] == list(DEMO_METHODS)
    for method in whole["methods"]:
        assert method["lossless"] is True
        assert list(method["by_category"]) == ["story", "repetition", "dialogue"]
        assert method["tokens"] == 3 * 4
    lines = found.out.splitlines()
    count = len(DEMO_METHODS)
    assert lines[0].split() == [
        *("method", "lossless", "tokens/pass", "speed-up", "tokens/s"),
        *("draft", "passes"),
    ]
    assert [line.split()[0] for line in lines[1 : 1 + count]] == list(DEMO_METHODS)
    assert all(line.split()[1] == "✓" for line in lines[1 : 1 + count])
    assert lines[1].split()[2:5] == ["1.00", "1.00", "(1.00-1.00)"]
    assert lines[2 + count].split()[-3:] == ["story", "repetition", "dialogue"]
    assert lines[-2:] == [
        f"results: {os.path.join('comparison', 'results.json')}",
        f"picture: {os.path.join('comparison', 'comparison.png')}",
    ]
    cost = found.err.splitlines()
    assert len(cost) == 1
    assert cost[0].startswith("jaxllm compare: parameters ")
    assert f" MB, methods {count}, prompts 3, shapes to compile {count}, " in cost[0]
    picture = image.imread(folder / "comparison.png")
    assert picture.shape[1] == 1500 and np.ptp(picture[..., :3]) > 0.5


def test_flags_reach_the_comparison(compare, tmp_path):
    options = {"temperature": 0.7, "top_k": 5, "top_p": 0.9, "min_p": 0.01, "seed": 3}
    flags = [f"--{name}={value}" for name, value in options.items()]
    decode = "--decode=autoregressive:query_width=2"
    found = compare(decode, *flags, "--verify=reject", "--batch=2", "--limit=1")
    assert found.code == 0, found.err
    whole = results(tmp_path / "out")
    assert whole["config"] == {
        "runs": 1,
        "max_new_tokens": 4,
        "batch": 2,
        **{name: options[name] for name in ("temperature", "top_k", "top_p")},
        "min_p": 0.01,
        "seed": 3,
        "verify": "reject",
    }
    assert whole["seed"] == 3 and whole["prompts"]["count"] == 2
    assert whole["prompts"]["path"] == str(tmp_path / "rows.jsonl")
    [method] = whole["methods"]
    assert method["name"] == "autoregressive:query_width=2"
    assert method["lossless"] is None
    assert found.out.splitlines()[1].split()[:3] == [method["name"], "-", "1.00"]


def test_a_method_that_is_not_lossless_ends_with_1(compare, tmp_path, monkeypatch):
    monkeypatch.setitem(METHODS, "bent", Bent)
    # Only the second prompt is long enough to come to this position.
    name = f"bent:position={len('Hello Tom') + 2}"
    found = compare("--decode", name)
    assert found.code == 1
    plain, wrong = results(tmp_path / "out")["methods"]
    assert (plain["name"], plain["lossless"]) == ("autoregressive", True)
    first = wrong["first_divergence"]
    assert (first["row"], first["position"], first["id"]) == (1, 2, "b")
    table = {line.split()[0]: line.split()[1] for line in found.out.splitlines()[1:3]}
    assert table == {"autoregressive": "✓", name: "✗"}
    accusation = found.err.splitlines()[-1]
    assert accusation.startswith(
        f"jaxllm compare: {name} is not lossless: 1 of 3 rows differ from "
        f"autoregressive; the first is row 1 (id 'b'), from position 2 on: token "
        f"{first['found']} "
    )
    assert f", expected token {first['expected']} " in accusation
    picture = image.imread(tmp_path / "out" / "comparison.png")
    assert picture.shape[1] == 1500 and np.ptp(picture[..., :3]) > 0.5


def test_a_near_tie_is_shown(compare, tmp_path, monkeypatch):
    monkeypatch.setitem(METHODS, "bent", Bent)
    monkeypatch.setattr(divergence, "FLOAT32_TIE", 1e3)
    found = compare("--decode=bent:position=7")
    assert found.code == 0
    wrong = results(tmp_path / "out")["methods"][1]
    assert (wrong["lossless"], wrong["near_ties"]) == (True, 1)
    assert found.out.splitlines()[2].split()[1:5] == ["✓", "(1", "near", "tie)"]


def test_dtypes_and_prompts_without_categories(compare, tmp_path):
    prompts = write_rows(tmp_path / "ids.jsonl", [{"token_ids": [5, 6]}])
    found = compare("--decode=autoregressive", "--dtype=bfloat16", prompts=prompts)
    assert found.code == 0, found.err
    whole = results(tmp_path / "out")
    assert whole["dtype"] == "bfloat16"
    assert list(whole["methods"][0]["by_category"]) == ["all"]
    assert "by category" not in found.out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--decode=autoregresive"],
            "unknown method: 'autoregresive', expected one of "
            f"{', '.join(sorted(METHODS))}. Did you mean 'autoregressive'?",
        ),
        (
            ["--decode=autoregressive", "--decode=autoregressive"],
            "cannot compare: 'autoregressive': is there twice, expected once. Leave "
            "one out.",
        ),
        (
            ["--decode=autoregressive:width=2"],
            "unknown field: autoregressive: 'width', expected one of query_width. "
            "Choose one of these.",
        ),
        (
            ["--prompts=/no/such/file.jsonl"],
            "cannot read prompts: /no/such/file.jsonl: No such file or directory, "
            "expected a JSONL file. Correct --prompts.",
        ),
        (
            ["--runs=0"],
            "cannot read flags: --runs: '0', expected an integer, 1 or more. Correct "
            "it.",
        ),
        (
            ["--verify=mach"],
            "cannot read flags: --verify: 'mach', expected one of match, reject. "
            "Correct it.",
        ),
        (
            ["--dekode=jacobi"],
            "cannot read flags: --dekode: no such flag, expected one that --help "
            "lists. Did you mean --decode?",
        ),
    ],
)
def test_a_mistake_is_one_line_before_anything_is_loaded(
    flags, message, jaxllm, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    assert_refused(jaxllm("compare", "--model=/no/such/model", *flags), message)
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_is_not_there(jaxllm, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = jaxllm("compare", "--model=dmeo")
    assert (found.code, found.out) == (2, "")
    assert found.err.startswith("jaxllm compare: cannot find model: 'dmeo': no such")
    assert list(tmp_path.iterdir()) == []


def test_a_prompt_that_is_too_long(compare, tmp_path):
    prompts = write_rows(tmp_path / "long.jsonl", [{"prompt": "a" * POSITIONS}])
    found = compare("--decode=autoregressive", prompts=prompts)
    assert (found.code, found.out) == (2, "")
    assert "cannot generate: prompt 0 has 96 tokens, expected at most 92" in found.err


def test_an_output_that_cannot_be_a_folder(compare, tmp_path):
    (tmp_path / "out").touch()
    assert_refused(
        compare("--decode=autoregressive"),
        f"cannot write results: {tmp_path / 'out'}: File exists, expected a folder to "
        "write to. Correct --output.",
    )


def test_a_bar_is_shown_on_terminals_only(compare, monkeypatch):
    assert "tokens/s" not in compare("--decode=autoregressive").err
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    cost, *drawn = compare("--decode=autoregressive").err.splitlines()
    assert cost.startswith("jaxllm compare: parameters ")
    # Two runs of one shape warm up, then three prompts are timed.
    assert "5/5" in drawn[-1] and "tokens/s" in drawn[-1]


def test_mistakes_on_the_command_line_are_found_without_jax():
    code = (
        "import sys\n"
        "from jaxllm.cli.main import main\n"
        "for a in ('--help', '--runs=0', '--xyzzy'): main(['compare', a])\n"
        "print('jax' in sys.modules, 'numpy' in sys.modules)"
    )
    child = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60
    )
    assert child.stdout.splitlines()[-1] == "False False", child.stderr
