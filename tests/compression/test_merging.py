"""Adapters weighted, switched, merged and taken off."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.compression import (
    LoraTensor,
    adapter_names,
    in_adapter,
    merge,
    remove,
    select,
    unmerge,
)
from jaxllm.core import ConfigError, Leaf
from jaxllm.core.partition import split
from jaxllm.models import restack
from jaxllm.quantization import Int8, quantize_params
from tests.compression.adapted import FAMILIES, adapted, assert_close, logits, model_of


def differences(params):
    """What a tree's adapters add, by path, each adapter alone."""
    found = {}
    for keys, x in jax.tree_util.tree_leaves_with_path(
        params, is_leaf=lambda x: isinstance(x, LoraTensor)
    ):
        if isinstance(x, LoraTensor):
            low = np.matmul(np.asarray(x.a_IR), np.asarray(x.b_RO))
            found[jax.tree_util.keystr(keys)] = low * np.asarray(x.scaling)
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_merged_and_unmerged_logits_agree(family):
    model, params, tokens = model_of(family)
    params = adapted(params)
    merged = merge(params)
    assert adapter_names(merged) == ()
    assert not any(
        isinstance(x, Leaf)
        for x in jax.tree.leaves(merged, is_leaf=lambda x: isinstance(x, Leaf))
    )
    layers, wanted = len(params["stacks"]), logits(model, merged, tokens)
    for stacks in ((1,) * layers, (layers,)):
        assert_close(logits(model, restack(params, stacks), tokens), wanted)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_unmerging_restores_the_weights_to_a_rounding(dtype):
    _, params, _ = model_of("llama")
    params = jax.tree.map(lambda x: x.astype(dtype), params)
    both = adapted(adapted(params), 1, "second")
    adapters, _ = split(both, in_adapter)
    again = unmerge(merge(both), adapters)
    assert jax.tree.structure(again) == jax.tree.structure(both)
    step = {"float32": 2.0**-23, "bfloat16": 2.0**-7}[dtype]
    added = max(np.abs(x).max() for x in differences(both).values())
    for x, y in zip(jax.tree.leaves(both), jax.tree.leaves(again), strict=True):
        assert x.dtype == y.dtype
        x, y = (np.asarray(a, np.float32) for a in (x, y))
        assert np.abs(x - y).max() <= step * (np.abs(x).max() + 2 * added)
    # Off again, the weights inside are the same arrays.
    bare = remove(both)
    assert all(map(np.array_equal, jax.tree.leaves(bare), jax.tree.leaves(params)))


def test_two_adapters_are_added_with_weights():
    model, params, tokens = model_of("qwen2")
    one, two = (differences(adapted(params, seed)) for seed in (0, 1))
    both = adapted(adapted(params, 0), 1, "second")
    weighted = select(both, {"default": 0.7, "second": -0.3})

    def put(keys, x):
        name = jax.tree_util.keystr(keys)
        return x + 0.7 * one[name] - 0.3 * two[name] if name in one else x

    wanted = logits(model, jax.tree_util.tree_map_with_path(put, params), tokens)
    assert_close(logits(model, weighted, tokens), wanted)
    assert_close(logits(model, merge(weighted), tokens), wanted)


def test_switching_is_by_name_and_compiles_nothing():
    model, params, tokens = model_of("llama")
    both = adapted(adapted(params, 0), 1, "second")
    traced = []

    @jax.jit
    def program(params, tokens):
        traced.append(0)
        return model(params, tokens).logits_BTV

    wanted = {
        "default": logits(model, adapted(params, 0), tokens),
        "second": logits(model, adapted(params, 1), tokens),
    }
    for name, alone in wanted.items():
        found = program(select(both, name), tokens)
        assert_close(found, alone)
    neither = program(select(both, {}), tokens)
    np.testing.assert_array_equal(neither, logits(model, params, tokens))
    assert len(traced) == 1
    assert np.abs(wanted["default"] - wanted["second"]).max() > 1e-2


def test_one_of_two_is_taken_off():
    _, params, _ = model_of("llama")
    both = adapted(adapted(params, 0), 1, "second")
    inner = remove(both, "second")
    assert adapter_names(inner) == ("default",)
    alone = adapted(params, 0)
    assert all(map(np.array_equal, jax.tree.leaves(inner), jax.tree.leaves(alone)))
    outer = remove(both, "default")
    assert adapter_names(outer) == ("second",)
    for name, x in differences(adapted(params, 1)).items():
        np.testing.assert_array_equal(differences(outer)[name], x)


@pytest.mark.parametrize("change", [remove, select])
def test_an_unknown_name_is_refused(change):
    _, params, _ = model_of("llama")
    message = (
        "unknown adapter: 'defualt', expected one of default. Did you mean 'default'?"
    )
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        change(adapted(params), "defualt")


def test_quantized_weights_are_merged_only_when_asked():
    model, params, tokens = model_of("llama")
    params = adapted(quantize_params(params, Int8()))
    message = (
        "cannot merge: an adapter is around IntTensor, expected a plain array. Give "
        "the dtype of the merged weights, or keep the adapter."
    )
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        merge(params)
    merged = merge(params, jnp.float32)
    assert merged["stacks"][0]["mlp"]["up"]["kernel"].dtype == jnp.float32
    assert_close(logits(model, params, tokens), logits(model, merged, tokens))
