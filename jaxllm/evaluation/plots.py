"""A comparison as a picture."""

import os
import re
from collections.abc import Sequence
from typing import IO

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from jaxllm.evaluation.comparison import Comparison, MethodResult

__all__ = ["draw_comparison", "make_figure", "wrap_name"]

_BAR, _BASELINE, _WRONG = "#3b6ea5", "#9aa5b1", "#c0392b"
_NAME_WIDTH = 34
_INCHES_OF_LINE, _INCHES_OF_BAR, _INCHES_AROUND = 0.17, 0.24, 1.5
_WIDTH = 10.0


def draw_comparison(
    comparison: Comparison, file: str | os.PathLike[str] | IO[bytes]
) -> None:
    """Writes the picture as PNG.

    Args:
      comparison: At least one method.
      file: Where it goes; an existing file is replaced.
    """
    make_figure(comparison).savefig(file, format="png")


def make_figure(comparison: Comparison) -> Figure:
    """Draws tokens per pass and speed-up of every method, side by side.

    Args:
      comparison: At least one method.

    Returns:
      A figure of two panels, a horizontal bar for each method in each.
    """
    methods = list(comparison.methods)
    names = [wrap_name(method.name) for method in methods]
    labels = [
        f"{name}\n(not lossless)" if method.lossless is False else name
        for name, method in zip(names, methods, strict=True)
    ]
    lines = sum(label.count("\n") + 1 for label in labels)
    height = _INCHES_AROUND + _INCHES_OF_BAR * len(labels) + _INCHES_OF_LINE * lines
    figure = Figure(figsize=(_WIDTH, height), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    passes, speeds = figure.subplots(1, 2, sharey=True)
    colours = [_colour(method, i == 0) for i, method in enumerate(methods)]
    _draw(
        passes,
        [method.overall.tokens_per_pass for method in methods],
        colours,
        "tokens per pass of the target",
    )
    _draw(
        speeds,
        [method.overall.speedup for method in methods],
        colours,
        f"speed-up over {_shortened(methods[0].name)}",
        [method.overall.spread for method in methods],
    )
    passes.set_yticks(range(len(methods)), labels)
    passes.set_ylim(len(methods) - 0.4, -0.6)
    figure.suptitle(_title(comparison), fontsize=11)
    return figure


def wrap_name(name: str, width: int = _NAME_WIDTH) -> str:
    """Breaks a method string into lines, behind its signs where that is possible."""
    lines, line = [], ""
    for piece in re.findall(r"[^:,+()]*[:,+()]+|[^:,+()]+", name):
        if line and len(line) + len(piece) > width:
            lines.append(line)
            line = ""
        line += piece
        while len(line) > width:
            lines.append(line[:width])
            line = line[width:]
    return "\n".join([*lines, line] if line else lines)


def _shortened(name: str) -> str:
    return name if len(name) <= _NAME_WIDTH else f"{name[: _NAME_WIDTH - 3]}..."


def _title(comparison: Comparison) -> str:
    settings = comparison.settings
    temperature = f"temperature {settings.temperature:g}"
    parts = [
        _shortened(os.path.basename(comparison.lm.name.rstrip("/"))),
        comparison.device,
        comparison.dtype,
        f"batch {settings.batch}",
        temperature if settings.temperature > 0 else "greedy",
        f"{len(comparison.prompts.rows)} prompts",
        f"median of {settings.runs} runs",
    ]
    return ", ".join(parts)


def _colour(method: MethodResult, is_baseline: bool) -> str:
    if method.lossless is False:
        return _WRONG
    return _BASELINE if is_baseline else _BAR


def _draw(
    axes: Axes,
    values: Sequence[float],
    colours: Sequence[str],
    title: str,
    spreads: Sequence[Sequence[float]] | None = None,
) -> None:
    """Draws one panel: a bar a method, its value behind it, and a line at 1."""
    rows = range(len(values))
    axes.barh(rows, values, height=0.62, color=colours, zorder=2)
    ends = list(values)
    if spreads is not None:
        # Rounding may leave a median a hair outside.
        below = [max(v - s[0], 0.0) for v, s in zip(values, spreads, strict=True)]
        above = [max(s[1] - v, 0.0) for v, s in zip(values, spreads, strict=True)]
        axes.errorbar(
            values,
            rows,
            xerr=[below, above],
            fmt="none",
            ecolor="#222222",
            elinewidth=1,
            capsize=2.5,
            zorder=3,
        )
        ends = [v + a for v, a in zip(values, above, strict=True)]
    for row, value, end in zip(rows, values, ends, strict=True):
        axes.annotate(
            f"{value:.2f}",
            (end, row),
            xytext=(5, 0),
            textcoords="offset points",
            va="center",
            fontsize=9,
            # The line at 1 shall not run through a figure.
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5},
            zorder=5,
        )
    axes.axvline(1.0, color="#222222", linewidth=1, linestyle=(0, (4, 3)), zorder=4)
    axes.set_xlim(0, 1.15 * max(1.0, *ends) if ends else 1.0)
    axes.set_title(title, fontsize=10)
    axes.tick_params(axis="y", length=0, labelsize=9)
    axes.tick_params(axis="x", labelsize=9)
    axes.grid(axis="x", color="#dddddd", linewidth=0.6, zorder=0)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
