"""The run folder: opened once, locked while a run writes to it, and described so that a report needs nothing else."""

import fcntl
import importlib.metadata
import json
import platform
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from qlora_kit import __version__
from qlora_kit.base.device import resolve_device
from qlora_kit.data import Packing
from qlora_kit.errors import RecipeError, RunError
from qlora_kit.export.trained_against import ADDED_TOKENS
from qlora_kit.memory import Ledger, PeakCounter
from qlora_kit.plan.devices import device_name
from qlora_kit.recipe import Recipe, dump_recipe, read_recipe
from qlora_kit.report import write_report
from qlora_kit.run.prepare import Prepared, fill_batches
from qlora_kit.run.start import reference_checksums
from qlora_kit.storage import (
    check_writable,
    clear_abandoned,
    make_folder,
    read_json,
    remove_folder,
    sha256_file,
    staged_for,
    write_json,
    write_text,
)
from qlora_kit.train.checkpoint import checkpoints
from qlora_kit.train.classes import classes_in
from qlora_kit.train.optim import effective_kind
from qlora_kit.train.trackers import PROJECT

ADAPTER, MODEL, CHECKPOINTS, LOCK = "adapter", "model", "checkpoints", ".lock"
RECIPE, PLAN, DATA = "recipe.yaml", "plan.json", "data.json"
RESULT, SCORES, SAMPLES = "result.json", "scores.json", "samples.jsonl"
RECORDS = (RECIPE, PLAN, DATA, "env.json", "metrics.jsonl", "memory.json", RESULT, SCORES, SAMPLES)
"""What stands as the run left it."""
CHECKSUMS = "checksums.json"
FILES = (*RECORDS, CHECKSUMS, "report.html")
"""What a run writes; an export that was put beside them is not among it."""

_SETTLED = ("base.quantize_head=auto", "lora.rank=auto", "lora.added_tokens=[]")
"""What a run's folder holds as it was settled."""

_MAY_CHANGE = ("base.cache", "memory.", "train.epochs", "train.tokens", "train.steps", "train.eval_every",
               "train.save_every", "train.sample_every", "train.keep_checkpoints", "train.early_stopping",
               "train.trackers")  # fmt: skip
"""Keys that a resumed run may have otherwise. More steps stretch the schedule: the rate goes on at its new place."""
_MAY_MOVE = {"base.model": "base", "base.revision": "base", "data.train": "train", "data.eval": "eval"}
"""Keys that may name another place, by the fingerprint that tells whether the same lies there."""


def check_run_folder(folder: Path, recipe: Recipe, resume: bool, overwrite: bool, force: bool = False) -> None:
    """See that a run may be written to `folder`; nothing is changed yet.

    Args:
        folder: of the run.
        recipe: that is to be run.
        resume: whether to go on with what is there.
        overwrite: whether to replace what is there.
        force: whether a resumed run may have another recipe.

    Raises:
        RunError: there is a run and neither `resume` nor `overwrite`, there is none to resume or it has another recipe,
            the place is taken or cannot be written, or the adapter that the run goes on from lies in it.
    """
    start = recipe.lora.from_
    if start is not None and Path(start).resolve().is_relative_to(folder.resolve()):
        raise RunError(f"lora.from={start} lies in output={folder}, which a run replaces; set output to another folder")
    if folder.exists() and not folder.is_dir():
        raise RunError(f"{folder} is a file, and a run needs a folder of its own; set output to another name")
    if resume and not _has_run(folder):
        raise RunError(f"{folder} holds no run to resume; start it without --resume")
    if _has_run(folder) and not (resume or overwrite):
        raise RunError(
            f"{folder} already holds a run; continue it with --resume, replace it with --overwrite, or set output"
        )
    if _things_in(folder) and not (_is_described(folder) or _ended_at_its_start(folder)):
        raise RunError(f"{folder} is not empty and holds no run; set output to another folder")
    check_writable(folder, "set output to another folder")
    changes = _changes(folder, recipe) if resume and not force else []
    if changes:
        raise RunError(
            f"{folder} was made with another recipe: {'; '.join(changes)}. Resume it as it was "
            f"(qlora-kit train {folder / RECIPE} --resume), continue anyway with --force, or start again with "
            "--overwrite"
        )


@contextmanager
def run_folder(folder: Path) -> Iterator[None]:
    """The folder, made if need be, and locked: no other run writes to it. If nothing came into it, it goes again.

    Raises:
        RunError: it cannot be made, or another run is writing to it.
    """
    try:
        make_folder(folder)
    except OSError as error:
        raise RunError(f"{folder} cannot be made: {error.strerror}; set output to another folder") from error
    with open(folder / LOCK, "a", encoding="utf-8") as file:  # a file that it may lead to stays as it is
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunError(
                f"another run is writing to {folder}; wait for it, or set output to another folder"
            ) from None
        for place in (folder, folder / CHECKPOINTS):
            clear_abandoned(place)
        try:
            yield
        finally:
            if not _things_in(folder):
                shutil.rmtree(folder)


