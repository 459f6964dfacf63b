"""Checkpoints: all that a run needs to go on, in safetensors and JSON, complete or absent.

    checkpoints/step-000050/  parameters.safetensors  optimizer.safetensors  random.safetensors
                              state.json  manifest.json

A folder takes its name when everything in it is on disk, manifest with checksums included. No pickle is written or
read.
"""

import random
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from qlora_kit.errors import RunError, first_line
from qlora_kit.memory import to_host
from qlora_kit.storage import (
    changed_files,
    check_room,
    checksums,
    json_text,
    read_checksums,
    read_json,
    remove_folder,
    staged_folder,
    write_json,
    write_tensors,
)
from qlora_kit.train.optim import AdapterOptimizer
from qlora_kit.units import MIB, is_number

MANIFEST, _STATE = "manifest.json", "state.json"
_FILES = ("optimizer.safetensors", "parameters.safetensors", "random.safetensors", _STATE)
"""What a checkpoint holds beside its manifest, in the manifest's order."""
_TEXT_BYTES = MIB
"""Of random states, headers and JSON, an upper bound."""


_COUNTS = ("step", "rows", "tokens", "best_step", "stale")
"""Of where a run stands, what is counted."""


@dataclass(slots=True)
class Progress:
    """Where a run stands.

    Attributes:
        step: optimizer steps done.
        rows: training rows consumed.
        tokens: tokens trained.
        numbers: step counts of the optimizer.
        best_step: of the lowest held-out loss so far, the latest if there are several; 0 before there is one.
        best_loss: held-out loss there, in nats a token.
        stale: evaluations since the last that was lower than all before.
    """

    step: int = 0
    rows: int = 0
    tokens: int = 0
    numbers: dict[str, int | float] = field(default_factory=dict)
    best_step: int = 0
    best_loss: float | None = None
    stale: int = 0

    def judge(self, eval_loss: float) -> bool:
        """Take note of the held-out loss at the present step; whether none before was lower."""
        before = self.best_loss
        self.stale = 0 if before is None or eval_loss < before else self.stale + 1
        is_best = before is None or eval_loss <= before
        if is_best:
            self.best_step, self.best_loss = self.step, eval_loss
        return is_best

    def forget_best(self) -> None:
        """Look for the best from here on."""
        self.best_step, self.best_loss, self.stale = 0, None, 0


def save_checkpoint(
    folder: Path, parameters: Mapping[str, Tensor], optimizer: AdapterOptimizer, progress: Progress, keep: int
) -> Path:
    """Write `step-NNNNNN` below `folder`; when it stands, newer ones go, and older ones beyond `keep` but the best.

    Args:
        folder: of all checkpoints.
        parameters: the trained ones by name, and what else of the adapter must be kept.
        optimizer: that steps them.
        progress: where the run stands.
        keep: checkpoints to keep, this one included; that of the lowest held-out loss comes on top.

    Raises:
        RunError: the disk has no room; what stands there is left as it is.
    """
    final = checkpoint_of(folder, progress.step)
    check_room(folder, checkpoint_bytes(parameters, optimizer), f"the checkpoint of step {progress.step}")
    progress.numbers = optimizer.state_numbers()
    with staged_folder(final) as staged:
        for name, copies in _host_copies(parameters, optimizer, _device(parameters).type == "cuda"):
            _wait(parameters)
            write_tensors(staged / f"{name}.safetensors", copies)
            copies.clear()
        write_tensors(staged / "random.safetensors", random_states(_device(parameters)))
        write_json(staged / _STATE, asdict(progress))
        write_json(staged / MANIFEST, {"step": progress.step, "files": checksums(staged)})
    standing = checkpoints(folder)
    newer = standing.index(final) + 1  # from here on: damaged ones that this run was not resumed from
    kept = {*standing[max(0, newer - keep) : newer], checkpoint_of(folder, progress.best_step)}
    for other in standing:
        if other not in kept:
            remove_folder(other)
    return final


def not_finite(parameters: Mapping[str, Tensor], optimizer: AdapterOptimizer) -> list[str]:
    """Names of what a checkpoint would hold with NaN or infinity in it: parameters, master weights, moments.

    Args:
        parameters: as `save_checkpoint` takes them, like the optimizer.
    """
    tensors = (*parameters.items(), *optimizer.state_tensors())
    return [name for name, tensor in tensors if tensor.is_floating_point() and not _is_finite(tensor.detach())]


