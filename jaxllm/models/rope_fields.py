"""Rotary position settings of `config.json`, read from and written to every spelling.

Hugging Face wrote `rope_theta` and `rope_scaling` until version 5, and writes one
object `rope_parameters` since; Gemma 3 has one of those for each kind of layer. What
is written here is the older spelling, which every version reads.

Letters: H head dim, R rotated dims.
"""

from collections.abc import Mapping
from typing import Any

from jaxllm.attention.rope import RopeConfig
from jaxllm.core import registry
from jaxllm.models.config_fields import REQUIRED, Fields

__all__ = ["read_layer_ropes", "read_rope", "write_layer_ropes", "write_rope"]

LAYER_TYPES = ("full_attention", "sliding_attention")

# A word of `rope_type`, and our kind; "su" is what LongRoPE was called at first.
_KINDS = {
    "default": "default",
    "linear": "linear",
    "dynamic": "dynamic",
    "yarn": "yarn",
    "llama3": "llama3",
    "longrope": "longrope",
    "su": "longrope",
}
# Phi-3 took both older words for LongRoPE, and knows no other rule.
_PHI3_KINDS = {
    "default": "default",
    "longrope": "longrope",
    "su": "longrope",
    "yarn": "longrope",
}
_KNOWN = (
    "attention_factor",
    "beta_fast",
    "beta_slow",
    "factor",
    "finetuned",  # a remark of the first YaRN checkpoints
    "high_freq_factor",
    "long_factor",
    "low_freq_factor",
    "mscale",
    "mscale_all_dim",
    "original_max_position_embeddings",
    "partial_rotary_factor",
    "rope_theta",
    "rope_type",
    "short_factor",
    "truncate",
    "type",
)
_MAX_POSITIONS = 2**30 - 1
_FACTOR = {"low": 1.0, "high": 1e6}
_WEIGHT = {"low": 1e-6, "high": 1e6}


def read_rope(
    fields: Fields, head_dim: int, max_positions: int, *, phi3: bool = False
) -> RopeConfig:
    """Reads the one rotation of a model.

    Args:
      fields: The configuration.
      head_dim: H.
      max_positions: Positions of the model, which stand for the original context
        where none is given.
      phi3: Whether the rules of Phi-3 hold: `partial_rotary_factor` counts, "yarn"
        means LongRoPE, and the original context is 4096 unless given.

    Returns:
      The rotation; fields that its kind does not use have their defaults.

    Raises:
      ConfigError: A key is missing, unknown or out of range, or two spellings are
        given and differ.
    """
    found = {
        key: _read(fields, section, head_dim, max_positions, phi3=phi3)
        for key in ("rope_scaling", "rope_parameters")
        if (section := fields.section(key)) is not None
    }
    if not found:
        empty = Fields({}, "rope_scaling.")
        return _read(fields, empty, head_dim, max_positions, phi3=phi3)
    return _agreed(fields, found)


def read_layer_ropes(
    fields: Fields, head_dim: int, max_positions: int
) -> tuple[RopeConfig, RopeConfig]:
    """Reads the rotations of Gemma 3: of its global, then of its local layers.

    Args:
      fields: The configuration.
      head_dim: H.
      max_positions: Positions of the model.

    Raises:
      ConfigError: As for `read_rope`.
    """
    empty = Fields({}, "rope_scaling.")
    found = {}
    nested = fields.section("rope_parameters")
    if nested is not None:
        for key in nested.values:
            if key not in LAYER_TYPES:
                raise fields.error(
                    "rope_parameters", f"the keys {' and '.join(LAYER_TYPES)} only"
                )
        found["rope_parameters"] = tuple(
            _read(
                fields,
                nested.section(layer_type) or empty,
                head_dim,
                max_positions,
                theta=theta,
            )
            for layer_type, theta in zip(LAYER_TYPES, _thetas(fields), strict=True)
        )
    scaling = fields.section("rope_scaling")
    if scaling is not None or nested is None:
        full, sliding = _thetas(fields)
        found["rope_scaling"] = (
            _read(fields, scaling or empty, head_dim, max_positions, theta=full),
            _read(fields, empty, head_dim, max_positions, theta=sliding),
        )
    return _agreed(fields, found)


