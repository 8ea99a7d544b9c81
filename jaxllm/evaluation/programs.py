"""What memory compiled programs take, by the compiler's own account."""

from typing import Any

import jax

from jaxllm.checkpoints import LanguageModel

__all__ = ["largest_program", "programs"]


def programs(lm: LanguageModel) -> list[Any]:
    """Returns the programs loaded on a model's devices; none where that is unknown."""
    device = jax.devices()[0] if lm.mesh is None else lm.mesh.devices.flat[0]
    try:
        return device.client.live_executables()
    except (AttributeError, NotImplementedError, jax.errors.JaxRuntimeError):
        return []


def largest_program(lm: LanguageModel, before: list[Any]) -> int | None:
    """Returns the memory of the largest program that was loaded since.

    Args:
      lm: The model.
      before: What `programs` returned then.

    Returns:
      Bytes of arguments, results and temporaries on one device, what is donated
      counted once; None when nothing was loaded or the backend does not tell.
    """
    known = {id(program) for program in before}
    sizes = []
    for program in programs(lm):
        if id(program) in known:
            continue
        try:
            stats = program.get_compiled_memory_stats()
        except (AttributeError, NotImplementedError, jax.errors.JaxRuntimeError):
            return None
        sizes.append(
            stats.argument_size_in_bytes
            + stats.output_size_in_bytes
            + stats.temp_size_in_bytes
            - stats.alias_size_in_bytes
        )
    return max(sizes, default=None)
