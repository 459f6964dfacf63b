"""Sources: what `data.train` names, files, folders and data sets of the Hugging Face hub, read row by row as examples.

The hub is read through `datasets`, which takes a second to import and is imported only then.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias

from qlora_kit.data.columns import ReadAs, check_format, read_as, read_row
from qlora_kit.data.examples import Example, Preference
from qlora_kit.data.faults import Faults
from qlora_kit.data.files import READERS, RawRow, files_in, rows_in, unread_in
from qlora_kit.data.formats import labelled_pair
from qlora_kit.errors import DataError, listed
from qlora_kit.recipe.schema import LARGEST_WEIGHT
from qlora_kit.units import counted


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

    def read_as(self) -> ReadAs | None:
        """How its first row is read that can be; None where there is none."""
        source, faults = self.source, Faults()
        for raw in (raw for _, raw_rows in self._open(faults) for _, raw in raw_rows):
            try:
                read_row(raw, "", source.format, source.columns, self._task)
            except DataError:
                continue
            return read_as(raw, source.format, source.columns, self._task)
        return None

    def files(self) -> list[Path]:
        """The files that decide its rows; none where a data set of the hub is not kept in any."""
        files = _files_of(self.source)
        return [Path(file["filename"]) for file in self._table.cache_files] if files is None else files

    def unread(self) -> str | None:
        """A sentence on the files of its folder that are not read; None where there are none."""
        path = Path(self.source.path).expanduser()
        names = [str(file.relative_to(path)) for file in unread_in(path)] if path.is_dir() else []
        if not names:
            return None
        why = f"not read, with an ending other than {', '.join(READERS)}"
        return f"{path}: {counted(len(names), 'file')} {why}: {listed(names)}"

    def _open(self, faults: Faults) -> Iterator[tuple[str, Iterator[RawRow]]]:
        """Each file or data set of the source: its name and its rows."""
        files = _files_of(self.source)
        if files is None:
            yield self.source.path, ((f"{self.source.path} row {n}", row) for n, row in enumerate(self._table, 1))
        for file in files or ():
            yield str(file), rows_in(file, faults)

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


def raw_rows(path: str | Path, faults: Faults) -> Iterator[RawRow]:
    """The rows of a file as they stand, each with its place; what cannot be read is left among the faults.

    Raises:
        DataError: there is no such file, or its ending is not known.
    """
    for file in _files_of(Source(str(path))) or ():
        yield from rows_in(file, faults)


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
        return files_in(path)
    if path.is_file():
        if path.suffix.lower() not in READERS:
            raise DataError(f"{path}: files that can be read end in {', '.join(READERS)}")
        return [path]
    if _is_hub_id(source.path):
        return None
    raise DataError(f"{path}: there is no such file or folder")


def _is_hub_id(path: str) -> bool:
    """`owner/name` or `name`, as long as it does not look like a file that is missing."""
    looks_local = path.startswith((".", "/", "~")) or Path(path).suffix.lower() in READERS
    return not looks_local and path.count("/") <= 1 and "\\" not in path and path != ""


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
            "; there is no file or folder of that name here either: correct the name, or, where the data set is gated "
            "or private, ask for access on its page and give your token with `hf auth login`"
        )
    if isinstance(error, ConnectionError):
        return "; there is no file or folder of that name here either: correct the name, or check the network"
    return ""
