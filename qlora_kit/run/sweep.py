"""A grid of runs: one after another, with rows and base made once, and what became of each in sweep.json."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qlora_kit.errors import QloraKitError, RunError
from qlora_kit.recipe import Cell, Grid
from qlora_kit.report import SWEEP, read_outcomes, write_sweep
from qlora_kit.run.common import Common
from qlora_kit.run.folder import RECIPE, check_run_folder, settings_of
from qlora_kit.run.train import train
from qlora_kit.storage import write_json
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
        failed, seconds = None, 0.0
        try:
            result = train(cell.recipe, resume=resume and _is_begun(cell), overwrite=overwrite, watch=watch,
                           trust_remote_code=trust_remote_code, common=common)  # fmt: skip
        except QloraKitError as error:
            faults.append(error)
            failed = str(error).splitlines()[0]
        else:
            if not result.finished:
                break
            seconds = result.seconds
        outcomes.append(Outcome(cell.name, cell.settings, failed, seconds))
        if len(faults) < len(outcomes):
            _record(grid, outcomes)
        watch.run_ended(outcomes[-1])
    if outcomes and len(faults) == len(outcomes):
        raise faults[0]
    if outcomes:
        write_sweep(grid.folder)
    return outcomes


def _is_begun(cell: Cell) -> bool:
    return (Path(cell.recipe.output) / RECIPE).is_file()


def _known(grid: Grid, resume: bool, overwrite: bool) -> dict[str, Outcome]:
    """Outcomes of runs that need not be made again, once nothing that stands would be lost."""
    place = grid.folder / SWEEP
    if not place.exists() or overwrite:
        if resume and not grid.folder.is_dir():
            raise RunError(f"{grid.folder} holds no sweep to resume; start it without --resume")
        for cell in grid.cells:
            check_run_folder(Path(cell.recipe.output), cell.recipe, resume and _is_begun(cell), overwrite)
        return {}
    if not resume:
        raise RunError(f"{grid.folder} already holds a sweep; continue it with --resume, replace it with --overwrite, "
                       "or set output")  # fmt: skip
    standing, now = read_outcomes(grid.folder), _told(grid)
    changes = [f"{key} was {standing[part].get(key)}, is {now[part].get(key)}" for part in ("axes", "fixed")
               for key in {**now[part], **standing[part]} if standing[part].get(key) != now[part].get(key)]  # fmt: skip
    if changes:
        raise RunError(f"{grid.folder} is another sweep: {'; '.join(changes)}. Resume it as it was, start again with "
                       "--overwrite, or set output")  # fmt: skip
    return {run["name"]: Outcome(**{key: run[key] for key in Outcome.__slots__}) for run in standing["runs"]}


def _record(grid: Grid, outcomes: Sequence[Outcome]) -> None:
    """Write sweep.json."""
    write_json(grid.folder / SWEEP, {**_told(grid), "runs": [asdict(outcome) for outcome in outcomes]})


def _told(grid: Grid) -> dict[str, Any]:
    """What the grid is: its axes, and what all of its runs have in common, each value in JSON."""
    axes = {key: list(values) for key, values in grid.axes.items()}
    settings = settings_of(grid.cells[0].recipe)
    fixed = {
        key: value for key, value in settings.items() if not any(f"{axis}.".startswith(f"{key}.") for axis in axes)
    }
    return {"recipe": grid.recipe, "axes": axes, "fixed": {key: json.dumps(value) for key, value in fixed.items()}}
