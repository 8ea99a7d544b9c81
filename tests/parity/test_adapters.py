"""Adapters of the PEFT library: ours load there, theirs load here, the same logits."""

import json
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.checkpoints import load_adapter, load_language_model, save_adapter
from tests.checkpoints.adapter_files import with_random_lora
from tests.checkpoints.small_checkpoint import CONFIGS, write_checkpoint

pytestmark = pytest.mark.parity

torch = pytest.importorskip(
    "torch", reason="torch is not installed; the extra 'parity' brings it"
)
peft = pytest.importorskip(
    "peft", reason="peft is not installed; the extra 'parity' brings it"
)

TOKENS = np.random.default_rng(1).integers(4, 64, (2, 24))
TARGETS = {
    "gpt2": ["c_attn", "c_proj", "c_fc"],
    "phi3": ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"],
}
SEPARATE = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.fixture
def base(tmp_path):
    """A function that writes a checkpoint and loads it there."""
    import transformers

    def load(name):
        if not (tmp_path / name).exists():
            write_checkpoint(tmp_path / name, CONFIGS[name])
        return transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path / name, dtype=torch.float32, attn_implementation="eager"
        ).eval()

    return load


def theirs(model):
    with torch.no_grad():
        return model.eval()(torch.tensor(TOKENS)).logits.numpy()


def ours(lm):
    return np.asarray(jax.jit(lm.model)(lm.params, jnp.asarray(TOKENS)).logits_BTV)


def agree(a, b):
    assert np.abs(a - b).max() <= 1e-4 * max(1.0, np.abs(b).max())


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("targets", [None, ("value", "down")])
def test_peft_reads_ours(tmp_path, base, name, targets):
    plain = base(name)
    lm = load_language_model(tmp_path / name, dtype="float32")
    adapted = with_random_lora(lm, targets, rank=4, alpha=6.0, rslora=True)
    save_adapter(adapted, tmp_path / "adapter")
    without = theirs(plain)
    with warnings.catch_warnings():
        # What it does not find or does not expect it only warns of.
        warnings.simplefilter("error", UserWarning)
        model = peft.PeftModel.from_pretrained(plain, tmp_path / "adapter")
    agree(ours(adapted), theirs(model))
    assert np.abs(theirs(model) - without).max() > 1e-2


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("rslora", [False, True])
def test_we_read_pefts(tmp_path, base, name, rslora):
    config = peft.LoraConfig(
        r=3,
        lora_alpha=5,
        lora_dropout=0.1,
        use_rslora=rslora,
        target_modules=TARGETS.get(name, SEPARATE),
        rank_pattern={TARGETS.get(name, SEPARATE)[0]: 5},
        init_lora_weights=False,
        task_type="CAUSAL_LM",
        fan_in_fan_out=name == "gpt2",
    )
    torch.manual_seed(0)
    model = peft.get_peft_model(base(name), config)
    model.save_pretrained(tmp_path / "adapter")
    lm = load_language_model(tmp_path / name, dtype="float32")
    adapted = load_adapter(tmp_path / "adapter", lm)
    agree(ours(adapted), theirs(model))
    assert np.abs(ours(adapted) - ours(lm)).max() > 1e-2
    # And back again: a file of ours that says the same.
    save_adapter(adapted, tmp_path / "again")
    model = peft.PeftModel.from_pretrained(base(name), tmp_path / "again")
    agree(ours(adapted), theirs(model))


def test_pefts_own_default_modules_and_one_layer(tmp_path, base):
    config = peft.LoraConfig(
        r=2, layers_to_transform=[1], target_modules=["q_proj"], init_lora_weights=False
    )
    model = peft.get_peft_model(base("llama"), config)
    model.save_pretrained(tmp_path / "adapter")
    stored = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert stored["layers_to_transform"] == [1]
    lm = load_language_model(tmp_path / "llama", dtype="float32", stacks=(3,))
    agree(ours(load_adapter(tmp_path / "adapter", lm)), theirs(model))


def test_an_adapter_beside_a_merged_one(tmp_path, base):
    # What peft merges is what we merge.
    from jaxllm.checkpoints import save_language_model

    plain = base("qwen3")
    lm = load_language_model(tmp_path / "qwen3", dtype="float32")
    adapted = with_random_lora(lm, rank=4)
    save_adapter(adapted, tmp_path / "adapter")
    merged = peft.PeftModel.from_pretrained(plain, tmp_path / "adapter")
    merged = merged.merge_and_unload()
    save_language_model(adapted, tmp_path / "merged", merge=True)
    again = load_language_model(tmp_path / "merged", dtype="float32")
    agree(ours(again), theirs(merged))
