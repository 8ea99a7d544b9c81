"""Segments read by the TPU's kernels, interpreted, give what XLA gives."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.attention import (
    CAUSAL,
    GLOBAL_WINDOW,
    Segment,
    attend_segment,
    init_pages,
)
from jaxllm.attention.kernels import attend_by_kernel

B, T, N, K, S, H, L = 4, 3, 4, 2, 24, 16, 3
SCALE = 0.3
LENGTH_B = jnp.asarray([24, 0, 7, 16], jnp.int32)


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


Q_BTNH = normal(0, B, T, N, H)


def keys(users, layers=None, **fields):
    lead = () if layers is None else (layers,)
    return Segment(
        k_UKSH=normal(1, *lead, users, K, S, H),
        v_UKSH=normal(2, *lead, users, K, S, H),
        **fields,
    )


def pages():
    cache = init_pages(
        [L],
        rows=B,
        pages=7,
        page_slots=8,
        row_pages=3,
        kv_heads=[K],
        head_dim=128,
        dtype="float32",
    )
    cache = dataclasses.replace(
        cache,
        k=(normal(3, *cache.k[0].shape),),
        v=(normal(4, *cache.v[0].shape),),
        table_BN=jnp.asarray([[6, 1, 2], [0, 0, 0], [3, 9, 9], [1, 4, 0]]),
        length_B=LENGTH_B,
    )
    return cache.segments(0, 2)[0]


START_B = jnp.asarray([0, 5, 2, 0])
CASES = {
    "rows": keys(B, length_U=LENGTH_B),
    "all slots": keys(B),
    "a layer of a stack": keys(B, L, layer=1, length_U=LENGTH_B),
    "behind a prefix": keys(
        B, L, layer=jnp.int32(2), length_U=LENGTH_B, start_U=START_B
    ),
    "one prefix of all rows": keys(1, L, layer=0, length_U=jnp.asarray([19])),
    "two prefixes of two rows": keys(2, length_U=jnp.asarray([24, 5])),
    "groups": keys(
        2,
        L,
        layer=1,
        length_U=jnp.asarray([9, 24]),
        rows_UR=jnp.asarray([[3, 4], [2, 0]]),
    ),
    "pages": pages(),
}


@pytest.mark.parametrize(
    "window", [GLOBAL_WINDOW, pytest.param(6, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("name", CASES)
def test_a_kernel_gives_what_xla_gives(name, window):
    segment = CASES[name]
    q_BTNH = normal(5, B, T, N, segment.k_UKSH.shape[-1])
    position_BT = (LENGTH_B + 3)[:, None] + jnp.arange(T)
    options = {"scale": SCALE, "softcap": 5.0, "window": window}
    found, expected = (
        attend_segment(q_BTNH, position_BT, segment, implementation=name, **options)
        for name in ("interpret", None)
    )
    np.testing.assert_allclose(found.out_BTNH, expected.out_BTNH, atol=1e-5)
    np.testing.assert_allclose(found.lse_BTN, expected.lse_BTN, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "segment"),
    [
        ("causal", keys(B, mask=CAUSAL)),
        ("rows to users", keys(2, row_B=jnp.asarray([0, 1, 1, 0]))),
        ("positions", keys(B, position_US=jnp.zeros((B, S), jnp.int32))),
        ("validity", keys(B, valid_US=jnp.ones((B, S), bool))),
    ],
)
def test_what_a_kernel_cannot_know_stays_with_xla(name, segment):
    position_BT = jnp.zeros((B, T), jnp.int32)
    options = {"scale": SCALE, "softcap": None, "window": GLOBAL_WINDOW, "rules": None}
    call = (Q_BTNH, position_BT, segment)
    assert attend_by_kernel(*call, **options, implementation="interpret") is None


def test_a_cpu_takes_no_kernel():
    options = {"scale": SCALE, "softcap": None, "window": GLOBAL_WINDOW, "rules": None}
    call = (Q_BTNH, jnp.zeros((B, T), jnp.int32), CASES["rows"])
    assert attend_by_kernel(*call, **options, implementation=None) is None


MESH = """
import functools
import jax, jax.numpy as jnp, numpy as np
from jaxllm.attention import attend_segment
from jaxllm.attention.kernels import attend_by_kernel
from jaxllm.core import ShardingRules, make_mesh
from tests.attention.test_kernels import B, CASES, LENGTH_B, N, SCALE, T, normal

options = {"scale": SCALE, "softcap": None, "window": 2**30, "rules": ShardingRules()}
for sizes, names in (
    ("data=2,tensor=2", ("a layer of a stack", "one prefix of all rows", "pages")),
    ("tensor=2", ("groups", "two prefixes of two rows")),
):
    with jax.set_mesh(make_mesh(sizes)):
        for name in names:
            segment = CASES[name]
            q = normal(5, B, T, N, segment.k_UKSH.shape[-1])
            position = (LENGTH_B + 3)[:, None] + jnp.arange(T)
            found, expected = (
                jax.jit(functools.partial(attend_segment, implementation=i, **options))(
                    q, position, segment
                ).out_BTNH
                for i in ("interpret", None)
            )
            print(name, float(jnp.abs(found - expected).max()) < 1e-5)
    sequence = make_mesh("sequence=2")
    with jax.set_mesh(sequence):
        call = (q, position, CASES["rows"])
        assert attend_by_kernel(*call, **options, implementation="interpret") is None
"""


@pytest.mark.slow
def test_every_device_runs_the_kernel_on_its_part(run_with_devices):
    lines = run_with_devices(4, MESH).splitlines()
    assert len(lines) == 5 and all(line.endswith(" True") for line in lines), lines
