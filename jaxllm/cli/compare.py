"""`jaxllm compare`: methods side by side on the same prompts and model."""

import json
import logging
import os
import sys
from typing import TYPE_CHECKING, Any

from absl import flags

from jaxllm.cli.options import (
    MESH,
    MODEL,
    SAMPLING,
    Choice,
    Flag,
    Number,
    Texts,
    UsageError,
)

if TYPE_CHECKING:
    from jaxllm.checkpoints import LanguageModel
    from jaxllm.evaluation import Comparison, Cost, MethodResult, Step

__all__ = ["FLAGS", "SUMMARY", "run"]

SUMMARY = """run methods side by side on the same prompts, and check their tokens

  jaxllm compare
  jaxllm compare --decode prompt_lookup --decode "jacobi:window=16" --runs 9
  jaxllm compare --model MODEL --prompts question.jsonl --limit 5 --output DIR

The first method is the baseline; where none is plain decoding, that is put first. A row
of --prompts is {"id"?, "category"?, "prompt" | "turns" | "question" | "token_ids"}.
Prints a table, and writes results.json and comparison.png to --output. The exit code is
1 when the tokens of a method are not the baseline's; a difference where two tokens are
as good as equal (a near tie) is counted and is none.
"""

FLAGS = (
    MODEL,
    Texts(
        "decode",
        [],
        "a method, name[:option=value,...]; may be repeated (default: a selection)",
    ),
    Flag("prompts", None, "a JSONL file of prompts (default: beginnings of stories)"),
    Flag("output", "comparison", "the folder that the results go to"),
    Number(
        "max_new_tokens", 64, "tokens to generate for a prompt", low=1, integer=True
    ),
    Number("runs", 5, "timed rounds, in which methods take turns", low=1, integer=True),
    Number("batch", 1, "most prompts that are decoded together", low=1, integer=True),
    Number(
        "limit",
        None,
        "take the first prompts of every category, so many (default: all)",
        low=1,
        integer=True,
    ),
    *SAMPLING,
    Number(
        "seed",
        0,
        "prompt i draws with seed + i",
        low=0,
        high=2**32 - 1,
        integer=True,
    ),
    Choice(
        "verify",
        "match",
        "match: all methods give the same tokens; reject: the textbook rule, equal in "
        "distribution only",
        ("match", "reject"),
    ),
    Flag(
        "dtype",
        None,
        "dtype of weights and activations (default: float32 on a CPU, else bfloat16)",
    ),
    MESH,
)

_RESULTS, _PICTURE = "results.json", "comparison.png"
_NOT_LOSSLESS = 1
_WRITE = "cannot write results"


def run(values: flags.FlagValues) -> int:
    """Runs the command.

    Args:
      values: The parsed flags.

    Returns:
      The exit code: 1 when a method is not lossless.

    Raises:
      UsageError: The output cannot be written.
      UserError: A method, the prompts or the model are unusable.
    """
    # jax comes with these.
    import jax

    from jaxllm import api
    from jaxllm.cli.progress import note
    from jaxllm.evaluation import (
        DEFAULT_METHODS,
        DEMO_METHODS,
        Settings,
        build_methods,
        compare,
        default_prompts,
        read_prompts,
    )

    default = DEMO_METHODS if values.model == "demo" else DEFAULT_METHODS
    methods = build_methods(values.decode or default)
    given = values.prompts
    prompts = default_prompts() if given is None else read_prompts(given)
    prompts = prompts.first(values.limit)
    settings = Settings(
        runs=values.runs,
        max_new_tokens=values.max_new_tokens,
        batch=values.batch,
        temperature=values.temperature,
        top_k=values.top_k,
        top_p=values.top_p,
        min_p=values.min_p,
        seed=values.seed,
        verify=values.verify,
    )
    dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    lm = api.load(values.model, dtype=values.dtype or dtype, mesh=values.mesh)
    _make_folder(values.output)
    with Progress() as progress:
        comparison = compare(lm, methods, prompts, settings, progress)
    print(table(comparison))
    _write(comparison, values.output)
    for method in comparison.methods:
        if method.lossless is False:
            note(_accusation(lm, comparison, method), "compare")
    return 0 if comparison.lossless else _NOT_LOSSLESS


def _make_folder(path: str) -> None:
    """Makes the output's folder, before an hour is spent on what goes there."""
    try:
        os.makedirs(path, exist_ok=True)
    except OSError as cause:
        raise UsageError(
            f"{_WRITE}: {path}: {cause.strerror}, expected a folder to write to. "
            "Correct --output."
        ) from None
    if not os.access(path, os.W_OK):
        raise UsageError(
            f"{_WRITE}: {path}: Permission denied, expected a folder to write to. "
            "Correct --output."
        )


