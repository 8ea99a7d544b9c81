"""The rows of the benchmark as text for people."""

from typing import Any

__all__ = ["render"]

Row = dict[str, Any]


def render(rows: list[Row], about: Row) -> str:
    """Returns all tables, what was left out, and the bars."""
    model, versions = about["model"], about["versions"]
    known = ", ".join(f"{name} {v}" for name, v in versions.items() if v)
    lines = [
        f"{model['name']}, {model['parameters'] / 1e6:.1f}M parameters; "
        f"{about['threads']} threads of {about['cores']} on {about['processor']}",
        f"{about['rounds']} rounds; load average {about['load_average_before']} before,"
        f" {about['load_average_after']} after",
        known,
    ]
    names = dict.fromkeys(row["setting"] for row in rows)
    for name in names:
        lines += _setting(name, [row for row in rows if row["setting"] == name])
    promised = [row for row in rows if row["kind"] == "bar"]
    if promised:
        lines += ["", "Bars (median of the ratios within a round; lowest to highest)"]
        lines += _columns([_bar_cells(row) for row in promised])
    return "\n".join(lines)


def _setting(name: str, rows: list[Row]) -> list[str]:
    timed = [row for row in rows if row.get("status") == "measured"]
    first = next(row for row in rows if "prompt_tokens" in row)
    title = f"{name}: prompt {first['prompt_tokens']}, {first['new_tokens']} new"
    if first["other_cores"] is not None:
        title += f"; other work on {first['other_cores']:.2f} cores"
    lines = ["", title]
    if timed:
        decode = timed[0]["kind"] == "decode"
        head = ["", "first token ms", "compile s"]
        if decode:
            head = ["", "decode tokens/s", "end to end", *head[1:], "of bandwidth"]
        lines += _columns([head, *(_timed_cells(row, decode) for row in timed)])
    for row in rows:
        if row["kind"] == "bandwidth":
            speed, low, high = (
                row[f"read_bytes_per_second{end}"] / 1e9
                for end in ("", "_low", "_high")
            )
            lines.append(f"  read bandwidth {speed:.1f} GB/s ({low:.1f}-{high:.1f})")
        if row["kind"] == "agreement":
            lines.append(f"  tokens of {row['contender']}: {_agreement(row)}")
        if row.get("status") == "left out":
            lines.append(f"  left out: {row['contender']}: {row['reason']}")
    return lines


def _timed_cells(row: Row, decode: bool) -> list[str]:
    end = [
        f"{1e3 * row['first_token_seconds']:.0f}",
        f"{row['compile_seconds']:.1f}",
    ]
    if not decode:
        return [row["contender"], *end]
    rate, low, high = (
        row[f"decode_tokens_per_second{end}"] for end in ("", "_low", "_high")
    )
    share = row.get("bandwidth_share")
    return [
        row["contender"],
        f"{rate:.1f} ({low:.1f}-{high:.1f})",
        f"{row['end_to_end_tokens_per_second']:.1f}",
        *end,
        "" if share is None else f"{share:.2f}",
    ]


def _agreement(row: Row) -> str:
    if row["equal"]:
        return f"all equal to {row['reference']}"
    near = "a near tie" if row["near_tie"] else "NOT a near tie"
    return (
        f"differ from {row['reference']} from token {row['index']} of row {row['row']}"
        f" on: {near}, logits {row['gap_between_choices']:.1e} apart"
    )


def _bar_cells(row: Row) -> list[str]:
    limit = f"{row['direction']} {row['limit']:g}"
    if row["goal"] is not None:
        limit += f" (goal {row['goal']:g})"
    if row["value"] is None:
        return [row["name"], "-", limit, f"not measured: {row['reason']}"]
    value = f"{row['value']:.2f}"
    if "low" in row:
        value += f" ({row['low']:.2f}-{row['high']:.2f})"
    verdict = "met" if row["met"] else "MISSED"
    if row["met"] is None:
        verdict = f"not judged: {row['reason']}"
    if "decode" in row:
        verdict += f"; decode {row['decode']:.2f}, end to end {row['end_to_end']:.2f}"
    if "peak_bytes" in row:
        verdict += (
            f"; {row['peak_bytes'] / 1e6:.0f} MB of {row['allowed_bytes'] / 1e6:.0f} MB"
        )
    return [row["name"], value, limit, verdict]


def _columns(table: list[list[str]]) -> list[str]:
    """Aligns cells: names to the left, figures to the right, the last as it is."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return [
        "  "
        + "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in table
    ]
