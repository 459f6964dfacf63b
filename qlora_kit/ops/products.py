"""Products with frozen weights that a block keeps, so that it need not take them again when it runs again.

Of all that a block does, its products take nearly all the time, and their results a good half of what it would keep.
So between a block that keeps everything and one that keeps its input there is one that keeps products: norms, rotary
embedding, attention and gates run again, and no weight is decoded for it.

A result is taken back in the order in which it was kept, if nobody wrote to it in the meantime; else it is taken anew.
The last of a block is not kept: what nothing in the block waits for is not reached when it runs again (`lora_linear`).
"""

from collections.abc import Callable
from contextvars import ContextVar, Token
from typing import Any

import torch
from torch import Tensor

_Result = tuple[Tensor, int]
"""A result, and the number of times that it had been written to when it was kept."""


class KeptProducts:
    """The products of one pass through a block."""

    def __init__(self) -> None:
        self._kept: list[_Result] = []

    def contexts(self) -> tuple["_Keeping", "_TakingBack"]:
        """Inside the first products are kept, inside the second taken back: as torch's checkpoint wants them."""
        return _Keeping(self._kept), _TakingBack(self._kept)


def product(make: Callable[[], Tensor]) -> Tensor:
    """What `make` gives, or gave when the block ran first."""
    if torch.compiler.is_compiling():
        return make()
    current = _CURRENT.get()
    return make() if current is None else current.result(make)


class _Context:
    """A pass through a block; the same one may be entered again, one after the other."""

    def __init__(self, kept: list[_Result]) -> None:
        self.kept = kept
        self._tokens: list[Token[Any]] = []

    def result(self, make: Callable[[], Tensor]) -> Tensor:
        """Of the next product."""
        raise NotImplementedError

    def __enter__(self) -> None:
        self._tokens.append(_CURRENT.set(self))

    def __exit__(self, *_: object) -> None:
        _CURRENT.reset(self._tokens.pop())


class _Keeping(_Context):
    def result(self, make: Callable[[], Tensor]) -> Tensor:
        made = make()
        self.kept.append((made.detach(), made._version))
        return made

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        self.kept[-1:] = []


class _TakingBack(_Context):
    def __enter__(self) -> None:
        super().__enter__()
        self._next = 0

    def result(self, make: Callable[[], Tensor]) -> Tensor:
        number, self._next = self._next, self._next + 1
        if number >= len(self.kept):
            return make()
        kept, version = self.kept[number]
        return kept.detach() if kept._version == version else make()


_CURRENT: ContextVar[_Context | None] = ContextVar("kept_products", default=None)
