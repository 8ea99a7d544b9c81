"""`jaxllm generate`: text from a prompt, a file of prompts, or a conversation."""

import contextlib
import os
import sys
import warnings
from collections.abc import Iterator
from typing import IO, TYPE_CHECKING, Any

from absl import flags

from jaxllm.cli.options import (
    MESH,
    MODEL,
    SAMPLING,
    Choice,
    Flag,
    Number,
    Switch,
    Texts,
    UsageError,
)
from jaxllm.cli.processes import PROCESSES, Mirror, first_says, join_processes
from jaxllm.version import __version__

if TYPE_CHECKING:
    from jaxllm.api import LanguageModel
    from jaxllm.cli.jobs import BatchJob
    from jaxllm.cli.progress import Meter
    from jaxllm.cli.tasks import Settings
    from jaxllm.decoding import BoundDrafter

__all__ = ["FLAGS", "SUMMARY", "run"]

SUMMARY = """generate text from a prompt, a file of prompts, or in a conversation

  jaxllm generate --prompt "Once upon a time" --stream
  jaxllm generate --prompts rows.jsonl --output results.jsonl
  jaxllm generate --model CHAT_MODEL --chat

A row of --prompts is {"id"?, "prompt" | "messages" | "token_ids"}, with any of
max_new_tokens, temperature, top_p, top_k, min_p, repetition_penalty, presence_penalty,
stop, seed for that row alone. A row of the output is {"id", "text", "token_ids",
"finish_reason", "prompt_tokens", "new_tokens", "target_passes", "seconds"}; a row that
failed has "error" and "line". Started again with the same --output, a job goes on with
the rows that are missing.
"""

FLAGS = (
    MODEL,
    Flag("adapter", None, "a directory with a LoRA adapter, or hf:org/name"),
    Flag("prompt", None, "the text to continue"),
    Flag("prompts", None, "a JSONL file of rows, or - for standard input"),
    Flag("decode", "autoregressive", "the method, name[:option=value,...]"),
    Number(
        "max_new_tokens",
        None,
        "most tokens to generate (default: 128, or what the model's positions leave)",
        low=0,
        integer=True,
    ),
    *SAMPLING,
    Number(
        "repetition_penalty",
        1.0,
        "above 1 makes every token of prompt and output less likely",
        low=1e-2,
        high=1e2,
    ),
    Number(
        "presence_penalty",
        0.0,
        "taken from the logits of every token of the output",
        low=-100,
        high=100,
    ),
    Choice(
        "verify",
        "match",
        "how drafts are tested: match gives the tokens of plain decoding; reject, for "
        "chains, gives its distribution",
        ("match", "reject"),
    ),
    Flag(
        "constraint",
        None,
        "what every text has to obey: regex:PATTERN, json:SCHEMA (inline or a file) or "
        "lark:FILE",
    ),
    Texts("stop", [], "a string that ends the text; may be repeated"),
    Switch("chat", False, "prompts are what a user says; without one, talk here"),
    Number(
        "num_samples",
        1,
        "results for each row, with different seeds; several are printed as JSONL",
        low=1,
        integer=True,
    ),
    Flag(
        "shared_prefix",
        "auto",
        "auto: what prompts have in common is run and kept once; off; or a file whose "
        "text stands before every prompt (the system message of a conversation)",
    ),
    Flag("kv_dtype", None, "dtype of cached keys and values (default: chosen)"),
    Number(
        "seed",
        0,
        "row i draws with seed + i, whatever its batch",
        low=0,
        high=2**32 - 1,
        integer=True,
    ),
    Flag("dtype", "bfloat16", "dtype of weights and activations, such as float32"),
    MESH,
    *PROCESSES,
    Flag("output", None, "write rows as JSONL to this file, or go on with it"),
    Switch("stream", False, "print text as it comes"),
    Switch("stats", False, "print totals as JSON to stderr"),
    Choice("truncate", None, "cut this end off a prompt that is too long", ("left",)),
)

# Words of --shared_prefix; anything else is a file.
_SHARING = ("auto", "off")

# What the rows of an output depend on; a job with others does not go on with it.
_DECISIVE = (
    "model",
    "adapter",
    "prompt",
    "decode",
    "max_new_tokens",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "verify",
    "constraint",
    "stop",
    "chat",
    "num_samples",
    "shared_prefix",
    "seed",
    "dtype",
    "kv_dtype",
    "truncate",
)


def run(values: flags.FlagValues) -> int:
    """Runs the command.

    Args:
      values: The parsed flags.

    Returns:
      The exit code.

    Raises:
      UsageError: The flags do not go together.
      UserError: The model, the prompt or every row is unusable.
    """
    _check(values)
    join_processes(values, "cannot generate")
    # jax comes with these, so not before the flags are known to be right.
    from jaxllm import api
    from jaxllm.cli.progress import Meter
    from jaxllm.drafting import make_drafter

    method = make_drafter(values.decode)
    lm = _load(values)
    drafter = api.bind(lm, method)
    settings = _settings(lm, drafter, values)
    meter = Meter()
    if values.prompt is None and values.prompts is None:
        from jaxllm.cli.conversation import converse

        converse(lm, drafter, settings, meter)
    elif values.prompts is None and values.output is None and settings.num_samples == 1:
        _answer(lm, drafter, settings, meter, values)
    else:
        _work(lm, drafter, settings, meter, values)
    if values.stats:
        meter.print_totals()
    return 0


