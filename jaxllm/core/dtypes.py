"""Which dtypes a model computes in."""

import dataclasses
from typing import Any

import jax.numpy as jnp

from jaxllm.core.errors import ConfigError

__all__ = ["DTypePolicy", "parse_dtype"]

_NAMES = {
    "float32": jnp.float32,
    "f32": jnp.float32,
    "bfloat16": jnp.bfloat16,
    "bf16": jnp.bfloat16,
    "float16": jnp.float16,
    "f16": jnp.float16,
}


def parse_dtype(name: Any) -> Any:
    """Returns the dtype of a name such as `"bfloat16"`, or of a dtype.

    Raises:
      ConfigError: It is not a floating dtype that models run in.
    """
    dtype = _NAMES.get(name) if isinstance(name, str) else name
    # Numpy takes None for float64.
    if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
        raise ConfigError(
            f"cannot set dtype: {name!r} is unknown, expected one of "
            f"{', '.join(_NAMES)}. Choose one of these."
        )
    return jnp.dtype(dtype)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DTypePolicy:
    """The dtypes of parameters, activations and cache.

    Norms, softmax, logits and accumulations are float32 whatever the policy says.

    Attributes:
      params: Storage dtype of floating parameters.
      compute: Dtype of activations between layers.
      cache: Dtype of cached keys and values.
    """

    params: Any = jnp.bfloat16
    compute: Any = jnp.bfloat16
    cache: Any = jnp.bfloat16

    def __post_init__(self) -> None:
        # jnp.float32 equals its dtype, but hashes otherwise.
        for field in dataclasses.fields(self):
            dtype = parse_dtype(getattr(self, field.name))
            object.__setattr__(self, field.name, dtype)

    @classmethod
    def of(cls, name: Any) -> "DTypePolicy":
        """Returns the policy with one dtype for all three."""
        return cls(params=name, compute=name, cache=name)
