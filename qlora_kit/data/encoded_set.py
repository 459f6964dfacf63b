"""An encoded set: the rows that are kept, in order, and what became of the others."""

import hashlib
from array import array
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Literal, TypeAlias

from qlora_kit.data.classes import Classes
from qlora_kit.data.collate import Deck
from qlora_kit.data.encoded import Encoded, Odd
from qlora_kit.data.faults import Faults
from qlora_kit.data.table import Rows, lengths_of
from qlora_kit.errors import DataError

Fate: TypeAlias = Literal["dropped", "truncated", "split", "no_trained"]
"""What may become of a row other than to be kept as it is; a field of `Counts`."""

MOST_DROPPED = 0.5
"""Share of the rows that may be too long: what is left of more is another set than the one that was given."""


@dataclass(slots=True)
class Counts:
    """What became of the rows."""

    rows: int = 0
    """Kept."""
    tokens: int = 0
    """In kept rows."""
    trained_tokens: int = 0
    """In kept rows, that the loss counts."""
    dropped: int = 0
    """Longer than max_tokens, and left out."""
    truncated: int = 0
    """Longer than max_tokens, and cut; counted whether or not a trained token was left."""
    split: int = 0
    """Longer than max_tokens, and cut into several."""
    no_trained: int = 0
    """Rows or pieces without a trained token, or pairs of which both answers are the same, and left out."""
    turns: int = 0
    """Further rows, beyond one a chat, of chats of which every answer is a row: see `template.py`."""
    faults: int = 0
    """Rows that cannot be read or encoded, and left out."""
    longest: int = 0
    """Tokens of the longest row before anything was cut."""

    @property
    def given(self) -> int:
        """Rows that there were; of a row that was split its pieces."""
        return self.rows + self.dropped + self.no_trained + self.faults

    def __add__(self, other: "Counts") -> "Counts":
        """The counts of both; the longest of either."""
        total = Counts(**{each.name: getattr(self, each.name) + getattr(other, each.name) for each in fields(self)})
        total.longest = max(self.longest, other.longest)
        return total


@dataclass(slots=True)
class Part:
    """What one source of a set gave."""

    name: str = ""
    """Its file, folder or hub id."""
    weight: float = 1.0
    """How often an epoch sees each of its rows."""
    counts: Counts = field(default_factory=Counts)

    @property
    def deck(self) -> Deck:
        """Its rows as a sampler draws them."""
        return Deck(self.counts.rows, self.weight)


