"""Checksums of files, and whether they are still what was written."""

import hashlib
from collections.abc import Mapping
from pathlib import Path, PurePosixPath

from qlora_kit.errors import RunError
from qlora_kit.storage.files import read_json


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
        raise RunError(f"{manifest} is malformed: it needs `files`, from file names to checksums")
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
