"""Two drawings in SVG: stacked horizontal bars and line charts.

Both stretch to the page without stretching their text: positions across are percentages, heights and letters pixels.
Labels of an axis hang outside the frame, into a margin that the style sheet leaves (`.chart`). Colours are classes of
the style sheet too, a set for light and a set for dark. A `<title>` names each drawing, and each part to a pointer.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from qlora_kit.report.curve import Point, finite, pieces, thin
from qlora_kit.report.markup import Markup, clipped, element, joined
from qlora_kit.report.text import CATEGORIES, in_words
from qlora_kit.units import format_bytes

ROW_PX, BAR_TOP_PX, BAR_PX = 58, 24, 20
LONGEST_LABEL = 26
"""Characters of a bar's name: with the bytes beside it, what fits a phone."""

MOST_DOTS = 40

_GRID = 1000
"""Units across and down of a chart's inner drawing; a thousandth of a phone's width is below one of its pixels."""


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
    return _drawing("bars", title, height, *drawn)


def _drawing(kind: str, title: str, height: int, *parts: Markup) -> Markup:
    named = element("title", title)
    return element("svg", named, *parts, class_=kind, role="img", aria_label=title, width="100%", height=height)


def _bar(name: str, parts: Mapping[str, float], total: float, longest: float, top: float) -> Markup:
    segments, start = [], 0.0
    for category, count in parts.items():
        said = f"{name}: {in_words(category)} {format_bytes(count)} ({count / (total or 1):.1%})"
        segments.append(
            element(
                "rect",
                element("title", said),
                class_=f"part {category_class(category)}",
                x=_percent(start / longest),
                width=_percent(count / longest),
                y=top + BAR_TOP_PX,
                height=BAR_PX,
            )
        )
        start += count
    label = element("text", clipped(name, LONGEST_LABEL), class_="name", x=0, y=top + 16)
    value = element("text", format_bytes(total), class_="value", x="100%", y=top + 16, text_anchor="end")
    return joined([label, value, *segments])


def _budget_mark(budget: float, share: float, rows: int) -> Markup:
    """A stroke across each bar, clear of the names, and its words below the last, on the side that has room."""
    x = _percent(share)
    tops = [ROW_PX * row + BAR_TOP_PX for row in range(rows)]
    strokes = [element("line", x1=x, x2=x, y1=top - 3, y2=top + BAR_PX + 3) for top in tops]
    anchor = "start" if share < 0.5 else "end"
    words = element("text", f"budget {format_bytes(budget)}", x=x, y=ROW_PX * rows + 10, text_anchor=anchor)
    return element("g", *strokes, words, class_="budget")


def category_class(category: str) -> str:
    """The class that colours `category`: its own if it is one of ours, else that of `other`."""
    return category.replace("_", "-") if category in CATEGORIES else "other"


@dataclass(frozen=True, slots=True)
class Series:
    """One curve of a chart."""

    name: str
    points: Sequence[Point]
    style: str
    """The class that colours it."""
    marked: bool = False
    """Whether every point is shown as a dot, as long as they are few."""
    faint: bool = False
    """Whether it lies behind its own smoothed curve: its rarest values may then run out of the frame."""


@dataclass(frozen=True, slots=True)
class _Frame:
    """What a chart shows: from `low` to `high` across (x) and upwards (y)."""

    x_low: float
    x_high: float
    y_low: float
    y_high: float

    def across(self, x: float) -> float:
        """`x` as a share of the width."""
        return (x - self.x_low) / (self.x_high - self.x_low)

    def down(self, y: float) -> float:
        """`y` as a share of the height, from the top."""
        return (self.y_high - y) / (self.y_high - self.y_low)


def line_chart(
    series: Sequence[Series], *, title: str, x_label: str, y_label: str, height: int = 260, from_zero: bool = False
) -> Markup:
    """`series` over one pair of axes: a line where neighbours are finite, a dot where a point stands alone.

    Long series are thinned. Without a finite value the drawing only says so.
    """
    known = [point for one in series for point in finite(one.points)]
    if not known:
        return _drawing(
            "chart", title, height, element("text", "no finite value", x="50%", y="50%", text_anchor="middle")
        )
    x_ticks = _ticks(min(x for x, _ in known), max(x for x, _ in known), intervals=5, whole=True)
    y_values = [y for one in series for y in _framed(one)] + [0.0] * from_zero
    y_ticks = _ticks(min(y_values), max(y_values), intervals=4)
    series = [replace(one, points=thin(one.points)) for one in series]
    frame = _Frame(*_x_range(known), y_ticks[0], y_ticks[-1])
    lines = joined(_line(one, frame) for one in series)
    inner = element(
        "svg",
        lines,
        width="100%",
        height=height,
        viewBox=f"0 0 {_GRID} {_GRID}",
        preserveAspectRatio="none",
        class_="lines",
    )
    axes = _axes(frame, x_ticks, y_ticks, x_label, y_label)
    return _drawing("chart", title, height, axes, inner, *(_dots(one, frame) for one in series))


