"""Formats: from the columns of a row to what it means.

    messages     messages: [{role, content}, ...], tools                 -> Chat
    sharegpt     conversations: [{from, value}, ...], system, tools      -> Chat
    alpaca       instruction, input, output, system                      -> Chat
    completion   prompt, completion                                      -> Completion
    text         text                                                    -> Text
    preference   prompt, chosen, rejected: texts, or turns               -> Preference
    labelled     label; prompt, completion or messages                   -> Labelled
    classification   text, label: a name, a number, or a list of them    -> Classified

A format is one line in `FORMATS` and one function that builds its example. This file reads no files and knows no
tokenizer. Keys of a message beside role and content (tool_calls, name, reasoning_content) are kept for the template.
"""

import reprlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from difflib import SequenceMatcher, get_close_matches
from typing import Any, TypeAlias

from qlora_kit.errors import DataError, listed

Columns: TypeAlias = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Chat:
    """Turns of a conversation, in the form that chat templates take."""

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None
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


@dataclass(frozen=True, slots=True)
class Format:
    """Which columns a format has, and how a row of it becomes an example."""

    required: tuple[str, ...]
    optional: tuple[str, ...]
    build: Callable[[Columns], Example]


def read_row(
    row: object,
    where: str,
    format: str = "auto",
    columns: Mapping[str, str] | None = None,
    task: str = "sft",
) -> Example:
    """Turn the columns of one row into an example.

    Args:
        row: column name -> value, as the file has it.
        where: `file:line` or `source row N`; every message begins with it.
        format: a name in `FORMATS`, or `auto`: the first that the task can use and whose required columns are there.
        columns: expected name -> name in the file.
        task: of `train.task`.

    Raises:
        DataError: if a column is missing or has the wrong type, a role is unknown, or nothing could be learnt from it.
    """
    try:
        if not isinstance(row, Mapping):
            raise DataError(f"found {_kind(row)}, wanted an object with named columns")
        check_format(format, columns, task)
        chosen, renamed = _match(row, _candidates(format, task), columns or {})
        return replace(chosen.build(renamed), where=where)
    except DataError as error:
        raise DataError(f"{where}: {error}") from None


def formats_of(task: str) -> tuple[str, ...]:
    """Names of the formats that a task can use, in the order in which `auto` tries them."""
    return _FORMATS_OF.get(task, _ANSWERS)


def check_format(format: str, columns: Mapping[str, str] | None = None, task: str = "sft") -> None:
    """Refuse a format or an expected column that does not exist, or of which the task can make nothing.

    Raises:
        DataError: names the known formats or columns and the nearest one.
    """
    if format != "auto" and format not in FORMATS:
        raise DataError(
            f"data.format={format} is not known{_nearest(format, FORMATS)}; known: auto, {', '.join(FORMATS)}"
        )
    if format != "auto" and format not in formats_of(task):
        raise DataError(
            f"data.format={format} is of no use to train.task={task}; it takes: {', '.join(formats_of(task))}"
        )
    mapped = set(columns or ())
    candidates = _candidates(format, task)
    if any(mapped <= _columns_of(known) for known in candidates):
        return
    expected = sorted(set().union(*map(_columns_of, candidates)))
    for name in sorted(mapped - set(expected)):
        raise DataError(
            f"data.columns: {name} is not an expected column{_nearest(name, expected)}; expected: "
            f"{', '.join(expected)} (written as expected name: name in the file)"
        )
    raise DataError(f"data.columns: no single format has the columns {', '.join(sorted(mapped))}")


# ---- which format a row has ----------------------------------------------------------------------------------------


def _match(row: Columns, known: Sequence[Format], columns: Mapping[str, str]) -> tuple[Format, Columns]:
    """The format of the row, and the row under the names that the format expects."""
    for expected, name in columns.items():
        if name not in row:
            raise DataError(
                f"column {name!r} (data.columns maps it to {expected}) is missing{_nearest(name, row)}; "
                f"found: {_listed(row)}"
            )
    renamed = {**row, **{expected: row[name] for expected, name in columns.items()}}
    # A map says what is meant: a format that knows nothing of the mapped columns is not a candidate.
    candidates = [each for each in known if columns.keys() <= _columns_of(each)]
    for each in candidates:
        if all(name in renamed for name in each.required):
            return each, renamed
    wanted = max(candidates, key=lambda each: _likeness(each, renamed))
    missing = [name for name in wanted.required if name not in renamed]
    near = "".join(_nearest(name, set(renamed) - set(wanted.required)) for name in missing)
    raise DataError(
        f"missing {', '.join(map(repr, missing))}{near}; found columns: {_listed(renamed)}; expected: "
        f"{', '.join(wanted.required)} (data.columns maps other names)"
    )


