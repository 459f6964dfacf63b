"""What a ledger wrote down, asked at its end: peaks, whose they were, a timeline, the largest allocations.

Every event is a storage that came or went, or a mark where a phase or a block begins. One walk over them answers all.
"""

import heapq
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

CATEGORIES = (
    "base_weights",
    "quantization_state",
    "adapters",
    "gradients",
    "optimizer_state",
    "activations",
    "workspace",
    "other",
)
PHASES = ("load", "forward", "loss", "backward", "optimizer", "evaluate", "save", "export")

SAMPLES = 200
"""Moments in a timeline, at most."""
LARGEST = 10
"""Allocations that are told of one by one."""

Place = tuple[str, str]
"""A phase, and in it a block of the model; "" outside of blocks."""


def whole(phase: str) -> str:
    """The phase that a part such as `evaluate/answer` belongs to; parts have peaks of their own by place."""
    return phase.partition("/")[0]


@dataclass(slots=True, eq=False)
class Allocation:
    """One storage.

    Attributes:
        nbytes: its size.
        phase: in which it came.
        is_recorded: whether autograd was recording.
        category: whose it is, where somebody said so.
        outlives_forward: whether the backward pass found it alive.
        is_apart: whether it lies in other memory than what is counted.
        module: whose it is, or whose forward or backward pass made it.
        operator: that returned it, "" where it was there before.
        shape: of the tensor that it was first seen with.
        dtype: of that.
    """

    nbytes: int
    phase: str | None
    is_recorded: bool
    category: str | None = None
    outlives_forward: bool = True
    is_apart: bool = False
    module: str = ""
    operator: Any = ""
    shape: tuple[int, ...] = ()
    dtype: Any = None

    def owner(self) -> str:
        """Its category, with hindsight where nobody said it."""
        if self.category is not None:
            return self.category
        if self.phase in ("forward", "loss"):
            return "activations" if self.outlives_forward else "workspace"
        if self.phase == "backward":
            return "activations" if self.is_recorded else "workspace"
        return "workspace" if self.phase is not None else "other"

    def as_json(self) -> dict[str, Any]:
        """What a report shows of it."""
        return {
            "bytes": self.nbytes,
            "category": self.owner(),
            "phase": whole(self.phase or ""),
            "module": self.module,
            "operator": str(self.operator).removesuffix(".default"),
            "shape": list(self.shape),
            "dtype": str(self.dtype).removeprefix("torch."),
        }


class History:
    """The events of a ledger, in their order."""

    def __init__(self) -> None:
        self._events: list[tuple[Allocation | None, int, str | None, str]] = []

    def add(self, allocation: Allocation, sign: int, phase: str | None, block: str) -> None:
        """Write down that a storage came (sign 1) or went (-1)."""
        self._events.append((allocation, sign, phase, block))

    def mark(self, phase: str | None, block: str) -> None:
        """Write down that a phase or a block begins: what stands then counts as its own, too."""
        self._events.append((None, 0, phase, block))

    def events(self) -> Iterator[tuple[Allocation, int]]:
        """What came (1) and went (-1) of the memory that is counted."""
        for allocation, sign, _, _ in self._events:
            if allocation is not None and not allocation.is_apart:
                yield allocation, sign

    def peak_bytes(self) -> int:
        """The most that was alive at one moment."""
        return max((total for total, _, _ in self._totals()), default=0)

    def peak_by_phase(self) -> dict[str, int]:
        """The most that was alive at one moment of each phase that there was."""
        peaks: dict[str, int] = {}
        for total, phase, _ in self._totals():
            if phase is not None:
                peaks[whole(phase)] = max(peaks.get(whole(phase), 0), total)
        return peaks

    def host_peak_by_phase(self) -> dict[str, int]:
        """The most that was alive at one moment of each phase in memory that is counted apart."""
        total, peaks = 0, dict[str, int]()
        for allocation, sign, phase, _ in self._events:
            if allocation is not None and allocation.is_apart:
                total += sign * allocation.nbytes
            peaks[whole(phase or "")] = max(peaks.get(whole(phase or ""), 0), total)
        return peaks

    def by_category(self) -> dict[str, int]:
        """Whose the bytes at the peak were; they sum to it."""
        counts = dict.fromkeys(CATEGORIES, 0)
        for allocation in self._alive_at_peak():
            counts[allocation.owner()] += allocation.nbytes
        return counts

    def largest(self) -> list[dict[str, Any]]:
        """The largest allocations alive at the peak that a step makes: weights and state are no news."""
        made = (each for each in self._alive_at_peak() if each.nbytes and each.category in (None, "gradients"))
        return [each.as_json() for each in heapq.nlargest(LARGEST, made, key=lambda each: each.nbytes)]

    def peaks_by_place(self) -> dict[Place, dict[str, int]]:
        """For each block in each phase, whose the bytes were at the most that was alive while it ran."""
        peaks: dict[Place, int] = {}
        held: dict[Place, dict[str, int]] = {}
        for total, phase, block, counts in self._counted():
            if phase is not None and total > peaks.get((phase, block), -1):
                peaks[phase, block] = total
                held[phase, block] = dict(counts)
        return held

    def timeline(self) -> list[dict[str, Any]]:
        """At most `SAMPLES` moments in order, each the fullest of its share of the events; the peak is among them.

        No share reaches over two phases, unless there are so many that they alone would fill the line.
        """
        phases = [phase for _, _, phase, _ in self._events]
        changes = sum(before != after for before, after in pairwise(phases))
        by_phase = changes <= SAMPLES // 2
        bucket = max(1, -(-len(phases) // (SAMPLES - changes if by_phase else SAMPLES)))
        fullest: list[tuple[int, str, dict[str, int]]] = []
        for index, (total, phase, _, counts) in enumerate(self._counted()):
            sample = total, whole(phase or ""), dict(counts)
            if index % bucket == 0 or (by_phase and phase != phases[index - 1]):
                fullest.append(sample)
            elif total > fullest[-1][0]:
                fullest[-1] = sample
        return [{"phase": phase, "bytes": counts} for _, phase, counts in fullest]

    def _totals(self) -> Iterator[tuple[int, str | None, str]]:
        total = 0
        for allocation, sign, phase, block in self._events:
            if allocation is not None and not allocation.is_apart:
                total += sign * allocation.nbytes
            yield total, phase, block

    def _counted(self) -> Iterator[tuple[int, str | None, str, dict[str, int]]]:
        """Every event with what stands after it; the counts are one dict that changes."""
        total, counts = 0, dict.fromkeys(CATEGORIES, 0)
        for allocation, sign, phase, block in self._events:
            if allocation is not None and not allocation.is_apart:
                total += sign * allocation.nbytes
                counts[allocation.owner()] += sign * allocation.nbytes
            yield total, phase, block, counts

    def _alive_at_peak(self) -> list[Allocation]:
        totals = [total for total, _, _ in self._totals()]
        if not totals:
            return []
        alive = Counter[Allocation]()
        for allocation, sign, _, _ in self._events[: totals.index(max(totals)) + 1]:
            if allocation is not None and not allocation.is_apart:
                alive[allocation] += sign
        return [allocation for allocation, count in alive.items() if count]
