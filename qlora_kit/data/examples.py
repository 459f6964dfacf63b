"""Examples: what a row means, whatever its columns were called."""

from dataclasses import dataclass, field
from typing import Any, TypeAlias


@dataclass(frozen=True, slots=True)
class Chat:
    """Turns of a conversation, in the form that chat templates take."""

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None
    given: int = 0
    """How many of the turns are a prompt: none of these is learnt, nor any other with a `weight` of 0."""
    where: str = field(default="", compare=False)
    """`file:line` or `source row N`; two rows with equal contents are equal wherever they stand."""


@dataclass(frozen=True, slots=True)
class Completion:
    """A prompt that is given and the text that should follow it, joined by nothing."""

    prompt: str
    completion: str
    where: str = field(default="", compare=False)


@dataclass(frozen=True, slots=True)
class Text:
    """A document, all of which is to be learnt."""

    text: str
    where: str = field(default="", compare=False)


@dataclass(frozen=True, slots=True)
class Preference:
    """Two answers to one prompt, of which one was preferred."""

    chosen: Chat | Completion
    rejected: Chat | Completion
    where: str = field(default="", compare=False)


@dataclass(frozen=True, slots=True)
class Labelled:
    """An answer to a prompt, and whether it is wanted."""

    answer: Chat | Completion
    is_good: bool
    where: str = field(default="", compare=False)


@dataclass(frozen=True, slots=True)
class Classified:
    """A text, and what it is."""

    text: str
    labels: tuple[str, ...]
    is_multi: bool = False
    """Whether it may have several labels, or none."""
    where: str = field(default="", compare=False)


Example: TypeAlias = Chat | Completion | Text | Preference | Labelled | Classified


def conversations(example: Example) -> tuple[Chat | Completion | Text | Classified, ...]:
    """What an example is made of: itself, or its answers with their prompts."""
    match example:
        case Preference():
            return example.chosen, example.rejected
        case Labelled():
            return (example.answer,)
        case _:
            return (example,)


def is_chat(example: Example) -> bool:
    """Whether an example goes through a chat template."""
    return any(isinstance(part, Chat) for part in conversations(example))
