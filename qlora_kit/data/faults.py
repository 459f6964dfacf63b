"""Faults: what is wrong with rows, gathered while they are read, and raised once or left out and counted."""

from qlora_kit.errors import DataError


class Faults:
    """Gathers one sentence for each bad row, so that a user mends a file in one go and not row by row.

    A function that takes `faults` leaves what it finds in there and goes on with the good rows; the caller decides
    with `stop` whether that ends the run. Without `faults` it stops by itself.

    Attributes:
        count: bad rows so far.
        shown: the first `most_shown` sentences.
        hides_rows: whether one of them is a file that breaks off: how many rows are lost in it is not known.
    """

    most_shown = 20

    def __init__(self) -> None:
        self.count = 0
        self.shown: list[str] = []
        self.hides_rows = False

    def add(self, fault: DataError | str, *, hides_rows: bool = False) -> None:
        """Count one bad row; `fault` says which row it is and what is wrong with it."""
        self.count += 1
        self.hides_rows |= hides_rows
        if len(self.shown) < self.most_shown:
            self.shown.append(" ".join(str(fault).split()))

    def __add__(self, other: "Faults") -> "Faults":
        """The faults of two sets of rows, the first 20 of them shown."""
        both = Faults()
        both.count, both.hides_rows = self.count + other.count, self.hides_rows or other.hides_rows
        both.shown = [*self.shown, *other.shown][: self.most_shown]
        return both

    def stop(self, *, may_skip: bool = True) -> None:
        """Raise what was gathered.

        Args:
            may_skip: whether the setting that leaves bad rows out has a say here; it has none in rows that a finished
                run is asked or scored on.

        Raises:
            DataError: if there is any fault; a single one is the message, of several see `told`.
        """
        may_skip = may_skip and not self.hides_rows
        if self.count == 1:
            raise DataError(self.shown[0] + (" (data.on_error=skip leaves the row out)" if may_skip else ""))
        if self.count > 1:
            way_out = " (data.on_error=skip leaves them out)" if may_skip else ""
            raise DataError(self.told(f"{self.count:,} rows cannot be used{way_out}"))

    def told(self, what: str) -> str:
        """`what` and the first fault on one line; below it the others, one a line, and how many are not shown."""
        if self.count == 0:
            return what
        more = self.count - len(self.shown)
        return "\n  ".join([f"{what}: {self.shown[0]}", *self.shown[1:], *([f"and {more:,} more"] if more else [])])
