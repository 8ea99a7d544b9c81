"""Adapters that do not fit: each is a sentence, and no pickle is opened."""

import re
import warnings

import numpy as np
import pytest

from jaxllm.checkpoints import AdapterWarning, load_adapter, save_adapter
from jaxllm.core import CheckpointError, ConfigError
from tests.checkpoints.adapter_files import (
    PREFIX,
    draw,
    load,
    query_tensors,
    with_random_lora,
    write_adapter,
)


def test_another_base_model_is_a_warning(tmp_path):
    lm = load(tmp_path / "model")
    for base, warns in (
        ("org/Another-7B", True),
        ("hub/MODEL", False),
        ("", False),
        (None, False),
    ):
        where = tmp_path / f"adapter{warns}{base and len(base)}"
        write_adapter(where, query_tensors(), base_model_name_or_path=base)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            load_adapter(where, lm)
        texts = [str(w.message) for w in caught if w.category is AdapterWarning]
        assert len(texts) == warns
        if warns:
            assert "'org/Another-7B'" in texts[0] and "same model?" in texts[0]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"peft_type": "IA3"},
            "'peft_type' is 'IA3', expected 'LORA'. Only LoRA is implemented.",
        ),
        (
            {"use_dora": True},
            "'use_dora' is True, expected none. Only plain LoRA of projections is "
            "implemented.",
        ),
        (
            {"modules_to_save": ["lm_head"]},
            "'modules_to_save' is ['lm_head'], expected none. Only plain LoRA of "
            "projections is implemented.",
        ),
        (
            {"bias": "all"},
            "'bias' is 'all', expected 'none'. Trained biases are not implemented.",
        ),
        (
            {"init_lora_weights": "pissa_niter_4"},
            "'init_lora_weights' is 'pissa_niter_4', expected true, false or one of "
            "gaussian, orthogonal, eva. It changes the base model too: let peft "
            "convert it, with save_pretrained(..., "
            "path_initial_model_for_weight_conversion=...).",
        ),
        ({"r": 0}, "'r' is 0, expected a whole number from 1. Correct the file."),
        ({"r": True}, "'r' is True, expected a whole number from 1. Correct the file."),
        (
            {"lora_alpha": "16"},
            "'lora_alpha' is '16', expected a number. Correct the file.",
        ),
        (
            {"rank_pattern": {"q_proj": 0}},
            "'rank_pattern' is {'q_proj': 0}, expected an object of module names and "
            "ranks. Correct the file.",
        ),
        (
            {"alpha_pattern": [1]},
            "'alpha_pattern' is [1], expected an object of module names and numbers. "
            "Correct the file.",
        ),
    ],
)
def test_a_configuration_of_another_kind_is_refused(tmp_path, config, message):
    lm = load(tmp_path / "model")
    write_adapter(tmp_path / "a", query_tensors(), **config)
    path = tmp_path / "a" / "adapter_config.json"
    with pytest.raises(ConfigError) as caught:
        load_adapter(tmp_path / "a", lm)
    assert str(caught.value) == f"cannot load adapter: {path}: {message}"


