"""Regular expressions for the names of layers, of a recipe or of an adapter: such as are matched in little time.

Python's matching goes back and tries again, and has no limit: a group that is repeated is tried in every division of a
name, 2^60 of them for a name of 60 characters, and k repeats of one character each in its k-th power. So a pattern is
judged before it is matched, by the tree that `re` itself parses it into: text can be written in many ways (comments,
spaces under a flag), a tree in one.
"""

import re
from collections.abc import Iterator
from re import _parser as parser  # type: ignore[attr-defined]
from typing import Any

_MOST_REPEATS = 5
"""In one pattern; those of PEFT and of programs around it have up to 4."""
_REPEATS = ("MAX_REPEAT", "MIN_REPEAT", "POSSESSIVE_REPEAT")
_CHARACTERS = ("LITERAL", "NOT_LITERAL", "ANY", "IN")
"""What may be repeated: each of these takes one character of a name."""


def compile_pattern(text: str) -> re.Pattern[str]:
    """The regular expression, if it is matched in little time, whatever the name.

    Raises:
        ValueError: it is none, or may take too long, or has a flag for all of it, which is none where it becomes a part
            of a longer one. Says why, as the end of a sentence about it.
    """
    try:
        compiled, tree = re.compile(text), parser.parse(text)
        repeats = sum(1 for _ in _repeats(tree))
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"does not compile: {error}") from None
    if tree.state.flags != parser.SRE_FLAG_UNICODE:
        raise ValueError("sets a flag for all of it, such as (?i): spell the names out")
    if repeats > _MOST_REPEATS:
        raise ValueError(f"has {repeats} repeats and could take years: at most {_MOST_REPEATS} are allowed")
    return compiled


def _repeats(tree: Any) -> Iterator[None]:
    """One for each repeat in a parsed pattern.

    Raises:
        ValueError: it is a group that is repeated.
    """
    for kind, argument in tree:
        if str(kind) in _REPEATS:
            _, most, repeated = argument
            if most > 1 and [str(inner) in _CHARACTERS for inner, _ in repeated] != [True]:
                raise ValueError("repeats a group and could take years: repeat single characters, such as .*")
            yield
        for part in _parts(argument):
            yield from _repeats(part)


def _parts(argument: Any) -> Iterator[Any]:
    """The patterns inside one element of another."""
    if isinstance(argument, parser.SubPattern):
        yield argument
    elif isinstance(argument, list | tuple):
        for each in argument:
            yield from _parts(each)
