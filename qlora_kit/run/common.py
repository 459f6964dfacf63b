"""What runs in one process have in common, made once: rows as tokens, a base with nothing on it, and its scores."""

from collections.abc import Callable
from typing import Any, TypeVar

from transformers import PreTrainedModel

from qlora_kit.lora import adapter_names, delete_adapter

T = TypeVar("T")


class Common:
    """Holds of each kind what was made last, for the next run that wants the same."""

    def __init__(self) -> None:
        self._kept: dict[str, tuple[object, Any]] = {}

    def take(self, kind: str, mark: object, make: Callable[[], T]) -> T:
        """What stands there under `mark`; if that is something else, it goes first: two bases need not fit.

        Args:
            kind: of thing.
            mark: equal where two runs want the same.
            make: makes it.
        """
        if kind not in self._kept or self._kept[kind][0] != mark:
            self.clear(kind)
            self._kept[kind] = (mark, make())
        made: T = self._kept[kind][1]
        return made

    def take_base(self, mark: object, load: Callable[[], PreTrainedModel]) -> PreTrainedModel:
        """A base as it was loaded: what an earlier run put on it is taken off, and its weights never change."""
        model = self.take("base", mark, load)
        for name in adapter_names(model):
            delete_adapter(model, name)
        return model

    def clear(self, kind: str) -> None:
        """Let go of what stands there."""
        self._kept.pop(kind, None)
