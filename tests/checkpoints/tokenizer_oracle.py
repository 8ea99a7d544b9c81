"""Texts on which tokenizers differ, and the tokenizer of transformers beside ours."""

import json
import logging

TEXTS = [
    "",
    " ",
    "x",
    " x",
    "  two  spaces ",
    "Once upon a time",
    "\n",
    "a\nb\n\nc\td\r\n",
    "naïve café — “quotes” …",
    "日本語 テスト",
    "🙂👍🏽 family 👨‍👩‍👧",
    "ﬁ ½ \uff21\u00a0b\u200bc",
    "1234567 89.5e-3",
    "<s> hi </s>there<unk>",
    "</s>",
    "<0x0A>",
    "\u2581x \u2581 y",
    "def f(x):\n    return x  # ok\n",
    "a" * 300,
    *("x" + " " * n + "y" for n in range(3, 40)),
]


def transformers_tokenizer(directory):
    logging.disable(logging.WARNING)  # it says that torch is absent
    try:
        from transformers import AutoTokenizer
    finally:
        logging.disable(logging.NOTSET)
    return AutoTokenizer.from_pretrained(str(directory), trust_remote_code=False)


def edit(path, **fields):
    content = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps(content | fields))
