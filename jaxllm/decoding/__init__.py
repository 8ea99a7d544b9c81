"""Decoding: the protocol, the engine, verification and sampling."""

from jaxllm.decoding.bound import BoundDrafter
from jaxllm.decoding.constraints import Constraint, make_constraint
from jaxllm.decoding.decode import (
    Decoded,
    Output,
    Request,
    Snapshot,
    decode,
    decode_chunks,
    drain,
    locate_nonfinite,
)
from jaxllm.decoding.engine import DecodeState, Stats, advance, prefill
from jaxllm.decoding.protocol import Committed, Draft, Drafter, Verdict
from jaxllm.decoding.sampling import Sampler, choose, draw, make_sampler, warp
from jaxllm.decoding.service import Arrival, Service
from jaxllm.decoding.serving import Server, serve
from jaxllm.decoding.verify import match, match_reference, reject

__all__ = [
    "Arrival",
    "BoundDrafter",
    "Committed",
    "Constraint",
    "DecodeState",
    "Decoded",
    "Draft",
    "Drafter",
    "Output",
    "Request",
    "Sampler",
    "Server",
    "Service",
    "Snapshot",
    "Stats",
    "Verdict",
    "advance",
    "choose",
    "decode",
    "decode_chunks",
    "drain",
    "draw",
    "locate_nonfinite",
    "make_constraint",
    "make_sampler",
    "match",
    "match_reference",
    "prefill",
    "reject",
    "serve",
    "warp",
]
