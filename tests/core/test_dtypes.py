import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.core import ConfigError, DTypePolicy, parse_dtype


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("float32", jnp.float32),
        ("f32", jnp.float32),
        ("bfloat16", jnp.bfloat16),
        ("bf16", jnp.bfloat16),
        ("float16", jnp.float16),
        ("f16", jnp.float16),
    ],
)
def test_a_name_and_a_dtype_give_the_dtype(name, dtype):
    for given in (name, dtype, jnp.dtype(dtype)):
        parsed = parse_dtype(given)
        assert isinstance(parsed, np.dtype)
        assert parsed == jnp.dtype(dtype)


@pytest.mark.parametrize("name", ["float", "Float32", "", "int8", None, jnp.int8, bool])
def test_what_models_do_not_run_in_is_refused(name):
    with pytest.raises(ConfigError) as error:
        parse_dtype(name)
    assert str(error.value) == (
        f"cannot set dtype: {name!r} is unknown, expected one of float32, f32, "
        "bfloat16, bf16, float16, f16. Choose one of these."
    )


def test_a_policy_of_one_dtype():
    policy = DTypePolicy.of("f32")
    assert policy == DTypePolicy(
        params=jnp.float32, compute=jnp.float32, cache=jnp.float32
    )
    with pytest.raises(ConfigError):
        DTypePolicy.of("int4")
    with pytest.raises(ConfigError):
        DTypePolicy(cache="int4")


def test_equal_policies_are_one_key():
    # A policy is part of a compiled program's key, however it was written.
    policies = [
        DTypePolicy(),
        DTypePolicy.of("bfloat16"),
        DTypePolicy.of(jnp.bfloat16),
        DTypePolicy(params="bf16", compute=jnp.dtype(jnp.bfloat16)),
        dataclasses.replace(DTypePolicy.of("f32"), **dict.fromkeys(
            ("params", "compute", "cache"), jnp.bfloat16)),
    ]  # fmt: skip
    assert len(set(policies)) == 1
    assert len({*policies, DTypePolicy(cache="float32")}) == 2
