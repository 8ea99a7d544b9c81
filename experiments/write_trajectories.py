"""Jacobi trajectories of a model on tasks and stories, for consistency training.

    python -m experiments.write_trajectories --model=runs/demo/model

Prompts are of the training split: templated tasks, and beginnings of the stories that
`experiments.prepare_family` wrote. Started again, it goes on with what is missing.
"""

import pathlib

from absl import app, flags

import jaxllm
from experiments.counted_cost import story_beginnings
from jaxllm.training.synthetic import mixed_example
from jaxllm.training.trajectories import TrajectoryConfig, write_trajectories

FLAGS = flags.FLAGS
flags.DEFINE_string("model", None, "Whose trajectories.", required=True)
flags.DEFINE_string("family", "runs/family", "Where the stories are.")
flags.DEFINE_string("output", "runs/family/trajectories", "Where they go.")
flags.DEFINE_integer("tasks", 6000, "Prompts of tasks.", lower_bound=1)
flags.DEFINE_integer("stories", 2000, "Prompts of stories.", lower_bound=0)
flags.DEFINE_integer("block", 16, "Tokens of a block.", lower_bound=2)


def family_prompts(
    lm: jaxllm.LanguageModel, folder: str, tasks: int, stories: int, seed: int
) -> list[list[int]]:
    """Prompts of the training split: first the tasks, then the stories."""
    examples = (mixed_example(i, seed) for i in range(tasks))
    found = [lm.tokenizer.encode(example.prompt) for example in examples]
    file = pathlib.Path(folder) / "stories.txt"
    return [*found, *story_beginnings(lm, file, stories, seed)]


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {argv[1:]}")
    lm = jaxllm.load(FLAGS.model, dtype="float32")
    write_trajectories(
        lm,
        family_prompts(lm, FLAGS.family, FLAGS.tasks, FLAGS.stories, seed=5),
        FLAGS.output,
        TrajectoryConfig(block=FLAGS.block, max_new=4 * FLAGS.block),
        progress=lambda done, of: print(f"{done} of {of} batches", flush=True),
    )


if __name__ == "__main__":
    app.run(main)
