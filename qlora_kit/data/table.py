"""Table: encoded rows in a file, each read when it is asked for.

As Python's lists a token takes 8 to 44 bytes; here it takes 5 of a file, of which only what is in use stands in memory.
A row is a record: its sizes, then

    ids     int32 each
    trained a byte each
    prompt  int32 each
    facts   JSON: where, answer, verdict, class, whether there is a prompt, whether another sequence follows

and the record of that other sequence.
"""

import json
import mmap
import struct
from array import array
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TypeAlias, overload

import numpy as np

from qlora_kit.data.encoded import Encoded

_SIZES = struct.Struct("<3i")
_ID = np.dtype("<i4")


class RowTable(Sequence[Encoded]):
    """Rows in a file, which may be renamed or deleted meanwhile.

    Args:
        path: of the file; it is made where it is not there, and then rows can be added.
        ends: where the record of each row in it ends, in bytes.
        lengths: tokens of the longest sequence of each row.
        add: rows to begin with.

    Attributes:
        ends: of the records.
        lengths: of the rows.
    """

    def __init__(
        self, path: Path, ends: Sequence[int] = (), lengths: Sequence[int] = (), *, add: Iterable[Encoded] = ()
    ) -> None:
        self.ends, self.lengths = array("q", ends), array("q", lengths)
        self._file = path.open("rb" if path.exists() else "w+b")
        self._pages: bytes | mmap.mmap = b""
        for row in add:
            self.append(row)

    def append(self, row: Encoded) -> None:
        """Put a row at the end.

        Raises:
            OSError: the disk is full.
        """
        record = b"".join(_packed(row))
        self._file.write(record)
        self.ends.append((self.ends[-1] if self.ends else 0) + len(record))
        self.lengths.append(row.longest)

    def flush(self) -> None:
        """Hand what was added to the system.

        Raises:
            OSError: the disk is full.
        """
        if self._file.writable():
            self._file.flush()

    def __len__(self) -> int:
        return len(self.ends)

    @overload
    def __getitem__(self, place: int) -> Encoded: ...
    @overload
    def __getitem__(self, place: slice) -> list[Encoded]: ...
    def __getitem__(self, place: int | slice) -> Encoded | list[Encoded]:
        if isinstance(place, slice):
            return [self[each] for each in range(*place.indices(len(self)))]
        number = range(len(self))[place]
        start = self.ends[number - 1] if number else 0
        return _unpacked(memoryview(self._mapped())[start : self.ends[number]])[0]

    def __iter__(self) -> Iterator[Encoded]:
        return map(self.__getitem__, range(len(self)))

    def _mapped(self) -> bytes | mmap.mmap:
        """The file's pages, mapped anew where it has grown."""
        if len(self._pages) < self.ends[-1]:
            self.flush()
            self._pages = mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ)
        return self._pages


Rows: TypeAlias = list[Encoded] | RowTable
"""Rows where they are few, or where they are many."""


def lengths_of(rows: Sequence[Encoded]) -> Sequence[int]:
    """Tokens of the longest sequence of each row; a table need not be read for it."""
    return rows.lengths if isinstance(rows, RowTable) else [row.longest for row in rows]


def _packed(row: Encoded) -> Iterator[bytes]:
    facts = [row.where, row.answer, row.is_good, row.target, row.prompt is not None, row.other is not None]
    text, prompt = json.dumps(facts).encode(), row.prompt or []
    yield _SIZES.pack(len(row.input_ids), len(prompt), len(text))
    yield np.array(row.input_ids, _ID).tobytes()
    yield bytes(row.trained)
    yield np.array(prompt, _ID).tobytes()
    yield text
    if row.other is not None:
        yield from _packed(row.other)


def _unpacked(record: memoryview) -> tuple[Encoded, memoryview]:
    """A row, and what is behind its record."""
    tokens, asked, told = _SIZES.unpack_from(record)
    sizes = (_SIZES.size, tokens * _ID.itemsize, tokens, asked * _ID.itemsize, told)
    parts = []
    for size in sizes:
        parts.append(record[:size])
        record = record[size:]
    _, ids, trained, prompt, facts = parts
    where, answer, is_good, target, has_prompt, has_other = json.loads(bytes(facts))
    other = None
    if has_other:
        other, record = _unpacked(record)
    row = Encoded(
        np.frombuffer(ids, _ID).tolist(),
        np.frombuffer(trained, bool).tolist(),
        np.frombuffer(prompt, _ID).tolist() if has_prompt else None,
        answer,
        where,
        other,
        is_good,
        tuple(target) if isinstance(target, list) else target,
    )
    return row, record
