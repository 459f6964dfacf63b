"""Unwritten: what a chat holds and its template does not write down, so that the model would learn without it.

A part is taken out, or says something else, and the chat is rendered again: where the rendering stays the same, the
part is not in it. No text is searched for, so that a template may trim a part, quote it, or put it into another turn;
one that refuses the chat without the part knows of it, too.

    calls of tools    taken out of the turn
    tools             taken away
    system's words    one more letter: without them some templates write words of their own, which may be the same
"""

from collections.abc import Collection, Iterator
from dataclasses import replace
from typing import Any

from qlora_kit.data.chat_template import Messages, Renderer
from qlora_kit.data.encoded import Odd
from qlora_kit.errors import DataError


def unwritten(messages: Messages, text: str, render: Renderer, said: Collection[int]) -> Iterator[Odd]:
    """The parts of a chat of which the template writes nothing; each that there is takes one more rendering.

    Args:
        messages: of the chat.
        text: their rendering.
        render: that made it.
        said: turns whose calls are looked for by themselves, see `loses_calls`.
    """
    if render.tools and _renders(messages, replace(render, tools=None), text):
        yield "tools"
    silent = [message if i in said else _without_calls(message) for i, message in enumerate(messages)]
    if silent != messages and _renders(silent, render, text):
        yield "tool_calls"
    other = [_with_other_rules(message) for message in messages]
    if other != messages and _renders(other, render, text):
        yield "system"


def loses_calls(messages: Messages, text: str, render: Renderer) -> bool:
    """Whether the last turn calls tools and its rendering would be the same if it did not."""
    *before, last = messages
    silent = _without_calls(last)
    return silent != last and _renders([*before, silent], render, text)


def _renders(messages: Messages, render: Renderer, text: str) -> bool:
    """Whether a chat is rendered as this text."""
    try:
        return render(messages) == text
    except DataError:
        return False


def _without_calls(message: dict[str, Any]) -> dict[str, Any]:
    if not message.get("tool_calls"):
        return message
    return {key: value for key, value in message.items() if key != "tool_calls"}


def _with_other_rules(message: dict[str, Any]) -> dict[str, Any]:
    rules = message.get("content") or ""
    return message | {"content": rules + "x"} if message["role"] == "system" and rules.strip() else message
