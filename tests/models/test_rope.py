"""Rotary positions: the reference's tables, and what any rotation must keep."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.attention import RopeConfig, apply_rope, rope_tables, rotate_angles
from jaxllm.core.errors import ConfigError
from jaxllm.models.families import decoder_config
from tests.models.golden_files import DIRECTORY

TABLES = json.loads((DIRECTORY / "rope.json").read_text("utf-8"))

# Each kind with its settings, and with the stretch that its settings cause set to 1.
KINDS = {
    "default": {},
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 4.0, "original_length": 64},
    "yarn": {"factor": 4.0, "original_length": 64},
    "llama3": {"factor": 8.0, "original_length": 64},
    "longrope": {
        "factor": 4.0,
        "original_length": 64,
        "short_factors": (1.0,) * 8,
        "long_factors": tuple(1.0 + i for i in range(8)),
    },
}


def rope(kind, **values):
    return RopeConfig(rotary_dim=16, kind=kind, **(KINDS[kind] | values))


@pytest.mark.parametrize("name", TABLES)
def test_tables_of_the_reference(name):
    case = TABLES[name]
    (config,) = decoder_config(case["config"]).ropes
    inverse, factor = rope_tables(config, case["length"])
    assert inverse.dtype == np.float32
    np.testing.assert_allclose(inverse, case["inverse_frequency"], rtol=2e-6, atol=0)
    assert np.max(np.abs(inverse - case["inverse_frequency"])) <= 1e-6
    assert abs(factor - case["attention_factor"]) <= 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_a_factor_of_one_is_the_plain_rotation(kind):
    one = {"factor": 1.0} if kind != "default" else {}
    if kind == "longrope":
        one["long_factors"] = (1.0,) * 8
    plain, _ = rope_tables(rope("default"))
    # Beyond its context the dynamic rule stretches by the length even at factor 1.
    length = 64 if kind == "dynamic" else 500
    inverse, factor = rope_tables(rope(kind, **one), length)
    np.testing.assert_allclose(inverse, plain, rtol=1e-6)
    assert factor == 1.0


@pytest.mark.parametrize("kind", KINDS)
def test_scores_depend_on_the_distance_only(kind):
    inverse, factor = rope_tables(rope(kind), 100)
    q, k = np.random.default_rng(0).standard_normal((2, 1, 1, 1, 16))

    def score(at_q, at_k):
        turned = [
            apply_rope(
                jnp.asarray(x, jnp.float32),
                *rotate_angles(jnp.asarray([[at]]), inverse, factor),
            )
            for x, at in ((q, at_q), (k, at_k))
        ]
        return float(jnp.vdot(*turned))

    for distance in (0, 1, 13):
        scores = [score(at + distance, at) for at in (0, 5, 40, 87)]
        np.testing.assert_allclose(scores, scores[0], atol=1e-5)
    assert abs(score(13, 0) - score(0, 0)) > 1e-2


def test_norm_is_kept_and_the_rest_passes_through():
    inverse, factor = rope_tables(rope("llama3"))
    x = jnp.asarray(np.random.default_rng(1).standard_normal((2, 30, 3, 24)))
    positions = jnp.broadcast_to(jnp.arange(30), (2, 30))
    turned = apply_rope(x, *rotate_angles(positions, inverse, factor))
    np.testing.assert_array_equal(turned[..., 16:], x[..., 16:])
    np.testing.assert_array_equal(turned[:, 0], x[:, 0])
    norms = [np.linalg.norm(y[..., :16], axis=-1) for y in (x, turned)]
    np.testing.assert_allclose(*norms, rtol=1e-5)
    assert np.abs(turned - x)[:, 1:, :, :16].max() > 0.1


def test_llama3_keeps_the_order_of_frequencies():
    inverse, _ = rope_tables(rope("llama3"))
    assert (np.diff(inverse) < 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_which_kinds_depend_on_the_length(kind):
    config = rope(kind)
    within, _ = rope_tables(config, 64)
    beyond, _ = rope_tables(config, 65)
    np.testing.assert_array_equal(within, rope_tables(config)[0])
    assert (within != beyond).any() == config.depends_on_length


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"rotary_dim": 8, "kind": "ntk"},
            "cannot scale rotary positions: rope_type 'ntk' is unknown, expected one "
            "of default, linear, dynamic, yarn, llama3, longrope. Check rope_scaling "
            "in config.json.",
        ),
        (
            {"rotary_dim": 7},
            "cannot rotate: rotary dim is 7, expected a positive even number. Check "
            "head_dim and partial_rotary_factor.",
        ),
        (
            {"rotary_dim": 8, "kind": "longrope", "short_factors": (1.0,)},
            "cannot scale rotary positions: short_factors has 1 values, expected 4. "
            "Check rope_scaling in config.json.",
        ),
    ],
)
def test_bad_rotations(values, message):
    with pytest.raises(ConfigError) as caught:
        RopeConfig(**values)
    assert str(caught.value) == message
