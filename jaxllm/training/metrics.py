"""What a run says about itself: JSON lines, TensorBoard, a curve, a line on stderr."""

import json
import math
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from jaxllm.checkpoints.files import replacing

__all__ = ["JsonlWriter", "Progress", "TensorBoardWriter", "Writer", "draw_curve"]

METRICS_NAME = "metrics.jsonl"
CURVE_NAME = "curve.png"


class Writer(Protocol):
    """Takes what is measured; only the first process of a job has any."""

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Writes numbers of a step."""

    def write_text(self, step: int, name: str, text: str) -> None:
        """Writes a text of a step."""

    def close(self) -> None:
        """Writes what is left."""


class JsonlWriter:
    """A line of JSON for each call, in a file that a resumed run goes on with."""

    def __init__(self, path: Path, step: int = 0):
        """Opens the file and drops what was written after a step.

        Args:
          path: The file; made if absent.
          step: The step that the run resumes from; later lines are of steps that will
            be done again.
        """
        kept = [line for line in read_lines(path) if line["step"] <= step]
        text = "".join(f"{json.dumps(line)}\n" for line in kept)
        with replacing(path, "cannot write metrics") as file:
            file.write(text.encode())
        self._file = path.open("a", encoding="utf-8")

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Writes numbers; those that JSON lacks are written as strings."""
        finite = {n: x if math.isfinite(x) else str(x) for n, x in scalars.items()}
        self._line({"step": step, **finite})

    def write_text(self, step: int, name: str, text: str) -> None:
        """Writes a text."""
        self._line({"step": step, name: text})

    def _line(self, content: dict[str, Any]) -> None:
        self._file.write(json.dumps(content) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


class TensorBoardWriter:
    """Event files for TensorBoard."""

    def __init__(self, directory: Path, step: int = 0):
        """Opens a new event file that hides what older ones say of later steps."""
        from tensorboardX import SummaryWriter

        self._writer = SummaryWriter(str(directory), purge_step=step + 1)

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Writes numbers."""
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, step)

    def write_text(self, step: int, name: str, text: str) -> None:
        """Writes a text."""
        self._writer.add_text(name, text, step)

    def close(self) -> None:
        """Writes what is left."""
        self._writer.close()


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Returns the lines of a metrics file; a last line that was torn is left out."""
    if not path.exists():
        return []
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            content = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(content, dict) and isinstance(content.get("step"), int):
            lines.append(content)
    return lines


def draw_curve(lines: Iterable[Mapping[str, Any]], path: Path) -> None:
    """Draws every loss of a run over its steps.

    Args:
      lines: As `read_lines` returns them.
      path: The PNG.
    """
    from matplotlib.figure import Figure

    lines = list(lines)
    names = dict.fromkeys(
        name for line in lines for name in line if name.endswith(("loss", "_per_byte"))
    )
    figure = Figure(figsize=(7, 4), layout="tight")
    axes = figure.add_subplot()
    for name in names:
        points = [
            (line["step"], line[name])
            for line in lines
            if isinstance(line.get(name), int | float)
        ]
        style = "-" if name.startswith("train/") else "o-"
        axes.plot(*zip(*points, strict=True), style, label=name, lw=1, ms=3)
    axes.set(xlabel="step")
    axes.grid(alpha=0.3)
    if names:
        axes.legend(fontsize="small")
    with replacing(path, "cannot draw the curve") as file:
        figure.savefig(file, format="png", dpi=120)


class Progress:
    """A line on stderr: a bar on terminals, else a line whenever metrics are read."""

    def __init__(self, steps: int, done: int):
        """Starts the clock.

        Args:
          steps: Of the whole run.
          done: Steps done before.
        """
        self._steps, self._first, self._begun = steps, done, time.perf_counter()
        self._bar: Any = None
        if sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=steps, initial=done, unit="step", file=sys.stderr)

    def say(self, text: str) -> None:
        """Prints a line that stays."""
        if self._bar is None:
            print(text, file=sys.stderr, flush=True)
        else:
            self._bar.write(text, file=sys.stderr)

    def show(self, step: int, figures: Sequence[str]) -> None:
        """Shows how far the run is.

        Args:
          step: Steps done.
          figures: Such as `("loss 2.310", "1200 tokens/s")`.
        """
        text = ", ".join(figures)
        if self._bar is not None:
            self._bar.set_postfix_str(text, refresh=False)
            self._bar.update(step - self._bar.n)
            return
        passed = time.perf_counter() - self._begun
        left = passed / max(step - self._first, 1) * (self._steps - step)
        self.say(f"step {step} of {self._steps}: {text}, {_clock(left)} left")

    def close(self) -> None:
        """Leaves the bar as it stands."""
        if self._bar is not None:
            self._bar.close()


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
