"""Every family against the reference: the golden logits, on every way to run a model.

The files are made by `tests/golden/make_golden.py`; torch is not needed here.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.models import Context, restack
from tests.models.golden_files import VARIANTS, golden, golden_model

TOLERANCE = 1e-4

each_variant = pytest.mark.parametrize("variant", VARIANTS)


def assert_close(logits, wanted):
    """The bar of the parity contract, and no NaN."""
    assert logits.shape == wanted.shape
    assert np.max(np.abs(np.asarray(logits) - wanted)) <= TOLERANCE


# One compile serves several tests of a variant, hence all of them give validity.
@functools.partial(jax.jit, static_argnums=0)
def run(model, params, tokens_BT, positions_BT, valid_BT):
    """A forward without a cache."""
    return model(params, tokens_BT, Context(positions_BT, valid_BT))


@functools.partial(jax.jit, static_argnums=0)
def extend(model, params, tokens_BT, context):
    """The cache grown by the valid tokens, and their logits."""
    forward = model(params, tokens_BT, context)
    count_B = context.valid_BT.sum(1)
    return context.cache.append(forward.new_kv, count_B=count_B), forward.logits_BTV


@functools.partial(jax.jit, static_argnums=(0, 4, 5))
def run_layers(model, params, x_BTD, context, start, stop):
    """A range of layers."""
    return model.run_layers(params, x_BTD, context, start, stop)


def counted(start, shape):
    """Positions of rows that go on at `start`."""
    return jnp.broadcast_to(start + jnp.arange(shape[1], dtype=jnp.int32), shape)


def run_chunks(model, params, tokens_BT, cuts, size):
    """Logits of a prefill in chunks that end at `cuts`, each padded to `size`."""
    total, logits, start = tokens_BT.shape[1], [], 0
    # Room beyond the tokens must not matter, neither to masks nor to frequencies.
    cache = model.init_cache(params, 2, total + 7)
    for cut in cuts:
        own = tokens_BT[:, start:cut]
        own = np.pad(own, ((0, 0), (0, size - own.shape[1])), constant_values=5)
        positions_BT = counted(start, own.shape)
        valid_BT = positions_BT < cut
        context = Context(positions_BT, valid_BT, cache=cache, rope_length=total)
        cache, logits_BTV = extend(model, params, own, context)
        logits.append(logits_BTV[:, : cut - start])
        start = cut
    assert cache.length_B.tolist() == [total] * 2
    return np.concatenate(logits, axis=1)


@each_variant
def test_full_forward(variant):
    model, params = golden_model(variant)
    tokens, wanted = golden(variant)["tokens"], golden(variant)["logits"]
    valid = jnp.ones(tokens.shape, bool)
    forward = run(model, params, tokens, counted(0, tokens.shape), valid)
    assert_close(forward.logits_BTV, wanted)


@each_variant
@pytest.mark.parametrize("side", ["right", "left"])
def test_ragged_batch(variant, side):
    model, params = golden_model(variant)
    wanted = golden(variant)
    tokens, kept = wanted["tokens"].copy(), int(wanted["length"])
    total = tokens.shape[1]
    own = slice(0, kept) if side == "right" else slice(total - kept, total)
    valid, positions = np.zeros((2, total), bool), np.zeros((2, total), np.int32)
    # Padding keeps the row's other tokens: a wrong key to see, not a silent one.
    tokens[1, own] = wanted["tokens"][1, :kept]
    valid[0], positions[0] = True, np.arange(total)
    valid[1, own], positions[1, own] = True, np.arange(kept)
    logits = run(model, params, tokens, positions, valid).logits_BTV
    assert_close(logits[0], wanted["logits"][0])
    assert_close(logits[1, own], wanted[side])


@each_variant
@pytest.mark.parametrize("size", [20, 7])
def test_prefill_in_chunks(variant, size):
    model, params = golden_model(variant)
    tokens, wanted = golden(variant)["tokens"], golden(variant)["logits"]
    total = tokens.shape[1]
    cuts = [*range(size, total, size), total]
    if size == 7:
        # As one stack: the scan slices parameters, cache, windows and rotations.
        params = restack(params, (model.config.num_layers,))
    assert_close(run_chunks(model, params, tokens, cuts, size), wanted)


@each_variant
def test_decoding_from_a_cache(variant):
    """Row 0 is told its tokens, row 1 goes on with the likeliest ones."""
    model, params = golden_model(variant)
    wanted = golden(variant)
    tokens, greedy = wanted["tokens"].copy(), wanted["greedy"][1]
    total = tokens.shape[1]
    prompt = total - len(greedy)
    tokens[1, prompt:] = greedy
    cache, start = model.init_cache(params, 2, total + 7), 0
    logits = []
    for end in range(prompt, total + 1):
        own = tokens[:, start:end]
        context = Context(
            counted(start, own.shape),
            jnp.ones(own.shape, bool),
            cache=cache,
            rope_length=total,
        )
        cache, logits_BTV = extend(model, params, own, context)
        logits.append(np.asarray(logits_BTV))
        start = end
    logits = np.concatenate(logits, axis=1)
    assert_close(logits[0], wanted["logits"][0])
    # What was fed is what we would have chosen at every step: our own greedy text.
    chosen_from = logits[1, prompt - 1 : -1]
    assert wanted["gaps"].min() >= 2 * TOLERANCE, "the reference itself is undecided"
    np.testing.assert_array_equal(chosen_from.argmax(-1), greedy)
    second, largest = np.sort(chosen_from, axis=-1)[:, -2:].T
    assert np.max(np.abs(largest - second - wanted["gaps"][1])) <= 2 * TOLERANCE


@each_variant
def test_stacks(variant):
    """Layers in one stack or in uneven ones, against stacks of one layer."""
    model, params = golden_model(variant)
    tokens, wanted = golden(variant)["tokens"], golden(variant)["logits"]
    layers = model.config.num_layers
    sizes = (layers,) if layers == 2 else (1, layers - 1)
    positions, valid = counted(0, tokens.shape), jnp.ones(tokens.shape, bool)
    forward = run(model, restack(params, sizes), tokens, positions, valid)
    assert_close(forward.logits_BTV, wanted)
    assert [k.shape[0] for k, _ in forward.new_kv] == list(sizes)


def layer_keys(new_kv):
    """The new keys of every layer that was run, in order."""
    return [np.asarray(k) for pair in new_kv if pair is not None for k in pair[0]]


@pytest.mark.parametrize("variant", ["gemma3", "gpt2", "qwen2"])
@pytest.mark.parametrize("stacked", [False, True])
def test_layers_in_two_halves(variant, stacked):
    model, params = golden_model(variant)
    tokens, wanted = golden(variant)["tokens"], golden(variant)["logits"]
    layers = model.config.num_layers
    if stacked:
        params = restack(params, (layers,))
    context = Context.start(tokens)
    x_BTD = model.embed(params, tokens, context.positions_BT)
    _, whole, _ = run_layers(model, params, x_BTD, context, 0, None)
    middle, halves = layers // 2, []
    for start, stop in ((0, middle), (middle, layers)):
        x_BTD, new_kv, _ = run_layers(model, params, x_BTD, context, start, stop)
        halves += layer_keys(new_kv)
    assert_close(model.unembed(params, x_BTD), wanted)
    np.testing.assert_allclose(halves, layer_keys(whole), atol=1e-5)
