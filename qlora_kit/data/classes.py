"""Classes: what the texts of a classification are called, and the number of each name."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from difflib import get_close_matches

from qlora_kit.errors import DataError

MOST_DIGITS = 18
"""Of a label that may be a number."""


@dataclass(frozen=True, slots=True)
class Classes:
    """The names of classes, in the order of a model's outputs.

    Attributes:
        names: of all classes.
        is_multi: whether a text may have several of them, or none.
    """

    names: tuple[str, ...]
    is_multi: bool

    def target(self, labels: Sequence[str]) -> int | tuple[float, ...]:
        """What a model's outputs should say of a text with these labels: one's number, or 1 or 0 for every class.

        Raises:
            DataError: a label is none of the names, or there is other than one and no text has several.
        """
        if not self.is_multi and len(labels) != 1:
            found = f"{len(labels)} labels ({', '.join(labels)})" if labels else "no label"
            raise DataError(f"it has {found}, and every training row has one; give it one")
        strange = [label for label in labels if label not in self.names]
        if strange:
            near = "".join(f" (did you mean {close!r}?)" for close in get_close_matches(strange[0], self.names, n=1))
            raise DataError(
                f"label {strange[0]!r} is not one of the training rows' labels{near}: {', '.join(self.names[:20])}"
            )
        if self.is_multi:
            return tuple(float(name in labels) for name in self.names)
        return self.names.index(labels[0])

    def named(self, target: int | Sequence[float]) -> list[str]:
        """The names of a target, or of what was said."""
        if isinstance(target, int):
            return [self.names[target]]
        return [name for name, is_one in zip(self.names, target, strict=True) if is_one]

    def words(self, target: int | Sequence[float]) -> str:
        """The same, to be shown."""
        return ", ".join(self.named(target)) or "none"


def classes_of(found: Collection[str], is_multi: bool, known: Sequence[str] = ()) -> Classes:
    """The classes of the training rows: sorted by name, or numbers by their size.


    Args:
        found: labels of the rows.
        is_multi: whether a row may have several of them, or none.
        known: names of a model that classifies already, in its own order; taken where all labels are among them.

    Raises:
        DataError: there are fewer than two classes.
    """
    if set(found) <= set(known):
        names = list(known)
    elif all(name.isdecimal() and len(name) <= MOST_DIGITS for name in found):
        names = _numbers(set(found))
    else:
        names = sorted(found)
    if len(names) < (1 if is_multi else 2):
        found_names = f"1 class ({names[0]})" if names else "no class"
        raise DataError(f"the rows have {found_names}, and a classifier needs at least two")
    return Classes(tuple(names), is_multi)


def _numbers(found: set[str]) -> list[str]:
    """Numbers as the places of a model's outputs, as other programs take them, though some may not occur; by size where
    most would not, or one is written otherwise than it counts."""
    highest = max(map(int, found))
    if highest < 2 * len(found) and all(str(int(name)) == name for name in found):
        return [str(number) for number in range(highest + 1)]
    return sorted(found, key=lambda name: (int(name), name))
