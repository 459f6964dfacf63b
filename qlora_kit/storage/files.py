"""Single files: JSON, text and tensors, staged under a hidden name, flushed, and renamed into place."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qlora_kit.errors import RunError
from qlora_kit.storage.hidden import hidden_beside, sync_file, sync_folder

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
    with hidden_beside(path, "tmp") as staged:
        try:
            with open(staged, "w", encoding="utf-8") as file:
                file.write(text)
            name_file(staged, path)
        finally:
            staged.unlink(missing_ok=True)


def name_file(staged: Path, final: Path) -> None:
    """Give a complete file its name, which it bears only once its bytes are on the disk."""
    sync_file(staged)
    os.replace(staged, final)
    sync_folder(final.parent)


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
        raise RunError(f"{path} cannot be written: {error}; check that the disk has room") from error


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
            raise OSError("it is not a regular file")  # a pipe would be waited for
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise RunError(f"{path} is missing") from error
    except (OSError, ValueError, RecursionError) as error:  # thousands of open brackets are the last
        raise RunError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise RunError(f"{path} holds a {type(content).__name__}, wanted a JSON object")
    return content
