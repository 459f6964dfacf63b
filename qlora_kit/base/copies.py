"""Quantised copies: codes and constants of a base, kept on disk, so that only the first load has to make them.

A copy is a folder, complete or absent, named by a hash: of the checkpoint's files as the system tells them apart, of
the settings that decide a code, and of the code that makes them. It holds

    00001.safetensors ...  codes and constants, by the dotted names of the layers that hold them
    copy.json              what marks the checkpoint, and checksums

All else (norms, embeddings that stay dense, configuration, fingerprint) is read from the checkpoint with or without a
copy, so that a copy serves every compute dtype, and nothing but codes can come from one. The checkpoint is not hashed:
that would take longer than quantising it. Its files are told apart by path, number, size and the time at which the
system saw them change, which no program sets; and what marks the base that was loaded has to be what the copy says.

A copy that is damaged is made again. Where the folder cannot be written, the disk is full, or QLORA_KIT_CACHE=0, a base
is loaded without one.
"""

import hashlib
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor, nn

from qlora_kit.base.dense import QuantizedWeight
from qlora_kit.base.files import weight_files
from qlora_kit.base.header import TensorEntry, read_header
from qlora_kit.errors import ModelError, RunError
from qlora_kit.ops import native
from qlora_kit.storage import (
    changed_files,
    check_room,
    checksums,
    drop_least_used,
    private_folder,
    read_checksums,
    read_json,
    remove_folder,
    sha256_file,
    staged_folder,
    write_json,
    write_tensors,
)
from qlora_kit.units import GIB, MIB, format_bytes

MOST_BYTES = 200 * GIB
"""That all copies together may take; the one that was used last stays whatever its size."""
SETTLED_NS = 2_000_000_000
"""A file that changed later could change again and tell the same time: that of some file systems is this coarse."""

_SHARD_BYTES = 512 * MIB
_TOLD = "copy.json"
_LIBRARIES = ("torch", "transformers", "bitsandbytes")
_DTYPES = {"U8": torch.uint8, "I8": torch.int8, "F32": torch.float32}


def copy_place(folder: Path, decides: object, notify: Callable[[str], None]) -> Path | None:
    """Where the copy of a checkpoint lies, or would; None where none can be kept.

    Args:
        folder: of the checkpoint.
        decides: all settings that decide what is quantised, and how.
        notify: given one line where none can be kept.

    Raises:
        ModelError: as `weight_files`.
    """
    if os.environ.get("QLORA_KIT_CACHE") == "0":
        return None
    try:
        stamps = [_stamp(file) for file in _deciding_files(folder)]
        if max(changed_ns for *_, changed_ns in stamps) > time.time_ns() - SETTLED_NS:
            notify(f"{folder} was written just now: a quantised copy is kept when it is loaded again")
            return None
        sources = (*sorted(Path(__file__).parent.glob("*.py")), *native.SOURCES)
        code = [sha256_file(file) for file in sources] + [version(name) for name in _LIBRARIES]
        key = hashlib.sha256(repr((stamps, decides, code)).encode()).hexdigest()
        return private_folder("bases") / key
    except (OSError, RuntimeError) as error:  # no home is a RuntimeError
        notify(f"no quantised copy of {folder} is kept: {error}")
        return None


def _deciding_files(folder: Path) -> Iterator[Path]:
    yield from (folder / "config.json", *folder.glob("*.safetensors.index.json"), *weight_files(folder))
    yield from sorted(folder.glob("*.py"))


def _stamp(file: Path) -> tuple[str, int, int, int, int]:
    """What tells a file from any other, and from itself at another time."""
    status = file.stat()
    return os.path.realpath(file), status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


class Copy:
    """A copy whose bytes were found to be those that were written.

    Args:
        place: its folder.
        mark: of the base that it was made from.
    """

    def __init__(self, place: Path, mark: str) -> None:
        self.mark = mark
        self._where: dict[str, dict[str, tuple[Path, TensorEntry]]] = {}
        for file in place.glob("*.safetensors"):
            for name, entry in read_header(file).items():
                layer, _, leaf = name.rpartition(".")
                self._where.setdefault(layer, {})[leaf] = (file, entry)

    def read(self, layer: str, device: torch.device) -> Mapping[str, Tensor] | None:
        """Codes and constants of a layer, on `device`; None if it has none here."""
        found = self._where.get(layer)
        return None if found is None else {leaf: _read(*at).to(device) for leaf, at in found.items()}


def _read(path: Path, entry: TensorEntry) -> Tensor:
    """Into memory of its own: mapped pages would count beside it."""
    made = torch.empty(entry.shape, dtype=_DTYPES[entry.dtype])
    try:
        with open(path, "rb") as file:
            file.seek(entry.begin)
            if file.readinto(made.numpy().data) != made.nbytes:
                raise EOFError("it was cut short")
    except (OSError, EOFError) as error:
        raise ModelError(f"{path} was changed while the base was loaded from it ({error}); load it again") from error
    return made


def find_copy(place: Path, notify: Callable[[str], None]) -> Copy | None:
    """The copy at a place; None where there is none, or one that is damaged, which is removed."""
    if not os.path.lexists(place):
        return None
    try:
        if any(path.is_symlink() for path in (place, *place.iterdir())):
            raise RunError(f"{place} is, or holds, a link")
        if faults := changed_files(place, read_checksums(place / _TOLD)):
            raise RunError(faults[0])
        copy = Copy(place, str(read_json(place / _TOLD)["mark"]))
        os.utime(place)
    except (RunError, ModelError, OSError, LookupError) as error:
        notify(f"a quantised copy is damaged and is made again: {error}")
        drop_copy(place)
        return None
    return copy


def drop_copy(place: Path) -> None:
    """Remove a copy, as far as that can be done."""
    with suppress(OSError):
        if place.is_symlink():
            place.unlink()
        remove_folder(place)


def keep_copy(model: nn.Module, place: Path, mark: str, notify: Callable[[str], None]) -> None:
    """Write the codes and constants of a model; where that cannot be done, say so.

    Args:
        model: as it was loaded.
        place: where to, from `copy_place`.
        mark: of the base.
        notify: given one line, of what was written or why nothing was.
    """
    tensors = {
        f"{name}.{leaf}": buffer
        for name, module in model.named_modules()
        if isinstance(module, QuantizedWeight)
        for leaf, buffer in module.named_buffers(recurse=False)
    }
    needed_bytes = sum(tensor.nbytes for tensor in tensors.values())
    try:
        check_room(place, needed_bytes, "a quantised copy")
        with staged_folder(place) as staged:
            for number, shard in enumerate(_shards(tensors), 1):
                write_tensors(staged / f"{number:05}.safetensors", {name: t.cpu() for name, t in shard.items()})
            write_json(staged / _TOLD, {"mark": mark, "files": checksums(staged)})
    except OSError as error:  # a RunError is one
        notify(f"no quantised copy is kept: {error}")
        return
    with suppress(OSError):  # another run may be at it, too
        drop_least_used(place, MOST_BYTES)
    notify(f"a quantised copy of {format_bytes(needed_bytes)} is kept for later loads: {place}")


def _shards(tensors: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    shard: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if shard and sum(each.nbytes for each in shard.values()) + tensor.nbytes > _SHARD_BYTES:
            yield shard
            shard = {}
        shard[name] = tensor
    yield shard
