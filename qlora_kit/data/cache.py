"""Cache: the encoded rows of a large set, kept by all that decides them, so that only the first run has to encode.

An entry is a folder, complete or absent, named by a hash: of the bytes of the sources, of what was asked for, and of
the code that encodes. It holds

    train.rows, eval.rows  records, see `table.py`; read page by page, and never wholly in memory
    index.safetensors      where they end, and lengths
    set.json               counts, faults, places, and checksums

One that is damaged is made again. Where the folder cannot be written, or QLORA_KIT_CACHE=0, rows are kept in memory.
"""

import hashlib
import json
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from qlora_kit.data.classes import Classes
from qlora_kit.data.encoded_set import Counts, EncodedSet, Part
from qlora_kit.data.faults import Faults
from qlora_kit.data.sources import Reader
from qlora_kit.data.table import RowTable
from qlora_kit.errors import RunError
from qlora_kit.storage import (
    checksums,
    drop_least_used,
    private_folder,
    read_json,
    sha256_file,
    staged_folder,
    write_json,
    write_tensors,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Sets: TypeAlias = tuple[EncodedSet, EncodedSet]
"""Rows to train on, and those held out."""

LARGE_BYTES = 4 * 2**20
"""Sources below this are encoded in a second or two, and no one looks for a cache of them."""
MOST_BYTES = 20 * 2**30
"""That all entries together may take; the one that was used last stays whatever its size."""

_CODE = sorted(path for kind in ("*.py", "templates/*.jinja") for path in Path(__file__).parent.glob(kind))
_LIBRARIES = ("transformers", "tokenizers", "jinja2")
_SIDES = ("train", "eval")
_FILES = ("train.rows", "eval.rows", "index.safetensors")


def cache_key(
    readers: Iterable[Reader], tokenizer: "PreTrainedTokenizerBase", settings: Mapping[str, Any]
) -> str | None:
    """What an entry is named by; None where rows are few, not in files, or asked not to be kept.

    The weights of sources are no part of it: they decide how often a row is seen, and not what it is.

    Args:
        readers: of all sources.
        tokenizer: that encodes; its chat template aside, which may be settled only when the rows are known.
        settings: all else that decides the rows.
    """
    # A slow tokenizer, or one that a model brings along, is code that has no hash here.
    is_data = tokenizer.is_fast and type(tokenizer).__module__.startswith("transformers.")
    if not is_data or os.environ.get("QLORA_KIT_CACHE") == "0":
        return None
    files = [reader.files() for reader in readers]
    try:
        if not all(files) or sum(file.stat().st_size for each in files for file in each) < LARGE_BYTES:
            return None
        contents = [[(str(file), sha256_file(file)) for file in each] for each in files]
        code = [sha256_file(file) for file in _CODE] + [version(name) for name in _LIBRARIES]
    except OSError:  # whoever reads the rows says it better
        return None
    sources = [replace(reader.source, weight=1) for reader in readers]
    writes = type(tokenizer).__name__, tokenizer.backend_tokenizer.to_str(), tokenizer.special_tokens_map
    decides = contents, sources, writes, sorted(settings.items()), code
    return hashlib.sha256(repr(decides).encode()).hexdigest()


def cached(key: str | None, make: Callable[[EncodedSet], EncodedSet]) -> Sets:
    """The sets that have a key: read, or made and kept.

    Args:
        key: from `cache_key`; None keeps nothing.
        make: fills an empty set with the rows to train on, and gives those held out. It may be called twice.
    """
    if key is not None:
        # The folder may refuse, or the disk be full; what cannot be made in memory either is the error to be told.
        with suppress(OSError, RunError):
            entry = private_folder("data") / key
            return _load(entry) or _make(entry, make)
    train = EncodedSet()
    return train, make(train)


def _make(entry: Path, make: Callable[[EncodedSet], EncodedSet]) -> Sets:
    with staged_folder(entry) as staged:
        train = EncodedSet(rows=RowTable(staged / "train.rows"))
        sets = train, make(train)
        _save(staged, sets)
    with suppress(OSError):  # another run may be at it, too
        drop_least_used(entry, MOST_BYTES)
    return sets


def _save(folder: Path, sets: Sets) -> None:
    index: dict[str, torch.Tensor] = {}
    told: dict[str, Any] = {}
    for side, rows in zip(_SIDES, sets, strict=True):
        table = rows.rows if isinstance(rows.rows, RowTable) else RowTable(folder / f"{side}.rows", add=rows.rows)
        table.flush()
        for name, numbers in (("ends", table.ends), ("lengths", table.lengths), ("given", rows.lengths_given)):
            index[f"{side}.{name}"] = torch.tensor(numbers, dtype=torch.int64)
        told[side] = {
            "parts": [asdict(part) for part in rows.parts],
            "has_chats": rows.has_chats,
            "classes": rows.classes and asdict(rows.classes),
            "fingerprint": rows.fingerprint,
            "faults": vars(rows.faults),
            "places": rows.places,
        }
    write_tensors(folder / "index.safetensors", index)
    write_json(folder / "set.json", {**told, "sha256": {**checksums(folder), "told": _mark(told)}})


def _load(folder: Path) -> Sets | None:
    """The sets of an entry; None where there is none, or one that is damaged."""
    try:
        told = read_json(folder / "set.json")
        sums = told["sha256"]
        if any(sha256_file(folder / name) != sums[name] for name in _FILES) or _mark(told) != sums["told"]:
            return None
        index = {name: tensor.tolist() for name, tensor in load_file(folder / "index.safetensors").items()}
        train, held = (_read_set(folder, side, told[side], index) for side in _SIDES)
        os.utime(folder)
    except (RunError, SafetensorError, OSError, LookupError, TypeError, ValueError):
        return None
    held.rows = list(held.rows)  # an evaluation holds them all in any case
    return train, held


def _mark(told: Mapping[str, Any]) -> str:
    """Checksum of what set.json says of both sides, by its text there."""
    return hashlib.sha256(json.dumps([told[side] for side in _SIDES]).encode()).hexdigest()


def _read_set(folder: Path, side: str, told: dict[str, Any], index: Mapping[str, Sequence[int]]) -> EncodedSet:
    faults, classes = Faults(), told["classes"]
    vars(faults).update(told["faults"])
    return EncodedSet(
        rows=RowTable(folder / f"{side}.rows", index[f"{side}.ends"], index[f"{side}.lengths"]),
        parts=[Part(part["name"], part["weight"], Counts(**part["counts"])) for part in told["parts"]],
        has_chats=told["has_chats"],
        classes=classes and Classes(tuple(classes["names"]), classes["is_multi"]),
        fingerprint=told["fingerprint"],
        faults=faults,
        places=defaultdict(list, told["places"]),
        lengths_given=list(index[f"{side}.given"]),
    )
