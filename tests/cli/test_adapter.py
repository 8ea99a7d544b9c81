"""`--adapter`: it changes the text, and a wrong one is a line."""

import dataclasses
import json

import jax
import pytest

from jaxllm import api
from jaxllm.checkpoints import save_adapter
from jaxllm.compression import LoraConfig, add_lora, merge, trainable
from jaxllm.core.partition import join, split

PROMPT = ("--prompt", "Once", "--max_new_tokens", "12")


@pytest.fixture(scope="module")
def adapted(checkpoint):
    lm = api.load(str(checkpoint), dtype="float32")
    config = LoraConfig(rank=4, targets=("query", "value", "down"))
    factors, rest = split(add_lora(lm.params, config, jax.random.key(0)), trainable)
    factors = jax.tree.map(lambda x: x + 0.3, factors)
    return dataclasses.replace(lm, params=join(factors, rest))


@pytest.fixture(scope="module")
def adapter(adapted, tmp_path_factory):
    directory = tmp_path_factory.mktemp("adapters") / "adapter"
    save_adapter(adapted, directory)
    return directory


def test_the_text_is_the_adapted_models(generate, adapter, adapted, tmp_path):
    plain = generate(*PROMPT)
    found = generate(*PROMPT, "--adapter", adapter)
    assert (found.code, found.err) == (0, "") and found.out != plain.out
    merged = dataclasses.replace(adapted, params=merge(adapted.params))
    [result] = api.generate(merged, ["Once"], max_new_tokens=12)
    assert found.out.rstrip("\n") == result.text.rstrip("\n")
    # Merged and saved, it is a model like any other.
    api.save(adapted, tmp_path / "merged", merge=True)
    assert generate(*PROMPT, model=tmp_path / "merged").out == found.out


def test_a_drafter_gives_the_adapted_models_tokens(generate, adapter):
    flags = (*PROMPT, "--adapter", adapter, "--decode")
    wanted = generate(*flags, "autoregressive")
    assert generate(*flags, "jacobi:window=4").out == wanted.out


def test_a_job_does_not_go_on_with_another_adapter(generate, adapter, tmp_path):
    output = tmp_path / "rows.jsonl"
    first = generate(*PROMPT, "--output", output, "--adapter", adapter)
    assert first.code == 0
    again = generate(*PROMPT, "--output", output)
    assert again.code == 2 and "was made with --adapter" in again.err


def test_what_is_no_adapter_is_one_line(generate, checkpoint):
    found = generate(*PROMPT, "--adapter", checkpoint)
    assert (found.code, found.out) == (2, "")
    assert found.err == (
        f"jaxllm generate: cannot load adapter: {checkpoint}/adapter_config.json: No "
        "such file or directory, expected a JSON file. Check the path.\n"
    )


def test_an_adapter_for_another_model_is_said(generate, adapter, tmp_path):
    path = tmp_path / "other"
    path.mkdir()
    for file in adapter.iterdir():
        (path / file.name).write_bytes(file.read_bytes())
    content = json.loads((path / "adapter_config.json").read_text())
    content["base_model_name_or_path"] = "org/elsewhere"
    (path / "adapter_config.json").write_text(json.dumps(content))
    found = generate(*PROMPT, "--adapter", path)
    assert found.code == 0
    assert found.err.startswith(
        "jaxllm generate: the adapter was made for 'org/elsewhere' and is used with "
    )
    assert found.err.count("\n") == 1
