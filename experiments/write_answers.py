"""What a target answers to tasks and stories, for drafts to learn from.

    python -m experiments.write_answers --model=runs/demo/model

Every prompt is answered at four temperatures. Started again, it goes on with what is
missing. Source: Direct Alignment of Draft Model (arXiv 2403.00858), its second stage.
"""

from absl import app, flags

import jaxllm
from experiments.write_trajectories import family_prompts
from jaxllm.training.generated import GenerationConfig, write_generated

FLAGS = flags.FLAGS
flags.DEFINE_string("answers", "runs/family/answers.jsonl", "Where they go.")


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {argv[1:]}")
    lm = jaxllm.load(FLAGS.model, dtype="float32")
    prompts = family_prompts(lm, FLAGS.family, FLAGS.tasks, FLAGS.stories, seed=6)
    write_generated(
        lm,
        prompts,
        FLAGS.answers,
        GenerationConfig(),
        progress=lambda done, of: print(f"{done} of {of} answers", flush=True),
    )


if __name__ == "__main__":
    app.run(main)
