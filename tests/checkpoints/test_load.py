"""Loading: every array from its place, bit for bit, or a sentence about why not."""

import json
import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jaxllm.checkpoints import load_language_model
from jaxllm.core import CheckpointError, ConfigError, Leaf
from jaxllm.models import restack
from jaxllm.models.families import family_of
from jaxllm.quantization import Int8, IntTensor, quantize_params
from tests.checkpoints.small_checkpoint import (
    CONFIGS,
    assert_equal_trees,
    make_tensors,
    parameter,
    write_checkpoint,
)

LLAMA = CONFIGS["llama"]


@pytest.mark.parametrize("stored", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", CONFIGS)
def test_every_parameter_is_its_tensor(tmp_path, name, dtype, stored):
    hf_config = CONFIGS[name]
    tensors = write_checkpoint(tmp_path, hf_config, make_tensors(hf_config, stored))
    lm = load_language_model(tmp_path, dtype=dtype, stacks=(1, 2))
    assert lm.hf_config == hf_config and lm.name == str(tmp_path)
    assert lm.config == family_of(hf_config).to_config(hf_config)
    assert lm.tokenizer is None and lm.mesh is None
    assert {x.dtype for x in jax.tree.leaves(lm.params)} == {jnp.dtype(dtype)}
    for rule in family_of(hf_config).rules(lm.config):
        wanted = tensors[rule.source].astype(np.float32)
        wanted = wanted.T if rule.transpose else wanted
        if rule.part is not None:
            wanted = wanted[..., slice(*rule.part)]
        got = parameter(lm.params, rule.path)
        assert (got == wanted.astype(got.dtype)).all(), rule


def test_stacks_are_chosen_at_load(tmp_path):
    write_checkpoint(tmp_path, LLAMA)
    single = load_language_model(tmp_path, dtype="float32")
    expected = (1, 1, 1) if jax.default_backend() == "cpu" else (3,)
    sizes = tuple(s["mlp"]["up"]["kernel"].shape[0] for s in single.params["stacks"])
    assert sizes == expected
    for stacks in ((3,), (2, 1)):
        lm = load_language_model(tmp_path, dtype="float32", stacks=stacks)
        assert_equal_trees(lm.params, restack(single.params, stacks))


def test_shards_and_a_single_file_give_the_same_tree(tmp_path):
    tensors = write_checkpoint(tmp_path / "one", LLAMA)
    write_checkpoint(tmp_path / "many", LLAMA, tensors, max_shard_bytes=20_000)
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 3
    one, many = (load_language_model(tmp_path / n) for n in ("one", "many"))
    assert_equal_trees(one.params, many.params)


def test_large_tensors_are_copied_by_pieces(tmp_path, monkeypatch):
    # Pieces and blocks far smaller than these tensors, and not dividing them.
    monkeypatch.setattr("jaxllm.checkpoints.assembly._CHUNK", 1)
    monkeypatch.setattr("jaxllm.checkpoints.assembly._BLOCK", 31)
    write_checkpoint(tmp_path, CONFIGS["phi3"])
    pieces = load_language_model(tmp_path, dtype="float32")
    monkeypatch.undo()
    whole = load_language_model(tmp_path, dtype="float32")
    assert_equal_trees(pieces.params, whole.params)


def test_gpt2_without_prefix_and_with_stored_masks(tmp_path):
    tensors = write_checkpoint(tmp_path / "usual", CONFIGS["gpt2"])
    bare = {k.removeprefix("transformer."): v for k, v in tensors.items()}
    for layer in range(3):
        bare[f"h.{layer}.attn.bias"] = np.tril(np.ones((1, 1, 8, 8), np.float32))
        bare[f"h.{layer}.attn.masked_bias"] = np.float32(-1e4).reshape(())
    write_checkpoint(tmp_path / "bare", CONFIGS["gpt2"], bare)
    usual, other = (load_language_model(tmp_path / n) for n in ("usual", "bare"))
    assert_equal_trees(usual.params, other.params)


def test_what_other_software_leaves_behind_is_ignored(tmp_path):
    tied = LLAMA | {"tie_word_embeddings": True}
    tensors = make_tensors(tied)
    assert "lm_head.weight" not in tensors
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)
    write_checkpoint(tmp_path, tied, tensors)
    assert "head" not in load_language_model(tmp_path).params


