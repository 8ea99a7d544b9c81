"""Writes held-back templated tasks as a prompt file for `jaxllm compare --prompts`.

    python -m experiments.write_task_prompts --output=tasks.jsonl
    jaxllm compare --prompts=tasks.jsonl --decode=autoregressive --decode=prompt_lookup

A row has `id`, `category` (the task), `prompt`, and `answer`, one right completion. The
problems are those that no training example repeats: `jaxllm.training.synthetic`.

Expect 10 rows of each of 10 tasks.
"""

import json
from pathlib import Path

from absl import app, flags

from jaxllm.training.synthetic import TASKS, prompt_rows

FLAGS = flags.FLAGS
flags.DEFINE_string("output", None, "The JSONL file to write.")
flags.DEFINE_multi_enum("task", list(TASKS), list(TASKS), "Which tasks.")
flags.DEFINE_integer("count", 10, "Prompts of each task.", lower_bound=1)
flags.DEFINE_integer("seed", 0, "Another seed gives other prompts.")


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {argv[1:]}")
    rows = prompt_rows(FLAGS.task, FLAGS.count, FLAGS.seed)
    output = Path(FLAGS.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    print(f"{output}: {len(rows)} prompts of {len(FLAGS.task)} tasks")


if __name__ == "__main__":
    flags.mark_flag_as_required("output")
    app.run(main)
