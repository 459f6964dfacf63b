"""What all drawings share: the SVG element, the stretched part inside it, ticks and axes.

A drawing stretches to the page without stretching its text: positions across are percentages, heights and letters
pixels. Labels of an axis hang outside the frame, into a margin that the style sheet leaves. Colours are classes of the
style sheet too, a set for light and a set for dark. A `<title>` names each drawing, and each part to a pointer.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from qlora_kit.report.markup import Markup, clipped, element

GRID = 1000
"""Units across and down of a chart's inner drawing; a thousandth of a phone's width is below one of its pixels."""


@dataclass(frozen=True, slots=True)
class Frame:
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


def drawing(kind: str, title: str, height: int, *parts: Markup, **attributes: str) -> Markup:
    """A drawing of class `kind`, as wide as the page and `height` pixels high."""
    named = element("title", title)
    return element(
        "svg",
        named,
        *parts,
        class_=kind,
        role="img",
        aria_label=title,
        width="100%",
        height=height,
        **attributes,
    )


def stretched(height: int, *parts: Markup) -> Markup:
    """`parts` in units of the grid, stretched over the frame."""
    return element(
        "svg",
        *parts,
        width="100%",
        height=height,
        viewBox=f"0 0 {GRID} {GRID}",
        preserveAspectRatio="none",
        class_="lines",
    )


def axes(
    frame: Frame,
    x_ticks: Sequence[float],
    y_ticks: Sequence[float],
    x_label: str,
    y_label: str,
    x_names: Sequence[str] = (),
) -> Markup:
    """Lines across at `y_ticks` with their numbers, the numbers of `x_ticks`, and what both are.

    With `x_names` the places 0, 1, ... have those names instead.
    """
    places = range(len(x_names)) if x_names else x_ticks
    below_x = list(zip(places, x_names or [_tick_text(tick, x_ticks) for tick in x_ticks], strict=True))
    drawn = [element("text", clipped(y_label, 32), class_="label", x=-56, y=-14)]
    for tick in y_ticks:
        y = percent(frame.down(tick))
        drawn.append(element("line", class_="grid", x1=0, x2="100%", y1=y, y2=y))
        drawn.append(element("text", _tick_text(tick, y_ticks), x=-10, y=y, dy="0.32em", text_anchor="end"))
    for tick, name in below_x:
        if frame.x_low <= tick <= frame.x_high:
            x = percent(frame.across(tick))
            drawn.append(element("text", clipped(name, 16), x=x, y="100%", dy=20, text_anchor="middle"))
    below = 40 if below_x else 22
    label = element("text", clipped(x_label, 48), class_="label", x="50%", y="100%", dy=below, text_anchor="middle")
    return element("g", *drawn, label, class_="axes")


def round_ticks(low: float, high: float, *, intervals: int, whole: bool = False) -> list[float]:
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


def percent(share: float) -> str:
    """`share` as a length of SVG."""
    return f"{100 * share:.3f}%"


def _tick_text(tick: float, ticks: Sequence[float]) -> str:
    """`tick` with the decimals that tell it from its neighbours; millions and thousandths in short forms."""
    largest, gap = max(map(abs, ticks)), ticks[1] - ticks[0]
    if largest >= 1e9 or gap < 1e-4:
        return f"{tick:.3g}"
    if largest >= 1e5:
        factor, suffix = (1e6, "M") if largest >= 1e6 else (1e3, "k")
        return f"{tick / factor:.{max(0, -math.floor(math.log10(gap / factor) + 1e-9))}f}{suffix}" if tick else "0"
    return f"{tick:,.{max(0, -math.floor(math.log10(gap) + 1e-9))}f}"
