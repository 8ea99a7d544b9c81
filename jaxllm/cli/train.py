"""`jaxllm train`: a run from a configuration file, which resumes by itself."""

import sys
from pathlib import Path

from absl import flags

from jaxllm.cli.options import Flag, Number, Switch, Texts, UsageError

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
    Flag("coordinator", None, "of several processes: the first one's host:port"),
    Number(
        "num_processes",
        None,
        "processes of the job (default: found, or 1)",
        integer=True,
    ),
    Number("process_id", None, "which of them this is", low=0, integer=True),
    Number(
        "initialization_timeout",
        300,
        "seconds to wait for the other processes",
        low=1,
        integer=True,
    ),
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
    _join_processes(values)
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


def _join_processes(values: flags.FlagValues) -> None:
    if values.coordinator is None and values.num_processes is None:
        return
    import jax

    if values.num_processes is None or values.process_id is None:
        raise UsageError(
            "cannot train: --coordinator is given without --num_processes and "
            "--process_id, expected all three. Add them, or leave out all of them "
            "where the cluster tells."
        )
    jax.distributed.initialize(
        values.coordinator,
        values.num_processes,
        values.process_id,
        initialization_timeout=values.initialization_timeout,
    )


if __name__ == "__main__":
    from jaxllm.cli.main import main

    sys.exit(main(["train", *sys.argv[1:]]))
