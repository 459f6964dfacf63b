"""Files that are complete or absent: everything is staged under another name, flushed, and renamed into place."""

import glob
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from qlora_kit.errors import RunError

SCHEMA = 1
"""Version of every JSON file that the kit writes, under the key `schema`."""


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write one JSON object with the schema's version, whole or not at all.

    Raises:
        ValueError: a number in it is not finite; JSON has no word for those.
    """
    write_text(path, json.dumps({"schema": SCHEMA, **content}, indent=2, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a text file, whole or not at all."""
    staged = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with open(staged, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(staged, path)
    _sync_folder(path.parent)


def write_tensors(path: Path, tensors: Mapping[str, Any], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file.

    Raises:
        RunError: it cannot be written; the library's own error is none that says so.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file(dict(tensors), path, metadata=None if metadata is None else dict(metadata))
    except SafetensorError as error:
        raise RunError(f"{path} cannot be written: {error}; see that the disk has room") from error


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        RunError: the file is missing, is no JSON, or holds something else than an object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise RunError(f"{path} is missing") from error
    except (OSError, ValueError) as error:
        raise RunError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise RunError(f"{path} holds a {type(content).__name__}, wanted a JSON object")
    return content


@contextmanager
def staged_folder(final: Path) -> Iterator[Path]:
    """A folder to write into, which takes the name `final` when the block ends without an error.

    A folder that already stands there is replaced only then; after an error nothing of the new one is left.
    """
    final.parent.mkdir(parents=True, exist_ok=True)
    remove_abandoned(final)
    staged = final.with_name(f".{final.name}.{os.getpid()}.tmp")
    shutil.rmtree(staged, ignore_errors=True)
    staged.mkdir()
    try:
        yield staged
        for file in staged.rglob("*"):
            if file.is_file():
                _sync_file(file)
        _sync_folder(staged)
        remove_folder(final)
        os.rename(staged, final)
        _sync_folder(final.parent)
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def remove_folder(folder: Path) -> None:
    """Delete a folder if it is there: renamed first, so that no half-empty folder ever bears its name."""
    if not folder.exists():
        return
    doomed = folder.with_name(f".{folder.name}.{os.getpid()}.old")
    os.rename(folder, doomed)
    shutil.rmtree(doomed)


def remove_abandoned(final: Path) -> None:
    """Delete what processes that were killed had staged for `final`: the name of each holds that of its process."""
    for staged in final.parent.glob(f".{glob.escape(final.name)}.*.tmp"):
        process = staged.name.split(".")[-2]
        if process.isdecimal() and not psutil.pid_exists(int(process)):
            shutil.rmtree(staged, ignore_errors=True)


def sha256_file(path: Path) -> str:
    """Checksum of a file's bytes, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync_file(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
