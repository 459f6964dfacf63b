"""Chats: turns and tools as rows hold them, in the form that chat templates take.

Keys of a turn beside role and content (tool_calls, name, reasoning_content) are kept for the template.
"""

from collections.abc import Mapping
from itertools import cycle
from typing import Any

from qlora_kit.data.calls import are_functions, calls_of, spelt_calls, tools_of
from qlora_kit.data.examples import Chat
from qlora_kit.data.values import filled, kind, named, nearest, short, string, without_nulls
from qlora_kit.errors import DataError

ROLES: dict[str, tuple[str, ...]] = {
    "system": ("developer",),
    "user": ("human", "prompter"),
    "assistant": ("gpt", "chatgpt", "bing", "bard", "model", "bot", "chatbot", "function_call"),
    "tool": ("function", "ipython", "observation"),
}
"""Who speaks, by the names that templates know, and those that other programs have for them."""
_ROLE_OF = {name: role for role, others in ROLES.items() for name in (role, *others)}
_NAMES_OF = {"role": ("from", "author"), "content": ("value", "parts")}
"""Keys of a turn, and what other programs call them; data sets mix them freely."""
_PAIRS = ({"user": "input", "assistant": "output"}, {"user": "human", "assistant": "assistant"})
"""Who speaks under which key of an object that is a question and its answer."""
CHAT_COLUMNS = ("system", "tools", "functions")
"""What only a chat has, beside its turns."""


def chat_of(messages: list[dict[str, Any]], row: Mapping[str, Any], given: int = 0) -> Chat:
    """A chat of these turns, of which so many are a prompt, with the tools of the row.

    Raises:
        DataError: no turn of it teaches anything, or the tools are none.
    """
    chat = Chat(messages, tools_of(row), given)
    answers = [messages[i] for i in answers_of(chat)]
    if not answers:
        is_silenced = any(message["role"] == "assistant" for message in messages[given:])
        raise DataError(
            f"{'every assistant turn has weight 0' if is_silenced else 'no assistant turn'}: nothing to learn from"
        )
    if not any(message.get("content", "").strip() or message.get("tool_calls") for message in answers):
        raise DataError("every assistant turn is empty: nothing to learn from")
    return chat


def answers_of(chat: Chat) -> list[int]:
    """The places of the turns that are learnt: the assistant's behind what is given, but those of a `weight` of 0."""
    turns = enumerate(chat.messages)
    return [i for i, turn in turns if turn["role"] == "assistant" and i >= chat.given and turn.get("weight", 1) != 0]


def turns_of(value: object, column: str) -> list[dict[str, Any]]:
    """The turns that a column holds.

    Raises:
        DataError: it holds none, or one that is none.
    """
    if not isinstance(value, list):
        raise DataError(f"column {column!r} is {kind(value)}, wanted a list of turns")
    if not value:
        raise DataError(f"column {column!r} holds no turns")
    return [_turn(turn, f"turn {number}") for number, turn in enumerate(value, 1)]


def dialogue_of(value: object, column: str) -> list[dict[str, Any]]:
    """The turns of a column that holds a whole conversation, which may be texts that alternate, the user's first.

    Raises:
        DataError: as `turns_of`.
    """
    return turns_of(in_turns(value), column)


def in_turns(value: object) -> object:
    """A conversation of texts, or of questions with their answers, as a list of turns; anything else as it is."""
    if not isinstance(value, list) or not value:
        return value
    if all(isinstance(text, str) for text in value) and len(value) > 1:
        return [
            {"role": role, "content": text} for role, text in zip(cycle(("user", "assistant")), value, strict=False)
        ]
    pairs = (
        pair for pair in _PAIRS if all(isinstance(each, Mapping) and {*each} == {*pair.values()} for each in value)
    )
    if (pair := next(pairs, None)) is None:
        return value
    return [{"role": role, "content": each[key]} for each in value for role, key in pair.items()]


def spoken(value: object, column: str, role: str) -> list[dict[str, Any]]:
    """The turns that a column holds; an object is one turn, and a text one of `role`.

    Raises:
        DataError: it is neither, or an answer that is empty.
    """
    if isinstance(value, list | Mapping):
        return turns_of([value] if isinstance(value, Mapping) else value, column)
    return [{"role": role, "content": filled(value, column) if role == "assistant" else string(value, column)}]


def opened(turns: list[dict[str, Any]], row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The turns behind that of the system, where the row has its words in a column of their own.

    Raises:
        DataError: the column holds something else than text, or other words than a system turn that stands first.
    """
    if not row.get("system"):
        return turns
    rules = {"role": "system", "content": _content(row["system"], "system")}
    if turns[0]["role"] != "system":
        return [rules, *turns]
    if turns[0]["content"] != rules["content"]:
        said = short(turns[0]["content"])
        raise DataError(f"column 'system' is {kind(rules['content'])}, and the first turn has {said}: keep one")
    return turns


def is_in_turns(row: Mapping[str, Any], *texts: object) -> bool:
    """Whether texts of a row are turns: one of them holds turns, or the row has columns that only a chat has.

    A column counts if it is there, be it empty, but not null: so all rows of a table are written in one way.
    """
    is_chat = "system" in row or "tools" in row or are_functions(row.get("functions"))
    return is_chat or any(isinstance(text, list | Mapping) for text in texts)


def speaker(turn: Mapping[str, Any]) -> str | None:
    """The role of a turn as a row has it, by the name that templates know; None where it is none of them."""
    name = next((turn[key] for key in ("role", *_NAMES_OF["role"]) if turn.get(key) is not None), None)
    return _ROLE_OF.get(name.lower()) if isinstance(name, str) else None


def _turn(raw: object, name: str) -> dict[str, Any]:
    """One message."""
    if not isinstance(raw, Mapping):
        raise DataError(f"{name} is {kind(raw)}, wanted an object with role and content")
    turn = without_nulls(raw)  # templates ask whether a key is there
    for key, others in _NAMES_OF.items():
        found = next((other for other in others if other in turn), None)
        if key not in turn and found is not None:
            turn = {key: turn.pop(found), **turn}
    if "role" not in turn:
        raise DataError(f"{name} has no role; found: {named(turn)}; expected: role, content (or from, value)")
    role = speaker(turn)
    if role is None:
        said = turn["role"]
        near = nearest(said, ROLES) if isinstance(said, str) else ""
        raise DataError(f"{name} has the unknown role {short(said)}{near}; known: {', '.join(ROLES)}")
    turn = spelt_calls(turn, role, name) | {"role": role}
    if role == "assistant" and turn.get("weight", 1) not in (0, 1):
        raise DataError(f"{name} has weight {short(turn['weight'])}, wanted 0 (it is not learnt) or 1")
    if turn.get("tool_calls"):
        turn["tool_calls"] = calls_of(turn["tool_calls"], name)
    if turn.get("content") is not None or role != "assistant" or not turn.get("tool_calls"):
        turn["content"] = _content(turn.get("content"), f"content of {name}")
    return turn


def _content(value: object, name: str) -> str:
    """The text of a turn, which may be a list of parts: they are joined as they stand."""
    if not isinstance(value, list):
        return string(value, name)
    if not all(isinstance(part, Mapping) and part.keys() & {"type", "text"} for part in value):
        raise DataError(f"{name} is {kind(value)}, wanted text, or a list of parts with type and text")
    if others := [part["type"] for part in value if part.get("type", "text") != "text"]:
        raise DataError(
            f"{name} has a part of type {short(others[0])}, and only text can be trained: leave the row out"
        )
    return "".join(string(part.get("text"), f"text in the {name}") for part in value)
