"""Load: rows from files, folders and the Hugging Face hub, and which of them are held out.

What is text (.jsonl, .json, .csv, .txt, .md) is read here, so that a fault has a file and a line; .parquet goes through
pyarrow, batch by batch and with no copy on the disk; the hub through `datasets`, which takes a second to import and is
imported only then.
"""

import csv
import hashlib
import io
import json
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from qlora_kit.data.columns import check_format, read_row
from qlora_kit.data.examples import Classified, Example, Labelled, Preference, is_chat
from qlora_kit.data.faults import Faults
from qlora_kit.data.formats import labelled_pair, prompt_of
from qlora_kit.errors import DataError
from qlora_kit.recipe.schema import LARGEST_WEIGHT

RawRow: TypeAlias = tuple[str, Any]
"""Where a row stands, and what was found there."""


@dataclass(frozen=True, slots=True)
class Source:
    """One place that rows come from."""

    path: str
    """A file, a folder, or a hub id."""
    split: str = "train"
    """Only hub data sets have splits."""
    weight: float = 1.0
    """How often an epoch sees each row, on the whole: see `collate.Deck`."""
    format: str = "auto"
    """A name in `formats.FORMATS`, or auto."""
    columns: Mapping[str, str] = field(default_factory=dict)
    """Expected name -> name in the file."""


Sources: TypeAlias = str | Path | Source | Mapping[str, Any] | Sequence["str | Path | Source | Mapping[str, Any]"]


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
            stands for its .jsonl, .json, .csv and .parquet files, or for its .txt and .md files, by name.
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


class Reader:
    """One source, whose rows are read anew each time: they are many, and need not stand in memory.

    Attributes:
        source: what was asked for.
    """

    def __init__(self, source: Source, task: str) -> None:
        self.source, self._task = source, task

    def read(self, faults: Faults) -> Iterator[Example]:
        """Its rows in order, and among `faults` those that cannot be read.

        Raises:
            DataError: it is missing, unreadable or empty.
        """
        for name, raw_rows in self._open(faults):
            try:
                yield from _read_rows(name, raw_rows, self.source, self._task, faults)
            except OSError as error:
                raise DataError(f"{name} cannot be read: {error.strerror or error}") from error

    def files(self) -> list[Path]:
        """The files that decide its rows; none where a data set of the hub is not kept in any."""
        files = _files_of(self.source)
        return [Path(file["filename"]) for file in self._table.cache_files] if files is None else files

    def _open(self, faults: Faults) -> Iterator[tuple[str, Iterator[RawRow]]]:
        """Each file or data set of the source: its name and its rows."""
        files = _files_of(self.source)
        if files is None:
            yield self.source.path, ((f"{self.source.path} row {n}", row) for n, row in enumerate(self._table, 1))
        for file in files or ():
            yield str(file), _read(file, faults)

    @cached_property
    def _table(self) -> Any:
        return _hub(self.source)


def open_sources(
    source: Sources, *, format: str = "auto", columns: Mapping[str, str] | None = None, task: str = "sft"
) -> list[Reader]:
    """The sources that are meant, each to be read as often as need be; takes what `load_rows` takes.

    Raises:
        DataError: a source cannot be meant so.
    """
    return [Reader(each, task) for each in _sources(source, format, columns or {}, task)]


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
        raise DataError(faults.told(f"no row is left to train on, all of {faults.count:,} cannot be used"))


def raw_rows(path: str | Path, faults: Faults) -> Iterator[RawRow]:
    """The rows of a file as they stand, each with its place; what cannot be read is left among the faults.

    Raises:
        DataError: there is no such file, or its ending is not known.
    """
    for file in _files_of(Source(str(path))) or ():
        yield from _read(file, faults)


def split_eval(rows: Sequence[Example], share: float = 0.02, most: int = 200) -> tuple[list[Example], list[Example]]:
    """Hold out some rows for evaluation, as `held_out` chooses.

    Returns:
        (train, eval), each in the order of `rows`.
    """
    sides: tuple[list[Example], list[Example]] = ([], [])
    for row, is_held in zip(rows, held_out([_digest(row) for row in rows], share, most), strict=True):
        sides[is_held].append(row)
    return sides


def held_out(digests: Sequence[int], share: float = 0.02, most: int = 200) -> list[bool]:
    """Which rows to hold out for evaluation, chosen by what they say.

    The hash of its contents ranks each row, so neither the order of the file, nor a seed, nor the weight of its source
    moves the split, and equal rows are on the same side of it. Of an answer with a verdict the prompt alone is hashed:
    all answers to one, such as those of a pair that was taken apart, are on the same side.

    Args:
        digests: of all rows.
        share: of the rows, 0 < share < 1; at least one row is held out if two rows differ.
        most: rows held out, unless every row occurs more often than that.
    """
    values, copies = np.unique(np.array(digests, dtype=np.uint64), return_counts=True)
    if len(values) < 2:
        return [False] * len(digests)
    room = min(most, max(1, round(share * len(digests))), len(digests) - 1)
    held: list[int] = []
    for value, count in zip(values, copies, strict=True):
        if count <= room:
            held.append(value)
            room -= count
        if not room:
            break
    return np.isin(digests, held or [values[copies.argmin()]]).tolist()


