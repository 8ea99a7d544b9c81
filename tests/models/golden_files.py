"""The golden models: read through the name maps, without the checkpoint loader."""

import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file

from jaxllm.models import make_model
from jaxllm.models.families import family_of

DIRECTORY = pathlib.Path(__file__).resolve().parent.parent / "golden"
VARIANTS = sorted(path.parent.name for path in DIRECTORY.glob("*/golden.npz"))


@functools.cache
def config_json(variant):
    """The content of a variant's `config.json`."""
    return json.loads((DIRECTORY / variant / "config.json").read_text("utf-8"))


@functools.cache
def golden(variant):
    """What the reference answered, by name; `make_golden.py` says what each is."""
    with np.load(DIRECTORY / variant / "golden.npz") as arrays:
        return dict(arrays)


@functools.cache
def golden_model(variant):
    """`(model, params)` of a variant: float32, stacks of one layer."""
    tensors = load_file(DIRECTORY / variant / "model.safetensors")
    return model_from(config_json(variant), tensors)


def array_shapes(architecture):
    """The shape of every array of a model, by the path that rules give it."""
    shapes = {}
    for path, leaf in jax.tree.leaves_with_path(_abstract(architecture)[1]):
        name = _name(path)
        shapes[name] = leaf.shape[1:] if name[0] == "layers" else leaf.shape
    return shapes


def model_from(config, tensors):
    """Builds a model from the content of `config.json` and named tensors.

    Every array is filled once, from a tensor of its shape, and every tensor is used.
    """
    family = family_of(config)
    architecture = family.to_config(config)
    shapes, found, used = array_shapes(architecture), {}, set()
    for rule in family.rules(architecture):
        name = next(n for n in family.sources(rule) if n in tensors)
        array = _placed(rule, tensors[name])
        assert rule.path not in found, f"{rule.path} is filled twice"
        assert array.shape == shapes[rule.path], rule
        found[rule.path] = array.astype(np.float32)
        used.add(name)
    assert found.keys() == shapes.keys(), found.keys() ^ shapes.keys()
    assert used == tensors.keys(), used ^ tensors.keys()
    model, abstract = _abstract(architecture)

    def fill(path, leaf):
        return jnp.asarray(found[_name(path)].reshape(leaf.shape))

    return model, jax.tree.map_with_path(fill, abstract)


def _abstract(architecture):
    return make_model(architecture, None, stacks=(1,) * architecture.num_layers)


def _placed(rule, tensor):
    """A tensor as its rule wants it."""
    if rule.part is not None:
        window = [slice(None)] * tensor.ndim
        window[0 if rule.transpose else -1] = slice(*rule.part)
        tensor = tensor[tuple(window)]
    return tensor.T if rule.transpose else tensor


def _name(path):
    """The path of a rule that fills the place at a path of the tree."""
    keys = tuple(getattr(k, "key", getattr(k, "idx", None)) for k in path)
    return ("layers", *keys[1:]) if keys[0] == "stacks" else keys
