"""Classes: what the texts of a classification are called, and the number of each name."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from difflib import get_close_matches

from qlora_kit.errors import DataError


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
            DataError: a label is none of the names.
        """
        strange = [label for label in labels if label not in self.names]
        if strange:
            near = "".join(f" (did you mean {close!r}?)" for close in get_close_matches(strange[0], self.names, n=1))
            raise DataError(f"label {strange[0]!r} is none of the training rows'{near}: {', '.join(self.names[:20])}")
        if self.is_multi:
            return tuple(float(name in labels) for name in self.names)
        return self.names.index(labels[0])


def classes_of(found: Collection[str], is_multi: bool, known: Sequence[str] = ()) -> Classes:
    """The classes of the training rows: sorted by name, numbers by their size.

    Args:
        found: labels of the rows.
        is_multi: whether a row may have several of them, or none.
        known: names of a model that classifies already, in its own order; taken where all labels are among them.

    Raises:
        DataError: there are fewer than two classes.
    """
    if set(found) <= set(known):
        names = list(known)
    elif all(name.isdecimal() for name in found):
        names = [str(number) for number in range(max(map(int, found)) + 1)]
    else:
        names = sorted(found)
    if len(names) < (1 if is_multi else 2):
        raise DataError(f"the rows have {len(names)} class ({', '.join(names)}), and two are the fewest to tell apart")
    return Classes(tuple(names), is_multi)
