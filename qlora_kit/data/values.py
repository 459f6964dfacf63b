"""Values of rows: those that are wanted, and words for those that are not."""

import json
import reprlib
from collections import Counter
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any

from qlora_kit.errors import DataError, listed


def string(value: object, name: str) -> str:
    """The value, which has to be text; `name` is what a message calls it."""
    if not isinstance(value, str):
        raise DataError(f"{name} is {kind(value)}, wanted text")
    return value


def filled(value: object, name: str) -> str:
    """The value, which has to be text that says something."""
    if not string(value, name).strip():
        raise DataError(f"{name} is empty: nothing to learn from")
    return str(value)


def at(row: Mapping[str, Any], path: str) -> Any:
    """The value of a column, or what stands in it: `a.b.0` is the first of the list b in the object a; in null is null.

    Raises:
        LookupError: there is none.
    """
    value: Any = row
    for key in [path] if path in row else path.split("."):
        if value is None:
            return None
        if isinstance(value, list) and key.isdecimal() and len(key) < 10 and int(key) < len(value):
            value = value[int(key)]
        elif isinstance(value, Mapping) and key in value:
            value = value[key]
        else:
            raise LookupError(path)
    return value


def has(row: Mapping[str, Any], path: str) -> bool:
    """Whether `at` finds something there that is not null."""
    try:
        return at(row, path) is not None
    except LookupError:
        return False


def under(row: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """A row under other names: new name -> where its value is, see `at`. No value stays under its own name as well.

    Raises:
        LookupError: there is no such value.
    """
    moved = {path if path in row else path.split(".")[0] for path in names.values()}
    return {
        **{name: value for name, value in row.items() if name not in moved},
        **{new: at(row, path) for new, path in names.items()},
    }


def from_json(text: str) -> Any:
    """What a JSON text says.

    Raises:
        DataError: an object has a key twice, of which one would be lost.
        ValueError: it is not JSON, or has a number with thousands of digits.
        RecursionError: it is nested hundreds of levels deep.
    """
    return DECODER.decode(text)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        name = twice([name for name, _ in pairs])
        values = " and ".join(short(value) for each, value in pairs if each == name)
        raise DataError(f"the key {name!r} appears twice ({values}): keep one")
    return found


def not_utf8(error: UnicodeDecodeError, place: str) -> DataError:
    """An error that names the byte at which a file stops being text, and where it stands."""
    return DataError(f"{place}: not UTF-8 (byte 0x{error.object[error.start]:02x}): save the file as UTF-8")


DECODER = json.JSONDecoder(object_pairs_hook=_object)
"""Of all rows: one that keeps every key."""


def twice(names: Sequence[str]) -> str | None:
    """The first name that is there more than once; None where each is there once."""
    return next((name for name, count in Counter(names).items() if count > 1), None)


def check_characters(value: object, name: str) -> None:
    """See that a value, and all that it holds, is written in whole characters; `name` is what a message calls it.

    JSON can spell half of a surrogate pair as an escape, and tokenizers refuse it much later.

    Raises:
        DataError: there is half of a pair in it.
    """
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            around = value[max(0, error.start - 10) : error.start + 10]
            raise DataError(f"{name} holds half of a surrogate pair ({around!a}), which is not a character") from None
    elif isinstance(value, Mapping):
        for key, each in value.items():
            check_characters(key, name)
            check_characters(each, name)
    elif isinstance(value, list | tuple):
        for each in value:
            check_characters(each, name)


def without_nulls(value: Any) -> Any:
    """The value without keys that hold null, however deep they stand; a null in a list stays.

    Where rows lie in a table (Parquet, the hub), the objects of a column share their keys, and what one row lacks is
    null there, not to be told from a null that was meant. So none is kept, and rows say the same whatever they lie in.
    A JSON schema loses `"default": null`, which says no more than its absence; of `"enum": [null]` nothing is lost.
    """
    if isinstance(value, Mapping):
        return {key: without_nulls(each) for key, each in value.items() if each is not None}
    return [without_nulls(each) for each in value] if isinstance(value, list) else value


_KINDS = {dict: "an object", list: "a list", str: "text", int: "a number", float: "a number", bool: "a boolean"}


def kind(value: object) -> str:
    """What a value is, and its beginning.

    >>> kind([1, 2]), kind(None)
    ('a list ([1, 2])', 'null')
    """
    if value is None:
        return "null"
    return f"{_KINDS.get(type(value), type(value).__name__)} ({short(value)})"


def short(value: object) -> str:
    """A value as Python writes it, without the middle of a long one."""
    return reprlib.repr(value)


def named(columns: Mapping[str, Any]) -> str:
    """The names of the columns of a row, the first few."""
    return listed(list(map(str, columns))) or "none"


def nearest(name: str, known: Mapping[str, Any] | list[str] | set[str], likeness: float = 0.6) -> str:
    """The known name that may be meant, as words to put behind the other; empty where none is like it, 0 to 1."""
    close = get_close_matches(name, sorted(known), n=1, cutoff=likeness)
    return f" (did you mean {close[0]!r}?)" if close else ""
