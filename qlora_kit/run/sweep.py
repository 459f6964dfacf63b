"""A grid of runs: one after another, with rows and base made once, and what became of each in sweep.json."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qlora_kit.errors import QloraKitError, RunError
from qlora_kit.recipe import Grid
from qlora_kit.report import SWEEP, write_sweep
from qlora_kit.run.common import Common
from qlora_kit.run.folder import RECIPE, check_run_folder
from qlora_kit.run.train import train
from qlora_kit.storage import read_json, write_json
from qlora_kit.watch import Watch


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one run of a grid.

    Attributes:
        name: of its folder.
        settings: by axis its value.
        failed: why it broke off, in one line; None where it came to its end.
        seconds: that it took.
    """

    name: str
    settings: Mapping[str, str]
    failed: str | None
    seconds: float


def sweep(
    grid: Grid,
    *,
    resume: bool = False,
    overwrite: bool = False,
    watch: Watch | None = None,
    trust_remote_code: bool = False,
) -> list[Outcome]:
    """Train every run of a grid. One that fails is recorded, and the others go on.

    Args:
        grid: from `read_grid`.
        resume: leave out runs that have an outcome, and go on with one that was stopped.
        overwrite: replace the sweep that stands in the folder.
        watch: is told what happens.
        trust_remote_code: let the model folder's own code run.

    Returns:
        what became of the runs, in the grid's order; shorter than the grid where a stop was requested.

    Raises:
        QloraKitError: the folder cannot take the sweep, or all runs failed; then that is what the first one said.
    """
    watch, common = watch or Watch(), Common()
    known = _known(grid, resume, overwrite)
    if overwrite:
        (grid.folder / SWEEP).unlink(missing_ok=True)  # or it would tell of runs that are gone
    outcomes, faults = list[Outcome](), list[QloraKitError]()
    for number, cell in enumerate(grid.cells, start=1):
        if cell.name in known:
            outcomes.append(known[cell.name])
            continue
        watch.run_begins(cell.name, number, len(grid.cells))
        result = None
        try:
            goes_on = resume and (Path(cell.recipe.output) / RECIPE).is_file()
            result = train(cell.recipe, resume=goes_on, overwrite=overwrite, watch=watch,
                           trust_remote_code=trust_remote_code, common=common)  # fmt: skip
        except QloraKitError as error:
            faults.append(error)
        if result is not None and not result.finished:
            return outcomes
        failed = None if result is not None else str(faults[-1]).splitlines()[0]
        outcomes.append(Outcome(cell.name, cell.settings, failed, 0.0 if result is None else result.seconds))
        if len(faults) < len(outcomes):
            _record(grid, outcomes)
        watch.run_ended(outcomes[-1])
    if outcomes and len(faults) == len(outcomes):
        raise faults[0]
    return outcomes


def _known(grid: Grid, resume: bool, overwrite: bool) -> dict[str, Outcome]:
    """Outcomes of runs that need not be made again, once nothing that stands would be lost."""
    place = grid.folder / SWEEP
    if not place.exists() or overwrite:
        if resume and not grid.folder.is_dir():
            raise RunError(f"{grid.folder} holds no sweep to resume; start it without --resume")
        for cell in grid.cells:
            goes_on = resume and (Path(cell.recipe.output) / RECIPE).is_file()
            check_run_folder(Path(cell.recipe.output), cell.recipe, goes_on, overwrite)
        return {}
    if not resume:
        raise RunError(f"{grid.folder} holds a sweep already; go on with --resume, replace it with --overwrite, "
                       "or set output")  # fmt: skip
    standing = read_json(place)
    if standing.get("axes") != _axes(grid):
        raise RunError(f"{grid.folder} is a sweep over other values ({_in_words(standing.get('axes'))}); give those, "
                       "start again with --overwrite, or set output")  # fmt: skip
    return {run["name"]: Outcome(**{key: run[key] for key in Outcome.__slots__}) for run in standing["runs"]}


def _record(grid: Grid, outcomes: Sequence[Outcome]) -> None:
    """Write sweep.json, and the page that draws it."""
    runs = [asdict(outcome) for outcome in outcomes]
    write_json(grid.folder / SWEEP, {"recipe": grid.recipe, "axes": _axes(grid), "runs": runs})
    write_sweep(grid.folder)


def _axes(grid: Grid) -> dict[str, list[str]]:
    return {key: list(values) for key, values in grid.axes.items()}


def _in_words(axes: Any) -> str:
    return "; ".join(f"{key}={','.join(values)}" for key, values in (axes or {}).items())
