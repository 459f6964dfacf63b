"""Trackers: metrics go to TensorBoard and others through accelerate, beside metrics.jsonl.

A run is a run of the project `qlora-kit`, called by its folder. TensorBoard's files lie in that folder, below
`qlora-kit/`. Metrics are called `train/loss`, `eval/loss` and so on; the recipe's settings are the hyperparameters.
A tracker that cannot be started stops the run before its first step; one that fails later does not.
"""

import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

import torch
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker, get_available_trackers

from qlora_kit.errors import RunError
from qlora_kit.train.loop import make_accelerator

Track: TypeAlias = Callable[[Mapping[str, Any]], None]
"""Takes a row of metrics."""

PROJECT = "qlora-kit"
_CALLED = {"wandb": "name", "mlflow": "run_name", "trackio": "name"}
"""What each tracker calls the name of a run."""
_FAULTS = {"wandb": ("wandb.errors", "Error"), "mlflow": ("mlflow.exceptions", "MlflowException")}
"""What trackers raise that is none of Python's own errors."""
_INSTALLED_BY = {"mlflow": "mlflow-skinny sqlalchemy alembic"}
"""What to install for a tracker, where that is not its own name: of MLflow its client, and what its database needs."""


def check_trackers(trackers: Sequence[str]) -> None:
    """Refuse a tracker that is not installed; accelerate would leave it out without a word.

    Raises:
        RunError: names it, and the command that installs it.
    """
    missing = sorted(set(trackers) - {str(known.value) for known in get_available_trackers()})
    if missing:
        packages = " ".join(_INSTALLED_BY.get(tracker, tracker) for tracker in missing)
        raise RunError(f"train.trackers asks for {', '.join(missing)}, not installed; pip install {packages}")


@contextmanager
def tracking(
    trackers: Sequence[str],
    folder: Path,
    settings: Mapping[str, Any],
    device: torch.device,
    note: Callable[[str], None],
) -> Iterator[Track]:
    """Takes rows of metrics to trackers; those that work to its end end with the block, however that ends.

    Args:
        trackers: their names; with none there is nothing to take rows to.
        folder: of the run.
        settings: of the recipe, by dotted key.
        device: that trains.
        note: is told of a tracker that fails on the way, and gets no more rows.

    Raises:
        RunError: one does not start; then nothing has been written.
    """
    if not trackers:
        yield lambda row: None
        return
    named = sorted(trackers, key="tensorboard".__eq__)  # it writes to the folder at once, so it starts last
    accelerator = make_accelerator(device, log_with=named, project_dir=str(folder))
    start_trackers(accelerator, named, folder, settings)
    working = list(accelerator.trackers)

    def have_each(do: Callable[[GeneralTracker], None]) -> None:
        for tracker in list(working):
            try:
                do(tracker)
            except _faults_of([tracker.name]) as error:  # a server is gone, a disk is full: no reason to stop training
                working.remove(tracker)
                note(f"train.trackers: {tracker.name} gets no more rows: {_reason(error)}; metrics.jsonl has them all")

    def track(row: Mapping[str, Any]) -> None:
        values = as_tracked(row)
        have_each(lambda tracker: tracker.log(values, step=row["step"]))

    try:
        yield track
    finally:
        have_each(lambda tracker: tracker.finish())


def start_trackers(
    accelerator: Accelerator, trackers: Sequence[str], folder: Path, settings: Mapping[str, Any]
) -> None:
    """Start what the accelerator logs with, and tell it the settings.

    Args:
        accelerator: made with these trackers.
        trackers: their names.
        folder: of the run.
        settings: of the recipe, by dotted key.

    Raises:
        RunError: one does not start: it wants a login, say, or its server is not there.
    """
    told = {
        key: value if isinstance(value, bool | int | float | str) else str(value) for key, value in settings.items()
    }
    names = {tracker: {_CALLED[tracker]: folder.name} for tracker in trackers if tracker in _CALLED}
    faults = _faults_of(trackers)
    try:
        accelerator.init_trackers(PROJECT, config=told, init_kwargs=names)
    except faults as error:
        raise RunError(
            f"train.trackers: {', '.join(trackers)} cannot be started: {_reason(error)}; "
            "fix that, or set train.trackers=[]"
        ) from error


def _faults_of(trackers: Sequence[str]) -> tuple[type[Exception], ...]:
    """What these trackers raise where something outside of the kit is at fault."""
    named = (_FAULTS[tracker] for tracker in trackers if tracker in _FAULTS)
    own = (getattr(importlib.import_module(module), fault) for module, fault in named)
    return OSError, RuntimeError, ValueError, ImportError, *own


def _reason(error: Exception) -> str:
    """The first line of what an error says."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].rstrip(".")


def as_tracked(row: Mapping[str, Any]) -> dict[str, Any]:
    """What a row of metrics knows, under the names that trackers group by: `train/...` and `eval/...`."""
    return {
        f"eval/{key.removeprefix('eval_')}" if key.startswith("eval_") else f"train/{key}": value
        for key, value in row.items()
        if key not in ("step", "rows") and value is not None
    }
