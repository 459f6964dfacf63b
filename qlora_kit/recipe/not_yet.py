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


def _only(*built: str | bool | float | None) -> Callable[[Any], bool]:
    return lambda value: value in built


def _all_but(*missing: str | bool) -> Callable[[Any], bool]:
    return lambda value: value not in missing


_FORMATS = _all_but("classification")
_FORMATS_BUILT = "built: auto, messages, sharegpt, alpaca, completion, text, preference, labelled"

ROWS = (
    NotYet("base.attention", _only("sdpa", "eager"), "built: sdpa, eager"),
    NotYet("lora.rank", _all_but("auto"), "write a whole number, such as 16"),
    NotYet("data.train[].format", _FORMATS, _FORMATS_BUILT),
    NotYet("data.format", _FORMATS, _FORMATS_BUILT),
    NotYet("train.task", _all_but("classify"), "built: sft, pretrain, dpo, ipo, orpo, kto"),
    NotYet("train.sample_every", _only(None), "built: null; sample afterwards with qlora-kit generate"),
)

BY_KEY = {row.key: row for row in ROWS}