def _candidates(format: str, task: str) -> list[Format]:
    return [FORMATS[name] for name in (formats_of(task) if format == "auto" else [format])]


def _columns_of(known: Format) -> set[str]:
    return {*known.required, *known.optional}


def _likeness(known: Format, row: Columns) -> float:
    """How near the columns of a row are to those a format requires, 0 to 1, and the share of them that it knows."""
    best = [max((SequenceMatcher(None, name, found).ratio() for found in row), default=0.0) for name in known.required]
    return sum(best) / len(best) + len(_columns_of(known) & row.keys()) / max(1, len(row))


# ---- one builder a format ------------------------------------------------------------------------------------------


def _messages(row: Columns) -> Chat:
    return _chat(_turns(row["messages"], "messages"), row)


def _sharegpt(row: Columns) -> Chat:
    turns = _turns(row["conversations"], "conversations")
    return _chat([*_system(row), *turns], row)


def _alpaca(row: Columns) -> Chat:
    question = _string(row["instruction"], "instruction")
    if row.get("input"):
        question = f"{question}\n\n{_string(row['input'], 'input')}"
    answer = {"role": "assistant", "content": _filled(row["output"], "output")}
    return _chat([*_system(row), {"role": "user", "content": question}, answer], row)


def _completion(row: Columns) -> Completion:
    return Completion(_string(row["prompt"], "prompt"), _filled(row["completion"], "completion"))


def _text(row: Columns) -> Text:
    return Text(_filled(row["text"], "text"))


def _classified(row: Columns) -> Classified:
    value = row["label"]
    is_multi = isinstance(value, list)
    labels = [_class_name(each) for each in (value if is_multi else [value])]
    if len(set(labels)) < len(labels):
        raise DataError(f"column 'label' names a class twice: {', '.join(labels)}")
    return Classified(_filled(row["text"], "text"), tuple(labels), is_multi)


def _class_name(value: object) -> str:
    """The name of a class, which may be a number that counts from 0."""
    if isinstance(value, str) and value.strip():
        return _string(value, "column 'label'").strip()
    if isinstance(value, int | float) and value >= 0 and value == value // 1:  # tables with gaps make counts 1.0
        return str(int(value))
    raise DataError(f"column 'label' is {_kind(value)}, wanted a name, a number from 0, or a list of them")


def _preference(row: Columns) -> Preference:
    chosen, rejected = (_answer(row.get("prompt"), row[name], name, row) for name in ("chosen", "rejected"))
    if chosen == rejected:
        raise DataError("chosen and rejected are the same: nothing to learn from")
    if _prompt_of(chosen) != _prompt_of(rejected):
        raise DataError("chosen and rejected differ before their last turn, so they are no answers to one prompt")
    return Preference(chosen, rejected)


def _labelled(row: Columns) -> Labelled:
    value, name = row["label"], "messages" if "messages" in row else "completion"
    if value not in (0, 1):
        raise DataError(f"column 'label' is {_kind(value)}, wanted true (the answer is good) or false")
    if name not in row:
        raise DataError(
            f"there is a label and no answer; found columns: {_listed(row)}; expected: completion or messages"
        )
    return Labelled(_answer(row.get("prompt"), row[name], name, row), bool(value))


def labelled_pair(pair: Preference) -> list[Labelled]:
    """Both answers of a pair as answers with a verdict."""
    return [Labelled(answer, answer is pair.chosen, pair.where) for answer in (pair.chosen, pair.rejected)]


def _answer(prompt: object, answer: object, name: str, row: Columns) -> Chat | Completion:
    """An answer that ends a conversation, or follows a text.

    Turns that begin with the assistant's go on from `prompt`, be it turns or what the user says; others are the whole
    conversation, beside which data sets often keep its first words in `prompt`.
    """
    if not isinstance(answer, list):
        if prompt is None:
            raise DataError(f"{name} is {_kind(answer)} and there is no column 'prompt': give prompt, or turns")
        if isinstance(prompt, list):
            answer = [{"role": "assistant", "content": _filled(answer, name)}]
        else:
            return Completion(_string(prompt, "prompt"), _filled(answer, name))
    turns = _turns(answer, name)
    if turns[0]["role"] == "assistant":
        before = prompt if isinstance(prompt, list) else [{"role": "user", "content": _string(prompt, "prompt")}]
        turns = [*_turns(before, "prompt"), *turns]
    if turns[-1]["role"] != "assistant":
        raise DataError(f"{name} ends with a turn of the {turns[-1]['role']}, wanted the assistant's")
    return _chat([*_system(row), *turns], row)


