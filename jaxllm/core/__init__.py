"""What every room stands on: weights' arithmetic, trees, sharding, errors."""

from jaxllm.core.dtypes import DTypePolicy, parse_dtype
from jaxllm.core.einsum import (
    Leaf,
    Weight,
    contract,
    dense,
    einsum,
    grouped_matmul,
    grouped_matmul_reference,
    take,
    unwrapped,
)
from jaxllm.core.errors import (
    CapacityError,
    CheckpointError,
    ConfigError,
    ShardingError,
    UserError,
)
from jaxllm.core.pytree import pytree_dataclass, static
from jaxllm.core.rng import position_gumbel, row_keys
from jaxllm.core.sharding import (
    ShardingRules,
    constrain,
    fetch,
    make_mesh,
    parse_mesh,
)

__all__ = [
    "CapacityError",
    "CheckpointError",
    "ConfigError",
    "DTypePolicy",
    "Leaf",
    "ShardingError",
    "ShardingRules",
    "UserError",
    "Weight",
    "constrain",
    "contract",
    "dense",
    "einsum",
    "fetch",
    "grouped_matmul",
    "grouped_matmul_reference",
    "make_mesh",
    "parse_dtype",
    "parse_mesh",
    "position_gumbel",
    "pytree_dataclass",
    "row_keys",
    "static",
    "take",
    "unwrapped",
]
