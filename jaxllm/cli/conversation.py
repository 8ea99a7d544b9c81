"""Text that appears while it is generated: one answer, or a conversation."""

import contextlib
from typing import Any

from jaxllm import api
from jaxllm.cli.output import write_text
from jaxllm.cli.progress import Meter, note
from jaxllm.cli.rows import Row
from jaxllm.cli.tasks import Settings, Task, make_tasks
from jaxllm.core.errors import UserError
from jaxllm.decoding import BoundDrafter

__all__ = ["converse", "stream_task"]


def stream_task(
    lm: api.LanguageModel,
    drafter: BoundDrafter,
    task: Task,
    meter: Meter,
    pieces: list[str],
) -> None:
    """Prints text as it comes, and a line feed behind it.

    Args:
      lm: The model.
      drafter: How tokens are proposed.
      task: What to continue.
      meter: Counts the result.
      pieces: Receives what is printed, so that it is there after an interrupt too.

    Raises:
      KeyboardInterrupt: As pressed; what was generated is printed, line feed included.
    """
    stream = api.stream(
        lm,
        task.ids,
        drafter=drafter,
        max_new_tokens=task.max_new_tokens,
        stop=task.stop,
        seed=task.seed,
        **task.sampling,
        **task.shared,
    )
    try:
        while True:
            pieces.append(next(stream))
            write_text(pieces[-1])
    except StopIteration as end:
        meter.add(len(task.ids), end.value)
    finally:
        if pieces and not pieces[-1].endswith("\n"):
            write_text("\n")


def converse(
    lm: api.LanguageModel, drafter: BoundDrafter, settings: Settings, meter: Meter
) -> None:
    """Talks with whoever sits at the terminal, until the end of input.

    The model sees the whole conversation each time. Ctrl-C ends an answer; what there
    is of it stays part of the conversation.

    Args:
      lm: The model; it needs a chat template.
      drafter: How tokens are proposed.
      settings: Options of every answer.
      meter: Counts the answers.

    Raises:
      UserError: The model has no chat template.
    """
    with contextlib.suppress(ImportError):  # Not everywhere, and nothing depends on it.
        import readline  # noqa: F401 - gives input() line editing and history

    if lm.tokenizer is None or lm.tokenizer.chat_template is None:
        make_tasks(lm, Row(1, 1, "Hello"), settings)  # says what is missing
    messages: list[dict[str, Any]] = []
    while True:
        try:
            said = input("> ")
        except EOFError:
            print()
            return
        if not said.strip():
            continue
        messages.append({"role": "user", "content": said})
        turn = len(messages) // 2 + 1
        try:
            [task] = make_tasks(lm, Row(turn, turn, messages, is_chat=True), settings)
        except UserError as error:
            note(str(error))
            messages.pop()
            continue
        pieces: list[str] = []
        with meter, contextlib.suppress(KeyboardInterrupt):
            stream_task(lm, drafter, task, meter, pieces)
        messages.append({"role": "assistant", "content": "".join(pieces)})
