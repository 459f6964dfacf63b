"""Which cards of the table a plan fits on, as rows and as a sentence. `plan` is the document plan.json."""

from collections.abc import Sequence
from itertools import groupby
from typing import Any, NamedTuple

from qlora_kit.report.methods import METHODS, method_names, own_method
from qlora_kit.units import GIB

COUNTED = "Usable is what a card reports less the driver's context; a tenth is left to the allocator (estimates)."


class CardGroup(NamedTuple):
    """Cards of about the same memory on which the same methods fit."""

    usable_bytes: float
    """Of the smallest of them."""
    names: list[str]
    fits: dict[str, bool]
    """By method, of those that the plan speaks of."""


def card_groups(plan: dict[str, Any]) -> list[CardGroup]:
    """The cards of `plan` from the smallest on, in groups of the same whole GiB; in each they keep their order."""

    def alike(card: dict[str, Any]) -> tuple[int, tuple[tuple[str, bool], ...]]:
        fits = tuple((method, card[method]) for method in METHODS if card.get(method) is not None)
        return int(card["usable_bytes"] // GIB), fits

    groups = []
    for (_, fits), found in groupby(sorted(plan.get("cards") or [], key=alike), key=alike):
        cards = list(found)
        smallest = min(card["usable_bytes"] for card in cards)
        groups.append(CardGroup(smallest, [card["name"] for card in cards], dict(fits)))
    return groups


def cards_sentence(plan: dict[str, Any]) -> str:
    """The smallest card for each method; "" where the plan has no cards.

    >>> card = {"name": "RTX 4060", "usable_bytes": 7 * GIB, "qlora": True, "lora_16bit": False}
    >>> cards_sentence({"cards": [card], "methods": {}})
    'Fits on: every card in the table; LoRA 16-bit: no card in the table.'
    """
    groups, said = card_groups(plan), []
    own = own_method(plan)
    for method in sorted(METHODS, key=lambda method: method != own):
        if any(method in group.fits for group in groups):
            name = "" if method == own else f"{method_names(plan)[method]}: "
            said.append(name + _from_which_on(groups, method))
    return f"Fits on: {'; '.join(said)}." if said else ""


def _from_which_on(groups: Sequence[CardGroup], method: str) -> str:
    fits = [group.fits.get(method, False) for group in groups]
    if not any(fits):
        return "no card in the table"
    if all(fits):
        return "every card in the table"
    first = fits.index(True)
    name = groups[first].names[0]
    if first == len(groups) - 1:
        return f"only {', '.join(groups[first].names)}"
    if all(fits[first:]):
        return f"{name} and larger"
    return f"{sum(len(group.names) for group in groups if group.fits.get(method))} cards, the smallest {name}"
