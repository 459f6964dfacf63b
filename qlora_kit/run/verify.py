"""Verify: whether files still have the bytes that were written, and whether resuming a run is exact on this machine."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qlora_kit.errors import RunError
from qlora_kit.export.sealed import MANIFEST as EXPORT
from qlora_kit.recipe import Recipe, read_recipe
from qlora_kit.run.folder import ADAPTER, CHECKPOINTS, CHECKSUMS, MODEL, RECIPE, RESULT
from qlora_kit.run.train import train
from qlora_kit.storage import changed_files, checksums, passing_folder, read_checksums, read_json
from qlora_kit.train.checkpoint import MANIFEST, checkpoint_of, checkpoints, verify_checkpoint
from qlora_kit.watch import Watch

STEPS, STOP = 6, 3
"""Steps of a short run, and the one at whose end its twin is stopped."""
_OF_THE_MOMENT = ("tokens_per_s", "peak_bytes")
"""What no two runs have alike."""


@dataclass(slots=True)
class Verified:
    """What was looked at, and what is wrong with it.

    Attributes:
        files: that have a checksum, by the folder that they are of.
        faults: those missing or changed, one line each.
    """

    files: dict[str, int] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)

    def look_at(self, folder: Path, manifest: Path) -> None:
        """Compare a folder with the checksums that were written."""
        self.files[str(folder)] = 0
        try:
            expected = read_checksums(manifest)
        except RunError as error:
            self._add([str(error)])
            return
        self.files[str(folder)] = len(expected)
        self._add(verify_checkpoint(folder) if manifest.name == MANIFEST else changed_files(folder, expected))

    def _add(self, faults: list[str]) -> None:
        """Each once: a missing result.json is told by checksums.json, and by what was trained."""
        self.faults += [fault for fault in faults if fault not in self.faults]


def verify(folder: Path) -> Verified:
    """Read every file that has a checksum.

    Args:
        folder: a run with its checkpoints, what it trained and exports that lie in it; one checkpoint; or an export.

    Raises:
        RunError: it is none of these, or holds nothing that has a checksum.
    """
    verified = Verified()
    for place, manifest in _manifests(folder):
        verified.look_at(place, manifest)
    if not verified.files:
        raise RunError(f"{folder} is not a run, checkpoint or export with checksums; give the folder of one")
    return verified


def _manifests(folder: Path) -> Iterator[tuple[Path, Path]]:
    """Each folder that has checksums, and the file that they stand in."""
    for name in (MANIFEST, EXPORT, CHECKSUMS):
        if (folder / name).is_file():
            yield folder, folder / name
    if (folder / RECIPE).is_file():
        for checkpoint in checkpoints(folder / CHECKPOINTS):
            yield checkpoint, checkpoint / MANIFEST
        trained = [name for name in (ADAPTER, MODEL) if (folder / name).is_dir()]
        if (folder / RESULT).is_file():
            trained = [name for name in (ADAPTER, MODEL) if name == read_json(folder / RESULT).get("folder")] or [
                ADAPTER
            ]
        for name in trained:  # without a result.json that is told as a fault
            yield folder / name, folder / RESULT
        for manifest in sorted(folder.glob(f"*/{EXPORT}")):
            yield manifest.parent, manifest


class _Stopping(Watch):
    """Asks for a stop after a step; passes rows on."""

    def __init__(self, watch: Watch, last: int) -> None:
        self._watch, self._last, self._step = watch, last, 0

    def row(self, row: Mapping[str, Any]) -> None:
        self._step = row["step"]
        self._watch.row(row)

    def stop_requested(self) -> bool:
        return self._step >= self._last


def verify_resume(folder: Path, watch: Watch | None = None, *, trust_remote_code: bool = False) -> list[str]:
    """Run a run's own recipe for a few steps, once in one go and once with a stop and a resume, beside its folder.

    Args:
        folder: of the run; nothing in it is changed.
        watch: is told of steps.
        trust_remote_code: let the model folder's own code run.

    Returns:
        what differs: rows of metrics, and files of the last checkpoint; nothing where resuming is exact.

    Raises:
        QloraKitError: as `train`.
    """
    watch, recipe = watch or Watch(), read_recipe(folder / RECIPE)
    with passing_folder(folder.absolute().with_name(f"{folder.absolute().name}-verify")) as place:
        whole, parts = (_short(recipe, place / name) for name in ("whole", "parts"))
        train(whole, watch=_Stopping(watch, STEPS), trust_remote_code=trust_remote_code)
        train(parts, watch=_Stopping(watch, STOP), trust_remote_code=trust_remote_code)
        train(parts, watch=_Stopping(watch, STEPS), resume=True, trust_remote_code=trust_remote_code)
        return _differences(Path(whole.output), Path(parts.output))


def _short(recipe: Recipe, output: Path) -> Recipe:
    changes = {"steps": STEPS, "eval_every": 2, "save_every": STOP, "trackers": [], "early_stopping": None}
    return recipe.model_copy(update={"train": recipe.train.model_copy(update=changes), "output": str(output)})


def _differences(whole: Path, parts: Path) -> list[str]:
    rows = [_rows(folder) for folder in (whole, parts)]
    found = [f"step {one['step']}: {one}, resumed {other}" for one, other in zip(*rows, strict=False) if one != other]
    if len(rows[0]) != len(rows[1]):
        found.append(f"{len(rows[0])} rows of metrics, resumed {len(rows[1])}")
    sums, resumed = (checksums(checkpoint_of(folder / CHECKPOINTS, STEPS)) for folder in (whole, parts))
    return found + [f"{name} of step {STEPS} has different bytes" for name in sums if sums[name] != resumed.get(name)]


def _rows(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [{key: value for key, value in json.loads(line).items() if key not in _OF_THE_MOMENT} for line in lines]
