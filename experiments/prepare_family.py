"""The text and the tokenizer of the shipped family, written once for all its configs.

    python -m experiments.prepare_family --data=DIR --output=runs/family

`DIR` holds the two TinyStories files. Writes `stories.txt`, `stories_valid.txt`,
`python.txt`, `python_valid.txt`, documents between lines `<|endoftext|>`, and
`tokenizer/`: a byte-level BPE tokenizer of 3072 entries, learned from equal shares of
stories, Python and templated tasks. The Python text is what this interpreter and its
packages bring, so it is a little different elsewhere.

Expect a minute; stories have 3.6 characters a token, Python 2.8, tasks 3.1.
"""

import itertools
import pathlib

from absl import app, flags

from jaxllm.checkpoints import Tokenizer
from jaxllm.training.corpora import (
    interleave,
    python_documents,
    read_stories,
    train_tokenizer,
)
from jaxllm.training.synthetic import END_OF_TEXT, mixed_example

FLAGS = flags.FLAGS
flags.DEFINE_string("data", None, "Directory of the TinyStories files.", required=True)
flags.DEFINE_string("output", "runs/family", "Where the files go.")
flags.DEFINE_integer("vocabulary", 3072, "Entries of the tokenizer.")
flags.DEFINE_integer("python", 8_000_000, "Characters of Python to learn from.")
flags.DEFINE_integer("sample", 9_000_000, "Characters that the tokenizer learns from.")

SETTINGS = {"clean_up_tokenization_spaces": False, "model_max_length": 1024}


def write(path: pathlib.Path, documents: list[str]) -> None:
    path.write_text(f"\n{END_OF_TEXT}\n".join(documents) + "\n", encoding="utf-8")


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {argv[1:]}")
    output = pathlib.Path(FLAGS.output)
    (output / "tokenizer").mkdir(parents=True, exist_ok=True)
    stories = read_stories(FLAGS.data)
    python = list(python_documents("train", FLAGS.python))
    write(output / "stories.txt", list(stories.train))
    write(output / "stories_valid.txt", [stories.held_back])
    write(output / "python.txt", python)
    write(output / "python_valid.txt", list(python_documents("test", 200_000)))
    tasks = (
        e.prompt + e.completion
        for e in (mixed_example(i, seed=1) for i in itertools.count())
    )
    names = {"stories": iter(stories.train), "python": iter(python), "tasks": tasks}
    total, sample = 0, []
    for _, document in interleave(names, dict.fromkeys(names, 1.0)):
        sample.append(document)
        total += len(document)
        if total > FLAGS.sample:
            break
    backend = train_tokenizer(sample, FLAGS.vocabulary)
    roles = dict.fromkeys(("bos_token", "eos_token", "pad_token"), END_OF_TEXT)
    Tokenizer(backend, special_tokens=roles, settings=SETTINGS).save(
        output / "tokenizer"
    )
    print(f"{len(stories.train)} stories, {len(python)} pieces of Python: {output}")


if __name__ == "__main__":
    app.run(main)