def _load(values: flags.FlagValues) -> "LanguageModel":
    """Loads the model with its adapter; says where that was made for another."""
    from jaxllm import api
    from jaxllm.checkpoints import AdapterWarning
    from jaxllm.cli.progress import note

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", AdapterWarning)
        lm = api.load(
            values.model,
            dtype=values.dtype,
            mesh=values.mesh,
            cache_dtype=values.kv_dtype,
            adapter=values.adapter,
        )
    for warning in caught:
        if issubclass(warning.category, AdapterWarning):
            note(str(warning.message))
        else:
            warnings.warn_explicit(
                warning.message, warning.category, warning.filename, warning.lineno
            )
    return lm


def _settings(
    lm: "LanguageModel", drafter: "BoundDrafter", values: flags.FlagValues
) -> "Settings":
    """Returns what the flags say of every row; refuses what no row can have."""
    from jaxllm.cli.tasks import Settings
    from jaxllm.decoding import make_sampler
    from jaxllm.decoding.constraints import make_constraint
    from jaxllm.decoding.verify import check_verifier

    constraint = None
    if values.constraint is not None:
        constraint = make_constraint(
            values.constraint,
            lm.tokenizer,
            lm.config.vocabulary,
            lm.generation.eos_ids,
        )
    sampling = {
        "temperature": values.temperature,
        "top_p": values.top_p,
        "top_k": values.top_k,
        "min_p": values.min_p,
        "repetition_penalty": values.repetition_penalty,
        "presence_penalty": values.presence_penalty,
        "verify": values.verify,
    }
    check_verifier(drafter.drafter, make_sampler(1, **sampling))
    return Settings(
        max_new_tokens=values.max_new_tokens,
        constraint=constraint,
        stop=tuple(values.stop),
        seed=values.seed,
        chat=values.chat,
        num_samples=values.num_samples,
        truncate=values.truncate == "left",
        **_sharing(values),
        **sampling,
    )


def _sharing(values: flags.FlagValues) -> dict[str, Any]:
    """Returns what --shared_prefix says; a file's text comes before every prompt."""
    if values.shared_prefix in _SHARING:
        return {"shared_prefix": values.shared_prefix}
    try:
        with open(values.shared_prefix, encoding="utf-8") as file:
            return {"preamble": file.read()}
    except (OSError, UnicodeDecodeError) as cause:
        reason = getattr(cause, "strerror", None) or "is no UTF-8 text"
        raise UsageError(
            f"cannot read a prefix: {values.shared_prefix}: {reason}, expected auto, "
            "off or a text file. Correct --shared_prefix."
        ) from None


def _check(values: flags.FlagValues) -> None:
    """Refuses flags that do not go together, and files that are not there."""

    def refuse(found: str, wanted: str, action: str) -> UsageError:
        return UsageError(f"cannot generate: {found}, expected {wanted}. {action}")

    if values.prompt is not None and values.prompts is not None:
        raise refuse("--prompt and --prompts: both are given", "one", "Leave one out.")
    alone = values.prompt is None and values.prompts is None
    if alone and not (values.chat and sys.stdin.isatty()):
        raise refuse(
            "--prompt: no prompt is given",
            "--prompt TEXT or --prompts FILE",
            "Give one, or --chat in a terminal.",
        )
    if alone:
        for name, default in (("output", None), ("num_samples", 1)):
            if values[name].value != default:
                raise refuse(f"--{name}: in a conversation", "none", "Leave it out.")
    if values.coordinator is not None and (alone or values.prompts == "-"):
        raise refuse(
            "--coordinator: with text from this terminal",
            "--prompt or a file",
            "Leave it out.",
        )
    if values.stream:
        for name in ("prompts", "output"):
            if values[name].value is not None:
                raise refuse(f"--stream: with --{name}", "--prompt alone", "Drop one.")
        if values.num_samples > 1:
            raise refuse("--stream: with --num_samples", "one sample", "Drop one.")
    if "" in values.stop:
        raise refuse("--stop: is empty", "some text", "Leave it out.")
    if values.prompts not in (None, "-"):
        with contextlib.closing(_open(values.prompts)):
            pass
        if values.output is not None and os.path.exists(values.output):
            if os.path.samefile(values.prompts, values.output):
                raise refuse(
                    "--output: is the file of --prompts", "another", "Choose another."
                )


def _open(path: str) -> IO[bytes]:
    if path == "-":
        return sys.stdin.buffer
    try:
        return open(path, "rb")
    except OSError as cause:
        raise UsageError(
            f"cannot read prompts: {path}: {cause.strerror}, expected a JSONL file. "
            "Correct --prompts."
        ) from None


