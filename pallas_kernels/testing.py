"""What tests and benchmarks of all ops share."""

import functools
import importlib
from collections.abc import Callable, Iterator
from typing import Any

from pallas_kernels.dispatch import OPS, Target

__all__ = ["cases", "obstacle"]


def cases(
    op: str, implementation: str | None = None
) -> Iterator[tuple[str, Callable[..., Any], tuple[Any, ...]]]:
    """Yields every shape of an op as a call.

    Args:
      op: A key of `dispatch.OPS`.
      implementation: Handed to the op.

    Yields:
      The shape's name, the function of the array arguments only, and those arguments
      as trees of `jax.ShapeDtypeStruct`.
    """
    for shape in _shapes(op):
        package = importlib.import_module(f"pallas_kernels.{op}")
        function = functools.partial(
            getattr(package, op), implementation=implementation, **shape.options
        )
        yield shape.name, function, shape.arguments()


def obstacle(op: str, name: str, generation: str) -> str | None:
    """Returns why an op's TPU kernel cannot run the shape of a name, or None."""
    if "tpu" not in OPS[op]:
        return "there is no tpu kernel"
    module = importlib.import_module(f"pallas_kernels.{op}.shapes")
    shape = next(s for s in module.SHAPES if s.name == name)
    return module.obstacle(shape, Target("tpu", generation))


def _shapes(op: str) -> Any:
    return importlib.import_module(f"pallas_kernels.{op}.shapes").SHAPES
