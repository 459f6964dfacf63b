"""The timeline: bytes alive by category as stacked areas, moment after moment, with the phases marked."""

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any, NamedTuple

from qlora_kit.report.axes import GRID, Frame, axes, drawing, percent, round_ticks, stretched
from qlora_kit.report.bars import category_class
from qlora_kit.report.markup import Markup, clipped, element, joined
from qlora_kit.report.methods import categories
from qlora_kit.report.text import in_words
from qlora_kit.units import GIB, KIB, MIB, format_bytes

HEIGHT_PX = 280
_NARROWEST_PX, _LETTER_PX, _LABEL_ROW_PX = 280, 7, 17
"""The frame on a phone; a letter of a label; a row of labels above the frame."""

Moment = Mapping[str, Any]
"""{"phase": its name, "bytes": {category: bytes}}, as memory.json has them."""


class _Span(NamedTuple):
    """Neighbouring moments of one phase, [first, last + 1)."""

    phase: str
    first: int
    end: int


def timeline(moments: Sequence[Moment], *, title: str) -> Markup:
    """Each of `moments` is as wide as the next: they stand in the order of events, and no clock was read."""
    totals = [sum(moment["bytes"].values()) for moment in moments]
    top = max(totals, default=0)
    factor, unit = next(((f, u) for f, u in ((GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB")) if top >= f), (1, "bytes"))
    y_ticks = round_ticks(0, 1.1 * (top or 1) / factor, intervals=5)  # room for the peak's label
    frame = Frame(0, len(moments), 0, y_ticks[-1])
    spans = _spans(moments)
    rows = _label_rows(spans, len(moments))
    layers = stretched(HEIGHT_PX, *_bands(spans, frame), *_layers(moments, frame, factor), *_edges(spans, frame))
    around = axes(frame, [], y_ticks, "moments in the order in which they came", unit)
    peak = totals.index(top) if totals else 0
    parts = [around, layers, _labels(rows, len(moments)), _peak_mark(peak, top, top / factor, frame)]
    above = f"margin-top: {30 + _LABEL_ROW_PX * len(rows)}px"
    return drawing("chart timeline", title, HEIGHT_PX, *parts, style=above)


def _spans(moments: Sequence[Moment]) -> list[_Span]:
    """Runs of one phase; what belongs to none is named ""."""
    spans, first = [], 0
    for phase, group in groupby(moments, key=lambda moment: str(moment.get("phase") or "")):
        end = first + sum(1 for _ in group)
        spans.append(_Span(phase, first, end))
        first = end
    return spans


def _bands(spans: Sequence[_Span], frame: Frame) -> list[Markup]:
    """A tint behind every second phase, which shows where one ends and the next begins."""
    return [
        element(
            "rect",
            element("title", in_words(span.phase) or "between phases"),
            class_="band",
            x=f"{GRID * frame.across(span.first):.1f}",
            width=f"{GRID * (frame.across(span.end) - frame.across(span.first)):.1f}",
            y=0,
            height=GRID,
        )
        for span in spans[1::2]
    ]


def _edges(spans: Sequence[_Span], frame: Frame) -> list[Markup]:
    """A line over the areas where a phase begins."""
    edges = [f"{GRID * frame.across(span.first):.1f}" for span in spans[1:]]
    return [element("line", class_="edge", x1=x, x2=x, y1=0, y2=GRID) for x in edges]


def _layers(moments: Sequence[Moment], frame: Frame, factor: float) -> list[Markup]:
    """One area a category that ever holds a byte, from the bottom up; between moments the bytes stay."""
    floor, drawn = [0.0] * len(moments), []
    for category in categories({"by_category": moment["bytes"]} for moment in moments):
        counts = [moment["bytes"].get(category, 0) for moment in moments]
        if not any(counts):
            continue
        ceiling = [low + count / factor for low, count in zip(floor, counts, strict=True)]
        there = _stairs(ceiling, frame)
        back = _stairs(floor, frame)[::-1]
        said = element("title", f"{in_words(category)}: at most {format_bytes(max(counts))}")
        style = f"layer {category_class(category)}"
        drawn.append(element("path", said, class_=style, d="M" + "L".join([*there, *back]) + "Z"))
        floor = ceiling
    return drawn


def _stairs(values: Sequence[float], frame: Frame) -> list[str]:
    """Both ends of each moment at its height; the corners within a level stretch are left out."""
    corners = []
    for index, value in enumerate(values):
        y = f"{GRID * frame.down(value):.1f}"
        corners += [(index, y), (index + 1, y)]
    kept = [
        corner
        for place, corner in enumerate(corners)
        if place in (0, len(corners) - 1) or not corners[place - 1][1] == corner[1] == corners[place + 1][1]
    ]
    return [f"{GRID * frame.across(x):.1f} {y}" for x, y in kept]


def _label_rows(spans: Sequence[_Span], count: int) -> list[list[_Span]]:
    """The longest span of each phase, in rows that a phone has room for: what would overlap goes a row up."""
    longest: dict[str, _Span] = {}
    for span in spans:
        if span.phase and span.end - span.first > _length(longest.get(span.phase)):
            longest[span.phase] = span
    rows: list[list[_Span]] = []
    for span in sorted(longest.values(), key=lambda span: span.first):
        start = _label_start(span, count)
        row = next((row for row in rows if _label_start(row[-1], count) + _label_width(row[-1]) <= start), None)
        if row is None:
            rows.append([span])
        else:
            row.append(span)
    return rows


def _length(span: _Span | None) -> int:
    return 0 if span is None else span.end - span.first


def _label_width(span: _Span) -> int:
    return _LETTER_PX * len(clipped(span.phase, 12)) + 6


def _label_start(span: _Span, count: int) -> float:
    """Where the label begins on a phone, in pixels: centred over its span, and never outside of the frame."""
    width = _label_width(span)
    return min(max(0.0, _middle(span, count) * _NARROWEST_PX - width / 2), _NARROWEST_PX - width)


def _middle(span: _Span, count: int) -> float:
    return (span.first + span.end) / 2 / count


def _labels(rows: Sequence[Sequence[_Span]], count: int) -> Markup:
    """Names above the frame, each with a thread down to its phase."""
    threads, names = [], []
    for row, spans in enumerate(rows):
        y = -8 - _LABEL_ROW_PX * row
        for span in spans:
            middle = _middle(span, count)
            half = _label_width(span) / 2 / _NARROWEST_PX
            anchor, x = ("start", 0.0) if middle < half else ("end", 1.0) if middle > 1 - half else ("middle", middle)
            threads.append(element("line", class_="thread", x1=percent(middle), x2=percent(middle), y1=0, y2=y + 3))
            name = clipped(in_words(span.phase), 12)
            names.append(element("text", name, class_="phase", x=percent(x), y=y, text_anchor=anchor))
    return element("g", *threads, *names)


def _peak_mark(index: int, peak: float, height: float, frame: Frame) -> Markup:
    x, y = frame.across(index + 0.5), percent(frame.down(height))
    anchor, shift = ("start", 8) if x < 0.5 else ("end", -8)
    dot = element("circle", class_="dot peak", cx=percent(x), cy=y, r=4)
    words = element(
        "text", f"peak {format_bytes(peak)}", class_="value", x=percent(x), y=y, dx=shift, dy=-7, text_anchor=anchor
    )
    return joined([dot, words])
