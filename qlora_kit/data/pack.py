"""Pack: rows of a step side by side, or several in one sequence, so that it computes little for padding.

    best-fit decreasing: rows from the longest to the shortest, each into the sequence that it fills best

Of many rows it makes at most 11/9 of the fewest sequences there could be, and a constant more (Johnson 1974); where
short rows are many, close to the fewest. Only the rows of one optimizer step are packed together: which rows a step has
stays a matter of the seed and of how many were consumed, so that a run resumes at a row. No row is cut, and every
document keeps its own positions and attention.
"""

import math
from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle

from qlora_kit.data.encoded import Encoded
from qlora_kit.data.table import lengths_of


def best_fit(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Sequences of rows by best-fit decreasing; the lengths and their order alone decide.

    Args:
        lengths: tokens of each row.
        max_tokens: that a sequence may hold; a longer row raises it to its own length.

    Returns:
        row numbers of each sequence, every row once, in the order in which they were put there.
    """
    room = max(max_tokens, max(lengths))
    packs: list[list[int]] = []
    free: list[tuple[int, int]] = []  # (tokens left, number of the pack), sorted
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        found = bisect_left(free, (lengths[row], 0))
        if found == len(free):
            packs.append([])
            left, number = room, len(packs) - 1
        else:
            left, number = free.pop(found)
        packs[number].append(row)
        insort(free, (left - lengths[row], number))
    return packs


@dataclass(frozen=True, slots=True)
class Room:
    """What one forward pass may take.

    Attributes:
        micro_batch: sequences of the longest kind.
        longest: tokens of such a sequence.
        most: sequences of any kind; None leaves it to the places, micro_batch x longest.
        overhead: tokens that take as long as what every pass costs beside its tokens, since it decodes all weights.
    """

    micro_batch: int
    longest: int
    most: int | None = None
    overhead: int = 0

    def holds(self, sequences: int, tokens: int) -> bool:
        """Whether so many sequences, padded to `tokens`, go side by side."""
        within = sequences <= (self.most or sequences)
        return sequences == 1 or (within and sequences * tokens <= self.micro_batch * self.longest)


SHORT = 2
"""Tokens of the shortest document of a rehearsal, and of a plan: one alone has nothing to predict, and is read without
the copies that others need."""


@dataclass(frozen=True, slots=True)
class Packing:
    """Sequences that hold several rows each.

    Attributes:
        sequences: in one forward pass.
        tokens: that none of them exceeds.
    """

    sequences: int
    tokens: int


def lay_out(lengths: Sequence[int], within: Room | Packing) -> list[list[list[int]]]:
    """Cut the rows of one step into micro-batches, the largest first.

    Args:
        lengths: tokens of each row.
        within: what a forward pass may take of rows that are a sequence each, or sequences that hold several.
    """
    if isinstance(within, Packing):
        return arrange(lengths, within.sequences, within.tokens)
    return side_by_side(lengths, within)


def side_by_side(lengths: Sequence[int], room: Room) -> list[list[list[int]]]:
    """Cut the rows of one step into micro-batches, each row a sequence of its own, so that the step takes least time.

    Time goes by places, padding included, and by passes. Rows of like length stand side by side; how many do is found
    exactly, by the best way for the rows up to each one.

    Args:
        lengths: tokens of each row.
        room: what a forward pass may take; a row that is longer goes alone.

    Returns:
        micro-batches of sequences of row numbers, the longest first.
    """
    rows = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    least, cut = [0.0], [0]  # of the first n rows: their time, and where their last micro-batch begins
    for end in range(1, len(rows) + 1):
        ways = []
        for begin in range(end - 1, -1, -1):
            tokens = lengths[rows[begin]]
            if not room.holds(end - begin, tokens):
                break
            ways.append((least[begin] + (end - begin) * tokens + room.overhead, begin))
        time, begin = min(ways)
        least.append(time)
        cut.append(begin)
    found: list[list[list[int]]] = []
    end = len(rows)
    while end > 0:
        found.append([[row] for row in rows[cut[end] : end]])
        end = cut[end]
    return found[::-1]


def arrange(lengths: Sequence[int], micro_batch: int, max_tokens: int) -> list[list[list[int]]]:
    """Cut the rows of one step into micro-batches of packed sequences, those of like length side by side.

    Packed rows take as few micro-batches as best fit allows. Of the sequences that do, those with the least padding are
    taken: best fit's own, or shorter ones, since with full ones the last is often nearly empty beside them.

    Args:
        lengths: tokens of each row.
        micro_batch: sequences in one forward pass.
        max_tokens: as for `best_fit`.

    Returns:
        micro-batches of sequences of row numbers, the longest first.
    """
    full = best_fit(lengths, max_tokens)
    most = math.ceil(len(full) / micro_batch) * micro_batch
    ways = [full, *(_shortest(lengths, count, max_tokens) for count in range(len(full), most + 1))]
    arranged = [_by_length(lengths, packs, micro_batch) for packs in ways]
    return max(arranged, key=lambda way: efficiency(lengths, way))


def _shortest(lengths: Sequence[int], count: int, max_tokens: int) -> list[list[int]]:
    """At most `count` sequences, as short as bisection finds them; best fit with `max_tokens` needs no more."""
    longest = max(lengths)
    rooms = range(max(longest, math.ceil(sum(lengths) / count)), max(max_tokens, longest) + 1)
    return best_fit(lengths, rooms[bisect_left(rooms, True, key=lambda room: len(best_fit(lengths, room)) <= count)])


def _by_length(lengths: Sequence[int], packs: list[list[int]], micro_batch: int) -> list[list[list[int]]]:
    packs = sorted(packs, key=lambda pack: -sum(lengths[row] for row in pack))
    return [packs[start : start + micro_batch] for start in range(0, len(packs), micro_batch)]


def efficiency(lengths: Sequence[int], micro_batches: Sequence[Sequence[Sequence[int]]]) -> float:
    """Share of the places in micro-batches, from `arrange` or `side_by_side`, that hold a token and no padding."""
    tokens = sum(lengths[row] for packs in micro_batches for pack in packs for row in pack)
    return tokens / places(lengths, micro_batches)


def places(lengths: Sequence[int], micro_batches: Sequence[Sequence[Sequence[int]]]) -> int:
    """Places of all sequences in micro-batches, each padded to the longest beside it."""
    return sum(len(packs) * max(sum(lengths[row] for row in pack) for pack in packs) for packs in micro_batches)


def longest_pack(lengths: Sequence[int], max_tokens: int, rows: int) -> int:
    """Tokens that no sequence can exceed where `rows` rows are packed together."""
    longest = sorted(lengths, reverse=True)[:rows]
    return max(longest[0], min(max_tokens, sum(longest)))


def full_packs(rows: Sequence[Encoded], count: int, tokens: int) -> list[list[Encoded]]:
    """`count` sequences of exactly `tokens` tokens that take most, for a rehearsal.

    Made of the longest rows, the last of each cut, and of two tokens of the shortest: so each holds several documents
    wherever two rows can share a sequence.
    """
    *others, shortest = sorted(range(len(rows)), key=lengths_of(rows).__getitem__, reverse=True)
    supply = (rows[row] for row in cycle([*others, shortest]))
    cut = SHORT if tokens > 2 * SHORT else 0
    return [[*_fill(supply, tokens - cut), *_fill(iter([rows[shortest]]), cut)] for _ in range(count)]


def _fill(supply: Iterator[Encoded], tokens: int) -> Iterator[Encoded]:
    """Rows of so many tokens together; of the last its end, which is trained on."""
    while tokens > 0:
        row = next(supply)
        yield Encoded(row.input_ids[-tokens:], row.trained[-tokens:])
        tokens -= len(row.input_ids)
