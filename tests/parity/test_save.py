"""What is saved here, transformers reads, and computes the same with it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.checkpoints import load_language_model, save_language_model
from tests.checkpoints.small_checkpoint import CONFIGS, write_checkpoint

pytestmark = pytest.mark.parity


@pytest.fixture(scope="module")
def reference():
    """A function from a directory to the reference's logits of some tokens."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")

    def logits(directory, tokens):
        model, report = transformers.AutoModelForCausalLM.from_pretrained(
            directory,
            dtype=torch.float32,
            trust_remote_code=False,
            attn_implementation="eager",
            output_loading_info=True,
        )
        assert not any(report[key] for key in ("missing_keys", "unexpected_keys"))
        assert not report["mismatched_keys"]
        with torch.no_grad():
            return model.eval()(torch.tensor(tokens)).logits.numpy()

    return logits


@pytest.mark.parametrize("name", CONFIGS)
def test_transformers_computes_the_same_from_a_saved_model(tmp_path, name, reference):
    write_checkpoint(tmp_path / "original", CONFIGS[name])
    lm = load_language_model(tmp_path / "original", dtype="float32")
    save_language_model(lm, tmp_path / "saved", max_shard_bytes=40_000)
    tokens = np.random.default_rng(1).integers(4, 64, (2, 24))
    saved = reference(tmp_path / "saved", tokens)
    # Bit for bit: the weights and the configuration are the same.
    assert (saved == reference(tmp_path / "original", tokens)).all()
    ours = np.asarray(jax.jit(lm.model)(lm.params, jnp.asarray(tokens)).logits_BTV)
    assert np.abs(ours - saved).max() < 1e-4 * max(1.0, np.abs(saved).max())


@pytest.mark.parametrize("name", CONFIGS)
def test_transformers_reads_a_configuration_written_anew(tmp_path, name, reference):
    # As for a model without a config.json of its own: everything comes from ours.
    write_checkpoint(tmp_path / "original", CONFIGS[name])
    lm = load_language_model(tmp_path / "original", dtype="float32")
    tokens = np.random.default_rng(1).integers(4, 64, (2, 24))
    wanted = reference(tmp_path / "original", tokens)
    save_language_model(dataclasses.replace(lm, hf_config={}), tmp_path / "saved")
    np.testing.assert_allclose(
        reference(tmp_path / "saved", tokens), wanted, rtol=1e-6, atol=1e-6
    )


@pytest.mark.data
@pytest.mark.parametrize("name", ["stories260K", "babyllama105"])
def test_a_real_checkpoint_and_its_tokenizer(data_dir, tmp_path, name, reference):
    import transformers

    source = data_dir / "models" / name
    lm = load_language_model(source, dtype="float32")
    save_language_model(lm, tmp_path / "saved")
    text = "Once upon a time"
    theirs = transformers.AutoTokenizer.from_pretrained(
        tmp_path / "saved", trust_remote_code=False
    )
    ids = lm.tokenizer.encode(text)
    assert theirs.encode(text) == ids
    logits = reference(tmp_path / "saved", [ids])
    ours = np.asarray(lm.model(lm.params, jnp.asarray([ids])).logits_BTV)
    assert np.abs(ours - logits).max() < 1e-4
