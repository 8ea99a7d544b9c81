"""What the models of the family can do, in one table: tasks, text, and Jacobi decoding.

    python -m experiments.evaluate_family --models=demo,runs/demo-cllm/model \
        --text=DIR/tinystories_valid.txt.gz --output=family.json

For every model: the share of held-back tasks that are answered exactly, by kind; bits a
byte of a text, the same bytes for every tokenizer; tokens a pass of Jacobi decoding on
tasks and on stories, every forward counted, the confirming one of a block too; how
often the greedy text is that of the first model, token for token; and the share of
tokens in runs of ten equal ones. A collapsed model has splendid tokens a pass and an
almost unchanged loss: read the columns together.

Paper (CLLMs, arXiv 2403.00835): up to 3.4 times faster, 2.4 on open dialogue.
"""

import math
import pathlib

import jax
import numpy as np
from absl import app, flags

import jaxllm
from experiments.counted_cost import story_prompts, write_report
from jaxllm.training.corpus import CorpusReader
from jaxllm.training.synthetic import TASKS, check, held_back
from jaxllm.training.trajectories import longest_run

FLAGS = flags.FLAGS
flags.DEFINE_list(
    "models", ["demo"], "Directories or names; the first is compared with."
)
flags.DEFINE_string("text", None, "A text to measure bits a byte on; none when unset.")
flags.DEFINE_integer("characters", 200_000, "Of that text.", lower_bound=1)
flags.DEFINE_integer("examples", 40, "Held-back examples of each task.", lower_bound=1)
flags.DEFINE_integer("window", 16, "Of Jacobi decoding.", lower_bound=2)
flags.DEFINE_integer("new", 96, "New tokens of an answer.", lower_bound=1)
flags.DEFINE_string("output", None, "Where the rows go, as JSON.")


def bits_a_byte(lm: jaxllm.LanguageModel, text: str, window: int = 512) -> float:
    """Loss over windows of a text that each begin with the start token."""
    ids = lm.tokenizer.encode(text, add_special_tokens=False)
    begin = lm.tokenizer.bos_id
    window = min(window, lm.config.max_positions - 1)
    pieces = [ids[i : i + window] for i in range(0, len(ids), window)]
    scores = jaxllm.score(lm, [[begin]] * len(pieces), pieces)
    nats = -sum(sum(s.logprobs) for s in scores)
    return nats / math.log(2) / len(text.encode())


def tokens_a_pass(results: list[jaxllm.Result]) -> float:
    emitted = sum(r.stats["emitted"] for r in results)
    return emitted / sum(r.stats["target_passes"] for r in results)


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {argv[1:]}")
    text = ""
    if FLAGS.text:
        records = CorpusReader(pathlib.Path(FLAGS.text), format="text")
        text = "".join(str(record.content) for record in records)[: FLAGS.characters]
    questions = [e for task in TASKS for e in held_back(task, FLAGS.examples, seed=9)]
    prompts = [e.prompt for e in questions]
    jacobi = f"jacobi:window={FLAGS.window},mode=block"
    rows, first = [], None
    for name in FLAGS.models:
        lm = jaxllm.load(name, dtype="float32")
        answers = jaxllm.generate(lm, prompts, decode=jacobi, max_new_tokens=FLAGS.new)
        stories = jaxllm.generate(
            lm, story_prompts(), decode=jacobi, max_new_tokens=FLAGS.new
        )
        right = [check(e, a.text) for e, a in zip(questions, answers, strict=True)]
        written = [r.token_ids for r in (*answers, *stories)]
        first = written if first is None else first
        same = [a == b for a, b in zip(written, first, strict=True)]
        repeats = [longest_run(np.asarray(ids)) >= 10 for ids in written]
        row = {
            "model": name,
            "parameters": sum(np.size(x) for x in jax.tree.leaves(lm.params)),
            "exact": float(np.mean(right)),
            **{
                f"exact[{task}]": float(
                    np.mean(
                        [
                            r
                            for r, e in zip(right, questions, strict=True)
                            if e.task == task
                        ]
                    )
                )
                for task in TASKS
            },
            "jacobi_tokens_a_pass[tasks]": tokens_a_pass(answers),
            "jacobi_tokens_a_pass[stories]": tokens_a_pass(stories),
            "same_as_first": float(np.mean(same)),
            "repetitive": float(np.mean(repeats)),
        }
        if text:
            row["bits_a_byte"] = bits_a_byte(lm, text)
        rows.append(
            {k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}
        )
    write_report(
        FLAGS.output,
        "consistency tuning multiplies tokens a pass at equal accuracy",
        "arXiv 2403.00835: up to 3.4 times faster",
        rows,
    )


if __name__ == "__main__":
    app.run(main)
