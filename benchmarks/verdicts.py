"""From times to rows, and from rows to what was promised and whether it holds."""

import dataclasses
import statistics
from typing import Any

__all__ = ["BARS", "Bar", "bars", "first_difference", "rows_of"]

Row = dict[str, Any]

OURS = "jaxllm"
REFERENCE = "HF eager"
BYTES = {"float32": 4, "bfloat16": 2}
QUIET = 0.2
"""Cores that other work may use while ratios are measured."""

NEAR_TIE = 2e-4
"""Gap of two logits below which rounding in float32 may choose either."""

DECODE = "decode_tokens_per_second"
END_TO_END = "end_to_end_tokens_per_second"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bar:
    """One promise.

    Attributes:
      name: What a reader sees.
      setting: The interleaved run that it is about.
      over: Whom this project is compared with; None where it stands alone.
      limit: The value that has to be reached, or kept below.
      goal: What would be better still.
      measure: `"rate"`: tokens/s over those of `over`, the lower of decode and end to
        end. `"prefill"`: time to the first token of `over` over ours. `"share"`: of
        the measured read bandwidth. `"cost"`: time of a step of `over` over ours, at
        most. `"memory"`: peak over twice the parameters plus 400 MB, at most.
    """

    name: str
    setting: str
    over: str | None
    limit: float
    measure: str
    goal: float | None = None

    @property
    def at_most(self) -> bool:
        """Whether the limit is an upper one."""
        return self.measure in ("cost", "memory")


_F32, _BF16 = "decode float32 batch 1", "decode bfloat16 batch 1"
_F32_8, _PREFILL = "decode float32 batch 8", "prefill 512 float32"


def _bar(
    name: str,
    setting: str,
    over: str | None,
    limit: float,
    measure: str,
    goal: float | None = None,
) -> Bar:
    return Bar(
        name=name, setting=setting, over=over, limit=limit, measure=measure, goal=goal
    )


BARS = (
    _bar("float32 over HF eager", _F32, "HF eager", 2.3, "rate"),
    _bar("float32 over CTranslate2", _F32, "CTranslate2", 0.95, "rate", 1.0),
    _bar("float32 over llama.cpp", _F32, "llama.cpp", 0.80, "rate"),
    _bar("float32 share of read bandwidth", _F32, None, 0.65, "share", 0.85),
    _bar("bfloat16 over HF eager", _BF16, "HF eager", 0.95, "rate", 1.1),
    _bar("prefill 512 over HF eager", _PREFILL, "HF eager", 2.0, "prefill"),
    _bar("prefill 512 over CTranslate2", _PREFILL, "CTranslate2", 0.9, "prefill"),
    _bar("batch 8 float32 over CTranslate2", _F32_8, "CTranslate2", 0.9, "rate"),
    _bar("cost of 8 query rows over 1", _F32, "jaxllm wide", 1.8, "cost"),
    _bar("peak memory, float32", _F32, None, 1.0, "memory"),
    _bar("peak memory, bfloat16", _BF16, None, 1.0, "memory"),
)


def first_difference(ours: list[list[int]], theirs: list[list[int]]) -> Row | None:
    """Returns where two outputs first differ (earliest in a row), or None."""
    found = [
        (index, row)
        for row, (a, b) in enumerate(zip(ours, theirs, strict=True))
        for index, pair in enumerate(zip(a, b, strict=True))
        if pair[0] != pair[1]
    ]
    if not found:
        return None
    index, row = min(found)
    return {"row": row, "index": index}


def rows_of(setting: Any, findings: Any, parameters: int) -> list[Row]:
    """Returns the rows of one setting: contenders, agreement, bandwidth.

    Args:
      setting: The `Setting`.
      findings: Its `Findings`.
      parameters: How many numbers the model holds.
    """
    plain = {
        "setting": setting.name,
        "dtype": setting.dtype,
        "batch": setting.batch,
        "prompt_tokens": setting.prompt,
        "new_tokens": setting.new,
        "other_cores": findings.other_cores,
    }
    kind = "decode" if setting.new > 1 else "prefill"
    nbytes = parameters * BYTES[setting.dtype]
    rows: list[Row] = []
    for name, times in findings.times.items():
        row = {"kind": kind, **plain, "contender": name, "status": "measured"}
        row |= _rates(setting, times)
        row["compile_seconds"] = round(findings.warm[name]["compile_seconds"], 3)
        if findings.bandwidth and not name.endswith("int8"):
            shares = [
                rate * nbytes / speed
                for rate, speed in zip(
                    row[f"{DECODE}_samples"], findings.bandwidth, strict=True
                )
            ]
            row |= _summary("bandwidth_share", shares)
        if name == OURS:
            row["peak_bytes"] = findings.warm[name]["peak_bytes"]
            row["parameter_bytes"] = nbytes
        rows.append(row)
    for name, reason in findings.missing.items():
        row = {"kind": kind, **plain, "contender": name}
        rows.append(row | {"status": "left out", "reason": reason})
    rows += [
        {"kind": "agreement", **plain, "contender": name, **_agreement(warm)}
        for name, warm in findings.warm.items()
        if "difference" in warm and name != REFERENCE
    ]
    if findings.bandwidth:
        speed = _summary("read_bytes_per_second", findings.bandwidth)
        rows.append({"kind": "bandwidth", **plain, **speed})
    return rows


