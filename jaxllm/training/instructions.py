"""Records to tokens, and which of them are learned: the answers alone.

A document of tokens is two lists of one length: ids, and 1 where a token is learned.
"""

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from jaxllm.checkpoints import Tokenizer
from jaxllm.checkpoints.files import quote
from jaxllm.core.errors import UserError

__all__ = ["encode_completion", "encode_messages", "encode_record", "encode_text"]

Encoded: TypeAlias = tuple[list[int], list[int]]

_ENCODE = "cannot tokenise record"


def encode_text(text: str, tokenizer: Tokenizer) -> Encoded:
    """Tokenises plain text, with what the tokenizer puts before it and its end token.

    Args:
      text: A whole document; an empty one has no tokens.
      tokenizer: Its end token is added where it has one.

    Returns:
      The ids, all of them learned.
    """
    ids = _ended(tokenizer.encode(text), tokenizer) if text else []
    return ids, [1] * len(ids)


def encode_completion(
    prompt: str, completion: str, tokenizer: Tokenizer, where: str = "a completion"
) -> Encoded:
    """Tokenises a prompt as decoding will see it, and the completion that it calls for.

    The two are tokenised together. Where a token would reach over the border they are
    tokenised apart: the prompt ends in the tokens that it has when it stands alone.

    Args:
      prompt: Not learned.
      completion: Learned, with the end token behind it.
      tokenizer: Of the model.
      where: What the record is, for messages.

    Returns:
      The ids, and 1 for those of the completion.

    Raises:
      UserError: Tokenised apart, the two parts have another text than together.
    """
    before = tokenizer.encode(prompt)
    ids = tokenizer.encode(prompt + completion)
    if ids[: len(before)] != before:
        apart = before + tokenizer.encode(completion, add_special_tokens=False)
        if tokenizer.decode(apart) != tokenizer.decode(ids):
            border = quote(prompt[-10:] + completion[:10])
            raise UserError(
                f"{_ENCODE}: {where}: a token of {border} belongs to the prompt and to "
                "the completion, expected a border between tokens. Move the space at "
                "the border to the other side."
            )
        ids = apart
    ids = _ended(ids, tokenizer)
    return ids, [0] * len(before) + [1] * (len(ids) - len(before))


def encode_messages(
    messages: Sequence[Mapping[str, Any]],
    tokenizer: Tokenizer,
    where: str = "a conversation",
) -> Encoded:
    """Tokenises a conversation with the chat template; every answer is learned.

    An answer is what the template adds to the conversation before it, opened for an
    answer: with exactly those tokens in front the model will have to write it. What
    follows the last answer is left out, and an answer that nothing stands before is
    not learned.

    Args:
      messages: Dicts with `role` and `content`; the answers have role `assistant`.
      tokenizer: With a chat template.
      where: What the record is, for messages.

    Returns:
      The ids, and 1 for those of the answers.

    Raises:
      UserError: There is no answer, the template refuses the messages, or it writes
        the beginning of a conversation differently once the conversation goes on.
      CheckpointError: There is no template, or a broken one.
    """
    if not isinstance(messages, list | tuple) or not all(
        isinstance(message, Mapping) for message in messages
    ):
        raise UserError(
            f"{_ENCODE}: {where}: 'messages' is {quote(messages)}, expected a list of "
            "objects with 'role' and 'content'. Correct the record."
        )
    answers = [i for i, m in enumerate(messages) if i and m.get("role") == "assistant"]
    if not answers:
        raise UserError(
            f"{_ENCODE}: {where}: no message of role 'assistant' follows another, "
            "expected an answer to learn. Add one or leave the record out."
        )
    tokens: list[int] = []
    learn: list[int] = []
    for answer in answers:
        opened = _chat_tokens(messages[:answer], tokenizer, True)
        closed = _chat_tokens(messages[: answer + 1], tokenizer, False)
        for what, start, whole in (
            ("what stands before it", tokens, opened),
            ("the answer itself", opened, closed),
        ):
            if whole[: len(start)] != start:
                raise UserError(
                    f"{_ENCODE}: {where}: message {answer}: the chat template writes "
                    f"the conversation differently once {what} is added, expected it "
                    "to go on where it stopped. Use a template that keeps earlier "
                    "turns as they are."
                )
        learn += [0] * (len(opened) - len(tokens)) + [1] * (len(closed) - len(opened))
        tokens = closed
    return tokens, learn


def encode_record(
    record: Mapping[str, Any], tokenizer: Tokenizer, where: str = "a record"
) -> Encoded:
    """Tokenises a record by the fields that it has.

    Args:
      record: With `messages`, or `prompt` and `completion`, or `text`; the first of
        these that is there counts, other fields do not.
      tokenizer: Of the model.
      where: What the record is, for messages.

    Returns:
      The ids, and 1 for those that are learned; empty for an empty text.

    Raises:
      UserError: The record has none of the fields, or a field is of another type.
    """
    # Tables written as JSONL have null where a row lacks a value.
    record = {name: value for name, value in record.items() if value is not None}
    if "messages" in record:
        return encode_messages(record["messages"], tokenizer, where)
    names: tuple[str, ...] = ("prompt", "completion")
    if not all(name in record for name in names):
        names = ("text",)
    if not all(name in record for name in names):
        found = ", ".join(map(quote, list(record)[:6])) or "none"
        raise UserError(
            f"{_ENCODE}: {where}: its fields are {found}, expected 'text', 'messages', "
            "or 'prompt' and 'completion'. Rename the fields."
        )
    for name in names:
        if not isinstance(record[name], str):
            raise UserError(
                f"{_ENCODE}: {where}: {name!r} is {quote(record[name])}, expected "
                "text. Correct the record."
            )
    if names == ("text",):
        return encode_text(record["text"], tokenizer)
    return encode_completion(record["prompt"], record["completion"], tokenizer, where)


def _ended(ids: list[int], tokenizer: Tokenizer) -> list[int]:
    end = tokenizer.eos_id
    # A token that begins every text may be the one that ends them.
    ends_already = len(ids) > 1 and ids[-1] == end
    return ids if end is None or ends_already else [*ids, end]


def _chat_tokens(
    messages: Sequence[Mapping[str, Any]], tokenizer: Tokenizer, opens_answer: bool
) -> list[int]:
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=opens_answer)
    return tokenizer.encode(text, add_special_tokens=False)
