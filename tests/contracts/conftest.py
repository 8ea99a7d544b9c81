"""What the contracts need beside the registry."""

import jax
import numpy as np
import pytest

from jaxllm.drafting.heads import save_heads
from tests.contracts.enrolled import toy_lm


@pytest.fixture(scope="session")
def heads_file(tmp_path_factory):
    """Random heads for the toy model."""
    path = tmp_path_factory.mktemp("heads") / "heads.safetensors"
    width = toy_lm().config.width
    kernel = np.asarray(jax.random.normal(jax.random.key(0), (3, width, width)))
    save_heads(path, kernel, [[0.5, 0.2], [0.4, 0.1], [0.3, 0.1]])
    return path