@pytest.mark.parametrize("method", ["int8", "int8:activations=8"])
@pytest.mark.parametrize("stacks", [(1, 1, 1), (1, 2)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_quantizing_while_loading_is_quantizing_afterwards(
    tmp_path, dtype, stacks, method
):
    write_checkpoint(tmp_path, LLAMA)
    plain = load_language_model(tmp_path, dtype=dtype, stacks=stacks)
    quantized = load_language_model(
        tmp_path, dtype=dtype, stacks=stacks, quantize=method
    )
    quantizer = Int8(activations=8 if "8:" in method else 0)
    assert_equal_trees(quantized.params, quantize_params(plain.params, quantizer))
    leaf = quantized.params["stacks"][1]["mlp"]["down"]["kernel"]
    assert isinstance(leaf, IntTensor) and leaf.shape == (stacks[1], 48, 32)


def test_an_array_is_not_read_before_it_is_quantized_but_once(tmp_path, monkeypatch):
    write_checkpoint(tmp_path, LLAMA)
    alive = []
    original = Int8.quantize

    def quantize(self, weight, *args, **kwargs):
        plain = [x for x in jax.live_arrays() if x.dtype == jnp.float32 and x.ndim == 3]
        alive.append(sum(x.nbytes for x in plain if 1 not in x.shape[1:]))
        return original(self, weight, *args, **kwargs)

    monkeypatch.setattr(Int8, "quantize", quantize)
    before = sum(
        x.nbytes
        for x in jax.live_arrays()
        if x.dtype == jnp.float32 and x.ndim == 3 and 1 not in x.shape[1:]
    )
    load_language_model(tmp_path, dtype="float32", quantize="int8")
    assert max(alive) - before <= 32 * 64 * 4  # the largest weight alone


def test_dtypes_of_the_policy(tmp_path):
    write_checkpoint(tmp_path, LLAMA)
    policy = load_language_model(tmp_path).model.policy
    assert policy.params == policy.compute == jnp.bfloat16
    on_cpu = jax.default_backend() == "cpu"
    assert policy.cache == (jnp.float32 if on_cpu else jnp.bfloat16)
    chosen = load_language_model(tmp_path, cache_dtype="bfloat16").model.policy
    assert chosen.cache == jnp.bfloat16


def refused(tmp_path, message, error=CheckpointError, **options):
    message = message.replace("DIR", str(tmp_path))
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        load_language_model(tmp_path, **options)
    assert re.match(r"^[a-z].+: .+", message) and len(message) < 400


@pytest.mark.parametrize(
    ("tensor", "shape", "wanted", "key"),
    [
        ("model.layers.1.self_attn.q_proj.weight", (30, 32), "(32, 32)", "HEADS"),
        ("model.layers.1.self_attn.o_proj.weight", (32, 30), "(32, 32)", "HEADS"),
        ("model.layers.2.self_attn.k_proj.weight", (32, 32), "(16, 32)", "KV"),
        ("model.layers.0.mlp.up_proj.weight", (48, 30), "(48, 32)", "hidden_size"),
        ("model.layers.0.mlp.down_proj.weight", (32, 50), "(32, 48)", "MLP"),
        ("model.norm.weight", (30,), "(32,)", "hidden_size"),
        ("model.embed_tokens.weight", (60, 32), "(64, 32)", "vocab_size"),
        ("lm_head.weight", (64, 31), "(64, 32)", "hidden_size"),
        ("lm_head.weight", (64,), "(64, 32)", "hidden_size"),
    ],
)
def test_a_wrong_shape_is_refused(tmp_path, tensor, shape, wanted, key):
    keys = {
        "HEADS": "num_attention_heads",
        "KV": "num_key_value_heads",
        "MLP": "intermediate_size",
    }
    tensors = make_tensors(LLAMA) | {tensor: np.zeros(shape, np.float32)}
    write_checkpoint(tmp_path, LLAMA, tensors)
    refused(
        tmp_path,
        f"cannot load weights: model.safetensors: '{tensor}' has shape {shape}, "
        f"expected {wanted}. Check {keys.get(key, key)} in config.json.",
    )


def test_keys_are_named_as_the_configuration_names_them(tmp_path):
    name = "transformer.h.1.attn.c_attn.weight"
    tensors = make_tensors(CONFIGS["gpt2"]) | {name: np.zeros((32, 90), np.float32)}
    write_checkpoint(tmp_path, CONFIGS["gpt2"], tensors)
    refused(
        tmp_path,
        f"cannot load weights: model.safetensors: '{name}' has shape (32, 90), "
        "expected (32, 96). Check n_head in config.json.",
    )


def test_missing_tensors_are_refused(tmp_path):
    tensors = make_tensors(LLAMA)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    del tensors["model.norm.weight"]
    write_checkpoint(tmp_path, LLAMA, tensors)
    refused(
        tmp_path,
        "cannot load weights: DIR: 2 of 30 tensors are missing, the first is "
        "'model.norm.weight', expected all of a llama model with 3 layers. Check that "
        "config.json belongs to these weights.",
    )


def test_a_missing_head_is_refused_unless_it_is_tied(tmp_path):
    tensors = make_tensors(LLAMA)
    del tensors["lm_head.weight"]
    write_checkpoint(tmp_path, LLAMA, tensors)
    refused(
        tmp_path,
        "cannot load weights: DIR: 'lm_head.weight' is missing, expected it because "
        "the output head is not tied to the embeddings. Check tie_word_embeddings in "
        "config.json.",
    )
    write = LLAMA | {"tie_word_embeddings": True}
    (tmp_path / "config.json").write_text(json.dumps(write))
    load_language_model(tmp_path)


def test_tensors_that_belong_nowhere_are_refused(tmp_path):
    write_checkpoint(tmp_path, LLAMA | {"num_hidden_layers": 2}, make_tensors(LLAMA))
    refused(
        tmp_path,
        "cannot load weights: DIR: 9 tensors belong to no parameter, the first is "
        "'model.layers.2.input_layernorm.weight', expected those of a llama model with "
        "2 layers. Check that config.json belongs to these weights.",
    )


def test_integers_are_refused(tmp_path):
    name = "model.layers.0.mlp.up_proj.weight"
    tensors = make_tensors(LLAMA) | {name: np.zeros((48, 32), np.uint8)}
    write_checkpoint(tmp_path, LLAMA, tensors)
    refused(
        tmp_path,
        f"cannot load weights: model.safetensors: '{name}' has dtype uint8, expected "
        "floating numbers. Use the checkpoint that is not quantized.",
    )


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("quantize", [None, "int8"])
def test_values_that_are_not_finite_are_refused_when_asked(tmp_path, bad, quantize):
    tensors = make_tensors(LLAMA)
    tensors["model.layers.2.self_attn.k_proj.weight"][3, 5] = bad
    write_checkpoint(tmp_path, LLAMA, tensors)
    load_language_model(tmp_path, quantize=quantize)
    refused(
        tmp_path,
        "cannot load weights: model.safetensors: "
        "'model.layers.2.self_attn.k_proj.weight' has values that are not finite in "
        "bfloat16, expected numbers. Download it again, or load it as float32.",
        check_finite=True,
        quantize=quantize,
    )


def test_bad_options_are_refused(tmp_path):
    write_checkpoint(tmp_path, LLAMA)
    with pytest.raises(ConfigError, match=r"^unknown method: 'int9'"):
        load_language_model(tmp_path, quantize="int9")
    with pytest.raises(ConfigError, match=r"^cannot restack: sizes \(2, 2\) sum to 4"):
        load_language_model(tmp_path, stacks=(2, 2))
    with pytest.raises(ConfigError, match=r"^cannot set dtype: 'int4' is unknown"):
        load_language_model(tmp_path, dtype="int4")


def test_code_and_pickles_of_a_checkpoint_are_refused(tmp_path):
    foreign = {"model_type": "strange", "auto_map": {"AutoModel": "code.Model"}}
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "config.json").write_text(json.dumps(foreign))
    with pytest.raises(CheckpointError, match=r"^refusing to load 'config\.json'"):
        load_language_model(tmp_path / "code")
    (tmp_path / "pickle").mkdir()
    (tmp_path / "pickle" / "config.json").write_text(json.dumps(LLAMA))
    (tmp_path / "pickle" / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(
        CheckpointError, match=r"^refusing to load 'pytorch_model\.bin'"
    ):
        load_language_model(tmp_path / "pickle")


def test_nothing_is_read_before_everything_is_checked(tmp_path, monkeypatch):
    tensors = make_tensors(LLAMA)
    tensors["model.layers.2.mlp.down_proj.weight"] = np.zeros((32, 8), np.float32)
    write_checkpoint(tmp_path, LLAMA, tensors)

    def read(self, index=()):
        raise AssertionError("read")

    monkeypatch.setattr("jaxllm.checkpoints.safetensors.LazyTensor.read", read)
    with pytest.raises(CheckpointError, match="has shape"):
        load_language_model(tmp_path)


def greedy(lm, ids, count):
    """Greedy ids by whole forwards of one padded shape; causal, so padding is free."""
    tokens = np.zeros((1, len(ids) + count), np.int32)
    tokens[0, : len(ids)] = ids
    forward = jax.jit(lambda p, t: lm.model(p, t).logits_BTV[0])
    first = None
    for position in range(len(ids), len(ids) + count):
        logits = np.asarray(forward(lm.params, jnp.asarray(tokens)))[position - 1]
        first = logits if first is None else first
        tokens[0, position] = logits.argmax()
    return first, tokens[0, len(ids) :].tolist()


@pytest.mark.data
@pytest.mark.parametrize("name", ["stories260K", "babyllama105"])
def test_real_checkpoints_give_the_golden_tokens(data_dir, name):
    directory = data_dir / "models" / name
    golden = json.loads((directory / "golden.json").read_text())
    lm = load_language_model(directory, dtype="float32")
    assert lm.generation.eos_ids == (2,)
    for prompt in golden["prompts"]:
        assert lm.tokenizer.encode(prompt["text"]) == prompt["ids"]
        logits, ids = greedy(lm, prompt["ids"], 64)
        top = sorted(range(len(logits)), key=lambda i: -logits[i])[:5]
        assert top == [i for i, _ in prompt["top5_last"]]
        wanted = [value for _, value in prompt["top5_last"]]
        # The file rounds to five digits.
        np.testing.assert_allclose(logits[top], wanted, atol=3e-5)
        assert ids == prompt["greedy_64"]


@pytest.mark.data
def test_a_quantized_real_checkpoint_stays_near(data_dir):
    directory = data_dir / "models" / "stories260K"
    plain = load_language_model(directory, dtype="float32")
    small = load_language_model(directory, dtype="float32", quantize="int8")
    tokens = jnp.asarray([plain.tokenizer.encode("Once upon a time, there was")])
    a, b = (
        np.asarray(jax.jit(m.model)(m.params, tokens).logits_BTV)
        for m in (plain, small)
    )
    assert 1e-3 < np.abs(a - b).max() < 1.0
    assert (a.argmax(-1) == b.argmax(-1)).mean() > 0.9
    weights = jax.tree.leaves(small.params, is_leaf=lambda x: isinstance(x, Leaf))
    assert sum(x.nbytes for x in weights) < 0.35 * sum(
        x.nbytes for x in jax.tree.leaves(plain.params)
    )


SHARDED = """
import jax, numpy as np, jax.numpy as jnp
from jaxllm.checkpoints import load_language_model
from jaxllm.models.sharding import param_shardings

assert len(jax.devices()) == 8
for directory, stacks, sizes, method in CASES:
    options = {"dtype": "float32", "quantize": method, "stacks": stacks}
    one = load_language_model(directory, **options)
    many = load_language_model(directory, mesh=sizes, **options)
    wanted = param_shardings(many.model, many.params, many.mesh)
    for a, b, s in zip(*map(jax.tree.leaves, (one.params, many.params, wanted))):
        assert b.sharding.is_equivalent_to(s, b.ndim)
        assert (np.asarray(a) == np.asarray(b)).all()
    split = [x for x in jax.tree.leaves(many.params) if not x.is_fully_replicated]
    tokens = jnp.arange(16, dtype=jnp.int32).reshape(2, 8)
    alone = np.asarray(jax.jit(one.model)(one.params, tokens).logits_BTV)
    with jax.set_mesh(many.mesh):
        spread = np.asarray(jax.jit(many.model)(many.params, tokens).logits_BTV)
    print(len(split), np.abs(alone - spread).max() / np.abs(alone).max())
"""


def test_eight_devices_give_the_logits_of_one(tmp_path, run_with_devices):
    for name in ("llama", "phi3", "gpt2"):
        write_checkpoint(tmp_path / name, CONFIGS[name])
    cases = [
        ("llama", (1, 1, 1), "data=2,tensor=4", None),  # more ways than kv heads
        ("phi3", (3,), "fsdp=4,tensor=2", None),
        ("llama", (1, 2), "fsdp=2,tensor=4", "int8"),
        ("gpt2", (3,), "data=4,tensor=2", None),
    ]
    cases = [(str(tmp_path / name), *rest) for name, *rest in cases]
    found = run_with_devices(8, f"CASES = {cases!r}\n{SHARDED}").splitlines()
    assert len(found) == len(cases)
    for line in found:
        split, difference = line.split()
        assert int(split) > 5 and float(difference) < 1e-5


def test_a_mesh_that_does_not_divide_is_refused_before_reading(
    tmp_path, run_with_devices
):
    write_checkpoint(tmp_path, LLAMA)
    (tmp_path / "model.safetensors").unlink()
    code = f"""
from jaxllm.checkpoints import load_language_model
from jaxllm.core import ShardingError
for sizes in ("tensor=8", "tensor=16"):
    try:
        load_language_model({str(tmp_path)!r}, mesh=sizes)
    except ShardingError as error:
        print(error)
"""
    assert run_with_devices(8, code).splitlines() == [
        "cannot shard: axis 'heads' has size 4, expected a multiple of 8 (mesh axes "
        "tensor). Choose mesh sizes that divide it.",
        "cannot make mesh: {'tensor': 16} needs 16 devices, expected at most 8, which "
        "is what there is. Choose smaller sizes.",
    ]
