"""Whether there is room, before anything is written; and the kit's own cache, which is kept to a size."""

import os
import shutil
from pathlib import Path

from qlora_kit.errors import RunError
from qlora_kit.storage.folders import remove_folder
from qlora_kit.units import format_bytes


def check_writable(place: Path, advice: str) -> None:
    """See that a folder can be made or written to before anything is read.

    Args:
        place: the folder; it need not be there yet.
        advice: what to do otherwise, for the message.

    Raises:
        RunError: it would lie below a file, or the disk or its owner allows no writing.
    """
    there = _nearest(place)
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        reason = "is not writable for you" if there.is_dir() else "is a file"
        raise RunError(f"{place} cannot be written: {there} {reason}; {advice}")


def check_room(place: Path, needed_bytes: int, what: str) -> None:
    """See that a disk has room before anything is written to it.

    Args:
        place: where it will be written; it need not be there yet.
        needed_bytes: that it takes.
        what: is to be written, for the message.

    Raises:
        RunError: fewer are free.
    """
    there = _nearest(place)
    free_bytes = shutil.disk_usage(there).free
    if free_bytes < needed_bytes:
        raise RunError(
            f"{what} needs {format_bytes(needed_bytes)} on the disk of {there}, which has {format_bytes(free_bytes)} "
            "free: make room there, or write to another disk"
        )


def _nearest(place: Path) -> Path:
    """`place`, or what is there of the way to it."""
    return next(folder for folder in (place.absolute(), *place.absolute().parents) if folder.exists())


def private_folder(name: str) -> Path:
    """A folder of the kit's cache, `~/.cache/qlora_kit/NAME` or below XDG_CACHE_HOME, made if it is not there.

    Raises:
        OSError: it cannot be made, or another user may write there: what is loaded from it runs, or is trained on.
    """
    asked = Path(os.environ.get("XDG_CACHE_HOME", ""))
    folder = (asked if asked.is_absolute() else Path("~/.cache").expanduser()) / "qlora_kit" / name
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = folder.stat()
    if status.st_uid != os.getuid() or status.st_mode & 0o022:
        raise PermissionError(f"others can write to {folder}")
    return folder


def drop_least_used(newest: Path, most_bytes: int) -> None:
    """Delete the entries of a cache that were used least lately, down to a size; what a killed run left is one.

    Args:
        newest: the entry that stays whatever its size; the others lie beside it, folders of files.
        most_bytes: that all may take together.
    """
    others = [folder for folder in newest.parent.iterdir() if folder != newest]
    used = _size(newest)
    for folder in sorted(others, key=lambda folder: folder.stat().st_mtime, reverse=True):
        used += _size(folder)
        if used > most_bytes:
            remove_folder(folder)


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir())
