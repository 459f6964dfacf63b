"""Horizontal bars: bytes by category stacked one bar a method, and one bar a phase beside its name."""

from collections.abc import Mapping
from typing import NamedTuple

from qlora_kit.report.axes import drawing, percent
from qlora_kit.report.markup import Markup, clipped, element, joined
from qlora_kit.report.methods import CATEGORIES
from qlora_kit.report.text import in_words
from qlora_kit.units import format_bytes

ROW_PX, BAR_TOP_PX, BAR_PX = 58, 24, 20
PHASE_ROW_PX, PHASE_BAR_PX = 30, 16
LONGEST_LABEL = 26
"""Characters of a bar's name: with the bytes beside it, what fits a phone."""
LONGEST_PHASE = 11
"""Characters of a phase's name in the margin of its bars."""


class PhaseBar(NamedTuple):
    """The bar of one phase: its bytes by category, {"": bytes} where that is not known, and bytes that a tick marks."""

    parts: Mapping[str, float]
    mark: float | None = None

    @property
    def total(self) -> float:
        """All its bytes."""
        return sum(self.parts.values())


def stacked_bars(bars: Mapping[str, Mapping[str, float]], *, title: str, budget: float | None = None) -> Markup:
    """One bar a name in `bars`, made of its bytes by category; the longest is as wide as the drawing.

    `budget` bytes are marked by a line across all bars, if the longest bar reaches so far.
    """
    totals = {name: sum(parts.values()) for name, parts in bars.items()}
    longest = max(totals.values(), default=0) or 1
    height = ROW_PX * len(bars)
    drawn = [_bar(name, parts, totals[name], longest, ROW_PX * row) for row, (name, parts) in enumerate(bars.items())]
    if budget is not None and budget <= longest:
        drawn.append(_budget_mark(budget, budget / longest, len(bars)))
        height += 22
    return drawing("bars", title, height, *drawn)


def phase_bars(phases: Mapping[str, PhaseBar], *, title: str) -> Markup:
    """One bar a phase, in the order given, its name before it and its bytes after it, both in the margins."""
    longest = max((max(bar.total, bar.mark or 0) for bar in phases.values()), default=0) or 1
    rows = [_phase(name, bar, longest, PHASE_ROW_PX * row) for row, (name, bar) in enumerate(phases.items())]
    return drawing("phases", title, PHASE_ROW_PX * len(phases), *rows)


def _phase(name: str, bar: PhaseBar, longest: float, top: float) -> Markup:
    middle = top + PHASE_ROW_PX / 2
    label = element("text", clipped(in_words(name), LONGEST_PHASE), x=-10, y=middle, dy="0.32em", text_anchor="end")
    value = element("text", format_bytes(bar.total), class_="value", x="100%", dx=10, y=middle, dy="0.32em")
    segments = _segments(in_words(name), bar.parts, bar.total, longest, middle - PHASE_BAR_PX / 2, PHASE_BAR_PX)
    drawn = [label, value, segments]
    if bar.mark is not None:
        x, reach = percent(bar.mark / longest), PHASE_BAR_PX / 2 + 4
        said = element("title", f"{in_words(name)}: planned {format_bytes(bar.mark)}")
        drawn.append(element("line", said, class_="mark", x1=x, x2=x, y1=middle - reach, y2=middle + reach))
    return joined(drawn)


def _bar(name: str, parts: Mapping[str, float], total: float, longest: float, top: float) -> Markup:
    label = element("text", clipped(name, LONGEST_LABEL), class_="name", x=0, y=top + 16)
    value = element("text", format_bytes(total), class_="value", x="100%", y=top + 16, text_anchor="end")
    return joined([label, value, _segments(name, parts, total, longest, top + BAR_TOP_PX, BAR_PX)])


def _segments(name: str, parts: Mapping[str, float], total: float, longest: float, top: float, height: float) -> Markup:
    """The parts of a bar, one after the other."""
    segments, start = [], 0.0
    for category, count in parts.items():
        said = f"{in_words(category)} {format_bytes(count)} ({count / (total or 1):.1%})" if category else ""
        segments.append(
            element(
                "rect",
                element("title", f"{name}: {said or format_bytes(count)}"),
                class_=f"part {category_class(category)}",
                x=percent(start / longest),
                width=percent(count / longest),
                y=top,
                height=height,
            )
        )
        start += count
    return joined(segments)


def _budget_mark(budget: float, share: float, rows: int) -> Markup:
    """A stroke across each bar, clear of the names, and its words below the last, on the side that has room."""
    x = percent(share)
    tops = [ROW_PX * row + BAR_TOP_PX for row in range(rows)]
    strokes = [element("line", x1=x, x2=x, y1=top - 3, y2=top + BAR_PX + 3) for top in tops]
    anchor = "start" if share < 0.5 else "end"
    words = element("text", f"budget {format_bytes(budget)}", x=x, y=ROW_PX * rows + 10, text_anchor=anchor)
    return element("g", *strokes, words, class_="budget")


def category_class(category: str) -> str:
    """The class that colours `category`: its own if it is one of ours, `whole` if it is all, else that of `other`."""
    return category.replace("_", "-") if category in CATEGORIES else "other" if category else "whole"