@contextmanager
def reported(folder: Path) -> Iterator[None]:
    """What is done in a run folder, with report.html at its end; after an error, the report of what there is by then.

    Raises:
        RunError: the report cannot be written. After an error that stays unsaid: the error says more.
    """
    with ExitStack() as after_an_error:
        after_an_error.callback(_report_what_there_is, folder)
        yield
        after_an_error.pop_all()
    write_report(folder)


def _report_what_there_is(folder: Path) -> None:
    with suppress(RunError):  # a full disk, or no step yet
        write_report(folder)


def files_of_run(folder: Path) -> list[Path]:
    """What goes of a run when another takes its folder, and nothing else that lies there; recipe and plan, which tell
    whose the folder is, are written over. Checkpoints, and the logs of trackers, are listed one by one: others may
    lie beside them."""
    written = [folder / name for name in (ADAPTER, MODEL, *FILES) if name not in (RECIPE, PLAN)]
    logs = (folder / PROJECT).glob("*")
    listed = folder / CHECKSUMS, *checkpoints(folder / CHECKPOINTS), *written, *logs  # no checksum outlives its file
    return [path for path in dict.fromkeys(listed) if path.exists()]


def clear_run_folder(folder: Path, earlier: Iterable[Path]) -> None:
    """Remove what `files_of_run` found of an earlier run."""
    for path in earlier:
        if path.is_dir():
            remove_folder(path)
        else:
            path.unlink()
    for shared in (PROJECT, CHECKPOINTS):
        with suppress(OSError):  # where something else lies in it, it stays
            (folder / shared).rmdir()


def _things_in(folder: Path) -> bool:
    return folder.is_dir() and any(path.name != LOCK for path in folder.iterdir())


def _changes(folder: Path, now: Recipe) -> list[str]:
    """What a resumed run would compute otherwise."""
    old, new = settings_of(read_recipe(folder / RECIPE)), settings_of(now)
    told = read_json(folder / DATA).get("fingerprints") if (folder / DATA).is_file() else None
    known = told if isinstance(told, dict) else {}

    def has_moved(key: str) -> bool:
        is_place = key.startswith("base.") or _without_places(old[key]) == _without_places(new[key])
        return bool(known.get(_MAY_MOVE.get(key, ""))) and is_place

    return [
        f"{key} was {old[key]}, is {new[key]}"
        for key in new
        if old[key] != new[key]
        and not key.startswith(_MAY_CHANGE)
        and not has_moved(key)
        and f"{key}={new[key]}" not in _SETTLED
    ]


def _without_places(sources: Any) -> Any:
    """What a recipe says of rows beside where they are: how many sources, their weights, splits, formats, columns."""
    if isinstance(sources, list):
        return [_without_places(each) for each in sources]
    if isinstance(sources, dict):
        return sources | {"path": ""}
    return sources if sources in ("auto", None) else ""


def settings_of(recipe: Recipe) -> dict[str, Any]:
    """Every setting by its dotted key, the output aside."""
    sections = recipe.model_dump(by_alias=True, exclude={"output"})
    return {f"{section}.{key}": value for section, keys in sections.items() for key, value in keys.items()}


def _has_run(folder: Path) -> bool:
    """Whether there is anything to lose: a run that ended before its first checkpoint leaves none."""
    has_trained = any((folder / kept).exists() for kept in (ADAPTER, MODEL)) or bool(checkpoints(folder / CHECKPOINTS))
    return (folder / RECIPE).is_file() and has_trained


def _is_described(folder: Path) -> bool:
    """Whether a run has said there what it is."""
    return all((folder / name).is_file() for name in (RECIPE, PLAN))


def _ended_at_its_start(folder: Path) -> bool:
    """Whether nothing lies there but what a run leaves that is killed, or has no room, before it has said what it is.

    That it was a run is told by its lock, by a file that it had begun, or by a recipe as runs alone write it.
    """
    staged = {path: staged_for(path) for path in folder.iterdir()}
    whole = {path.name for path, final in staged.items() if final is None}
    begun = {final for final in staged.values() if final is not None}
    if not (whole <= {LOCK, PROJECT, *FILES} and begun <= {ADAPTER, MODEL, CHECKPOINTS, *FILES}):
        return False
    return LOCK in whole or bool(begun) or _is_as_runs_write_it(folder / RECIPE)


