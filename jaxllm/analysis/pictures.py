"""A report as a picture: the roof of the hardware, and the operators below it."""

import math
import os
from typing import IO

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from jaxllm.analysis.roofline import Cost, Report

__all__ = ["draw_report", "make_figure"]

_COLOURS = {"memory": "#3b6ea5", "compute": "#c0392b", "interconnect": "#8e6bb0"}
_ROOF = "#222222"
_SMALLEST, _LARGEST = 20, 900
_CLOSE = 3
_NAMED = 0.01
"""Least share of the time that makes an operator worth its name in the picture."""


def draw_report(report: Report, file: str | os.PathLike[str] | IO[bytes]) -> None:
    """Writes the picture as PNG.

    Args:
      report: One pass.
      file: Where it goes; an existing file is replaced.
    """
    make_figure(report).savefig(file, format="png")


def make_figure(report: Report) -> Figure:
    """Draws the roofline and, beside it, the time of every operator.

    Args:
      report: One pass.

    Returns:
      A figure of two panels. On the left every operator stands at its operations a
      byte, at the rate that it reaches when it takes its least time, as large as its
      share of the time; on the right are the times.
    """
    figure = Figure(figsize=(12, 5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    roof, times = figure.subplots(1, 2, width_ratios=(3, 2))
    _draw_roof(roof, report)
    _draw_times(times, report)
    work, mesh = report.workload, report.mesh
    split = ",".join(f"{axis}={size}" for axis, size in mesh.items())
    figure.suptitle(
        f"{report.model}, {report.slice.name}{f' ({split})' if split else ''}, "
        f"{work.phase}, {work.rows} x {work.tokens} tokens at context {work.context}: "
        f"{report.seconds * 1e3:.4g} ms at least (a model, not a measurement)",
        fontsize=11,
    )
    return figure


def _products(report: Report) -> list[Cost]:
    return [
        cost for cost in report.costs if cost.operator.flops and cost.operator.intensity
    ]


def _draw_roof(axes, report: Report) -> None:  # type: ignore[no-untyped-def]
    costs, device = _products(report), report.device
    intensities = [cost.operator.intensity or 0.0 for cost in costs]
    dtypes = sorted({cost.operator.dtype for cost in costs} - {"float32"}) or [
        "float32"
    ]
    ridges = [device.peak(dtype) / device.bandwidth for dtype in dtypes]
    low = min(0.1, *intensities, *ridges) / 2
    high = max(*intensities, *ridges) * 10
    for dtype, ridge in zip(dtypes, ridges, strict=True):
        peak = device.peak(dtype)
        axes.plot([low, ridge, high], [low * device.bandwidth, peak, peak], color=_ROOF)
        axes.annotate(
            f"{dtype} {peak / 1e12:.4g} T/s",
            (high, peak),
            xytext=(-4, 4),
            textcoords="offset points",
            ha="right",
            fontsize=8,
        )
    for cost in costs:
        share = cost.seconds / report.seconds
        rate = _rate(cost)
        axes.scatter(
            [cost.operator.intensity],
            [rate],
            s=_SMALLEST + (_LARGEST - _SMALLEST) * share,
            color=_COLOURS[cost.bound],
            alpha=0.75,
            edgecolors="white",
            zorder=3,
        )
    for names, intensity, rate in _labels(report, costs):
        axes.annotate(
            names,
            (intensity, rate),
            xytext=(12, -4),
            va="top",
            textcoords="offset points",
            fontsize=8,
        )
    axes.set(xscale="log", yscale="log", xlim=(low, high))
    axes.set_xlabel("operations a byte")
    axes.set_ylabel("operations a second of a device")
    axes.set_title(f"memory {device.bandwidth / 1e9:.4g} GB/s", fontsize=10)
    axes.grid(which="major", color="#dddddd", linewidth=0.6, zorder=0)
    axes.set_axisbelow(True)


def _labels(report: Report, costs: list[Cost]) -> list[tuple[str, float, float]]:
    """Returns names and where they go; operators that stand together share a label."""
    groups: dict[tuple[int, ...], list[Cost]] = {}
    for cost in costs:
        if cost.seconds >= _NAMED * report.seconds:
            place = (cost.operator.intensity or 1.0, _rate(cost))
            close = tuple(round(_CLOSE * math.log10(x)) for x in place)
            groups.setdefault(close, []).append(cost)
    return [
        (
            "\n".join(cost.operator.name for cost in each),
            each[0].operator.intensity or 1.0,
            _rate(each[0]),
        )
        for each in groups.values()
    ]


def _rate(cost: Cost) -> float:
    return cost.operator.flops / max(cost.compute_seconds, cost.memory_seconds)


def _draw_times(axes, report: Report) -> None:  # type: ignore[no-untyped-def]
    costs = [cost for cost in report.costs if cost.seconds]
    names = [cost.operator.name for cost in costs]
    own = [1e3 * (cost.seconds - cost.sent_seconds) for cost in costs]
    sent = [1e3 * cost.sent_seconds for cost in costs]
    rows = range(len(costs))
    more = [cost.compute_seconds > cost.memory_seconds for cost in costs]
    colours = [_COLOURS["compute" if compute else "memory"] for compute in more]
    axes.barh(rows, own, color=colours, zorder=2)
    axes.barh(rows, sent, left=own, color=_COLOURS["interconnect"], zorder=2)
    axes.set_yticks(rows, names, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("ms")
    axes.grid(axis="x", color="#dddddd", linewidth=0.6, zorder=0)
    axes.set_axisbelow(True)
    for name, colour in _COLOURS.items():
        axes.barh([0], [0], color=colour, label=name)
    axes.legend(fontsize=8, frameon=False)
