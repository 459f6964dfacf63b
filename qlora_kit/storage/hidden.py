"""Hidden names: what is unfinished, renamed away or being deleted, and what killed processes left of it."""

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from glob import escape
from pathlib import Path
from typing import Literal

_LEFT = re.compile(r"\.(?P<name>.+)\.(?P<owner>\d+)\.(?P<kind>tmp|old|gone)")
_ours: set[tuple[str, str]] = set()
"""Hidden names that this process is at work on."""


@contextmanager
def hidden_beside(path: Path, kind: Literal["tmp", "old", "gone"]) -> Iterator[Path]:
    """A name beside `path` for what is unfinished, renamed away, or being deleted; nothing bears it at first."""
    clear_abandoned(path.parent, path.name)
    hidden = path.with_name(f".{path.name}.{os.getpid()}.{kind}")
    place = _place(hidden)
    _ours.add(place)
    try:
        yield hidden
    finally:
        _ours.discard(place)


def clear_abandoned(folder: Path, name: str | None = None) -> None:
    """Remove what processes that were killed left unfinished, or half deleted, in a folder, and put back what one had
    only renamed away, if nothing came to stand in its place.

    Args:
        folder: to look in, itself alone.
        name: what it was to be; None looks for all.
    """
    for path in folder.glob(f".{'*' if name is None else escape(name)}.*"):
        left = _LEFT.fullmatch(path.name)
        if left is None or _is_under_way(path, int(left["owner"])):
            continue
        place = path.with_name(left["name"])
        if left["kind"] == "old" and not os.path.lexists(place):
            os.rename(path, place)
        else:
            remove(path)


def staged_for(path: Path) -> str | None:
    """What this is to be, or was, where it bears the hidden name of something unfinished; None where its name is its
    own."""
    left = _LEFT.fullmatch(path.name)
    return None if left is None else left["name"]


def remove(path: Path) -> None:
    """Delete a file, a folder with all that is in it, or a link, which is not followed."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def sync_file(path: Path) -> None:
    """Have a file's bytes on the disk."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Have on the disk which names a folder holds."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _place(path: Path) -> tuple[str, str]:
    """Where a name stands, however its folder is spelt."""
    return os.path.realpath(path.parent), path.name


def _is_under_way(path: Path, owner: int) -> bool:
    """Whether a living process is at work on what bears a hidden name. A name with this process's own number may be of
    a dead one that had the same: in containers all have."""
    return _place(path) in _ours if owner == os.getpid() else _is_alive(owner)


def _is_alive(process: int) -> bool:
    """Whether a process of that number runs."""
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):  # no system counts as far as the latter
        return False
    except PermissionError:  # it is another user's
        return True
    return True