def write_rope(rope: RopeConfig, head_dim: int, max_positions: int) -> dict[str, Any]:
    """Returns the keys that `read_rope` reads back to the same rotation.

    Args:
      rope: The rotation.
      head_dim: H.
      max_positions: Positions of the model.
    """
    keys: dict[str, Any] = {"rope_theta": rope.theta}
    keys["rope_scaling"] = _scaling(rope, max_positions)
    if rope.kind == "longrope":
        # Phi-3's own readers look here first.
        keys["original_max_position_embeddings"] = rope.original_length
    if rope.rotary_dim != head_dim:
        part = rope.rotary_dim / head_dim
        # The reader rounds towards zero.
        if int(head_dim * part) != rope.rotary_dim:
            part = (rope.rotary_dim + 0.5) / head_dim
        keys["partial_rotary_factor"] = part
    return keys


def write_layer_ropes(
    full: RopeConfig, sliding: RopeConfig, max_positions: int
) -> dict[str, Any]:
    """Returns the keys that `read_layer_ropes` reads back to the same rotations."""
    return {
        "rope_theta": full.theta,
        "rope_local_base_freq": sliding.theta,
        "rope_scaling": _scaling(full, max_positions),
    }


def _thetas(fields: Fields) -> tuple[float, float]:
    return (
        _theta(fields, "rope_theta", 1_000_000.0),
        _theta(fields, "rope_local_base_freq", 10_000.0),
    )


def _theta(fields: Fields, key: str, default: float) -> float:
    # A base of 1 or less has no longest wavelength.
    return fields.number(key, default, low=1.001, high=1e12)


def _agreed(fields: Fields, found: Mapping[str, Any]) -> Any:
    """Returns the one reading of all spellings that were given."""
    first, *others = found.values()
    if any(other != first for other in others):
        raise fields.error(
            "rope_scaling", "what 'rope_parameters' says", "Remove one of the two."
        )
    return first