def _digest(row: Example) -> int:
    said = {"prompt": prompt_of(row.answer)} if isinstance(row, Labelled) else _plain(row)
    contents = {**said, "where": type(row).__name__}
    text = json.dumps(contents, sort_keys=True, default=_plain)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8])


def _plain(value: Any) -> Any:
    """What JSON has no word for: an example in another by its fields, and a date, say, as Python writes it."""
    return {name: getattr(value, name) for name in value.__slots__} if isinstance(value, Example) else repr(value)


# ---- sources -------------------------------------------------------------------------------------------------------


def _sources(source: Sources, format: str, columns: Mapping[str, str], task: str) -> list[Source]:
    """Every source as a `Source`, checked."""
    listed = [source] if isinstance(source, str | Path | Source | Mapping) else list(source)
    found = [_source(each, format, columns) for each in listed]
    for each in found:
        check_format(each.format, each.columns, task)
        if not 0 < each.weight <= LARGEST_WEIGHT:
            raise DataError(f"{each.path}: weight is {each.weight}, wanted a number above 0, at most {LARGEST_WEIGHT}")
    return found


def _source(given: "str | Path | Source | Mapping[str, Any]", format: str, columns: Mapping[str, str]) -> Source:
    if isinstance(given, Source):
        return given
    fields = given if isinstance(given, Mapping) else {"path": str(given)}
    unknown = set(fields) - set(Source.__slots__)
    if unknown or "path" not in fields:
        raise DataError(f"a source has the keys {', '.join(Source.__slots__)}; found: {', '.join(map(str, fields))}")
    # A recipe writes null for what is not said.
    said: dict[str, Any] = {key: value for key, value in fields.items() if value is not None}
    return Source(**{"format": format, "columns": columns} | said)


def _read_rows(name: str, raw_rows: Iterator[RawRow], source: Source, task: str, faults: Faults) -> Iterator[Example]:
    faults_before, is_empty = faults.count, True
    for where, raw in raw_rows:
        is_empty = False
        try:
            row = read_row(raw, where, source.format, source.columns, task)
        except DataError as error:
            faults.add(error)
            continue
        yield from labelled_pair(row) if task == "kto" and isinstance(row, Preference) else [row]
    if is_empty and faults.count == faults_before:
        raise DataError(f"{name} is empty: it holds no rows")


def _files_of(source: Source) -> list[Path] | None:
    """The files that a source stands for; None for a data set of the hub."""
    path = Path(source.path).expanduser()
    if path.is_dir():
        return _files(path)
    if path.is_file():
        if path.suffix.lower() not in _READERS:
            raise DataError(f"{path}: files that can be read end in {', '.join(_READERS)}")
        return [path]
    if _is_hub_id(source.path):
        return None
    raise DataError(f"{path}: there is no such file or folder")


def _files(folder: Path) -> list[Path]:
    """The files of a folder that hold rows, or the documents, sorted; not both, since a README is seldom meant."""
    visible = (
        file for file in folder.rglob("*") if not any(part.startswith(".") for part in file.parts[len(folder.parts) :])
    )
    files = sorted(file for file in visible if file.is_file() and file.suffix.lower() in _READERS)
    documents = [file for file in files if _READERS[file.suffix.lower()] is _document]
    if any(folder.rglob("*.arrow")):
        raise DataError(f"{folder} holds .arrow files, which are not read: write them again with Dataset.to_parquet")
    if not files:
        raise DataError(f"{folder} is empty: no file in it ends in {', '.join(_READERS)}")
    if documents and len(documents) < len(files):
        rows = next(file for file in files if file not in documents)
        raise DataError(
            f"{folder} holds rows ({rows.name}) and documents ({documents[0].name}): "
            "list the files that are meant under data.train"
        )
    return files


def _is_hub_id(path: str) -> bool:
    """`owner/name` or `name`, as long as it does not look like a file that is missing."""
    looks_local = path.startswith((".", "/", "~")) or Path(path).suffix.lower() in _READERS
    return not looks_local and path.count("/") <= 1 and "\\" not in path and path != ""


# ---- readers -------------------------------------------------------------------------------------------------------


def _read(path: Path, faults: Faults) -> Iterator[RawRow]:
    """The rows of a file, by its ending; of one that is UTF-16 one fault, and not one a line."""
    with path.open("rb") as file:
        if file.read(2) in (b"\xff\xfe", b"\xfe\xff"):
            faults.add(f"{path} is UTF-16: save it as UTF-8 (iconv -f UTF-16 -t UTF-8)", hides_rows=True)
            return
    yield from _READERS[path.suffix.lower()](path, faults)


def _json_lines(path: Path, faults: Faults) -> Iterator[RawRow]:
    with path.open("rb") as file:
        # By bytes and "\n" alone: other line ends (U+2028, a lone "\r") may stand inside JSON text.
        for number, line in enumerate(file, 1):
            where = f"{path}:{number}"
            try:
                text = _decode(line, where).strip()
                if text:
                    yield where, _parse(text, where)
            except DataError as error:
                faults.add(error)


