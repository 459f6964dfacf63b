"""A sweep: the held-out losses of a grid of runs in one table and one drawing, above what compares the runs.

Runs that differ in their seed alone are one point: the mean of their losses, with the lowest and the highest.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from statistics import fmean, median
from typing import Any

from qlora_kit.errors import RunError
from qlora_kit.report.compare import known_peak, render_comparison, style_of
from qlora_kit.report.curve import curve, finite
from qlora_kit.report.facts import median_speed
from qlora_kit.report.folder import COUNT, MAYBE_TEXT, TEXT, RunFolder, document, read_run
from qlora_kit.report.lines import Series, line_chart
from qlora_kit.report.markup import Markup, clipped, element
from qlora_kit.report.page import lead, legend, section, table, wide, write_page
from qlora_kit.report.text import Table, aligned, in_words, wrapped
from qlora_kit.units import format_bytes

SWEEP, PAGE = "sweep.json", "report.html"
SEED = "train.seed"
_SHAPE = {
    "recipe": TEXT,
    "axes": {"*": [TEXT]},
    "fixed": {"*": TEXT},
    "runs": [{"name": TEXT, "settings": {"*": TEXT}, "failed": MAYBE_TEXT, "seconds": COUNT}],
}
_SHARES = ("exact_match", "accuracy", "f1")
_OUT_OF_SIGHT = 3.0
"""Losses above as many times the median are of runs that came apart: the frame leaves them out."""


@dataclass(frozen=True, slots=True)
class Point:
    """Runs that differ in their seed alone.

    Attributes:
        settings: by axis the value that they share.
        runs: those that came to their end.
        failed: why the others broke off, a line each.
    """

    settings: Mapping[str, str]
    runs: Sequence[RunFolder]
    failed: Sequence[str]

    @property
    def losses(self) -> list[float]:
        """Held-out losses: of what each run leaves, or where nothing was scored the last on the way."""
        return [loss for run in self.runs if (loss := _loss(run)) is not None]

    @property
    def loss(self) -> float | None:
        """Their mean; None where a run failed or knows none: a mean of the others would flatter the setting."""
        return fmean(self.losses) if self.losses and len(self.losses) == len(self.runs) and not self.failed else None

    @property
    def name(self) -> str:
        """As in `rank=4, lr=2e-4`."""
        return ", ".join(f"{_leaf(key)}={value}" for key, value in self.settings.items())


@dataclass(frozen=True, slots=True)
class Swept:
    """What a sweep's folder says.

    Attributes:
        path: of the folder.
        axes: by key the values, as they were written.
        points: in the order of the axes.
        runs: folders of the runs that came to their end.
        missing: runs that have no outcome yet.
    """

    path: Path
    axes: Mapping[str, Sequence[str]]
    points: Sequence[Point]
    runs: Sequence[RunFolder]
    missing: int

    @property
    def shown(self) -> list[str]:
        """Axes of the table and the drawing: all but the seed."""
        return [key for key in self.axes if key != SEED] or list(self.axes)

    @property
    def is_of_one_task(self) -> bool:
        """Whether the losses are the same sum."""
        return len({run.task for run in self.runs}) <= 1

    @property
    def best(self) -> Point | None:
        """The point of the lowest mean loss; None where the tasks differ."""
        known = [point for point in self.points if point.loss is not None and self.is_of_one_task]
        return min(known, key=lambda point: point.loss or 0.0, default=None)


def read_outcomes(folder: Path) -> dict[str, Any]:
    """sweep.json, checked: `axes`, and `runs` that lie in the folder and have a value of every axis.

    Raises:
        RunError: it is missing, or not what it should be.
    """
    found = document(folder / SWEEP, _SHAPE)
    for each in found["runs"]:
        is_folder = each["name"] and Path(each["name"]).name == each["name"]
        is_of_axes = set(each["settings"]) == set(found["axes"])
        if (
            not is_folder
            or not is_of_axes
            or any(value not in found["axes"][key] for key, value in each["settings"].items())
        ):
            raise RunError(f"{folder / SWEEP}: the run {clipped(each['name'], 40)} is not part of this sweep")
    return found


def read_sweep(folder: str | Path) -> Swept:
    """Read a sweep and its runs.

    Raises:
        RunError: sweep.json is missing or not what it should be, or a run of it is.
    """
    folder = Path(folder)
    found = read_outcomes(folder)
    shown = [key for key in found["axes"] if key != SEED] or list(found["axes"])
    groups: dict[tuple[str, ...], tuple[list[RunFolder], list[str]]] = {}
    runs = []
    for each in found["runs"]:
        done, failed = groups.setdefault(tuple(each["settings"][key] for key in shown), ([], []))
        if each.get("failed"):
            failed.append(f"{each['name']}: {each['failed']}")
        else:
            runs.append(read_run(folder / each["name"]))
            done.append(runs[-1])
    order = [_places(found["axes"][key]) for key in shown]
    ranked = sorted(groups, key=lambda values: [places[value] for places, value in zip(order, values, strict=True)])
    points = [Point(dict(zip(shown, values, strict=True)), *groups[values]) for values in ranked]
    whole = math.prod(len(values) for values in found["axes"].values())
    return Swept(folder, found["axes"], points, runs, whole - len(found["runs"]))


def write_sweep(folder: str | Path) -> Path:
    """Draw a sweep's page again from its folder alone, and return its path.

    Raises:
        RunError: as `read_sweep`, or it cannot be written.
    """
    swept = read_sweep(folder)
    path = swept.path / PAGE
    top = section(
        "Sweep",
        lead(" ".join(sweep_sentences(swept))),
        _figure(swept),
        wide(table(sweep_table(swept), "sweep", kind="runs")),
    )
    write_page(path, render_comparison(swept.runs, top))
    return path


def sweep_table(swept: Swept) -> Table:
    """A row a point: its settings, its held-out loss, other scores as they are known, peak memory and speed."""
    columns = [(heading, [cell(point) for point in swept.points]) for heading, cell in _columns(swept)]
    known = [(heading, cells) for heading, cells in columns if any(cell is not None for cell in cells)]
    first, *others = swept.shown
    return [
        [*map(_leaf, swept.shown), *(heading for heading, _ in known)],
        *(
            [
                point.settings[first],
                *(point.settings[key] for key in others),
                *(cells[row] or "-" for _, cells in known),
            ]
            for row, point in enumerate(swept.points)
        ),
    ]


def sweep_sentences(swept: Swept) -> list[str]:
    """Which point is best, whether the grid ends there, what failed, and what is missing."""
    said = []
    best = swept.best
    if best is not None:
        said.append(f"The held-out loss is lowest at {best.name}: {_spread_words(best)}.")
        edges = [key for key in swept.shown if _is_at_edge(key, swept.axes[key], best.settings[key])]
        if edges:
            said.append(f"That is the end of the grid over {', '.join(map(_leaf, edges))}: try values beyond it, too.")
    if not swept.is_of_one_task:
        said.append("The losses of different tasks measure different things: none of them is the best.")
    failed = [line for point in swept.points for line in point.failed]
    if failed:
        said.append(f"{len(failed)} of the runs failed, first {clipped(failed[0], 160)}.")
    if swept.missing:
        said.append(f"{swept.missing} of the runs are still missing.")
    return said


def sweep_text(swept: Swept) -> str:
    """The table and the sentences for a terminal."""
    return "\n".join([aligned(sweep_table(swept)), "", *wrapped(sweep_sentences(swept))])


def sweep_facts(swept: Swept) -> dict[str, Any]:
    """The same for other programs: `axes`, `points` with their losses and scores, and `best`, settings or null."""
    return {
        "sweep": str(swept.path),
        "axes": {key: list(values) for key, values in swept.axes.items()},
        "points": [_facts(point) for point in swept.points],
        "best": None if swept.best is None else dict(swept.best.settings),
        "missing": swept.missing,
    }


def sweep_chart(swept: Swept) -> Markup:
    """Held-out loss over the axis of most values, whose values stand apart evenly; a line for each of the others'."""
    across, series = sweep_series(swept)
    known = [loss for point in swept.points if (loss := point.loss) is not None]
    return line_chart(
        series,
        title=f"Held-out loss over {_leaf(across)}",
        x_label=_leaf(across),
        y_label=f"held-out {swept.runs[0].loss_words}" if swept.is_of_one_task and swept.runs else "held-out loss",
        x_names=_sorted(swept.axes[across]),
        top=_OUT_OF_SIGHT * median(known) if known else None,
    )