def _read(
    fields: Fields,
    section: Fields,
    head_dim: int,
    max_positions: int,
    *,
    theta: float | None = None,
    phi3: bool = False,
) -> RopeConfig:
    """Reads one object of settings; what it lacks stands at the top level."""
    for key in section.values:
        if key not in _KNOWN:
            place = f"config.json: {section.place.rstrip('.')}"
            raise registry.unknown_name("field", str(key), _KNOWN, of=place)
    word = "rope_type" if section.has("rope_type") else "type"
    kind = section.choice(word, _PHI3_KINDS if phi3 else _KINDS, "default")
    if theta is None:
        theta = _theta(fields, "rope_theta", 10_000.0)
    rotary_dim = _rotary_dim(fields, section, head_dim, phi3)
    rope: dict[str, Any] = {
        "rotary_dim": rotary_dim,
        "theta": _theta(section, "rope_theta", theta),
        "kind": kind,
    }
    match kind:
        case "linear":
            rope["factor"] = section.number("factor", **_FACTOR)
        case "dynamic":
            rope["factor"] = section.number("factor", **_FACTOR)
            rope["original_length"] = max_positions
        case "llama3":
            rope |= _read_llama3(section)
        case "yarn":
            rope |= _read_yarn(section)
        case "longrope":
            rope |= _read_longrope(section, rotary_dim // 2)
    if kind in ("llama3", "yarn", "longrope"):
        original = _original_length(fields, section, max_positions, phi3)
        rope["original_length"] = original
        if rope["factor"] is None:
            rope["factor"] = max_positions / original
    return RopeConfig(**rope)


def _rotary_dim(fields: Fields, section: Fields, head_dim: int, phi3: bool) -> int:
    holder = section if section.has("partial_rotary_factor") else fields
    part = holder.number("partial_rotary_factor", 1.0, low=0.0, high=1.0)
    dim = int(head_dim * part)
    if part != 1.0 and not phi3:
        raise holder.error("partial_rotary_factor", "1", "Only Phi-3 rotates a part.")
    if part != 1.0 and (dim < 2 or dim % 2):
        raise holder.error(
            "partial_rotary_factor",
            f"a factor that leaves an even number of the {head_dim} dims of a head",
        )
    if dim % 2:
        raise fields.error("head_dim", f"an even number, not {dim}")
    return dim


def _original_length(
    fields: Fields, section: Fields, max_positions: int, phi3: bool
) -> int:
    key = "original_max_position_embeddings"
    outer = fields.integer(key, 4096 if phi3 else None, high=_MAX_POSITIONS)
    inner = section.integer(key, None, high=_MAX_POSITIONS)
    if outer is not None and inner is not None and outer != inner:
        raise section.error(key, f"the same as at the top level, {outer}")
    length = outer or inner or max_positions
    if length < 2:
        raise (section if inner else fields).error(key, "2 or more")
    return length


def _read_llama3(section: Fields) -> dict[str, Any]:
    low = section.number("low_freq_factor", **_WEIGHT)
    high = section.number("high_freq_factor", **_WEIGHT)
    if high <= low:
        raise section.error("high_freq_factor", f"more than 'low_freq_factor', {low:g}")
    return {
        "factor": section.number("factor", **_FACTOR),
        "low_frequency_factor": low,
        "high_frequency_factor": high,
    }


def _read_yarn(section: Fields) -> dict[str, Any]:
    fast = section.number("beta_fast", 32.0, **_WEIGHT)
    slow = section.number("beta_slow", 1.0, **_WEIGHT)
    if fast < slow:
        raise section.error("beta_fast", f"no less than 'beta_slow', {slow:g}")
    factor_is_null = "factor" in section.values and not section.has("factor")
    return {
        # Null asks for the ratio of the two lengths; absence is a mistake.
        "factor": section.number(
            "factor", None if factor_is_null else REQUIRED, **_FACTOR
        ),
        "attention_factor": section.number("attention_factor", None, **_WEIGHT),
        "beta_fast": fast,
        "beta_slow": slow,
        "mscale": section.number("mscale", None, low=0.0, high=1e6),
        "mscale_all_dim": section.number("mscale_all_dim", None, low=0.0, high=1e6),
        "truncate": section.flag("truncate", True),
    }


def _read_longrope(section: Fields, count: int) -> dict[str, Any]:
    return {
        "factor": section.number("factor", None, **_FACTOR),
        "attention_factor": section.number("attention_factor", None, **_WEIGHT),
        "short_factors": section.numbers("short_factor", count, **_WEIGHT),
        "long_factors": section.numbers("long_factor", count, **_WEIGHT),
    }


def _scaling(rope: RopeConfig, max_positions: int) -> dict[str, Any] | None:
    """Returns the content of `rope_scaling`; None for the plain rotation."""
    keys: dict[str, Any]
    match rope.kind:
        case "default":
            return None
        case "longrope":
            # Readers of Phi-3 look for "type".
            keys = {
                "type": "longrope",
                "short_factor": list(rope.short_factors),
                "long_factor": list(rope.long_factors),
            }
            if rope.factor != max_positions / rope.original_length:
                keys["factor"] = rope.factor
            if rope.attention_factor is not None:
                keys["attention_factor"] = rope.attention_factor
            return keys
    keys = {"rope_type": rope.kind, "factor": rope.factor}
    if rope.kind == "llama3":
        keys |= {
            "low_freq_factor": rope.low_frequency_factor,
            "high_freq_factor": rope.high_frequency_factor,
            "original_max_position_embeddings": rope.original_length,
        }
    if rope.kind == "yarn":
        keys |= {
            "original_max_position_embeddings": rope.original_length,
            "beta_fast": rope.beta_fast,
            "beta_slow": rope.beta_slow,
            "truncate": rope.truncate,
        }
        for key in ("attention_factor", "mscale", "mscale_all_dim"):
            if getattr(rope, key) is not None:
                keys[key] = getattr(rope, key)
    return keys