class Progress:
    """Prints the cost to stderr, and draws a bar on terminals."""

    def __init__(self) -> None:
        """Shows nothing yet."""
        self._tokens = 0
        self._bar: Any = None

    def begin(self, cost: "Cost") -> None:
        """Says what the comparison will take."""
        from jaxllm.cli.progress import Bar, note

        note(
            f"parameters {cost.parameter_bytes / 1e6:.4g} MB, methods {cost.methods}, "
            f"prompts {cost.prompts}, shapes to compile {cost.shapes}, target passes "
            f"at most {cost.passes}",
            "compare",
        )
        self._bar = Bar(cost.rows)
        self._bar.start()

    def step(self, step: "Step") -> None:
        """Moves on by a batch."""
        self._tokens += step.tokens
        self._bar.step(len(step.rows), self._tokens)

    def __enter__(self) -> "Progress":
        """Returns itself."""
        return self

    def __exit__(self, *error: object) -> None:
        """Leaves the bar as it stands."""
        if self._bar is not None:
            self._bar.__exit__(*error)


def table(comparison: "Comparison") -> str:
    """Returns the results as text; by category too where there are several."""
    head = ["method", "lossless", "tokens/pass", "speed-up", "", "tokens/s"]
    rows = [[*head, "draft passes"]]
    for method in comparison.methods:
        low, high = method.overall.spread
        rows.append(
            [
                method.name,
                _verdict(method),
                f"{method.overall.tokens_per_pass:.2f}",
                f"{method.overall.speedup:.2f}",
                f"({low:.2f}-{high:.2f})",
                f"{method.overall.tokens_per_second:.0f}",
                ", ".join(f"{n} {x}" for n, x in method.draft_passes.items()) or "-",
            ]
        )
    lines = _aligned(rows)
    categories = comparison.prompts.categories
    if len(categories) > 1:
        rows = [["tokens/pass by category", *categories]]
        for method in comparison.methods:
            found = [method.by_category[name] for name in categories]
            rows.append([method.name, *(f"{x.tokens_per_pass:.2f}" for x in found)])
        lines += ["", *_aligned(rows)]
    return "\n".join(lines)


def _verdict(method: "MethodResult") -> str:
    if method.lossless is None:
        return "-"
    if not method.lossless:
        return "✗"
    ties = method.near_ties
    return f"✓ ({ties} near {'tie' if ties == 1 else 'ties'})" if ties else "✓"


def _aligned(rows: list[list[str]]) -> list[str]:
    """Returns lines: text to the left, figures to the right."""
    columns = list(zip(*rows, strict=True))
    widths = [max(map(len, column)) for column in columns]
    is_figure = [all(_is_number(cell) for cell in column[1:]) for column in columns]
    return [
        "  ".join(
            cell.rjust(width) if figure else cell.ljust(width)
            for cell, width, figure in zip(row, widths, is_figure, strict=True)
        ).rstrip()
        for row in rows
    ]


def _is_number(cell: str) -> bool:
    return cell.replace(".", "", 1).isdigit()


def _write(comparison: "Comparison", folder: str) -> None:
    from jaxllm.checkpoints.files import replacing

    results, picture = (os.path.join(folder, name) for name in (_RESULTS, _PICTURE))
    text = json.dumps(comparison.to_json(), indent=1, allow_nan=False) + "\n"
    with replacing(results, _WRITE) as file:
        file.write(text.encode())
    # Fonts that are missing are nothing to tell a user.
    logging.getLogger("matplotlib").setLevel(logging.ERROR)
    from jaxllm.evaluation.plots import draw_comparison

    with replacing(picture, _WRITE) as file:
        draw_comparison(comparison, file)
    print(f"\nresults: {results}\npicture: {picture}")


def _accusation(
    lm: "LanguageModel", comparison: "Comparison", method: "MethodResult"
) -> str:
    """Names the first divergence of a method that is not lossless."""
    first = method.first_divergence
    if first is None:
        return f"{method.name} is not lossless"
    return (
        f"{method.name} is not lossless: {method.divergences} of "
        f"{len(comparison.prompts.rows)} rows differ from "
        f"{comparison.methods[0].name}; the first is row {first.row} (id "
        f"{comparison.prompts.rows[first.row].id!r}), from position {first.position} "
        f"on: {_token(lm, first.found)}, expected {_token(lm, first.expected)}"
    )


def _token(lm: "LanguageModel", token: int | None) -> str:
    if token is None:
        return "the end"
    if lm.tokenizer is None:
        return f"token {token}"
    return f"token {token} {lm.tokenizer.decode([token])!r}"


if __name__ == "__main__":
    from jaxllm.cli.main import main

    sys.exit(main(["compare", *sys.argv[1:]]))
