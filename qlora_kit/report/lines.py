"""Line charts: curves over one pair of axes."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from qlora_kit.report.axes import GRID, Frame, axes, drawing, percent, round_ticks, stretched
from qlora_kit.report.curve import Point, finite, pieces, thin
from qlora_kit.report.markup import Markup, element, joined

MOST_DOTS = 40


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
    spread: Sequence[tuple[float, float, float]] = ()
    """Of points that are means the place, the lowest and the highest: drawn as upright bars."""


def line_chart(
    series: Sequence[Series],
    *,
    title: str,
    x_label: str,
    y_label: str,
    height: int = 260,
    from_zero: bool = False,
    x_names: Sequence[str] = (),
    top: float | None = None,
) -> Markup:
    """`series` over one pair of axes: a line where neighbours are finite, a dot where a point stands alone.

    Long series are thinned. Without a finite value the drawing only says so.

    Args:
        series: the curves.
        title: that names the drawing.
        x_label: what goes across.
        y_label: what goes up.
        height: in pixels.
        from_zero: whether the frame begins at zero.
        x_names: of the places 0, 1, ... across, where these stand for values that are no even scale.
        top: values above it may run out of the frame.
    """
    known = [point for one in series for point in finite(one.points)]
    if not known:
        return drawing(
            "chart", title, height, element("text", "no finite value", x="50%", y="50%", text_anchor="middle")
        )
    x_ticks = round_ticks(min(x for x, _ in known), max(x for x, _ in known), intervals=5, whole=True)
    y_values = [y for one in series for y in _framed(one) if top is None or y <= top] + [0.0] * from_zero
    y_ticks = round_ticks(min(y_values), max(y_values), intervals=4)
    series = [replace(one, points=thin(one.points)) for one in series]
    across = _x_range([(x, 0.0) for x in range(len(x_names))] or known)
    frame = Frame(*across, y_ticks[0], y_ticks[-1])
    lines = joined(_line(one, frame) for one in series)
    inner = stretched(height, lines)
    around = axes(frame, x_ticks, y_ticks, x_label, y_label, x_names)
    return drawing("chart", title, height, around, inner, *(_dots(one, frame, x_names) for one in series))


def _x_range(known: Sequence[tuple[float, float]]) -> tuple[float, float]:
    low, high = min(x for x, _ in known), max(x for x, _ in known)
    return (low, high) if low < high else (low - 1, high + 1)


def _framed(series: Series) -> list[float]:
    """The values that the frame must hold: all, or of a faint series the middle 99 %."""
    values = sorted(y for _, y in [*finite(series.points), *((x, y) for x, *ends in series.spread for y in ends)])
    cut = len(values) // 200 if series.faint else 0
    return values[cut : len(values) - cut]


def _line(series: Series, frame: Frame) -> Markup:
    strokes = [
        "M" + "L".join(f"{GRID * frame.across(x):.1f} {GRID * frame.down(y):.1f}" for x, y in piece)
        for piece in pieces(series.points)
        if len(piece) > 1
    ]
    return element("path", class_=f"line {series.style}", d="".join(strokes)) if strokes else Markup()


def _dots(series: Series, frame: Frame, x_names: Sequence[str] = ()) -> Markup:
    """Circles, and the bars of what they are means of, stand outside the stretched drawing, so that they stay round."""
    alone = [piece[0] for piece in pieces(series.points) if len(piece) == 1]
    shown = finite(series.points) if series.marked and len(series.points) <= MOST_DOTS else alone
    bars = [
        element(
            "line",
            class_=f"spread {series.style}",
            x1=percent(frame.across(x)),
            x2=percent(frame.across(x)),
            y1=percent(frame.down(low)),
            y2=percent(frame.down(high)),
        )
        for x, low, high in series.spread
        if low < high and 0 <= frame.down(high) <= frame.down(low) <= 1
    ]
    circles = [
        element(
            "circle",
            element("title", f"{series.name} at {x_names[round(x)] if x_names else f'{x:,.0f}'}: {y:.4g}"),
            class_=f"dot {series.style}",
            cx=percent(frame.across(x)),
            cy=percent(frame.down(y)),
            r=4 if series.marked else 2.5,
        )
        for x, y in shown
        if -1e-6 <= frame.down(y) <= 1 + 1e-6
    ]
    return joined([*bars, *circles])