def sweep_series(swept: Swept) -> tuple[str, list[Series]]:
    """The axis that the drawing goes along, and its lines."""
    numeric = [key for key in swept.shown if _numbers(swept.axes[key]) is not None]
    across = max(numeric or swept.shown, key=lambda key: len(swept.axes[key]))
    places = {value: place for place, value in enumerate(_sorted(swept.axes[across]))}
    lines: dict[str, list[Point]] = {}
    for point in swept.points:
        name = ", ".join(f"{_leaf(key)} {value}" for key, value in point.settings.items() if key != across)
        lines.setdefault(name, []).append(point)
    series = []
    for index, (name, points) in enumerate(lines.items()):
        found = sorted(((places[point.settings[across]], point) for point in points), key=itemgetter(0))
        spread = [(x, min(point.losses), max(point.losses)) for x, point in found if point.loss is not None]
        means = [(x, point.loss) for x, point in found]
        series.append(Series(name or "held-out loss", means, style_of(index), marked=True, spread=spread))
    return across, series


def _figure(swept: Swept) -> Markup:
    _, series = sweep_series(swept)
    names = legend((one.name, one.style) for one in series) if len(series) > 1 else Markup()
    return element("figure", names, sweep_chart(swept))


def _columns(swept: Swept) -> Iterator[tuple[str, Callable[[Point], str | None]]]:
    yield "loss", lambda point: None if point.loss is None else f"{point.loss:.4f}"
    if any(len(point.losses) > 1 for point in swept.points):
        yield "from", lambda point: f"{min(point.losses):.4f}" if point.losses else None
        yield "to", lambda point: f"{max(point.losses):.4f}" if point.losses else None
    for name in _SHARES:
        yield in_words(name).replace(" match", ""), _share(name)
    yield "peak", _peak
    yield "tok/s", _speed
    yield "failed", lambda point: str(len(point.failed)) if point.failed else None


