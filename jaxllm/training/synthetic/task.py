"""What a templated task is: problems to draw, and which answers are right."""

from dataclasses import dataclass
from random import Random

__all__ = ["END_OF_TEXT", "Drawn", "Example", "Task", "answer_of", "ask"]

END_OF_TEXT = "<|endoftext|>"
"""Ends an answer; also the text of the token that stands before every document."""


@dataclass(frozen=True)
class Example:
    """A problem and one right answer.

    Attributes:
      task: Name in `TASKS`.
      prompt: Ends with `Answer:`; nothing is missing but the answer.
      completion: The answer, with the space before it and without an end marker.
    """

    task: str
    prompt: str
    completion: str

    @property
    def text(self) -> str:
        """The document that a model learns from, still without an end marker."""
        return self.prompt + self.completion


@dataclass(frozen=True)
class Drawn:
    """A problem before it is known which split it belongs to.

    Attributes:
      content: What is asked, whatever the wording. It follows from the prompt alone, so
        two splits of the contents are two splits of the prompts.
      prompt: As in `Example`.
      completion: As in `Example`.
    """

    content: str
    prompt: str
    completion: str


class Task:
    """Base of every task: a frozen dataclass of options."""

    def draw(self, random: Random) -> Drawn:
        """Draws a problem.

        Args:
          random: All that the problem depends on.

        Returns:
          The problem in one of its wordings, and its answer.
        """
        raise NotImplementedError

    def agrees(self, wanted: str, found: str) -> bool:
        """Says whether an answer is right.

        Args:
          wanted: A right answer, as `draw` writes it.
          found: Any text, without an end marker.

        Returns:
          Whether `found` says the same. Anything that cannot be read is wrong.
        """
        raise NotImplementedError


def ask(question: str, **lines: str) -> str:
    """Returns a prompt: the question, what it is about, and where the answer goes.

    The question comes first, so that a causal model reads the rest knowing it.

    Args:
      question: A sentence.
      **lines: What the question is about; `text="..."` becomes a line `Text: ...`.
    """
    about = [f"{name.capitalize()}: {line}" for name, line in lines.items()]
    return "\n".join([f"Question: {question}", *about, "Answer:"])


def answer_of(text: str) -> str:
    """Returns what a model wrote up to the end marker, or all where there is none."""
    return text.split(END_OF_TEXT, 1)[0]