def without(tensors, end):
    return {key: x for key, x in tensors.items() if not key.endswith(end)}


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (
            query_tensors(layers=4),
            "{weights}: 'model.layers.3.self_attn.q_proj' is no projection of the "
            "model, expected q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, "
            "down_proj, lm_head of its layers. Check that the adapter was made for "
            "this model.",
        ),
        (
            query_tensors(last="self_attn.qkv_proj"),
            "{weights}: 'model.layers.0.self_attn.qkv_proj' is no projection of the "
            "model, expected q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, "
            "down_proj, lm_head of its layers. Check that the adapter was made for "
            "this model.",
        ),
        (
            query_tensors() | {f"{PREFIX}model.embed_tokens.lora_embedding_A": draw(2)},
            "{weights}: 'base_model.model.model.embed_tokens.lora_embedding_A' is "
            "neither A nor B of a projection, expected names such as "
            "'base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight'. Only "
            "plain LoRA of projections is implemented.",
        ),
        (
            without(query_tensors(), "1.self_attn.q_proj.lora_B.weight"),
            "{weights}: 1 tensors are missing, the first is 'base_model.model.model."
            "layers.1.self_attn.q_proj.lora_B.weight', expected A and B of every "
            "module that is adapted. Download it again, or check that it was made for "
            "this model.",
        ),
        (
            query_tensors(layers=2),
            "{weights}: 2 tensors are missing, the first is 'base_model.model.model."
            "layers.2.self_attn.q_proj.lora_A.weight', expected A and B of every "
            "module that is adapted. Download it again, or check that it was made for "
            "this model.",
        ),
        (
            query_tensors(rank=3),
            "{weights}: 'base_model.model.model.layers.0.self_attn.q_proj.lora_A."
            "weight' has shape (3, 32), expected (2, 32). Check r and rank_pattern in "
            "adapter_config.json.",
        ),
        (
            query_tensors(inputs=40),
            "{weights}: 'base_model.model.model.layers.0.self_attn.q_proj.lora_A."
            "weight' has shape (2, 40), expected (2, 32). Check that the adapter was "
            "made for this model.",
        ),
        (
            query_tensors(outputs=64),
            "{weights}: 'base_model.model.model.layers.0.self_attn.q_proj.lora_B."
            "weight' has shape (64, 2), expected (32, 2). Check that the adapter was "
            "made for this model.",
        ),
        (
            {key: x.astype(np.int8) for key, x in query_tensors().items()},
            "{weights}: 'base_model.model.model.layers.0.self_attn.q_proj.lora_A."
            "weight' has dtype int8, expected floating numbers. Save the adapter as "
            "float32.",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_refused(tmp_path, tensors, message):
    lm = load(tmp_path / "model")
    write_adapter(tmp_path / "a", tensors, target_modules=["q_proj"])
    weights = tmp_path / "a" / "adapter_model.safetensors"
    with pytest.raises(CheckpointError) as caught:
        load_adapter(tmp_path / "a", lm)
    wanted = f"cannot load adapter: {message.format(weights=weights)}"
    assert str(caught.value) == wanted


def test_pickles_and_empty_directories_are_refused(tmp_path):
    lm = load(tmp_path / "model")
    write_adapter(tmp_path / "a", query_tensors())
    weights = tmp_path / "a" / "adapter_model.safetensors"
    weights.rename(tmp_path / "a" / "adapter_model.bin")
    message = (
        "refusing to load 'adapter_model.bin': pickle files can run code. Convert it "
        "to safetensors with peft and torch, where you trust it: load it there and "
        "call save_pretrained('converted')."
    )
    with pytest.raises(CheckpointError, match=f"^{re.escape(message)}$"):
        load_adapter(tmp_path / "a", lm)
    (tmp_path / "a" / "adapter_model.bin").unlink()
    message = (
        f"cannot load adapter: {tmp_path / 'a'}: has no weights, expected "
        "adapter_model.safetensors. Check the path."
    )
    with pytest.raises(CheckpointError, match=f"^{re.escape(message)}$"):
        load_adapter(tmp_path / "a", lm)
    message = (
        f"cannot load adapter: '{tmp_path / 'b'}': no such directory, expected one "
        "with adapter_config.json, or 'hf:org/name'. Check the path."
    )
    with pytest.raises(CheckpointError, match=f"^{re.escape(message)}$"):
        load_adapter(tmp_path / "b", lm)


def test_nothing_is_overwritten(tmp_path):
    lm = with_random_lora(load(tmp_path / "model"), ("query",))
    with pytest.raises(CheckpointError, match=r"^cannot save adapter: .*is not empty"):
        save_adapter(lm, tmp_path / "model")