@dataclass(slots=True)
class EncodedSet:
    """The rows to train on, in order, and what became of the others."""

    rows: Rows = field(default_factory=list)
    parts: list[Part] = field(default_factory=list)
    """One a source, in the order of the rows."""
    has_chats: bool = False
    """Whether any row went through a chat template."""
    classes: Classes | None = None
    """Of texts that are classified, those of all rows."""
    faults: Faults = field(default_factory=Faults)
    """What is wrong with the rows that were left out as faults."""
    places: dict[Fate | Odd, list[str]] = field(default_factory=lambda: defaultdict(list))
    """Where the rows stand that were not kept as they are, or of which their template makes something odd."""
    fingerprint: str = ""
    """Of the rows that are kept, as the model sees them, and of their order; it tells one set from another."""
    lengths_given: list[int] = field(default_factory=list)
    """Tokens of each row that could be encoded, before anything was cut or left out."""

    @property
    def counts(self) -> Counts:
        """What became of the rows of all sources."""
        return sum((part.counts for part in self.parts), Counts())

    @property
    def decks(self) -> list[Deck]:
        """The sources as a sampler draws them."""
        return [part.deck for part in self.parts]

    @property
    def epoch(self) -> Counts:
        """Of the kept rows that an epoch sees, how many there are, and their tokens by the mean of each source."""
        total = Counts()
        for part in self.parts:
            counts, drawn = part.counts, part.deck.drawn
            total.rows += drawn
            total.tokens += round(drawn * counts.tokens / max(1, counts.rows))
            total.trained_tokens += round(drawn * counts.trained_tokens / max(1, counts.rows))
        return total

    @property
    def longest(self) -> int:
        """Tokens of the longest row that is kept."""
        return max(self.lengths)

    @property
    def lengths(self) -> Sequence[int]:
        """Tokens of each row that is kept."""
        return lengths_of(self.rows)

    def see(self, rows: Sequence[Encoded], where: str) -> None:
        """Count what an example makes, before anything is cut or left out."""
        counts = self.parts[-1].counts
        for odd in {odd for row in rows for sequence in row.sequences for odd in sequence.odd}:
            self.places[odd].append(where)
        counts.turns += len(rows) - 1
        counts.longest = max(counts.longest, *(row.longest for row in rows))
        self.lengths_given.extend(row.longest for row in rows)

    def add(self, row: Encoded) -> None:
        """Keep a row, or count it among those that teach nothing."""
        # Answers may differ in nothing but what was cut off, or in white space that the template leaves out.
        is_same = row.other is not None and row.other.input_ids == row.input_ids
        if is_same or any(sequence.trained_tokens == 0 for sequence in row.sequences):
            self.count("no_trained", row.where)
            return
        self.rows.append(row)
        self.fingerprint = _next_fingerprint(self.fingerprint, row)
        counts = self.parts[-1].counts
        counts.rows += 1
        counts.tokens += sum(len(sequence.input_ids) for sequence in row.sequences)
        counts.trained_tokens += sum(sequence.trained_tokens for sequence in row.sequences)

    def count(self, fate: Fate, where: str) -> None:
        """Count a row that is not kept as it is, and remember where it stands."""
        counts = self.parts[-1].counts
        setattr(counts, fate, getattr(counts, fate) + 1)
        self.places[fate].append(where)

    def check_left(self, max_tokens: int, purpose: str = "train on", *, may_set: bool = True) -> None:
        """See that there is a row.

        Args:
            max_tokens: above which rows were too long.
            purpose: what the rows are for.
            may_set: whether settings have a say here; a finished run has its own.

        Raises:
            DataError: there is none; it says what became of them.
        """
        counts, given = self.counts, len(self.lengths_given) + self.faults.count
        see_length, see_loss = ("; see data.over_length", " (see data.loss_on)") if may_set else ("", "")
        if not self.rows and 0 < given == self.faults.count:
            raise DataError(self.faults.told(f"no row is left to {purpose}: none of the {given:,} can be used"))
        if not self.rows:
            raise DataError(self.faults.told(
                f"no row is left to {purpose}: of {given:,}, {counts.dropped:,} have more than "
                f"data.max_tokens={max_tokens} tokens (the longest {counts.longest:,}{see_length}), "
                f"{counts.no_trained:,} have no trained token{see_loss} or have two identical answers, "
                f"{counts.faults:,} cannot be used"
            ))  # fmt: skip

    @property
    def is_mostly_dropped(self) -> bool:
        """Whether more than `MOST_DROPPED` of the rows were left out for their length."""
        return self.counts.dropped > MOST_DROPPED * (len(self.lengths_given) + self.faults.count)

    def check_most_fit(self, max_tokens: int) -> None:
        """See that most rows were not left out for their length. A preview does without, which shows what would fit.

        Raises:
            DataError: more than `MOST_DROPPED` were.
        """
        counts, given = self.counts, len(self.lengths_given) + self.faults.count
        if self.is_mostly_dropped:
            raise DataError(
                f"{counts.dropped:,} of {given:,} rows have more than data.max_tokens={max_tokens} tokens and would be "
                f"left out; raise it (the longest has {counts.longest:,}), or set data.over_length=truncate or split"
            )


def _next_fingerprint(before: str, row: Encoded) -> str:
    """A fingerprint that depends on all rows up to this one."""
    seen = hashlib.sha256(before.encode())
    for sequence in row.sequences:
        seen.update(array("q", [len(sequence.input_ids), *sequence.input_ids]).tobytes() + bytes(sequence.trained))
    seen.update(repr((row.is_good, row.target)).encode())
    return seen.hexdigest()