def _answer(
    lm: "LanguageModel",
    drafter: "BoundDrafter",
    settings: "Settings",
    meter: "Meter",
    values: flags.FlagValues,
) -> None:
    """Prints the continuation of one prompt."""
    from jaxllm.cli.conversation import stream_task
    from jaxllm.cli.jobs import generate_batch
    from jaxllm.cli.output import write_text
    from jaxllm.cli.rows import Row
    from jaxllm.cli.tasks import make_tasks

    [task] = make_tasks(lm, Row(1, 1, values.prompt), settings)
    with meter:
        if values.stream:
            stream_task(lm, drafter, task, meter, [])
            return
        [result] = generate_batch(lm, drafter, [task])
        meter.add(len(task.ids), result)
    if lm.tokenizer is None:
        write_text(" ".join(map(str, result.token_ids)) + "\n")
    else:
        write_text(result.text if result.text.endswith("\n") else result.text + "\n")


def _work(
    lm: "LanguageModel",
    drafter: "BoundDrafter",
    settings: "Settings",
    meter: "Meter",
    values: flags.FlagValues,
) -> None:
    """Runs a job: rows in, rows out."""
    from jaxllm.cli.jobs import BatchJob
    from jaxllm.cli.output import ResultStream
    from jaxllm.cli.progress import Bar, note
    from jaxllm.cli.tasks import make_tasks

    with contextlib.ExitStack() as stack:
        results: Any = ResultStream()
        found = failed = 0
        if values.output is not None:
            results = _open_results(stack, values)
            found, failed = results.found, results.found_failed
        rows = stack.enter_context(_rows(values))
        if values.prompts is None:
            rows = list(rows)
            make_tasks(lm, rows[0], settings)  # so that a mistake ends the command
        job = BatchJob(lm, drafter, settings, results, meter)
        total = _count(values.prompts, settings.num_samples)
        try:
            with meter, Bar(total, found) as bar:
                job.run(rows, bar, look_ahead=values.prompts != "-")
        except KeyboardInterrupt:
            if values.output is not None:
                kept = found + meter.rows + meter.failed
                note(f"stopped: {kept} rows are in {values.output}; start again")
            raise
        _judge(job, found, failed, values)


def _open_results(stack: contextlib.ExitStack, values: flags.FlagValues) -> Any:
    """Returns the output, or on all processes but the first what it holds."""
    from jaxllm.cli.output import ResultFile

    files = []

    def describe() -> list[Any]:
        file = stack.enter_context(ResultFile(values.output, _config(values)))
        files.append(file)
        return [file.keys, file.found, file.found_failed]

    described = first_says(describe)
    return files[0] if files else Mirror(*described)


def _judge(job: "BatchJob", found: int, failed: int, values: flags.FlagValues) -> None:
    """Says what came of a job that ended; fails when no row succeeded."""
    from jaxllm.cli.progress import note
    from jaxllm.core.errors import UserError

    meter = job.meter
    bad = failed + meter.failed
    if found - failed + meter.rows == 0:
        if not bad:
            raise UserError(
                f"cannot read prompts: {values.prompts}: holds no rows, expected at "
                "least one. Write one JSON object a line."
            )
        raise UserError(
            f"cannot generate: all rows failed ({bad}), expected one that succeeds. "
            f"The first: {job.first_error}"
        )
    if bad:
        note(f"{bad} rows failed; their 'error' says why")
    if found and not meter.rows + meter.failed:
        note(f"nothing to do: all {found} rows are in {values.output}")


@contextlib.contextmanager
def _rows(values: flags.FlagValues) -> Iterator[Any]:
    from jaxllm.cli.rows import Row, read_rows

    if values.prompts is None:
        yield [Row(1, 1, values.prompt)]
        return
    with contextlib.ExitStack() as stack:
        file = _open(values.prompts)
        if file is not sys.stdin.buffer:
            stack.enter_context(file)
        yield read_rows(file)


def _count(prompts: str | None, samples: int) -> int | None:
    """Returns how many rows a progress bar has to show."""
    if prompts is None:
        return samples
    if not sys.stderr.isatty() or not os.path.isfile(prompts):
        return None
    with _open(prompts) as file:
        return samples * sum(1 for raw in file if raw.strip())


def _config(values: flags.FlagValues) -> dict[str, Any]:
    """Returns what stands beside the output and says how it was made."""
    import importlib.metadata

    from jaxllm.cli.output import describe_prompts

    chosen: dict[str, Any] = {name: values[name].value for name in _DECISIVE}
    preamble = str(values.shared_prefix)
    if preamble not in _SHARING:
        about = describe_prompts(preamble)
        chosen["shared_prefix"] = f"{preamble} (sha256 {about['sha256'][:16]})"
    versions = {"jaxllm": __version__}
    versions |= {n: importlib.metadata.version(n) for n in ("jax", "jaxlib", "flax")}
    config: dict[str, Any] = {
        "command": "generate",
        "flags": chosen,
        "versions": versions,
    }
    if values.prompts is not None and os.path.isfile(values.prompts):
        config["prompts"] = describe_prompts(values.prompts)
    return config


if __name__ == "__main__":
    from jaxllm.cli.main import main

    sys.exit(main(["generate", *sys.argv[1:]]))