def _is_finite(tensor: Tensor) -> bool:
    # Least and largest are NaN where any value is; unlike a mask of all values, they take no memory.
    return tensor.numel() == 0 or bool(torch.isfinite(torch.stack(tensor.aminmax())).all())


def checkpoint_bytes(parameters: Mapping[str, Tensor], optimizer: AdapterOptimizer) -> int:
    """What one takes on the disk."""
    state = sum(tensor.nbytes for _, tensor in optimizer.state_tensors())
    return sum(tensor.nbytes for tensor in parameters.values()) + state + _TEXT_BYTES


def checkpoint_of(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step stands below `folder`, if there is one."""
    return folder / f"step-{step:06d}"


def rehearse_checkpoint(parameters: Mapping[str, Tensor], optimizer: AdapterOptimizer, *, on_card: bool) -> None:
    """What writing a checkpoint allocates, without the files: for the dry run, and before the first step.

    Args:
        parameters: as `save_checkpoint` takes them, like the optimizer.
        on_card: whether they lie on a card, or in a dry run would.
    """
    for _, copies in _host_copies(parameters, optimizer, on_card):
        copies.clear()


def checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints below `folder`, oldest first; folders under other names than a run gives do not count."""
    complete = (path.parent for path in folder.glob(f"step-*/{MANIFEST}"))
    found = [(step, path) for path in complete if (step := _named_step(path)) is not None]
    return [path for _, path in sorted(found)]


def verify_checkpoint(folder: Path) -> list[str]:
    """What is wrong with a folder that has a manifest: files missing or changed since it was written, the manifest
    itself among them, or the name of another step."""
    manifest = folder / MANIFEST
    try:
        expected = read_checksums(manifest)
        if faults := changed_files(folder, expected):
            return faults
        step = read_json(folder / _STATE).get("step")
    except RunError as error:
        return [str(error)]
    if not isinstance(step, int):
        return [f"{folder / _STATE} names no step"]
    # All that a manifest says follows from the files and the step, so each of its bytes can be looked at.
    as_written = json_text({"step": step, "files": {name: expected.get(name) for name in _FILES}})
    if manifest.read_bytes() != as_written.encode():
        return [f"{manifest} is not as it was written for step {step} and the files {', '.join(_FILES)}"]
    if _named_step(folder) not in (step, None):
        return [f"{folder} holds step {step}, but its name says another one: rename it"]
    return []


def _named_step(folder: Path) -> int | None:
    """The step that a folder's name says; None under a name that no run gives."""
    named = re.fullmatch("step-([0-9]{6}|[1-9][0-9]{6,})", folder.name)
    return None if named is None else int(named[1])


def newest_checkpoint(folder: Path) -> tuple[Path, list[str]]:
    """The newest checkpoint that verifies, and what is wrong with newer ones.

    Raises:
        RunError: there is none.
    """
    faults: list[str] = []
    for candidate in reversed(checkpoints(folder)):
        found = verify_checkpoint(candidate)
        if not found:
            return candidate, faults
        faults += found
    detail = f" ({'; '.join(faults)})" if faults else ""
    raise RunError(f"{folder} holds no complete checkpoint to resume from{detail}; start again with --overwrite")


@torch.no_grad()
def load_checkpoint(folder: Path, parameters: Mapping[str, Tensor], optimizer: AdapterOptimizer) -> Progress:
    """Put the run back where the checkpoint was written, bit for bit.

    Raises:
        RunError: the files do not fit this run.
    """
    saved, state, states = (_load(folder / f"{name}.safetensors") for name in ("parameters", "optimizer", "random"))
    progress = _read_progress(folder / _STATE)
    _check_shapes(folder, saved, parameters)
    _wait(parameters)
    try:
        optimizer.restore(state, progress.numbers)
    except KeyError as error:
        raise RunError(
            f"{folder} holds the state of another optimizer ({error}); resume with the recipe it was made with"
        ) from error
    _put(saved, parameters)
    try:
        set_random_states(states, _device(parameters))
    except (LookupError, TypeError, ValueError, RuntimeError) as error:
        raise RunError(
            f"{folder} holds invalid random states ({first_line(error)}); remove it to continue from an earlier one"
        ) from error
    return progress


def _read_progress(path: Path) -> Progress:
    """Where a run stands, of a file whose checksum tells only that it is as somebody wrote it.

    Raises:
        RunError: it does not say so as this version does.
    """
    content: dict[str, Any] = read_json(path)
    content.pop("schema", None)
    numbers, best_loss = content.get("numbers"), content.get("best_loss")
    is_sound = (
        content.keys() <= {each.name for each in fields(Progress)}  # an earlier version counted less
        and content.keys() >= {"step", "rows", "tokens"}
        and all(type(count := content.get(name, 0)) is int and 0 <= count < 2**63 for name in _COUNTS)
        and (isinstance(numbers, dict) and all(is_number(number) for number in numbers.values()))
        and (best_loss is None or is_number(best_loss))
    )
    if not is_sound:
        raise RunError(
            f"{path} does not record the run's position in the form of this version; continue with the version that "
            "wrote it, or remove its folder to continue from the one before"
        )
    return Progress(**content)


@torch.no_grad()
def load_parameters(folder: Path, parameters: Mapping[str, Tensor]) -> None:
    """Give parameters the values of a checkpoint, and touch nothing else.

    Raises:
        RunError: as `load_checkpoint`.
    """
    saved = _load(folder / "parameters.safetensors")
    _check_shapes(folder, saved, parameters)
    _put(saved, parameters)


def _put(saved: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> None:
    for name, parameter in parameters.items():
        parameter.copy_(saved[name])


def _load(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise RunError(f"{path.parent} cannot be read: {error}") from error


def _check_shapes(folder: Path, saved: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> None:
    shapes = {name: tensor.shape for name, tensor in saved.items()}
    if shapes != {name: parameter.shape for name, parameter in parameters.items()}:
        raise RunError(f"{folder} holds other parameters than this run trains; resume with the recipe it was made with")


def _device(parameters: Mapping[str, Tensor]) -> torch.device:
    return next(iter(parameters.values())).device


def _wait(parameters: Mapping[str, Tensor]) -> None:
    """Until the card has done what was queued: it may still fill copies, and paged state, which is managed memory, is
    the card's alone for as long; on WSL the process would not survive a look at it."""
    device = _device(parameters)
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _host_copies(
    parameters: Mapping[str, Tensor], optimizer: AdapterOptimizer, on_card: bool
) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """The content of each file in the host's memory, one file after the other: clear the one before the next comes.

    On a CPU it is written from where it lies.
    """
    bring = to_host if on_card else Tensor.contiguous
    yield "parameters", {name: bring(tensor.detach()) for name, tensor in parameters.items()}
    _wait(parameters)
    state = sorted(optimizer.state_tensors(), key=lambda named: named[1].is_cuda)  # paged first, while the card rests
    yield "optimizer", {name: bring(tensor) for name, tensor in state}


def random_states(device: torch.device) -> dict[str, Tensor]:
    """torch's (of the CPU and of the run's own device), Python's and NumPy's random states as tensors."""
    version, words, gauss = random.getstate()
    numpy_state: Any = np.random.get_state()
    _, keys, position, has_gauss, cached = numpy_state
    states = {
        "torch": torch.get_rng_state(),
        "python": torch.tensor([version, *words], dtype=torch.int64),
        "python_gauss": torch.tensor([float("nan") if gauss is None else gauss], dtype=torch.float64),
        "numpy": torch.from_numpy(keys.astype(np.int64)),
        "numpy_rest": torch.tensor([position, has_gauss, cached], dtype=torch.float64),
    }
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def set_random_states(states: Mapping[str, Tensor], device: torch.device) -> None:
    """Draw from here on what was drawn after `random_states` gave these."""
    torch.set_rng_state(states["torch"])
    version, *words = states["python"].tolist()
    gauss = states["python_gauss"].item()
    random.setstate((version, tuple(words), None if gauss != gauss else gauss))
    position, has_gauss, cached = states["numpy_rest"].tolist()
    keys = states["numpy"].numpy().astype(np.uint32)
    np.random.set_state(("MT19937", keys, int(position), int(has_gauss), cached))
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)
