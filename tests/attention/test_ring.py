"""Attention of tokens on several devices is that of one device, gradients too."""

import json

import numpy as np
import pytest

RING = """
import dataclasses, functools, json
import jax, jax.numpy as jnp, numpy as np
from jaxllm.attention import CAUSAL, GLOBAL_WINDOW, Segment, attend, packed
from jaxllm.attention.ring import ring_attention, ring_size
from jaxllm.core import ShardingRules, make_mesh

B, T, N, H = 4, 32, 4, 8
rng = np.random.default_rng(0)
document_BT = np.sort(rng.integers(0, 5, (B, T)), axis=1)
document_BT[:, -3:] = -1
position_BT = np.stack([
    [int((row[:t] == row[t]).sum()) for t in range(T)] for row in document_BT
])
document_BT = jnp.asarray(document_BT, jnp.int32)
position_BT = jnp.asarray(position_BT, jnp.int32)
real = (document_BT >= 0)[..., None, None]

def plain(q, k, v, **options):
    mask = packed(document_BT, document_BT)
    segment = Segment(k_UKSH=k, v_UKSH=v, position_US=position_BT, mask=mask)
    return attend(q, position_BT, [segment], scale=H**-0.5, **options)

def ring(q, k, v, **options):
    options |= {"rules": ShardingRules(), "scale": H**-0.5}
    return ring_attention(q, k, v, position_BT, document_BT, **options)

def outputs(function, q, k, v, options):
    def loss(q, k, v):
        out = function(q, k, v, **options)
        return jnp.sum(jnp.where(real, jnp.sin(3 * out), 0.0)), out
    (_, out), grads = jax.value_and_grad(loss, (0, 1, 2), has_aux=True)(q, k, v)
    return jnp.where(real, out, 0.0), *grads

for sizes, K, window, softcap in CASES:
    q, k, v = (jnp.asarray(rng.normal(size=s), jnp.float32)
               for s in ((B, T, N, H), (B, K, T, H), (B, K, T, H)))
    limit = GLOBAL_WINDOW if window is None else jnp.int32(window)
    options = {"window": limit, "softcap": softcap}
    expected = jax.jit(functools.partial(outputs, plain, options=options))(q, k, v)
    mesh = make_mesh(sizes)
    with jax.set_mesh(mesh):
        assert ring_size(T, CAUSAL, ShardingRules()) == mesh.shape["sequence"]
        run = jax.jit(functools.partial(outputs, ring, options=options))
        found = run(q, k, v)
        text = run.lower(q, k, v).compile().as_text()
    print(json.dumps({
        "sizes": sizes,
        "errors": [float(jnp.abs(a - b).max()) for a, b in zip(found, expected)],
        "sends": "collective-permute" in text,
        "gathers": text.count("all-gather("),
    }))
"""

CASES = [
    ("sequence=8", 2, None, None),
    ("sequence=2", 4, 5, 3.0),
    ("data=2,sequence=2,tensor=2", 2, None, None),
    # Fewer kv heads than devices that split heads.
    ("sequence=4,tensor=2", 1, None, None),
]


@pytest.mark.slow
def test_a_ring_gives_the_attention_and_the_gradients_of_one_device(run_with_devices):
    lines = run_with_devices(8, f"CASES = {CASES!r}\n{RING}").splitlines()
    found = [json.loads(line) for line in lines]
    assert [x["sizes"] for x in found] == [sizes for sizes, *_ in CASES]
    for x in found:
        np.testing.assert_array_less(x["errors"], 1e-5, err_msg=x["sizes"])
        assert x["sends"] and not x["gathers"], x