def _prompt_of(answer: Chat | Completion) -> object:
    return answer.messages[:-1] if isinstance(answer, Chat) else answer.prompt


FORMATS: dict[str, Format] = {
    "messages": Format(("messages",), ("tools",), _messages),
    "sharegpt": Format(("conversations",), ("system", "tools"), _sharegpt),
    "alpaca": Format(("instruction", "output"), ("input", "system"), _alpaca),
    "completion": Format(("prompt", "completion"), (), _completion),
    "text": Format(("text",), (), _text),
    "preference": Format(("chosen", "rejected"), ("prompt", "system", "tools"), _preference),
    "labelled": Format(("label",), ("prompt", "completion", "messages", "system", "tools"), _labelled),
    "classification": Format(("text", "label"), (), _classified),
}
_ANSWERS = ("messages", "sharegpt", "alpaca", "completion", "text")
"""In the order in which `auto` tries them: the more a format says about a row, the earlier."""
_PAIRS = ("preference",)
_FORMATS_OF = {"dpo": _PAIRS, "ipo": _PAIRS, "orpo": _PAIRS, "kto": ("labelled", "preference"),
               "classify": ("classification",)}  # fmt: skip


# ---- turns ---------------------------------------------------------------------------------------------------------

ROLES = ("system", "user", "assistant", "tool")
_ROLE_OF = {**{role: role for role in ROLES}, "human": "user", "gpt": "assistant"}


def _chat(messages: list[dict[str, Any]], row: Columns) -> Chat:
    answers = [message for message in messages if message["role"] == "assistant"]
    if not answers:
        raise DataError("no assistant turn: nothing to learn from")
    if not any(message.get("content", "").strip() or message.get("tool_calls") for message in answers):
        raise DataError("every assistant turn is empty: nothing to learn from")
    tools = row.get("tools") or None
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise DataError(f"column 'tools' is {_kind(tools)}, wanted a list of objects")
    return Chat(messages, tools)


def _turns(value: object, column: str) -> list[dict[str, Any]]:
    if not isinstance(value, list):
        raise DataError(f"column {column!r} is {_kind(value)}, wanted a list of turns")
    if not value:
        raise DataError(f"column {column!r} holds no turns")
    return [_turn(turn, f"turn {number}") for number, turn in enumerate(value, 1)]


def _turn(raw: object, name: str) -> dict[str, Any]:
    """One message; both namings of its keys are taken, since data sets mix them freely with both column names."""
    if not isinstance(raw, Mapping):
        raise DataError(f"{name} is {_kind(raw)}, wanted an object with role and content")
    # Tables fill keys that other rows have with null; templates ask whether a key is there.
    turn = {key: value for key, value in raw.items() if value is not None}
    if "role" not in turn and "from" in turn:
        turn = {"role": turn.pop("from"), "content": turn.pop("value", None), **turn}
    if "role" not in turn:
        raise DataError(f"{name} has no role; found: {_listed(turn)}; expected: role, content (or from, value)")
    role = turn["role"]
    if not isinstance(role, str) or role not in _ROLE_OF:
        near = _nearest(role, _ROLE_OF) if isinstance(role, str) else ""
        raise DataError(f"{name} has the unknown role {_short(role)}{near}; known: {', '.join(ROLES)}")
    turn["role"] = _ROLE_OF[role]
    if turn.get("content") is not None or not turn.get("tool_calls"):
        turn["content"] = _string(turn.get("content"), f"content of {name}")
    return turn


def _system(row: Columns) -> list[dict[str, Any]]:
    return [{"role": "system", "content": _string(row["system"], "system")}] if row.get("system") else []


# ---- values --------------------------------------------------------------------------------------------------------


def _string(value: object, name: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{name} is {_kind(value)}, wanted text")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON can spell it as an escape, and tokenizers refuse it much later
        raise DataError(
            f"{name} holds half of a surrogate pair ({value[error.start]!a}), which is no character"
        ) from None
    return value


def _filled(value: object, name: str) -> str:
    if not _string(value, name).strip():
        raise DataError(f"{name} is empty: nothing to learn from")
    return str(value)


_KINDS = {dict: "an object", list: "a list", str: "text", int: "a number", float: "a number", bool: "a truth value"}


def _kind(value: object) -> str:
    if value is None:
        return "null"
    return f"{_KINDS.get(type(value), type(value).__name__)} ({_short(value)})"


def _short(value: object) -> str:
    return reprlib.repr(value)


def _listed(names: Mapping[str, Any]) -> str:
    return listed(list(map(str, names))) or "none"


def _nearest(name: str, known: Mapping[str, Any] | list[str] | set[str]) -> str:
    close = get_close_matches(name, sorted(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""
