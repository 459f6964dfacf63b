"""Values of rows: those that are wanted, and words for those that are not."""

import reprlib
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

from qlora_kit.errors import DataError, listed


def string(value: object, name: str) -> str:
    """The value, which has to be text of whole characters; `name` is what a message calls it."""
    if not isinstance(value, str):
        raise DataError(f"{name} is {kind(value)}, wanted text")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON can spell it as an escape, and tokenizers refuse it much later
        raise DataError(
            f"{name} holds half of a surrogate pair ({value[error.start]!a}), which is no character"
        ) from None
    return value


def filled(value: object, name: str) -> str:
    """The value, which has to be text that says something."""
    if not string(value, name).strip():
        raise DataError(f"{name} is empty: nothing to learn from")
    return str(value)


_KINDS = {dict: "an object", list: "a list", str: "text", int: "a number", float: "a number", bool: "a truth value"}


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


def nearest(name: str, known: Mapping[str, Any] | list[str] | set[str]) -> str:
    """The known name that may be meant, as words to put behind the other; empty where none is like it."""
    close = get_close_matches(name, sorted(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""
