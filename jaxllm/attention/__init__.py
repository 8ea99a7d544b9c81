"""Attention as a list of key-value segments, and what stands in them."""

from jaxllm.attention.cache import Cache, DenseCache, NewKV, init_cache
from jaxllm.attention.masks import (
    CAUSAL,
    FULL,
    GLOBAL_WINDOW,
    Mask,
    allowed,
    ancestor,
    ancestors_of,
    packed,
)
from jaxllm.attention.paged import PagedCache, init_pages
from jaxllm.attention.reference import attend_reference
from jaxllm.attention.rope import RopeConfig, apply_rope, rope_tables, rotate_angles
from jaxllm.attention.segments import (
    AttentionOutput,
    Segment,
    attend,
    attend_segment,
    merge,
)
from jaxllm.attention.shared_prefix import PrefixedCache, PrefixLevel, SharedPrefix

__all__ = [
    "CAUSAL",
    "FULL",
    "GLOBAL_WINDOW",
    "AttentionOutput",
    "Cache",
    "DenseCache",
    "Mask",
    "NewKV",
    "PagedCache",
    "PrefixLevel",
    "PrefixedCache",
    "RopeConfig",
    "Segment",
    "SharedPrefix",
    "allowed",
    "ancestor",
    "ancestors_of",
    "apply_rope",
    "attend",
    "attend_reference",
    "attend_segment",
    "init_cache",
    "init_pages",
    "merge",
    "packed",
    "rope_tables",
    "rotate_angles",
]
