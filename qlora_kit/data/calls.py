"""Calls of tools, and the tools: objects in a chat, and in a rendering what its template takes.

OpenAI's interface has the arguments of a call as a JSON text, and its first form one call a turn (`function_call`) and
bare `functions` for tools. In ShareGPT's rows a call is a turn of its own, whose text is its JSON. Tables have tools as
text, since schemas that differ share no columns. transformers' documentation asks for objects: most templates give them
to `tojson`, which would write a text in quotes once more. Some (DeepSeek's) join arguments to other text. So a chat
holds objects, and a template that takes only text is given their JSON.
"""

import json
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, TypeAlias

from qlora_kit.data.chat_template import Renderer
from qlora_kit.data.values import check_characters, from_json, kind, without_nulls
from qlora_kit.errors import DataError

Object: TypeAlias = dict[str, Any]


def tools_of(row: Mapping[str, Any]) -> list[Object] | None:
    """The tools that a row holds, as a list or as the JSON text of one; None where there are none.

    Raises:
        DataError: it holds something else in their place.
    """
    if tools := _objects(row, "tools"):
        return tools
    functions = _objects(row, "functions") if are_functions(row.get("functions")) else []
    return [each if _is_wrapped(each) else _around(each) for each in functions] or None


def are_functions(value: object) -> bool:
    """Whether a column is a list of tools in OpenAI's first form, or the JSON of one, and no other of that name."""
    try:
        found = json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        return False
    return isinstance(found, list) and all(_is_wrapped(each) or _is_named(each) for each in found)


def _is_wrapped(value: object) -> bool:
    return isinstance(value, dict) and value.get("type") == "function" and isinstance(value.get("function"), dict)


def _is_named(value: object) -> bool:
    return isinstance(value, dict) and isinstance(value.get("name"), str)


def _objects(row: Mapping[str, Any], column: str) -> list[Object]:
    found = _spelt_out(without_nulls(row.get(column)), f"column {column!r}") or []
    if not (isinstance(found, list) and all(isinstance(each, dict) for each in found)):
        raise DataError(f"column {column!r} is {kind(found)}, wanted a list of objects, or the JSON of one")
    return found


def _around(function: Object) -> Object:
    """A tool or a call as templates take it, made of what has the name."""
    return {"type": "function", "function": function}


def spelt_calls(turn: Object, role: str, name: str) -> Object:
    """A turn with its calls in `tool_calls`, where it has them in an older form, and no `function_call` beside these.

    The key may be there and call nothing: tables give it to every turn. `role` is that of the turn, as templates know
    it, and `name` what a message calls the turn.

    Raises:
        DataError: its text should be the JSON of calls, and is not.
    """
    if str(turn["role"]).lower() == "function_call":
        found = _spelt_out(turn.get("content"), f"the call in {name}")
        calls = found if isinstance(found, list) else [found]
        silent = {key: value for key, value in turn.items() if key != "content"}
        return silent | {"tool_calls": [_around(call) if isinstance(call, dict) else call for call in calls]}
    call = turn.get("function_call")
    if not isinstance(call, dict):
        return turn
    rest = {key: value for key, value in turn.items() if key != "function_call"}
    is_call = role == "assistant" and call.get("name") is not None and not turn.get("tool_calls")
    return rest | {"tool_calls": [_around(call)]} if is_call else rest


def calls_of(value: object, name: str) -> list[Object]:
    """The calls of a turn, the arguments of each as an object; `name` is what a message calls the turn.

    Raises:
        DataError: they are no list of objects, or arguments are neither an object nor the JSON of one.
    """
    if not isinstance(value, list) or not all(isinstance(call, dict) for call in value):
        raise DataError(f"tool_calls of {name} is {kind(value)}, wanted a list of objects")
    return [_with_function(call, partial(_with_object, name=name)) for call in value]


def with_arguments(messages: list[Object], render: Renderer) -> list[Object]:
    """The turns of a chat with the arguments of calls as its template takes them: objects, or their JSON."""
    if not any(message.get("tool_calls") for message in messages) or not _takes_text(render):
        return messages
    return [
        message | {"tool_calls": [_with_function(call, _with_text) for call in message["tool_calls"]]}
        if message.get("tool_calls")
        else message
        for message in messages
    ]


def _with_function(call: Object, change: Callable[[Object], Object]) -> Object:
    """A call in which what has the name and the arguments is changed; data sets leave out what OpenAI has around it."""
    function = call.get("function")
    return call | {"function": change(function)} if isinstance(function, dict) else change(call)


def _with_object(function: Object, name: str) -> Object:
    if "arguments" not in function:
        return function
    column = f"function.arguments in {name}"
    arguments = _spelt_out(function["arguments"], column)
    if not isinstance(arguments, dict):
        raise DataError(f"{column} is {kind(function['arguments'])}, wanted an object, or the JSON of one")
    return function | {"arguments": arguments}


def _with_text(function: Object) -> Object:
    if "arguments" not in function:
        return function
    return function | {"arguments": json.dumps(function["arguments"], ensure_ascii=False)}


def _spelt_out(value: object, name: str) -> Any:
    """What a JSON text says, nulls and all; a value that is no text, or an empty one, as it is."""
    if not isinstance(value, str) or not value:
        return value
    try:
        found = from_json(value)
    except DataError as error:
        raise DataError(f"{name}: {error}") from None
    except ValueError as error:
        raise DataError(f"{name} is {kind(value)}, which is not JSON: {error}") from None
    check_characters(found, name)
    return found


_ARGUMENTS = {"zone": "UTC"}


def _takes_text(render: Renderer) -> bool:
    """Whether a template refuses an object, or writes it as Python does, and writes a text as it is.

    It is found by looking: a call is rendered either way.
    """
    text, by_object = json.dumps(_ARGUMENTS), _rendered(render, _ARGUMENTS)
    return (not by_object or repr(_ARGUMENTS) in by_object) and text in _rendered(render, text)


def _rendered(render: Renderer, arguments: object) -> str:
    """A chat that calls a tool; nothing where it is refused."""
    function = {"name": "clock", "arguments": arguments}
    call = {"id": "call00000", "type": "function", "function": function}  # Mistral's ids have nine letters
    try:
        return render([{"role": "user", "content": "?"}, {"role": "assistant", "content": "", "tool_calls": [call]}])
    except DataError:
        return ""
