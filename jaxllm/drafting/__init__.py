"""Drafters, one a file; `METHODS` is what `--decode` names."""

from jaxllm.drafting.autoregressive import Autoregressive

METHODS = {
    "autoregressive": Autoregressive,
}

__all__ = ["METHODS", "Autoregressive"]
