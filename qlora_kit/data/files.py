"""Files: which hold rows, and those rows as they stand, each with its place.

What is text (.jsonl, .json, .csv, .tsv, .txt, .md) is read here, so that a fault has a file and a line; .parquet goes
through pyarrow, batch by batch and with no copy on the disk.
"""

import csv
import io
import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

from qlora_kit.data.faults import Faults
from qlora_kit.data.json_list import json_values
from qlora_kit.data.values import from_json, not_utf8, twice
from qlora_kit.errors import DataError

RawRow: TypeAlias = tuple[str, Any]
"""Where a row stands, and what was found there."""


def files_in(folder: Path) -> list[Path]:
    """The files of a folder that hold rows, or the documents, sorted; not both, since a README is seldom meant.

    Raises:
        DataError: there are none, or both, or data sets as `datasets` saves them, or splits beside that for training.
    """
    files = [file for file in _visible(folder) if file.suffix.lower() in READERS]
    documents = [file for file in files if READERS[file.suffix.lower()] is _document]
    if any(folder.rglob("*.arrow")):
        raise DataError(
            f"{folder} holds .arrow files, which are not supported: save them again with Dataset.to_parquet"
        )
    if not files:
        raise DataError(f"{folder} is empty: no file in it ends in {', '.join(READERS)}")
    if documents and len(documents) < len(files):
        rows = next(file for file in files if file not in documents)
        raise DataError(
            f"{folder} holds rows ({rows.name}) and documents ({documents[0].name}): "
            "list the files to use under data.train"
        )
    names = [file.relative_to(folder) for file in files]
    trained, others = ([name for name in names if _split_of(name) == which] for which in ("train", "held_out"))
    if trained and others and not documents:
        raise DataError(
            f"{folder} holds rows to train on ({trained[0]}) and to hold out ({others[0]}): list the files to use "
            "under data.train and data.eval"
        )
    return files


_SPLIT = re.compile(
    r"(?:(?P<train>train)|(?P<held_out>test|valid|validation|val|dev|eval))(?:[-_.]\d+(?:-of-\d+.*)?)?", re.IGNORECASE
)
"""A name of rows to train on or to hold out, alone or with a number as the hub has it."""


def _split_of(file: Path) -> str | None:
    """Which rows a file holds by its name, else by that of the nearest folder that says so; None where none does."""
    parts = (file.stem, *reversed(file.parts[:-1]))
    return next((found.lastgroup for part in parts if (found := _SPLIT.fullmatch(part))), None)


def unread_in(folder: Path) -> list[Path]:
    """The files of a folder that hold no rows, going by their names; sorted."""
    return [file for file in _visible(folder) if file.suffix.lower() not in READERS]


def _visible(folder: Path) -> list[Path]:
    found = (
        file for file in folder.rglob("*") if not any(part.startswith(".") for part in file.relative_to(folder).parts)
    )
    return sorted(file for file in found if file.is_file())


def rows_in(path: Path, faults: Faults) -> Iterator[RawRow]:
    """The rows of a file, by its ending, which is in `READERS`; of one that is UTF-16 one fault, and not one a line."""
    with path.open("rb") as file:
        if file.read(2) in (b"\xff\xfe", b"\xfe\xff"):
            faults.add(f"{path} is UTF-16: save it as UTF-8 (iconv -f UTF-16 -t UTF-8)", hides_rows=True)
            return
    yield from READERS[path.suffix.lower()](path, faults)


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
        is_cut = start.startswith(b"{") and not start.endswith(b"}")
        is_whole = start.startswith(b"[") or is_cut or not start
    if not is_whole:
        yield from _json_lines(path, faults)
        return
    try:
        for number, row in enumerate(json_values(path), 1):
            yield f"{path} row {number}", row
    except DataError as error:
        faults.add(error, hides_rows=True)


def _csv(path: Path, faults: Faults, between: str | None = None) -> Iterator[RawRow]:
    """Every value as text: `datasets` would read an answer of 4 as a number and one of NA as nothing."""
    between = between or _separator(path)
    csv.field_size_limit(max(csv.field_size_limit(), path.stat().st_size))  # otherwise a cell ends at 128 KiB
    columns: list[str] = []
    start = 1  # the line in which a row begins: its cells may hold line breaks
    try:
        with path.open("rb") as file:
            reader = csv.reader(_lines_of_text(file, path), delimiter=between, strict=True)
            for values in reader:
                where, start = f"{path}:{start}", reader.line_num + 1
                if not columns:
                    columns = values
                    _check_columns(columns, where)
                elif len(values) == len(columns):
                    yield where, dict(zip(columns, values, strict=True))
                elif values:
                    faults.add(f"{where}: {len(values)} values for {len(columns)} columns")
    except DataError as error:
        faults.add(error, hides_rows=True)
    except csv.Error as error:
        faults.add(f"{path}:{start}: not {path.suffix[1:].upper()}: {error}", hides_rows=True)


def _separator(path: Path) -> str:
    """A comma, or where no name has one what spreadsheets write in countries whose numbers do."""
    with path.open("rb") as file:
        header = next((line for line in file if line.strip()), b"").strip()
    names = header.split(b";")
    return ";" if len(names) > 1 and b"," not in header and all(name.strip() for name in names) else ","


def _tsv(path: Path, faults: Faults) -> Iterator[RawRow]:
    """As .csv, with tabs: a cell that holds one, or a line's end, stands in quotation marks."""
    return _csv(path, faults, between="\t")


def _lines_of_text(file: BinaryIO, path: Path) -> Iterator[str]:
    """Lines as `csv` takes them, one by one: it knows a lone "\r" for a line's end, too."""
    for number, line in enumerate(file, 1):
        text = _decode(line, f"{path}:{number}", "utf-8-sig" if number == 1 else "utf-8")
        yield from io.StringIO(text, newline="")


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
            _check_columns(table.schema_arrow.names, str(path))
            for batch in table.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path} row {number}", row
    except DataError as error:
        faults.add(error, hides_rows=True)
    except (ArrowException, ValueError, OverflowError) as error:  # of Python's own: a date that it has not
        faults.add(f"{path}: not readable Parquet, after row {number}: {error}", hides_rows=True)


def _check_columns(names: Sequence[str], where: str) -> None:
    if name := twice(names):
        raise DataError(f"{where}: the column {name!r} appears twice")


READERS: dict[str, Callable[[Path, Faults], Iterator[RawRow]]] = {
    ".jsonl": _json_lines,
    ".json": _json_file,
    ".csv": _csv,
    ".tsv": _tsv,
    ".parquet": _parquet,
    ".txt": _document,
    ".md": _document,
}
"""What reads a file, by its ending."""


def _decode(data: bytes, where: object, codec: str = "utf-8-sig") -> str:
    """UTF-8, strictly; by this codec without a byte order mark. `where` is a file, or a file and line."""
    try:
        return data.decode(codec)
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        place = where if isinstance(where, str) else f"{where}:{line}"
        raise not_utf8(error, place) from None


def _parse(text: str, where: str) -> Any:
    try:
        return from_json(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: not JSON: {error.msg.removesuffix(' at')} at column {error.colno}") from None
    except DataError as error:
        raise DataError(f"{where}: {error}") from None
    except (ValueError, RecursionError) as error:  # a number with thousands of digits; thousands of open brackets
        raise DataError(f"{where}: not readable JSON: {error}") from None
