"""Packages that only constraints need, imported where they are used."""

import importlib
from typing import Any

from jaxllm.core.errors import ConfigError

__all__ = ["optional_package"]


def optional_package(name: str) -> Any:
    """Imports a package of the extra `constraints`.

    Raises:
      ConfigError: It is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError:
        raise ConfigError(
            f"cannot constrain: package {name}: is not installed, expected it beside "
            f'jaxllm. Run pip install "jaxllm[constraints]".'
        ) from None