def _x_range(known: Sequence[tuple[float, float]]) -> tuple[float, float]:
    low, high = min(x for x, _ in known), max(x for x, _ in known)
    return (low, high) if low < high else (low - 1, high + 1)


def _framed(series: Series) -> list[float]:
    """The values that the frame must hold: all, or of a faint series the middle 99 %."""
    values = sorted(y for _, y in finite(series.points))
    cut = len(values) // 200 if series.faint else 0
    return values[cut : len(values) - cut]


def _axes(frame: _Frame, x_ticks: list[float], y_ticks: list[float], x_label: str, y_label: str) -> Markup:
    drawn = [element("text", clipped(y_label, 32), class_="label", x=-56, y=-14)]
    for tick in y_ticks:
        y = _percent(frame.down(tick))
        drawn.append(element("line", class_="grid", x1=0, x2="100%", y1=y, y2=y))
        drawn.append(element("text", _tick_text(tick, y_ticks), x=-10, y=y, dy="0.32em", text_anchor="end"))
    for tick in x_ticks:
        if frame.x_low <= tick <= frame.x_high:
            x = _percent(frame.across(tick))
            drawn.append(element("text", _tick_text(tick, x_ticks), x=x, y="100%", dy=20, text_anchor="middle"))
    drawn.append(element("text", clipped(x_label, 32), class_="label", x="50%", y="100%", dy=40, text_anchor="middle"))
    return element("g", *drawn, class_="axes")


def _line(series: Series, frame: _Frame) -> Markup:
    strokes = [
        "M" + "L".join(f"{_GRID * frame.across(x):.1f} {_GRID * frame.down(y):.1f}" for x, y in piece)
        for piece in pieces(series.points)
        if len(piece) > 1
    ]
    return element("path", class_=f"line {series.style}", d="".join(strokes)) if strokes else Markup()


def _dots(series: Series, frame: _Frame) -> Markup:
    """Circles stand outside the stretched drawing, so that they stay round."""
    alone = [piece[0] for piece in pieces(series.points) if len(piece) == 1]
    shown = finite(series.points) if series.marked and len(series.points) <= MOST_DOTS else alone
    return joined(
        element(
            "circle",
            element("title", f"{series.name} at {x:,.0f}: {y:.4g}"),
            class_=f"dot {series.style}",
            cx=_percent(frame.across(x)),
            cy=_percent(frame.down(y)),
            r=4 if series.marked else 2.5,
        )
        for x, y in shown
        if -1e-6 <= frame.down(y) <= 1 + 1e-6
    )


def _ticks(low: float, high: float, *, intervals: int, whole: bool = False) -> list[float]:
    """Round numbers 1, 2 or 5 times a power of ten apart, from at or below `low` to at or above `high`."""
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        margin = 0.1 * abs(high) or 1.0
        low, high = low - margin, high + margin
    rough = (high - low) / intervals
    power = 10.0 ** math.floor(math.log10(rough))
    gap = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= 0.999 * rough)
    if whole:
        gap = max(1.0, gap)
    first, last = math.floor(low / gap + 1e-9), math.ceil(high / gap - 1e-9)
    return [index * gap for index in range(first, last + 1)]


def _tick_text(tick: float, ticks: Sequence[float]) -> str:
    """`tick` with the decimals that tell it from its neighbours; millions and thousandths in short forms."""
    largest, gap = max(map(abs, ticks)), ticks[1] - ticks[0]
    if largest >= 1e9 or gap < 1e-4:
        return f"{tick:.3g}"
    if largest >= 1e5:
        factor, suffix = (1e6, "M") if largest >= 1e6 else (1e3, "k")
        return f"{tick / factor:.{max(0, -math.floor(math.log10(gap / factor) + 1e-9))}f}{suffix}" if tick else "0"
    return f"{tick:,.{max(0, -math.floor(math.log10(gap) + 1e-9))}f}"


def _percent(share: float) -> str:
    return f"{100 * share:.3f}%"