def _share(name: str) -> Callable[[Point], str | None]:
    def cell(point: Point) -> str | None:
        known = [value for run in point.runs if (value := _score(run, name)) is not None]
        return f"{100 * fmean(known):.1f} %" if known else None

    return cell


def _peak(point: Point) -> str | None:
    peaks = [peak for run in point.runs if (peak := known_peak(run)) is not None]
    return format_bytes(max(peaks)) if peaks else None


def _speed(point: Point) -> str | None:
    speeds = [speed for run in point.runs if (speed := median_speed(run)) is not None]
    return f"{median(speeds):,.0f}" if speeds else None


def _loss(run: RunFolder) -> float | None:
    scored = _score(run, "loss")
    evaluated = finite(curve(run.rows, "eval_loss"))
    return scored if scored is not None else evaluated[-1][1] if evaluated else None


def _score(run: RunFolder, name: str) -> float | None:
    value: float | None = (run.scores or {}).get("adapter", {}).get(name)
    return value


def _facts(point: Point) -> dict[str, Any]:
    scores = {name: [_score(run, name) for run in point.runs] for name in _SHARES}
    known = {name: values for name, values in scores.items() if any(value is not None for value in values)}
    return {
        "settings": dict(point.settings),
        "loss": point.loss,
        "losses": point.losses,
        **known,
        "runs": [run.name for run in point.runs],
        "failed": list(point.failed),
    }


def _spread_words(point: Point) -> str:
    low, high = min(point.losses), max(point.losses)
    several = f" ({low:.4f} to {high:.4f} over {len(point.losses)} seeds)" if len(point.losses) > 1 else ""
    return f"{point.loss:.4f}{several}"


def _is_at_edge(key: str, values: Sequence[str], best: str) -> bool:
    """Whether more values on that side may be better still: of numbers that can go further, such as rates."""
    numbers = _numbers(values)
    return numbers is not None and len(numbers) > 2 and float(best) in (min(numbers), max(numbers)) and key != SEED


def _sorted(values: Sequence[str]) -> list[str]:
    """Numbers by their size; other values as they are given."""
    return list(values) if _numbers(values) is None else sorted(values, key=float)


def _numbers(values: Sequence[str]) -> list[float] | None:
    try:
        return [float(value) for value in values]
    except ValueError:
        return None


def _places(values: Sequence[str]) -> dict[str, int]:
    return {value: place for place, value in enumerate(values)}


def _leaf(key: str) -> str:
    return key.rpartition(".")[2]
