"""Small tokenizers and documents for the tests of training data."""

import itertools

import jax
import numpy as np
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend

from jaxllm.checkpoints import Tokenizer
from jaxllm.training.data import DataConfig, open_data
from jaxllm.training.sources import SourceConfig

SEPARATOR = "<|endoftext|>"
SPECIAL = ("<s>", "</s>", "<|user|>", "<|assistant|>", "<|end|>")
CHAT = (
    "{{ bos_token }}"
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
# "Ġ" and "Ċ" are how byte-level vocabularies write a space and a line end.
MERGES = [("t", "h"), ("th", "e"), ("Ġ", "a"), ("e", "d"), ("Ċ", "Ċ")]


def byte_tokenizer(*, merges=MERGES, template=CHAT, begins=True, extra=0):
    """A byte-level tokenizer with a few merges; begins a text with `<s>`."""
    pieces = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    pieces += ["".join(merge) for merge in MERGES]
    pieces += [f"<extra {i}>" for i in range(extra)]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    backend = Backend(models.BPE(vocab=vocabulary, merges=list(merges)))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(
        add_prefix_space=False, use_regex=False
    )
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(piece, special=True) for piece in SPECIAL])
    if begins:
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 0)]
        )
    return Tokenizer(
        backend,
        special_tokens={"bos_token": "<s>", "eos_token": "</s>"},
        chat_template=template,
    )


class Lists:
    """Documents given as lists of ids; everything is learned unless masks say not."""

    def __init__(self, documents, masks=None):
        self.documents = [np.asarray(d, np.int32) for d in documents]
        masks = masks or [np.ones(len(d)) for d in self.documents]
        self.masks = [np.asarray(m, np.uint8) for m in masks]

    def __len__(self):
        return len(self.documents)

    def __getitem__(self, index):
        return self.documents[index], self.masks[index]


def random_documents(lengths, vocabulary=61, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, vocabulary, n) for n in lengths]


def numbered_documents(lengths):
    """Documents whose every token says which it is: no id is there twice."""
    ends = np.cumsum(lengths)
    return [np.arange(end - n, end) for end, n in zip(ends, lengths, strict=True)]


TOKENIZER = byte_tokenizer()


def config_of(*names, weights=None, **options):
    weights = weights or [1.0] * len(names)
    sources = tuple(
        SourceConfig(path=name, weight=weight, format="memory")
        for name, weight in zip(names, weights, strict=True)
    )
    options = {"row_length": 16, "batch_rows": 4, "prefetch": 0} | options
    return DataConfig(sources=sources, **options)


def stream_of(documents, process=0, processes=1, **options):
    """A stream over documents in memory: lists of ids, or a dict of them by name."""
    if not isinstance(documents, dict):
        documents = {"only": documents}
    memory = {
        name: Lists(value) if isinstance(value, list) else value
        for name, value in documents.items()
    }
    config = config_of(*memory, **options)
    return open_data(config, TOKENIZER, "unused", process, processes, memory)


def finite(documents, **options):
    return stream_of(documents, epochs=1, shuffle=False, **options)


def pieces(batches):
    """The documents, or parts of them, that batches hold, row by row."""
    for batch in batches:
        for tokens, segment in zip(batch.tokens_BT, batch.segment_BT, strict=True):
            for number in range(1, segment.max(initial=0) + 1):
                yield tuple(tokens[segment == number].tolist())


def same(batch, other):
    leaves = zip(jax.tree.leaves(batch), jax.tree.leaves(other), strict=True)
    return all(np.array_equal(a, b) for a, b in leaves)


def take(stream, count):
    return list(itertools.islice(stream, count))
