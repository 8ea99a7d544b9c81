"""One metric of several runs over their steps, as a picture.

    python -m experiments.plot_runs --metric=train/acceptance --smooth=5 \
        --runs=tvdpp=runs/aligned,kl=runs/aligned-kl --output=alignment.png

Any metric that `jaxllm train` wrote to `metrics.jsonl` of a workdir.
"""

import pathlib

import numpy as np
from absl import app, flags
from matplotlib.figure import Figure

from jaxllm.training.metrics import read_lines

FLAGS = flags.FLAGS
flags.DEFINE_list("runs", [], "NAME=WORKDIR of each.")
flags.DEFINE_string("metric", "train/loss", "Its name.")
flags.DEFINE_string("label", "", "What the axis says; the metric's name when empty.")
flags.DEFINE_integer("smooth", 1, "Points of a running mean.", lower_bound=1)
flags.DEFINE_string("output", None, "The PNG.", required=True)


def points(workdir: str, metric: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns steps and values."""
    lines = read_lines(pathlib.Path(workdir) / "metrics.jsonl")
    found = [(line["step"], line[metric]) for line in lines if metric in line]
    if not found:
        raise app.UsageError(f"{workdir}: no line of metrics.jsonl has {metric!r}")
    steps, values = np.asarray(found, np.float64).T
    return steps, values


def main(argv: list[str]) -> None:
    if len(argv) > 1 or not FLAGS.runs:
        raise app.UsageError("expected --runs=NAME=WORKDIR,... and nothing else")
    figure = Figure(figsize=(7, 4), layout="tight")
    axes = figure.add_subplot()
    for run in FLAGS.runs:
        name, _, workdir = run.rpartition("=")
        steps, values = points(workdir, FLAGS.metric)
        width = min(FLAGS.smooth, len(values))
        mean = np.convolve(values, np.full(width, 1 / width), "valid")
        style = "o-" if len(values) < 40 else "-"
        axes.plot(steps[width - 1 :], mean, style, label=name or workdir, lw=1, ms=3)
    axes.set(xlabel="step", ylabel=FLAGS.label or FLAGS.metric)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    figure.savefig(FLAGS.output, dpi=120)


if __name__ == "__main__":
    app.run(main)
