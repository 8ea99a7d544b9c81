"""`jaxllm systems`: what the registries hold, and nothing else."""

import importlib
import json
import pathlib

import pytest

from jaxllm.cli.systems import REGISTRIES

ROOT = pathlib.Path(__file__).resolve().parents[2]


@pytest.fixture
def rows(jaxllm):
    found = jaxllm("systems", "--json")
    assert (found.code, found.err) == (0, "")
    return json.loads(found.out)


def registered():
    for registry in REGISTRIES:
        entries = getattr(importlib.import_module(registry.module), registry.name)
        yield from ((registry.kind, name) for name in entries)


def test_everything_registered_is_listed(rows):
    assert [(row["kind"], row["name"]) for row in rows] == list(registered())
    assert {"autoregressive", "int8", "llama", "gpt2"} <= {row["name"] for row in rows}


def test_a_row_says_what_it_is(rows):
    for row in rows:
        assert row["what"] and row["status"] == "implemented"
        importlib.import_module(row["module"])
    [int8] = [row for row in rows if row["name"] == "int8"]
    assert "arXiv 2208.07339" in int8["source"]
    assert int8["options"] == {"activations": 0}


def test_the_evidence_is_in_the_repository(rows):
    named = {row["evidence"] for row in rows}
    assert [path for path in named if not (ROOT / path).is_file()] == []


@pytest.mark.parametrize("columns", [60, 120, 200])
def test_the_table_has_every_row(columns, jaxllm, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    found = jaxllm("systems")
    assert (found.code, found.err) == (0, "")
    header, *lines = found.out.splitlines()
    assert header.split() == ["kind", "name", "status", "evidence", "what"]
    begun = [tuple(line.split()[:2]) for line in lines if not line.startswith(" ")]
    assert begun == list(registered())
    if columns == 200:
        assert max(map(len, lines)) <= columns