def _is_as_runs_write_it(path: Path) -> bool:
    """Whether a recipe has every key and no word more: what people write by hand is no such file."""
    try:
        return path.is_file() and path.read_text(encoding="utf-8") == dump_recipe(read_recipe(path))
    except (RecipeError, UnicodeDecodeError):
        return False


def describe_run(
    recipe: Recipe, prepared: Prepared, plan: Mapping[str, Any], fingerprints: Mapping[str, str], folder: Path
) -> None:
    """Write recipe.yaml, plan.json, env.json and data.json; from here on no checksum holds until `seal_records`.

    Args:
        recipe: as the plan settled it.
        prepared: rows and pace.
        plan: as plan.json has it.
        fingerprints: of what the run is made from, by train, eval and base, for `check_unchanged`.
        folder: of the run.
    """
    (folder / CHECKSUMS).unlink(missing_ok=True)
    write_text(folder / RECIPE, dump_recipe(recipe))
    write_json(folder / PLAN, dict(plan))
    device = resolve_device(recipe.base.device)
    optimizer = effective_kind(recipe.train.optimizer, device)
    write_json(folder / "env.json", environment(device) | {"optimizer": optimizer})
    train = prepared.train
    data: dict[str, Any] = {"chats": train.has_chats, "train": asdict(train.counts)}
    data["fingerprints"] = dict(fingerprints)
    data["sources"] = [{**asdict(part), "rows_an_epoch": part.deck.drawn} for part in train.parts]
    if recipe.data.eval is not None:
        data["eval"] = asdict(prepared.eval.counts)
    if prepared.packing is not None:
        data["packing"] = _packing(recipe, prepared, prepared.packing)
    if recipe.train.task == "classify":
        classes = classes_in(prepared.config)
        data["classes"], data["is_multi"] = list(classes.names), classes.is_multi
    if prepared.date is not None:
        data["date"] = prepared.date.isoformat()
    if checksums := reference_checksums(recipe):
        data["reference"] = checksums
    write_json(folder / DATA, data)


def seal_records(folder: Path) -> None:
    """Write checksums.json, of all that a run leaves but its report, which is written again."""
    files = [folder / name for name in RECORDS if (folder / name).is_file()]
    write_json(folder / CHECKSUMS, {"files": {file.name: sha256_file(file) for file in files}})


def _packing(recipe: Recipe, prepared: Prepared, packing: Packing) -> dict[str, Any]:
    """Sequences of the first epoch, and the share of their places that is no padding."""
    filling = fill_batches(recipe, prepared.train, prepared.pace, prepared.layout, prepared.longest)
    return {**asdict(filling), "longest": packing.tokens}


def trained_folder(folder: Path, recipe: Recipe) -> Path:
    """Where a run leaves what it trained: adapter/, or model/ where that is every weight."""
    return folder / (MODEL if recipe.train.full_finetune else ADAPTER)


def provenance_of(recipe: Recipe) -> dict[str, str]:
    """Which base the run was trained on and which tokens it added, for the metadata of adapters and exports."""
    facts = {"base": recipe.base.model}
    if recipe.base.revision is not None:
        facts["revision"] = recipe.base.revision
    if recipe.lora.added_tokens:
        facts[ADDED_TOKENS] = json.dumps(recipe.lora.added_tokens)
    return facts


def write_memory(folder: Path, planned: Mapping[str, Any], ledger: Ledger, counter: PeakCounter) -> None:
    """Write memory.json: the plan of the recipe's own method beside what the ledger and the device counted."""
    history = ledger.history
    measured = ledger.summary()
    categories = measured["by_category"]
    error = {"peak": _relative(planned["peak_bytes"], measured["peak_bytes"])} | {
        name: _relative(planned["by_category"][name], count) for name, count in categories.items() if count
    }
    write_json(
        folder / "memory.json",
        {
            "planned": dict(planned),
            "measured": measured,
            "error": error,
            "timeline": history.timeline(),
            "largest": history.largest(),
            "device_counter": {
                "name": counter.name,
                "peak_bytes": counter.peak_bytes,
                "start_bytes": counter.start_bytes,
            },
            "file_backed_bytes": counter.file_backed_bytes,
        },
    )


def environment(device: torch.device) -> dict[str, Any]:
    """What a run records of its machine and of the packages."""
    packages = ("torch", "bitsandbytes", "transformers", "accelerate", "datasets", "safetensors")
    return {
        "qlora_kit": __version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "device": device_name(device),
        "cuda": torch.version.cuda or "none",
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        **{name: importlib.metadata.version(name) for name in packages},
    }


def _relative(planned: int, measured: int) -> float:
    return planned / measured - 1