def _json_file(path: Path, faults: Faults) -> Iterator[RawRow]:
    """One list of objects, one object over several lines, or one object a line as in .jsonl."""
    with path.open("rb") as file:
        start = file.readline().removeprefix(b"\xef\xbb\xbf").strip()
        is_whole = start.startswith(b"[") or start == b"{" or not start
    if not is_whole:
        yield from _json_lines(path, faults)
        return
    try:
        text = _decode(path.read_bytes(), path)
        rows = _parse(text, path) if text.strip() else []
    except DataError as error:
        faults.add(error, hides_rows=True)
        return
    for number, row in enumerate(rows if isinstance(rows, list) else [rows], 1):
        yield f"{path} row {number}", row


def _csv(path: Path, faults: Faults) -> Iterator[RawRow]:
    """Every value as text: `datasets` would read an answer of 4 as a number and one of NA as nothing."""
    try:
        text = _decode(path.read_bytes(), path)
    except DataError as error:
        faults.add(error, hides_rows=True)
        return
    csv.field_size_limit(max(csv.field_size_limit(), len(text)))  # otherwise a cell ends at 128 KiB
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    columns: list[str] = []
    start = 1  # the line in which a row begins: its cells may hold line breaks
    try:
        for values in reader:
            where, start = f"{path}:{start}", reader.line_num + 1
            if not columns:
                columns = values
                if twice := [name for name, count in Counter(columns).items() if count > 1]:
                    faults.add(f"{where}: the column {twice[0]!r} is there twice", hides_rows=True)
                    return
            elif len(values) == len(columns):
                yield where, dict(zip(columns, values, strict=True))
            elif values:
                faults.add(f"{where}: {len(values)} values, and there are {len(columns)} columns")
    except csv.Error as error:
        faults.add(f"{path}:{start}: not CSV: {error}", hides_rows=True)


def _document(path: Path, faults: Faults) -> Iterator[RawRow]:
    try:
        text = _decode(path.read_bytes(), path)
    except DataError as error:
        faults.add(error)
        return
    if text.strip():
        yield str(path), {"text": text}


def _parquet(path: Path, faults: Faults) -> Iterator[RawRow]:
    """Rows, counted from 1."""
    from pyarrow import ArrowException, parquet

    number = 0
    try:
        with parquet.ParquetFile(path) as table:
            for batch in table.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path} row {number}", row
    except (ArrowException, ValueError, OverflowError) as error:  # of Python's own: a date that it has not
        faults.add(f"{path}: not Parquet that can be read, after row {number}: {error}", hides_rows=True)


def _hub(source: Source) -> Any:
    """A data set, as `datasets` keeps it: a table on the disk that is read row by row. Its id may be `ID:CONFIG`."""
    import datasets
    from datasets.exceptions import DatasetGenerationError, DatasetsError

    try:
        return datasets.load_dataset(*source.path.split(":", 1), split=source.split)
    # A ValueError is an unknown split or configuration; a RuntimeError a data set that is a script.
    except (DatasetsError, OSError, ValueError, RuntimeError) as error:
        cause = error.__cause__ if isinstance(error, DatasetGenerationError) else None
        told = " ".join(str(cause or error).split()).rstrip(".")
        raise DataError(f"{source.path} (split {source.split}) cannot be read: {told}{_way_out(error)}") from error


def _way_out(error: Exception) -> str:
    from datasets.exceptions import DatasetNotFoundError

    if isinstance(error, DatasetNotFoundError):
        return (
            "; there is no file or folder of that name here either: mend the name, or, where the data set is gated or "
            "private, ask for access on its page and give your token with `hf auth login`"
        )
    if isinstance(error, ConnectionError):
        return "; there is no file or folder of that name here either: mend the name, or see that there is a network"
    return ""


_READERS: dict[str, Callable[[Path, Faults], Iterator[RawRow]]] = {
    ".jsonl": _json_lines,
    ".json": _json_file,
    ".csv": _csv,
    ".parquet": _parquet,
    ".txt": _document,
    ".md": _document,
}


def _decode(data: bytes, where: object) -> str:
    """UTF-8, strictly; a byte order mark is dropped. `where` is a file, or a file and line."""
    try:
        return data.removeprefix(b"\xef\xbb\xbf").decode()
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        place = where if isinstance(where, str) else f"{where}:{line}"
        raise DataError(
            f"{place}: not UTF-8 (byte 0x{error.object[error.start]:02x}): save the file as UTF-8"
        ) from None


def _parse(text: str, where: object) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        place = where if isinstance(where, str) else f"{where}:{error.lineno}"
        what = error.msg.removesuffix(" at")
        raise DataError(f"{place}: not JSON: {what} at column {error.colno}") from None
    except (ValueError, RecursionError) as error:  # a number with thousands of digits; thousands of open brackets
        raise DataError(f"{where}: not JSON that can be read: {error}") from None
