"""Load: the rows of all sources, at once or scanned one by one, and which of them are held out."""

import hashlib
import json
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from qlora_kit.data.examples import Classified, Example, Labelled, Preference, is_chat
from qlora_kit.data.faults import Faults
from qlora_kit.data.formats import prompt_of
from qlora_kit.data.sources import Reader, Sources, open_sources
from qlora_kit.errors import DataError


def load_rows(
    source: Sources,
    *,
    format: str = "auto",
    columns: Mapping[str, str] | None = None,
    task: str = "sft",
    faults: Faults | None = None,
) -> list[Example]:
    """Read every row of one or several sources.

    Args:
        source: a path, a hub id, a `Source`, a mapping with the fields of `Source`, or a list of these. A folder
            stands for its .jsonl, .json, .csv, .tsv and .parquet files, or for its .txt and .md files, by name.
        format: for sources that do not name their own.
        columns: expected name -> name in the file; for sources that do not name their own.
        task: of `train.task`: rows that it can use are looked for.
        faults: bad rows are left in here and the others returned; without it, bad rows are an error.

    Returns:
        rows in the order of the sources. A .txt or .md file is one row.

    Raises:
        DataError: if rows are bad (the first 20, and their number), none is left, or a source is missing, unreadable or
            empty.
    """
    gathered = Faults() if faults is None else faults
    readers = open_sources(source, format=format, columns=columns, task=task)
    rows = [row for reader in readers for row in reader.read(gathered)]
    if faults is None:
        gathered.stop()
    _check_any(len(rows), gathered)
    return rows


@dataclass(slots=True)
class Scan:
    """What there is to know of rows before they are encoded.

    Attributes:
        digests: by which rows are held out, 64 bits, whatever file and line a row stands in.
        has_chats: whether any goes through a chat template.
        labels: of texts that are classified.
        is_multi: whether such a text may have several, or none.
        faults: what is wrong with those that cannot be read.
    """

    digests: "array[int]" = field(default_factory=lambda: array("Q"))
    has_chats: bool = False
    labels: set[str] = field(default_factory=set)
    is_multi: bool = False
    faults: Faults = field(default_factory=Faults)


def scan(readers: Sequence[Reader]) -> Scan:
    """Read all rows of the sources once, and keep none.

    Raises:
        DataError: there is none that can be used, or a source is missing, unreadable or empty.
    """
    found = Scan()
    for reader in readers:
        for row in reader.read(found.faults):
            found.digests.append(_digest(row))
            found.has_chats = found.has_chats or is_chat(row)
            if isinstance(row, Classified):
                found.labels.update(row.labels)
                found.is_multi = found.is_multi or row.is_multi
    if readers:
        _check_any(len(found.digests), found.faults)
    return found


def _check_any(rows: int, faults: Faults) -> None:
    if not rows:
        raise DataError(faults.told(f"no row is left to train on: none of the {faults.count:,} can be used"))


def split_eval(rows: Sequence[Example], share: float = 0.02, most: int = 200) -> tuple[list[Example], list[Example]]:
    """Hold out some rows for evaluation, as `held_out` chooses.

    Returns:
        (train, eval), each in the order of `rows`.
    """
    sides: tuple[list[Example], list[Example]] = ([], [])
    for row, is_held in zip(rows, held_out([_digest(row) for row in rows], share, most), strict=True):
        sides[is_held].append(row)
    return sides


def held_out(digests: Sequence[int], share: float = 0.02, most: int = 200, least: int = 1) -> list[bool]:
    """Which rows to hold out for evaluation, chosen by what they say.

    The hash of its contents ranks each row, so neither the order of the file, nor a seed, nor the weight of its source
    moves the split, and equal rows are on the same side of it. Of pairs of answers, and of answers with a verdict, the
    prompt alone is hashed: all answers to one are on the same side.

    Args:
        digests: of all rows.
        share: of the rows, 0 < share < 1.
        most: rows held out, unless every row occurs more often than that.
        least: rows held out, as far as there are rows that differ.
    """
    values, copies = np.unique(np.array(digests, dtype=np.uint64), return_counts=True)
    if len(values) < 2:
        return [False] * len(digests)
    room = min(most, max(least, round(share * len(digests))), len(digests) - 1)
    held: list[int] = []
    for value, count in zip(values, copies, strict=True):
        if count <= room:
            held.append(value)
            room -= count
        if not room:
            break
    return np.isin(digests, held or [values[copies.argmin()]]).tolist()


def _digest(row: Example) -> int:
    match row:
        case Labelled(answer) | Preference(answer):
            said = {"prompt": prompt_of(answer)}
        case _:
            said = _plain(row)
    contents = {**said, "where": type(row).__name__}
    text = json.dumps(contents, sort_keys=True, default=_plain)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8])


def _plain(value: Any) -> Any:
    """What JSON has no word for: an example in another by its fields, and a date, say, as Python writes it.

    How many turns of a chat are given is left out: it says the same, whichever of them are learnt.
    """
    if not isinstance(value, Example):
        return repr(value)
    return {name: getattr(value, name) for name in value.__slots__ if name != "given"}
