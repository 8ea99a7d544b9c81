import pytest

from jaxllm.core.errors import CheckpointError, UserError
from jaxllm.training.instructions import (
    encode_completion,
    encode_messages,
    encode_text,
)
from tests.training.small_data import CHAT, byte_tokenizer

TALK = [
    {"role": "user", "content": "the cat?"},
    {"role": "assistant", "content": "a dog"},
    {"role": "user", "content": "the"},
    {"role": "assistant", "content": "red naïve 🙂"},
]


def spans(tokens, learn, tokenizer):
    """The texts of the runs of learned tokens."""
    runs, previous = [], 0
    for token, is_learned in zip(tokens, learn, strict=True):
        if is_learned and not previous:
            runs.append([])
        if is_learned:
            runs[-1].append(token)
        previous = is_learned
    return [tokenizer.decode(run, skip_special_tokens=False) for run in runs]


def test_text_is_learned_whole():
    tokenizer = byte_tokenizer()
    tokens, learn = encode_text("the cat", tokenizer)
    assert tokenizer.decode(tokens, skip_special_tokens=False) == "<s>the cat</s>"
    assert learn == [1] * len(tokens)
    assert encode_text("", tokenizer) == ([], [])


def test_the_end_token_is_not_doubled():
    tokenizer = byte_tokenizer()
    tokens, _ = encode_text("the</s>", tokenizer)
    assert tokens.count(tokenizer.eos_id) == 1


def test_a_begin_token_alone_is_no_end_token():
    # Some vocabularies have one token for both.
    tokenizer = byte_tokenizer()
    tokenizer.eos_id = tokenizer.bos_id
    tokens, learn = encode_completion("", "x", tokenizer)
    assert len(tokens) == 3
    assert tokens[0] == tokens[-1] == tokenizer.bos_id
    assert learn == [0, 1, 1]
    assert encode_completion("", "", tokenizer) == ([0, 0], [0, 1])


@pytest.mark.parametrize(
    ("prompt", "completion"),
    [
        ("2+2=", "4"),
        ("", "the cat"),
        ("the cat", " and a dog"),
        ("the", ""),
        ("x", "\n\n🙂"),
        ("🙂 é", "日本"),
    ],
)
def test_a_prompt_has_the_tokens_that_decoding_gives_it(prompt, completion):
    tokenizer = byte_tokenizer()
    tokens, learn = encode_completion(prompt, completion, tokenizer)
    before = tokenizer.encode(prompt)
    assert tokens[: len(before)] == before
    assert learn == [0] * len(before) + [1] * (len(tokens) - len(before))
    assert tokenizer.decode(tokens) == prompt + completion
    assert tokens[-1] == tokenizer.eos_id


@pytest.mark.parametrize(("prompt", "completion"), [("t", "he"), ("x ", "ab")])
def test_a_token_over_the_border_is_cut_there(prompt, completion):
    tokenizer = byte_tokenizer()
    together = tokenizer.encode(prompt + completion)
    tokens, learn = encode_completion(prompt, completion, tokenizer)
    before = tokenizer.encode(prompt)
    assert together[: len(before)] != before, "no token reaches over the border"
    assert tokens[: len(before)] == before
    assert sum(learn) == len(tokens) - len(before)
    assert tokenizer.decode(tokens) == prompt + completion


def test_a_border_that_changes_the_text_is_refused():
    # Such tokenizers put a space before every text: the completion would get one.
    from tokenizers import pre_tokenizers

    tokenizer = byte_tokenizer()
    tokenizer._backend.pre_tokenizer = pre_tokenizers.ByteLevel(
        add_prefix_space=True, use_regex=False
    )
    assert encode_completion("x", "y", tokenizer)[1] == [0, 0, 0, 1, 1]
    with pytest.raises(UserError, match=r"record: line 7: a token of 'the' belongs"):
        encode_completion("t", "he", tokenizer, "line 7")


def test_every_answer_is_learned_and_nothing_else():
    tokenizer = byte_tokenizer()
    tokens, learn = encode_messages(TALK, tokenizer)
    assert spans(tokens, learn, tokenizer) == ["a dog<|end|>", "red naïve 🙂<|end|>"]
    text = tokenizer.apply_chat_template(TALK, add_generation_prompt=False)
    assert tokens == tokenizer.encode(text, add_special_tokens=False)


@pytest.mark.parametrize("answer", [1, 3])
def test_an_answer_stands_behind_what_decoding_sees(answer):
    tokenizer = byte_tokenizer()
    tokens, learn = encode_messages(TALK, tokenizer)
    seen = tokenizer.encode(
        tokenizer.apply_chat_template(TALK[:answer]), add_special_tokens=False
    )
    assert tokens[: len(seen)] == seen
    assert learn[len(seen)] == 1
    assert learn[len(seen) - 1] == 0


def test_what_follows_the_last_answer_is_left_out():
    tokenizer = byte_tokenizer()
    longer = [*TALK, {"role": "user", "content": "and?"}]
    assert encode_messages(longer, tokenizer) == encode_messages(TALK, tokenizer)


def test_an_answer_that_comes_first_is_not_learned():
    tokenizer = byte_tokenizer()
    tokens, learn = encode_messages(
        [{"role": "assistant", "content": "hello"}, *TALK], tokenizer
    )
    assert spans(tokens, learn, tokenizer) == ["a dog<|end|>", "red naïve 🙂<|end|>"]
    assert "hello" in tokenizer.decode(tokens)
    with pytest.raises(UserError, match="no message of role 'assistant' follows"):
        encode_messages([{"role": "assistant", "content": "hello"}], tokenizer)


FORGETFUL = CHAT.replace(
    "{{ m.content }}<|end|>", "{{ m.content if loop.last or m.role == 'user' }}<|end|>"
)
ENDS_ONCE = CHAT.replace("<|end|>", "{% if loop.last %}<|end|>{% endif %}")
THINKS = CHAT.replace("<|assistant|>{% endif %}", "<|assistant|><think>{% endif %}")


@pytest.mark.parametrize(
    ("template", "said"),
    [
        (FORGETFUL, "message 3: .* once what stands before it is added"),
        (ENDS_ONCE, "message 1: .* once the answer itself is added"),
        (THINKS, "message 1: .* once the answer itself is added"),
    ],
)
def test_a_template_that_rewrites_what_it_wrote_is_refused(template, said):
    with pytest.raises(UserError, match=f"record: line 7: {said}"):
        encode_messages(TALK, byte_tokenizer(template=template), "line 7")


def test_a_token_over_the_border_of_an_answer_is_refused():
    # The prompt ends in "t" and the answer begins with "he".
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    talk = [TALK[0] | {"content": "t"}, TALK[1] | {"content": "he"}]
    with pytest.raises(UserError, match="message 1"):
        encode_messages(talk, byte_tokenizer(template=template))


def test_a_tokenizer_without_template_is_refused():
    with pytest.raises(CheckpointError, match="chat_template"):
        encode_messages(TALK, byte_tokenizer(template=None))
