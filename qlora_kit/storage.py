"""Files that are complete or absent: everything is staged under another name, flushed, and renamed into place."""

import ctypes
import errno
import hashlib
import json
import os
import re
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from glob import escape
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from qlora_kit.errors import RunError
from qlora_kit.units import format_bytes

_HERE, _EXCHANGE = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of Linux
_LEFT = re.compile(r"\.(?P<name>.+)\.(?P<owner>\d+)\.(?P<kind>tmp|old|gone)")
_ours: set[tuple[str, str]] = set()
"""Hidden names that this process is at work on."""
SCHEMA = 1
"""Version of every JSON file that the kit writes, under the key `schema`."""


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write one JSON object with the schema's version, whole or not at all.

    Raises:
        ValueError: a number in it is not finite; JSON has no word for those.
    """
    write_text(path, json_text(content))


def json_text(content: Mapping[str, Any]) -> str:
    """What `write_json` writes."""
    return json.dumps({"schema": SCHEMA, **content}, indent=2, allow_nan=False) + "\n"


def write_text(path: Path, text: str) -> None:
    """Write a text file, whole or not at all."""
    with _beside(path, "tmp") as staged:
        try:
            with open(staged, "w", encoding="utf-8") as file:
                file.write(text)
            name_file(staged, path)
        finally:
            staged.unlink(missing_ok=True)


def name_file(staged: Path, final: Path) -> None:
    """Give a complete file its name, which it bears only once its bytes are on the disk."""
    _sync_file(staged)
    os.replace(staged, final)
    _sync_folder(final.parent)


def write_tensors(path: Path, tensors: Mapping[str, Any], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file: of the same tensors and metadata, the same bytes.

    Raises:
        RunError: it cannot be written; the library's own error is none that says so.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file(dict(tensors), path, metadata=None if metadata is None else dict(metadata))
        if metadata is not None:
            _sort_metadata(path)
    except (SafetensorError, OSError) as error:
        raise RunError(f"{path} cannot be written: {error}; see that the disk has room") from error


def _sort_metadata(path: Path) -> None:
    """Put in order what the library writes in another one each time."""
    with open(path, "r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(size)
        if len(text) == size:  # the library's JSON is Python's
            file.seek(8)
            file.write(text)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        RunError: the file is missing, is no JSON, or holds something else than an object.
    """
    try:
        if path.exists() and not path.is_file():
            raise OSError("it is no plain file")  # a pipe would be waited for
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise RunError(f"{path} is missing") from error
    except (OSError, ValueError, RecursionError) as error:  # thousands of open brackets are the last
        raise RunError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise RunError(f"{path} holds a {type(content).__name__}, wanted a JSON object")
    return content


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
    with _beside(final, "tmp") as staged:
        try:
            staged.mkdir()  # in the block: an interrupt may come at any moment from here on
            yield staged
            for file in staged.rglob("*"):
                if file.is_file():
                    _sync_file(file)
            _sync_folder(staged)
            if replaces:
                _take_place(staged, final)
            else:
                _take_free_place(staged, final)
        finally:
            shutil.rmtree(staged, ignore_errors=True)


@contextmanager
def passing_folder(beside: Path) -> Iterator[Path]:
    """A folder that is gone when the block ends, hidden beside the name that is given."""
    with _beside(beside, "tmp") as folder:
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
        _sync_folder(made.parent)


def remove_folder(folder: Path) -> None:
    """Delete a folder if it is there: renamed first, so that no half-empty folder ever bears its name."""
    if folder.exists():
        with _beside(folder, "gone") as doomed:
            os.rename(folder, doomed)
            _remove(doomed)


def _take_place(staged: Path, final: Path) -> None:
    """Give a complete folder its name. What bore the name stands under that of `staged` then, or is gone."""
    if not final.exists():
        os.rename(staged, final)
    elif not _exchange(staged, final):
        with _beside(final, "old") as doomed:
            os.rename(final, doomed)
            try:
                os.rename(staged, final)
            except OSError:
                os.rename(doomed, final)
                raise
            shutil.rmtree(doomed, ignore_errors=True)
    _sync_folder(final.parent)


def _take_free_place(staged: Path, final: Path) -> None:
    """Give a complete folder its name, unless something came to stand there meanwhile."""
    try:
        os.rename(staged, final)  # which takes the place of an empty folder, and of no other
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        raise RunError(f"{final} was written by another program meanwhile; give another folder") from error
    _sync_folder(final.parent)


def _exchange(first: Path, second: Path) -> bool:
    """Let two folders take each other's names at one stroke; False where the system cannot."""
    if not sys.platform.startswith("linux"):
        return False
    library = ctypes.CDLL(None, use_errno=True)
    # musl has no such function before 1.2.6; a file system may lack it, too, and then nothing was done.
    exchange = getattr(library, "renameat2", None)
    return exchange is not None and exchange(_HERE, bytes(first), _HERE, bytes(second), _EXCHANGE) == 0


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
            _remove(path)


def staged_for(path: Path) -> str | None:
    """What this is to be, or was, where it bears the hidden name of something unfinished; None where its name is its
    own."""
    left = _LEFT.fullmatch(path.name)
    return None if left is None else left["name"]


def _remove(path: Path) -> None:
    """Delete a file, a folder with all that is in it, or a link, which is not followed."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def _beside(path: Path, kind: Literal["tmp", "old", "gone"]) -> Iterator[Path]:
    """A name beside `path` for what is unfinished, renamed away, or being deleted; nothing bears it at first."""
    clear_abandoned(path.parent, path.name)
    hidden = path.with_name(f".{path.name}.{os.getpid()}.{kind}")
    place = _place(hidden)
    _ours.add(place)
    try:
        yield hidden
    finally:
        _ours.discard(place)


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
        reason = "does not let you" if there.is_dir() else "is a file"
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
            "free; nothing is written"
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


def sha256_file(path: Path) -> str:
    """Checksum of a file's bytes, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def checksums(folder: Path, known: Mapping[Path, str] | None = None) -> dict[str, str]:
    """Checksum of every file of a folder, by its name in it.

    Args:
        folder: to read.
        known: checksums of files that need not be read, since they were taken while they were written.
    """
    files, known = sorted(path for path in folder.rglob("*") if path.is_file()), known or {}
    return {path.relative_to(folder).as_posix(): known.get(path) or sha256_file(path) for path in files}


def read_checksums(manifest: Path) -> dict[str, str]:
    """The checksums that a JSON file holds under `files`, of files below a folder by their name in it.

    Raises:
        RunError: it cannot be read, holds none, or names a file elsewhere.
    """
    expected = read_json(manifest).get("files")
    if not isinstance(expected, dict) or not all(isinstance(checksum, str) for checksum in expected.values()):
        raise RunError(f"{manifest} is malformed: it needs `files`, from names of files to checksums")
    for name in expected:
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or not name.isprintable():
            raise RunError(f"{manifest} names {name!r}, which leads out of its folder or cannot be shown: refused")
    return expected


def changed_files(folder: Path, expected: Mapping[str, str]) -> list[str]:
    """What is wrong with files that were written with these checksums: those missing, and those changed since."""
    faults = []
    for name, checksum in expected.items():
        path = folder / name
        if not path.is_file():
            faults.append(f"{path} is missing")
        elif sha256_file(path) != checksum:
            faults.append(f"{path} does not have the bytes that were written")
    return faults


def _sync_file(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
