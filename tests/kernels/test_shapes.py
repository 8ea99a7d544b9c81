"""Every shape of the attention ops, with fewer rows and keys, against the reference.

Letters: B rows, T queries, N query heads, H head dim.
"""

import dataclasses
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import testing
from pallas_kernels.operands import PagedKeys
from tests.kernels.attention_oracle import assert_same

OPS = ("decode_attention", "prefix_attention", "flash_attention")
SHAPES = [
    (op, shape)
    for op in OPS
    for shape in importlib.import_module(f"pallas_kernels.{op}.shapes").SHAPES
]


def small(shape):
    """The shape with the same heads, dtype and mask, small enough to interpret."""
    keys = min(shape.keys, 280)
    return dataclasses.replace(
        shape,
        rows=min(shape.rows, 3),
        queries=min(shape.queries, 20),
        heads=shape.heads * min(shape.kv_heads, 2) // shape.kv_heads,
        kv_heads=min(shape.kv_heads, 2),
        keys=keys,
        layers=min(shape.layers, 2),
        page=shape.page and 16,
    )


def drawn(shape):
    """Arguments of a call: any floats, lengths that differ, positions near the end."""
    random = np.random.default_rng(0)

    def fill(x):
        if x.dtype == jnp.int32:
            return jnp.asarray(random.integers(0, shape.keys + 1, x.shape), jnp.int32)
        return jnp.asarray(random.normal(size=x.shape), x.dtype)

    query, keys, *rest = jax.tree.map(fill, shape.arguments())
    keys = dataclasses.replace(keys, layer=jnp.int32(max(0, shape.layers - 1)))
    if isinstance(keys, PagedKeys):
        pages = random.permutation(keys.k.shape[-4]).reshape(keys.pages.shape)
        keys = dataclasses.replace(keys, pages=jnp.asarray(pages, jnp.int32))
    elif keys.segment is not None:
        keys = dataclasses.replace(keys, segment=jnp.sort(keys.segment % 3))
        rest[2] = jnp.sort(rest[2] % 4 - 1)
    return (query, keys, *rest)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("op", "shape"), SHAPES, ids=[f"{op}-{shape.name}" for op, shape in SHAPES]
)
def test_the_kernel_equals_the_reference(op, shape):
    reason = testing.obstacle(op, shape.name, "v5e")
    shape = small(shape)
    arguments = drawn(shape)
    function = getattr(importlib.import_module(f"pallas_kernels.{op}"), op)
    want = function(*arguments, implementation="reference", **shape.options)
    if reason is not None:
        with pytest.raises(ValueError, match=reason[:20]):
            function(*arguments, implementation="interpret", **shape.options)
        return
    found = function(*arguments, implementation="interpret", **shape.options)
    assert_same(found, want, shape.dtype)
