"""`jaxllm train`: a run from a configuration file, which resumes by itself."""

import sys
from pathlib import Path

from absl import flags

from jaxllm.cli.options import Flag, Switch, Texts, UsageError
from jaxllm.cli.processes import PROCESSES, join_processes

__all__ = ["FLAGS", "SUMMARY", "run"]

SUMMARY = """train a model, or go on with a run

  jaxllm train --config configs/demo_draft.py --workdir runs/draft
  jaxllm train --config C --set optimizer.rate=3e-4 --set steps=500 --workdir DIR

A configuration is a Python file whose get_config() returns a TrainConfig. Started again
with the same --workdir, a run goes on from its last whole checkpoint. The workdir holds
checkpoints, metrics.jsonl and, at the end, curve.png; it is a model that --model takes.

Exit codes beside the usual ones: 3 when loss or gradients stay not finite, 143 after a
SIGTERM, when the step was saved and a scheduler may start the run again.
"""

FLAGS = (
    Flag("config", None, "a Python file with get_config() -> TrainConfig"),
    Texts("set", [], "a change, field=value or a.b=value; may be repeated"),
    Flag("workdir", None, "the folder of the run"),
    Texts(
        "allow_config_change",
        [],
        "a field in which a resumed run may differ from its start; may be repeated",
    ),
    Switch("export", False, "write the model to WORKDIR/model at the end, as bfloat16"),
    *PROCESSES,
)

_DIVERGED = 3
_PREEMPTED = 143


def run(values: flags.FlagValues) -> int:
    """Runs the command.

    Args:
      values: The parsed flags.

    Returns:
      The exit code.

    Raises:
      UsageError: A flag is missing.
      UserError: The configuration, the data or the workdir cannot be used.
    """
    for name in ("config", "workdir"):
        if not values[name].value:
            raise UsageError(
                f"cannot train: --{name} is missing, expected "
                f"{'a Python file' if name == 'config' else 'a folder'}. Add it."
            )
    join_processes(values, "cannot train")
    # jax comes with these; a job of several processes has to be joined before.
    import jax

    from jaxllm.training import (
        DivergedError,
        PreemptedError,
        export,
        fit,
        load_config,
    )

    config, memory = load_config(values.config, values.set)
    try:
        lm = fit(
            config, values.workdir, memory=memory, allow=values.allow_config_change
        )
    except PreemptedError as stop:
        print(stop, file=sys.stderr, flush=True)
        return _PREEMPTED
    except DivergedError as cause:
        print(f"jaxllm train: {cause}", file=sys.stderr, flush=True)
        return _DIVERGED
    if values.export and jax.process_index() == 0:
        export(lm, Path(values.workdir) / "model")
    return 0


if __name__ == "__main__":
    from jaxllm.cli.main import main

    sys.exit(main(["train", *sys.argv[1:]]))
