"""Faults: what is wrong with rows, gathered while they are read, and raised once."""

from qlora_kit.errors import DataError


class Faults:
    """Gathers one sentence for each bad row, so that a user mends a file in one go and not row by row.

    A function that takes `faults` leaves what it finds in there and goes on with the good rows; the caller decides
    with `stop` whether that ends the run. Without `faults` it stops by itself.

    Attributes:
        count: bad rows so far.
        shown: the first `most_shown` sentences.
    """

    most_shown = 20

    def __init__(self) -> None:
        self.count = 0
        self.shown: list[str] = []

    def add(self, fault: DataError | str) -> None:
        """Count one bad row; `fault` says which row it is and what is wrong with it."""
        self.count += 1
        if len(self.shown) < self.most_shown:
            self.shown.append(" ".join(str(fault).split()))

    def stop(self) -> None:
        """Raise what was gathered.

        Raises:
            DataError: if there is any fault; names the first 20 and counts them all, on one line.
        """
        if self.count == 0:
            return
        if self.count == 1:
            raise DataError(self.shown[0])
        more = self.count - len(self.shown)
        rest = f"; and {more} more" if more else ""
        raise DataError(f"{self.count} rows cannot be used: {'; '.join(self.shown)}{rest}")
