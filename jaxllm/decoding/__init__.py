"""Decoding: the protocol, the engine, verification and sampling."""

from jaxllm.decoding.decode import (
    Output,
    Request,
    Snapshot,
    decode,
    decode_chunks,
    locate_nonfinite,
)
from jaxllm.decoding.engine import DecodeState, Stats, advance, prefill
from jaxllm.decoding.protocol import Committed, Draft, Drafter, Verdict
from jaxllm.decoding.sampling import Sampler, choose, make_sampler, warp
from jaxllm.decoding.verify import match, match_reference

__all__ = [
    "Committed",
    "DecodeState",
    "Draft",
    "Drafter",
    "Output",
    "Request",
    "Sampler",
    "Snapshot",
    "Stats",
    "Verdict",
    "advance",
    "choose",
    "decode",
    "decode_chunks",
    "locate_nonfinite",
    "make_sampler",
    "match",
    "match_reference",
    "prefill",
    "warp",
]
