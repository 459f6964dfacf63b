"""Tensors of the CPU that stand for a card's, in a plan for a card that is not here."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_ON_CARD: ContextVar[bool] = ContextVar("on_card", default=False)


@contextmanager
def as_on_card(is_so: bool) -> Iterator[None]:
    """A block in which tensors of the CPU stand for a card's: what a plan allocates is then what the card would. Of one
    that computes in fp16 it is taken to be older than Ampere."""
    token = _ON_CARD.set(is_so)
    try:
        yield
    finally:
        _ON_CARD.reset(token)


def stands_for_card() -> bool:
    """Whether this is such a block."""
    return _ON_CARD.get()
