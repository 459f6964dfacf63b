"""Recipes as YAML: the subset that a recipe needs, with the scalars of YAML 1.2's core schema.

PyYAML alone reads YAML 1.1, where `2e-4` is text, `off` is false, `010` is 8 and `12:30` is 750. Here numbers are
numbers, only true and false are booleans, and the rest is text. Tags, aliases and deep nesting have no use in a recipe
and are refused: with them go code execution, cycles and documents that grow without end.
"""

import re
from typing import Any

import yaml

MOST_VALUES = 5_000
"""Values in one document; a full recipe has about 70."""
DEEPEST = 16
"""Levels of nesting; a recipe needs 5."""

_DIGITS = 300
"""Longest number, in digits: as a float it stays below 1.8e308. A longer one is text, which no number's place takes."""
_INT = rf"[-+]?[0-9]{{1,{_DIGITS}}}|0o[0-7]{{1,{_DIGITS}}}|0x[0-9a-fA-F]{{1,240}}"
_FLOAT = r"[-+]?(\.[0-9]+|[0-9]+\.[0-9]*|[0-9]+(?=[eE]))([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"
_SCALARS = (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", _INT, list("-+0123456789")),
    ("float", _FLOAT, list("-+.0123456789")),
)
_PREFIX = "tag:yaml.org,2002:"

NOTHING = yaml.ScalarNode(_PREFIX + "null", "")
"""The value that is left out in `key=`."""


class Unreadable(Exception):
    """Text that is not YAML, or not a recipe's YAML. `line` counts from 1."""

    def __init__(self, line: int, problem: str) -> None:
        super().__init__(problem)
        self.line = line


class _Loader(yaml.SafeLoader):
    """Turns text into nodes, which know their lines; refuses what no recipe needs."""

    yaml_implicit_resolvers = {}  # noqa: RUF012 - PyYAML declares it, and reads it only

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = self._count = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()
        self._count += 1
        if isinstance(event, yaml.AliasEvent):
            raise _refused("aliases (*name) are not used in recipes; write the value again", event)
        if isinstance(event, yaml.ScalarEvent | yaml.CollectionStartEvent) and event.tag is not None:
            raise _refused("tags (!name) are not used in recipes; write the plain value", event)
        if self._depth >= DEEPEST:
            raise _refused(f"nested more than {DEEPEST} levels deep", event)
        if self._count > MOST_VALUES:
            raise _refused(f"more than {MOST_VALUES} values", event)
        self._depth += 1
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node


def _refused(problem: str, event: yaml.Event) -> Unreadable:
    return Unreadable(event.start_mark.line + 1 if event.start_mark else 1, problem)


class _Dumper(yaml.SafeDumper):
    """Quotes what YAML 1.1 or 1.2 would read as something else than text, so that any reader reads the same."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


for _name, _pattern, _first in _SCALARS:
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(_PREFIX + _name, re.compile(rf"(?:{_pattern})\Z"), _first)


def parse(text: str) -> yaml.Node | None:
    """The one document in `text` as a tree of nodes; None if there is none.

    Raises:
        Unreadable: if the text is not YAML, uses a tag or an alias, is too deep or too large, or holds characters that
            no recipe needs.
    """
    try:
        loader = _Loader(text)
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise Unreadable(line, f"the character U+{error.character:04X} is not allowed in a recipe") from None
    try:
        return loader.get_single_node()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        reason = ", ".join(part for part in (error.context, error.problem) if part)
        raise Unreadable(mark.line + 1 if mark else 1, f"this is not YAML: {reason}") from None
    except (ValueError, OverflowError):  # raised by PyYAML itself, as on "\UFFFFFFFF" or a version of 5,000 digits
        raise Unreadable(loader.line + 1, "this is not YAML: an escape or a number is out of range") from None


def scalar(node: yaml.ScalarNode) -> str | int | float | bool | None:
    """The value of a scalar node under the core schema."""
    text = node.value
    match node.tag.removeprefix(_PREFIX):
        case "null":
            return None
        case "bool":
            return text.lower() == "true"
        case "int":
            return int(text, {"0x": 16, "0o": 8}.get(text[:2], 10))
        case "float":
            return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
        case _:
            return str(text)


def written(node: yaml.Node) -> str:
    """A node as the user wrote it, as far as it is of use in a message: text in quotes, all else bare."""
    match node:
        case yaml.SequenceNode():
            return f"[{', '.join(written(item) for item in node.value)}]"
        case yaml.MappingNode():
            return f"{{{', '.join(f'{written(key)}: {written(item)}' for key, item in node.value)}}}"
        case _ if node.tag == _PREFIX + "str":
            return f"'{node.value}'"
        case _:
            return node.value or "nothing"


def dump(values: dict[str, Any]) -> str:
    """`values` as YAML in the given order, a blank line before each section."""
    parts = (yaml.dump({key: value}, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=10**6)
             for key, value in values.items())  # fmt: skip
    return "\n".join(parts)