def _rates(setting: Any, times: list[dict[str, float]]) -> Row:
    first = [t["first_seconds"] for t in times]
    row = _summary("first_token_seconds", first)
    if setting.new == 1:
        return row
    tokens = setting.batch * setting.new
    rest = setting.batch * (setting.new - 1)
    # Two runs are subtracted; noise must not leave nothing, or less, of the second.
    decode = [
        rest / max(t["total_seconds"] - t["first_seconds"], 0.01 * t["total_seconds"])
        for t in times
    ]
    row |= _summary(DECODE, decode)
    row |= _summary(END_TO_END, [tokens / t["total_seconds"] for t in times])
    return row


def _summary(name: str, samples: list[float]) -> Row:
    """Returns the median under the name itself, with its spread and samples."""
    return {
        name: statistics.median(samples),
        f"{name}_low": min(samples),
        f"{name}_high": max(samples),
        f"{name}_samples": samples,
    }


def _agreement(warm: Row) -> Row:
    difference = warm["difference"]
    if difference is None:
        return {"reference": REFERENCE, "equal": True, "near_tie": None}
    near = difference["gap_between_choices"] < NEAR_TIE
    return {"reference": REFERENCE, "equal": False, "near_tie": near, **difference}


def bars(rows: list[Row], *, judged: bool) -> list[Row]:
    """Returns a row for every bar whose setting was run.

    Args:
      rows: Of all settings.
      judged: Whether the run is the one that the bars were set for. If not, or when
        other work disturbed it, `met` is None.
    """
    found = []
    for bar in BARS:
        entered = {
            row["contender"]: row
            for row in rows
            if row["setting"] == bar.setting and row["kind"] in ("decode", "prefill")
        }
        if OURS not in entered:
            continue
        row: Row = {
            "kind": "bar",
            "setting": bar.setting,
            "name": bar.name,
            "limit": bar.limit,
            "direction": "at most" if bar.at_most else "at least",
            "goal": bar.goal,
            "value": None,
            "met": None,
        }
        absent = [
            name
            for name in (OURS, bar.over)
            if name and entered.get(name, {}).get("status") != "measured"
        ]
        if absent:
            why = entered.get(absent[0], {}).get("reason", "did not take part")
            found.append(row | {"reason": f"{absent[0]}: {why}"})
            continue
        row |= _value(bar, entered[OURS], entered.get(bar.over or OURS, {}))
        others = entered[OURS]["other_cores"] or 0.0
        if not judged:
            row["reason"] = "set for another model or shape"
        elif others > QUIET and bar.measure != "memory":
            row["reason"] = f"other work kept {others:.1f} cores busy"
        else:
            value = row["value"]
            row["met"] = value <= bar.limit if bar.at_most else value >= bar.limit
        found.append(row)
    return found


def _value(bar: Bar, ours: Row, theirs: Row) -> Row:
    if bar.measure == "memory":
        allowed, peak = 2 * ours["parameter_bytes"] + 400_000_000, ours["peak_bytes"]
        return {"value": peak / allowed, "peak_bytes": peak, "allowed_bytes": allowed}
    if bar.measure == "share":
        return _range(ours["bandwidth_share_samples"])
    if bar.measure == "prefill":
        return _ratio(theirs, ours, "first_token_seconds")
    decode = _ratio(ours, theirs, DECODE)
    if bar.measure == "cost":
        return decode
    whole = _ratio(ours, theirs, END_TO_END)
    lower = min(decode, whole, key=lambda row: row["value"])
    return lower | {"decode": decode["value"], "end_to_end": whole["value"]}


def _ratio(above: Row, below: Row, name: str) -> Row:
    pairs = zip(above[f"{name}_samples"], below[f"{name}_samples"], strict=True)
    return _range([a / b for a, b in pairs])


def _range(samples: list[float]) -> Row:
    return {
        "value": statistics.median(samples),
        "low": min(samples),
        "high": max(samples),
    }
