"""Load: rows from files, folders and the Hugging Face hub, and which of them are held out.

What is text (.jsonl, .json, .csv, .txt, .md) is read here, so that a fault has a file and a line; .parquet goes through
pyarrow, batch by batch and with no copy on the disk; the hub through `datasets`, which takes a second to import and is
imported only then.
"""

import csv
import hashlib
import io
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from qlora_kit.data.faults import Faults
from qlora_kit.data.formats import Example, Preference, check_format, labelled_pair, read_row
from qlora_kit.errors import DataError

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
    """How often each row is seen in an epoch; the part after the point is a share of the rows, chosen by content."""
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
    rows: list[Example] = []
    for part in _sources(source, format, columns or {}, task):
        rows += _weigh(_read_source(part, task, gathered), part.weight)
    if faults is None:
        gathered.stop()
    if not rows:
        why = f"all of {gathered.count:,} cannot be used" if gathered.count else "the weights leave none"
        raise DataError(gathered.told(f"no row is left to train on, {why}"))
    return rows


def raw_rows(path: str | Path, faults: Faults) -> Iterator[RawRow]:
    """The rows of a file as they stand, each with its place; what cannot be read is left among the faults.

    Raises:
        DataError: there is no such file, or its ending is not known.
    """
    for _, rows in _open(Source(str(path)), faults):
        yield from rows


def split_eval(rows: Sequence[Example], share: float = 0.02, most: int = 200) -> tuple[list[Example], list[Example]]:
    """Hold out some rows for evaluation, chosen by what they say.

    A hash of its contents ranks each row, so neither the order of the file nor a seed moves the split, and equal rows
    are on the same side of it.

    Args:
        rows: what there is.
        share: of the rows, 0 < share < 1; at least one row is held out if two rows differ.
        most: rows held out, unless every row occurs more often than that.

    Returns:
        (train, eval), each in the order of `rows`.
    """
    digests = [_digest(row) for row in rows]
    copies = Counter(digests)
    if len(copies) < 2:
        return list(rows), []
    room = min(most, max(1, round(share * len(rows))), len(rows) - 1)
    held: set[str] = set()
    for digest in sorted(copies):
        if copies[digest] <= room:
            held.add(digest)
            room -= copies[digest]
    held = held or {min(sorted(copies), key=copies.__getitem__)}
    sides: tuple[list[Example], list[Example]] = ([], [])
    for row, digest in zip(rows, digests, strict=True):
        sides[digest in held].append(row)
    return sides


def _digest(row: Example, salt: str = "") -> str:
    """A hash of what a row says, whatever file and line it stands in."""
    contents = {**asdict(row), "where": type(row).__name__}
    return hashlib.sha256((salt + json.dumps(contents, sort_keys=True, default=repr)).encode()).hexdigest()


def _weigh(rows: list[Example], weight: float) -> list[Example]:
    whole, part = divmod(weight, 1)
    # Another salt than that of the split: the rows that are seen once more should not be those held out first.
    once_more = [row for row in rows if int(_digest(row, "weight")[:8], 16) < part * 2**32] if part else []
    return rows * int(whole) + once_more


# ---- sources -------------------------------------------------------------------------------------------------------


def _sources(source: Sources, format: str, columns: Mapping[str, str], task: str) -> list[Source]:
    """Every source as a `Source`, checked."""
    listed = [source] if isinstance(source, str | Path | Source | Mapping) else list(source)
    found = [_source(each, format, columns) for each in listed]
    for each in found:
        check_format(each.format, each.columns, task)
        if not 0 < each.weight < float("inf"):
            raise DataError(f"{each.path}: weight is {each.weight}, wanted a number above 0")
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


def _read_source(source: Source, task: str, faults: Faults) -> list[Example]:
    rows: list[Example] = []
    for name, raw_rows in _open(source, faults):
        try:
            rows += _read_rows(name, raw_rows, source, task, faults)
        except OSError as error:
            raise DataError(f"{name} cannot be read: {error.strerror or error}") from error
    return rows


def _read_rows(name: str, raw_rows: Iterator[RawRow], source: Source, task: str, faults: Faults) -> list[Example]:
    rows: list[Example] = []
    faults_before, is_empty = faults.count, True
    for where, raw in raw_rows:
        is_empty = False
        try:
            row = read_row(raw, where, source.format, source.columns, task)
            rows += labelled_pair(row) if task == "kto" and isinstance(row, Preference) else [row]
        except DataError as error:
            faults.add(error)
    if is_empty and faults.count == faults_before:
        raise DataError(f"{name} is empty: it holds no rows")
    return rows


def _open(source: Source, faults: Faults) -> Iterator[tuple[str, Iterator[RawRow]]]:
    """Each file or data set of a source: its name and its rows."""
    path = Path(source.path).expanduser()
    if path.is_dir():
        for file in _files(path):
            yield str(file), _read(file, faults)
    elif path.is_file():
        if path.suffix.lower() not in _READERS:
            raise DataError(f"{path}: files that can be read end in {', '.join(_READERS)}")
        yield str(path), _read(path, faults)
    elif _is_hub_id(source.path):
        yield source.path, _hub(source)
    else:
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


def _hub(source: Source) -> Iterator[RawRow]:
    """Rows, counted from 1."""
    import datasets
    from datasets.exceptions import DatasetsError

    try:
        table = datasets.load_dataset(source.path, split=source.split)
    except (DatasetsError, OSError, ValueError) as error:
        cause = " ".join(str(error.__cause__ or error).split())
        raise DataError(f"{source.path} (split {source.split}) cannot be read: {cause}") from error
    for number, row in enumerate(table, 1):
        yield f"{source.path} row {number}", row


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
