"""What the contracts need beside the registry."""

import itertools

import jax
import numpy as np
import pytest

from jaxllm.drafting.heads import save_heads
from tests.contracts.enrolled import toy_lm

_COUNT = itertools.count(1)


@pytest.fixture(autouse=True)
def forget_programs_often():
    """A process can hold only so many compiled programs, and here come hundreds."""
    yield
    if next(_COUNT) % 16 == 0:
        jax.clear_caches()


@pytest.fixture(scope="session")
def heads_file(tmp_path_factory):
    """Random heads for the toy model."""
    path = tmp_path_factory.mktemp("heads") / "heads.safetensors"
    width = toy_lm().config.width
    kernel = np.asarray(jax.random.normal(jax.random.key(0), (3, width, width)))
    save_heads(path, kernel, [[0.5, 0.2], [0.4, 0.1], [0.3, 0.1]])
    return path
