"""A made-up vocabulary for the toy model, and decoding under a constraint with it."""

import numpy as np

from jaxllm.decoding import Request, decode, make_sampler
from jaxllm.drafting import Autoregressive
from tests.decoding.toys import VOCABULARY, toy_model

END = 0
LENGTHS = (3, 8)
"""Tokens of the prompts."""
MIXED = {"temperature": [0.0, 1.5], "top_p": [1.0, 0.8]}
"""The first row greedy, the second sampled."""

_SINGLE = 'abcdefghxyz0123456789 .,-:"{}[]\n'
_LONGER = ["ab", "abc", "bc", "cab", "12", "00", "é", " a", ", ", '":', '{"', "a\n"]
# The first and last bytes of characters, in parts and together; "é" is there twice.
_PARTS = [b"\xc3", b"\xa9", b"\xf0\x9f", b"\x99\x82", b"a\xc3", b"\xa9b", b"\xff"]
_PARTS.append("é".encode())
_WRITTEN = [*(t.encode() for t in (*_SINGLE, *_LONGER)), *_PARTS]
BYTES = (b"", *_WRITTEN, *[b""] * (VOCABULARY - 1 - len(_WRITTEN)))


def text_of(tokens) -> bytes:
    return b"".join(BYTES[t] for t in tokens)


def prompts_of(*lengths: int) -> list[list[int]]:
    rng = np.random.default_rng(sum(lengths))
    return [rng.integers(0, VOCABULARY, n).tolist() for n in lengths]


def run(constraint, *, new=24, drafter=None, copies=1, eos=(END,), **options):
    """Decodes copies of two prompts in one batch.

    `constraint` may be None. An option may be a list, for the first prompt and for the
    second.
    """
    model, params = toy_model()
    arguments = {"target": params, "drafter": {}}
    if constraint is not None:
        arguments["constraint"] = constraint
    rows = len(LENGTHS) * copies
    options = {n: x * copies if type(x) is list else x for n, x in options.items()}
    request = Request(
        prompts=prompts_of(*LENGTHS) * copies,
        max_new_tokens=[new] * rows,
        sampler=make_sampler(rows, **options),
        seeds=list(range(len(LENGTHS))) * copies,
        eos=eos,
        steps_per_call=5,
    )
    return decode(model, arguments, request, drafter=drafter or Autoregressive())


def tokens_of(outputs) -> list[list[int]]:
    return [output.token_ids for output in outputs]
