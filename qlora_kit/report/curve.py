"""A run's curves as numbers: taken from its rows, smoothed, thinned for drawing, split where a value is missing."""

from collections.abc import Iterable, Sequence
from statistics import median
from typing import Any

Point = tuple[float, float | None]
"""A step and its value; None where the value was not finite."""

LONGEST_WINDOW = 201
"""Steps that a running median spans at most: longer ones hide what a reader looks for, and cost a sort each."""


def curve(rows: Iterable[dict[str, Any]], key: str) -> list[Point]:
    """The values of `key` over the steps; rows that do not have it are left out, null ones are gaps."""
    return [(row["step"], row[key]) for row in rows if key in row]


def finite(points: Iterable[Point]) -> list[tuple[float, float]]:
    """`points` without the gaps."""
    return [(x, y) for x, y in points if y is not None]


def window_for(count: int) -> int:
    """Points in the running median of a curve of `count` points: a twentieth of them, odd, so that it has a middle."""
    return min(count // 20 | 1, LONGEST_WINDOW)


def smooth(points: Sequence[Point], window: int) -> list[Point]:
    """The centred median of `window` points, fewer at the ends: it does not lag, and one spike does not bend it.

    A gap stays a gap and counts in no median.
    """
    half = window // 2
    medians: list[Point] = []
    for index, (x, y) in enumerate(points):
        near = [value for _, value in points[max(0, index - half) : index + half + 1] if value is not None]
        medians.append((x, median(near) if y is not None else None))
    return medians


def thin(points: Sequence[Point], buckets: int = 300) -> list[Point]:
    """At most `3 * buckets` points that look the same drawn small: of each bucket the lowest, the highest and a gap.

    Spikes survive, which a plain stride would drop.
    """
    if len(points) <= 3 * buckets:
        return list(points)
    kept: list[Point] = []
    for bucket in range(buckets):
        part = points[bucket * len(points) // buckets : (bucket + 1) * len(points) // buckets]
        known = finite(part)
        if known:
            kept += sorted({min(known, key=lambda point: point[1]), max(known, key=lambda point: point[1])})
        if len(known) < len(part):
            kept.append((part[-1][0], None))
    return kept


def pieces(points: Iterable[Point]) -> list[list[tuple[float, float]]]:
    """`points` split at the gaps, without empty pieces."""
    split: list[list[tuple[float, float]]] = [[]]
    for x, y in points:
        if y is None:
            split.append([])
        else:
            split[-1].append((x, y))
    return [piece for piece in split if piece]
