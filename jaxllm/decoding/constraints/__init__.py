"""Constraints on generated text, walked down every draft by the engine."""

from jaxllm.decoding.constraints.constraint import Constraint, constrain, follow
from jaxllm.decoding.constraints.grammar import GrammarConstraint, compile_grammar
from jaxllm.decoding.constraints.regular import (
    RegularConstraint,
    compile_regex,
    compile_regex_reference,
)
from jaxllm.decoding.constraints.specification import make_constraint, with_room
from jaxllm.decoding.constraints.vocabulary import token_bytes

__all__ = [
    "Constraint",
    "GrammarConstraint",
    "RegularConstraint",
    "compile_grammar",
    "compile_regex",
    "compile_regex_reference",
    "constrain",
    "follow",
    "make_constraint",
    "token_bytes",
    "with_room",
]
