"""What the schema knows and this version does not do: a row a key, and nothing else to change when a feature lands."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class NotYet:
    """One key of which only some values are built. `instead` says what to write today."""

    key: str
    is_built: Callable[[Any], bool]
    instead: str


def _all_but(*missing: str | bool) -> Callable[[Any], bool]:
    return lambda value: value not in missing


ROWS = (NotYet("lora.rank", _all_but("auto"), "write a whole number, such as 16"),)

BY_KEY = {row.key: row for row in ROWS}
