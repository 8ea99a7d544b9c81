"""The console script `jaxllm`: finds the command, runs it, and turns errors into codes.

0 is success, 1 a bug (with its traceback), 2 a user's mistake (one line on stderr), 130
an interrupt. A command is a module with `SUMMARY`, `FLAGS` and `run(values) -> int`; it
is imported when it is asked for, and imports jax in `run`.
"""

import contextlib
import importlib
import io
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Sequence
from types import ModuleType

from absl import flags

from jaxllm.cli import options
from jaxllm.cli.options import UsageError
from jaxllm.version import __version__

__all__ = ["COMMANDS", "main"]

COMMANDS = {
    "generate": "jaxllm.cli.generate",
    "compare": "jaxllm.cli.compare",
    "train": "jaxllm.cli.train",
    "analyze": "jaxllm.cli.analyze",
    "systems": "jaxllm.cli.systems",
    "doctor": "jaxllm.cli.doctor",
}

_USER_ERROR = 2
_INTERRUPTED = 130
_PIPE_CLOSED = 141


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
      arguments: Without the program's name; those of the process when None.

    Returns:
      The exit code.

    Raises:
      Exception: A bug, as it came; Python prints its traceback and exits with 1.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    program = "jaxllm"
    _let_text_through()
    try:
        name = given[0] if given else ""
        if name in ("--help", "-h", "help"):
            print(_overview())
            return 0
        if name == "--version":
            print(f"jaxllm {__version__}")
            return 0
        if name not in COMMANDS:
            raise _unknown_command(name)
        program = f"jaxllm {name}"
        return _run(importlib.import_module(COMMANDS[name]), program, given[1:])
    except KeyboardInterrupt:
        return _INTERRUPTED
    except BrokenPipeError:
        # Whoever read the output has gone, such as `head`: nobody is left to tell.
        _forget_stdout()
        return _PIPE_CLOSED
    except Exception as error:
        message = _explanation(error)
        if message is None:
            raise
        if "--traceback" in given:
            traceback.print_exc()
        print(f"{program}: {message}", file=sys.stderr)
        return _USER_ERROR


def _run(command: ModuleType, program: str, arguments: list[str]) -> int:
    declared = (*command.FLAGS, *options.SHARED)
    values = flags.FlagValues()
    for flag in declared:
        flag.declare(values)
    options.parse(values, ["--help"] if arguments == ["-h"] else arguments)
    if values["help"].value:
        print(options.describe(declared, program, command.SUMMARY))
        return 0
    _quiet()
    with _profile(values["profile_dir"].value):
        code = command.run(values)
    sys.stdout.flush()
    return code


def _profile(directory: str | None) -> contextlib.AbstractContextManager:
    if directory is None:
        return contextlib.nullcontext()
    try:
        os.makedirs(directory, exist_ok=True)
    except OSError as cause:
        raise UsageError(
            f"cannot profile: {directory}: {cause.strerror}, expected a folder to "
            "write to. Correct --profile_dir."
        ) from None
    import jax

    return jax.profiler.trace(directory)


def _quiet() -> None:
    """Keeps other libraries' notices off stderr, where a user's settings allow it."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("GLOG_minloglevel", "3")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    for name in ("jax", "absl", "orbax", "transformers", "huggingface_hub"):
        logging.getLogger(name).setLevel(logging.ERROR)
    if not sys.warnoptions:
        warnings.simplefilter("ignore")


def _let_text_through() -> None:
    """Prepares standard output for any character, as a model's text may hold."""
    if not isinstance(sys.stdout, io.TextIOWrapper):
        return
    if sys.stdout.isatty():
        sys.stdout.reconfigure(errors="replace")
    else:
        # JSON is UTF-8, whatever the language settings are.
        sys.stdout.reconfigure(encoding="utf-8")


def _overview() -> str:
    lines = ["usage: jaxllm COMMAND [--FLAG=VALUE ...]", ""]
    for name, module in COMMANDS.items():
        summary = importlib.import_module(module).SUMMARY.strip().splitlines()[0]
        lines.append(f"  {name:<10} {summary}")
    lines += ["", "`jaxllm COMMAND --help` lists a command's flags."]
    return "\n".join([*lines, "`jaxllm --version` prints the version."])


def _unknown_command(name: str) -> UsageError:
    wanted = f"expected one of {', '.join(COMMANDS)}"
    if not name:
        return UsageError(
            f"cannot start: no command is given, {wanted}. Run jaxllm --help."
        )
    action = options.nearest(name, COMMANDS)
    action = action.replace("Run with --help.", "Run jaxllm --help.")
    return UsageError(f"cannot start: {name!r} is no command, {wanted}. {action}")


def _explanation(error: Exception) -> str | None:
    """Returns the one line that a user needs, or None for what is a bug."""
    # Looked up, not imported: where it was never imported none can have been raised.
    errors = sys.modules.get("jaxllm.core.errors")
    known = (UsageError, *([errors.UserError] if errors else []))
    if isinstance(error, known):
        return " ".join(str(error).split())
    if "RESOURCE_EXHAUSTED" in str(error):
        return (
            f"out of memory: {' '.join(str(error).split())[:160]}, expected less. "
            "Shorten the prompts, lower --max_new_tokens, or split the model with "
            "--mesh."
        )
    return None


def _forget_stdout() -> None:
    """Lets the interpreter flush what is left without a second error."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    sys.exit(main())
