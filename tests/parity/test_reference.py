"""Against the reference itself: are the golden files its answers, and our texts too?

Needs torch (extra `parity`); the real checkpoints need the development data.
"""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxllm.models import Context
from jaxllm.models.families import decoder_config, family_of
from tests.golden import make_golden
from tests.models.golden_files import (
    DIRECTORY,
    VARIANTS,
    config_json,
    golden,
    model_from,
)

pytestmark = pytest.mark.parity

torch = pytest.importorskip(
    "torch", reason="torch is not installed; the extra 'parity' brings it"
)

# Below this gap between the two largest logits rounding may decide.
UNDECIDED = 2e-4
NEW_TOKENS = 200


@pytest.fixture(autouse=True)
def one_thread():
    """Sums of several threads come in any order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_every_variant_is_committed():
    assert sorted(make_golden.VARIANTS) == VARIANTS


@pytest.mark.parametrize("variant", VARIANTS)
def test_golden_files_are_the_references(variant):
    model = make_golden.make_model(variant)
    arrays, committed = make_golden.golden_arrays(variant, model), golden(variant)
    assert arrays.keys() == committed.keys()
    for name, array in arrays.items():
        if array.dtype == np.float32:
            assert np.max(np.abs(array - committed[name])) <= 1e-5, name
        else:
            np.testing.assert_array_equal(array, committed[name], err_msg=name)
    stored = load_file(DIRECTORY / variant / "model.safetensors")
    for name, parameter in model.named_parameters():
        np.testing.assert_array_equal(parameter.detach(), stored[name], err_msg=name)


def test_rope_tables_are_the_references():
    committed = json.loads((DIRECTORY / "rope.json").read_text("utf-8"))
    tables = make_golden.rope_tables()
    assert tables.keys() == committed.keys()
    for name, table in tables.items():
        for key, value in table.items():
            if isinstance(value, dict):
                assert value == committed[name][key]
            else:
                np.testing.assert_allclose(value, committed[name][key], rtol=1e-6)


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_we_write_is_the_same_model_to_the_reference(variant):
    """`to_hf` content, read by transformers, gives the same logits."""
    import transformers

    source = config_json(variant)
    family = family_of(source)
    written = family.to_hf(decoder_config(source))
    config = transformers.AutoConfig.for_model(
        written.pop("model_type"), **written, pad_token_id=0
    )
    model = transformers.AutoModelForCausalLM.from_config(
        config, attn_implementation="eager", dtype=torch.float32
    ).eval()
    drawn = make_golden.make_model(variant)
    model.load_state_dict(drawn.state_dict())
    wanted = golden(variant)
    logits = make_golden.logits_of(model, wanted["tokens"])
    assert np.max(np.abs(logits - wanted["logits"])) <= 1e-5


def reference_greedy(model, prompt):
    """Ids that follow a prompt, and the gap of the two largest logits at each."""
    ids, gaps = [], []
    tokens, past = torch.tensor([prompt]), None
    with torch.no_grad():
        for _ in range(NEW_TOKENS):
            out = model(tokens, past_key_values=past, use_cache=True)
            past = out.past_key_values
            first, second = out.logits[0, -1].topk(2).values.tolist()
            gaps.append(first - second)
            tokens = out.logits[:, -1:].argmax(-1)
            ids.append(int(tokens))
    return ids, gaps


@functools.partial(jax.jit, static_argnums=0)
def extend(model, params, tokens_BT, cache):
    """The likeliest next token, and the cache grown by the tokens."""
    positions_BT = cache.length_B[:, None] + jnp.arange(tokens_BT.shape[1])
    forward = model(params, tokens_BT, Context(positions_BT, cache=cache))
    chosen = forward.logits_BTV[:, -1:].argmax(-1).astype(jnp.int32)
    return chosen, cache.append(forward.new_kv)


def our_greedy(model, params, prompt):
    """The same ids from our model: a prefill, then token by token from the cache."""
    cache = model.init_cache(params, 1, model.config.max_positions)
    ids, tokens = [], jnp.asarray([prompt], jnp.int32)
    for _ in range(NEW_TOKENS):
        tokens, cache = extend(model, params, tokens, cache)
        ids.append(int(tokens[0, 0]))
    return ids


@pytest.mark.data
@pytest.mark.parametrize("checkpoint", ["stories260K", "babyllama105"])
def test_greedy_text_of_real_checkpoints(data_dir, checkpoint):
    import transformers

    directory = data_dir / "models" / checkpoint
    config = json.loads((directory / "config.json").read_text("utf-8"))
    tensors = load_file(directory / "model.safetensors")
    # Some converters keep the tied head beside the table.
    tensors.pop("lm_head.weight", None)
    model, params = model_from(config, tensors)
    reference = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32
    ).eval()
    prompts = json.loads((directory / "golden.json").read_text("utf-8"))["prompts"]
    compared = 0
    for prompt in prompts:
        room = model.config.max_positions - len(prompt["ids"])
        assert room >= NEW_TOKENS, "the text would pass the model's positions"
        wanted, gaps = reference_greedy(reference, prompt["ids"])
        ids = our_greedy(model, params, prompt["ids"])
        for position, gap in enumerate(gaps):
            if gap < UNDECIDED:
                break
            assert ids[position] == wanted[position], (prompt["text"], position, gap)
            compared += 1
    assert compared >= len(prompts) * NEW_TOKENS // 2, "hardly anything was compared"
