"""Constraints on generated text, walked down every draft by the engine."""

from jaxllm.decoding.constraints.constraint import Constraint, constrain, follow

__all__ = ["Constraint", "constrain", "follow"]
