"""Folders that are complete or absent: written under a hidden name, then renamed into place in one step."""

import ctypes
import errno
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qlora_kit.errors import RunError
from qlora_kit.storage.hidden import hidden_beside, remove, sync_file, sync_folder

_HERE, _EXCHANGE = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of Linux


def check_folder(path: Path) -> None:
    """See that there is such a folder, whatever it holds.

    Raises:
        RunError: there is none, or it is a file.
    """
    if not path.is_dir():
        found = f"{path} is a file" if path.exists() else f"there is no folder {path}"
        raise RunError(f"{found}; give the folder of a run, the output of a `qlora-kit train`")


@contextmanager
def staged_folder(final: Path, *, replaces: bool = True) -> Iterator[Path]:
    """A folder to write into, which takes the name `final` when the block ends without an error.

    A folder that already stands there is replaced only then; after an error nothing of the new one is left. Where
    `final` is a link, it stays one, and the folder that it leads to is meant.

    Args:
        final: its place.
        replaces: whether a folder that is not empty may be replaced.

    Raises:
        RunError: one stands there by then and may not be.
    """
    final = Path(os.path.realpath(final))
    make_folder(final.parent)
    with hidden_beside(final, "tmp") as staged:
        try:
            staged.mkdir()  # in the block: an interrupt may come at any moment from here on
            yield staged
            for file in staged.rglob("*"):
                if file.is_file():
                    sync_file(file)
            sync_folder(staged)
            if replaces:
                _take_place(staged, final)
            else:
                _take_free_place(staged, final)
        finally:
            shutil.rmtree(staged, ignore_errors=True)


@contextmanager
def passing_folder(beside: Path) -> Iterator[Path]:
    """A folder that is gone when the block ends, hidden beside the name that is given."""
    with hidden_beside(beside, "tmp") as folder:
        folder.mkdir(parents=True)
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def make_folder(folder: Path) -> None:
    """Make a folder, and those above it that are not there; each is a lasting entry of the one that holds it."""
    missing = [each for each in (folder, *folder.parents) if not each.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for made in missing:
        sync_folder(made.parent)


def remove_folder(folder: Path) -> None:
    """Delete a folder if it is there: renamed first, so that no half-empty folder ever bears its name."""
    if folder.exists():
        with hidden_beside(folder, "gone") as doomed:
            os.rename(folder, doomed)
            remove(doomed)


def _take_place(staged: Path, final: Path) -> None:
    """Give a complete folder its name. What bore the name stands under that of `staged` then, or is gone."""
    if not final.exists():
        os.rename(staged, final)
    elif not _exchange(staged, final):
        with hidden_beside(final, "old") as doomed:
            os.rename(final, doomed)
            try:
                os.rename(staged, final)
            except OSError:
                os.rename(doomed, final)
                raise
            shutil.rmtree(doomed, ignore_errors=True)
    sync_folder(final.parent)


def _take_free_place(staged: Path, final: Path) -> None:
    """Give a complete folder its name, unless something came to stand there meanwhile."""
    try:
        os.rename(staged, final)  # which takes the place of an empty folder, and of no other
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        raise RunError(f"{final} was written by another program in the meantime; give another folder") from error
    sync_folder(final.parent)


def _exchange(first: Path, second: Path) -> bool:
    """Let two folders take each other's names at one stroke; False where the system cannot."""
    if not sys.platform.startswith("linux"):
        return False
    library = ctypes.CDLL(None, use_errno=True)
    # musl has no such function before 1.2.6; a file system may lack it, too, and then nothing was done.
    exchange = getattr(library, "renameat2", None)
    return exchange is not None and exchange(_HERE, bytes(first), _HERE, bytes(second), _EXCHANGE) == 0
