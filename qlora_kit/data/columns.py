"""Columns: which format a row has, so that its function in `formats.py` makes an example of it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import SequenceMatcher

from qlora_kit.data.examples import Example
from qlora_kit.data.formats import FORMATS, Columns, Format
from qlora_kit.data.hints import check_whole, hint, reads, unread
from qlora_kit.data.values import check_characters, kind, named, nearest, under
from qlora_kit.errors import DataError
from qlora_kit.recipe import TASKS


def read_row(
    row: object,
    where: str,
    format: str = "auto",
    columns: Mapping[str, str] | None = None,
    task: str = "sft",
) -> Example:
    """Turn the columns of one row into an example.

    Args:
        row: column name -> value, as the file has it.
        where: `file:line` or `source row N`; every message begins with it.
        format: a name in `FORMATS`, or `auto`: the first that the task can use and whose required columns are there and
            not null.
        columns: expected name -> name in the file; `a.b.0` is the first of the list b in the object a.
        task: of `train.task`.

    Raises:
        DataError: if a column is missing or has the wrong type, a role is unknown, nothing could be learnt from it, or
            it is nested hundreds of levels deep.
    """
    try:
        if not isinstance(row, Mapping):
            raise DataError(f"found {kind(row)}, wanted an object with named columns")
        check_format(format, columns, task)
        known = _candidates(format, task)
        chosen, renamed = _match(row, known, columns or {})
        for name in (*chosen.required, *chosen.optional):  # whatever else a row holds is not read
            check_characters(renamed.get(name), f"column {name!r}")
        if task == "sft" and format == "auto" and not columns and chosen is FORMATS["text"]:
            check_whole(renamed)
        return replace(_built(chosen, renamed, [] if columns else known), where=where)
    except DataError as error:
        raise DataError(f"{where}: {error}") from None
    except RecursionError:
        raise DataError(f"{where}: objects and lists are nested too deeply to be read") from None


@dataclass(frozen=True, slots=True)
class ReadAs:
    """How a row is read.

    Attributes:
        format: a name in `FORMATS`.
        columns: that hold something and are read.
        unread: that hold something and are not.
    """

    format: str
    columns: list[str]
    unread: list[str]


def read_as(row: Columns, format: str = "auto", columns: Mapping[str, str] | None = None, task: str = "sft") -> ReadAs:
    """How a row is read that `read_row` can read; takes what that takes."""
    names = columns or {}
    chosen, _ = _match(row, _candidates(format, task), names)
    others = unread(row, chosen, names)
    read = [name for name, value in row.items() if value is not None and name not in others]
    return ReadAs(next(name for name, known in FORMATS.items() if known is chosen), read, others)


def formats_of(task: str) -> tuple[str, ...]:
    """Names of the formats that a task can use, in the order in which `auto` tries them."""
    return TASKS[task].formats


def check_format(format: str, columns: Mapping[str, str] | None = None, task: str = "sft") -> None:
    """Refuse a format or an expected column that does not exist, or of which the task can make nothing.

    Raises:
        DataError: names the known formats or columns and the nearest one.
    """
    if format != "auto" and format not in FORMATS:
        raise DataError(
            f"data.format={format} is not known{nearest(format, FORMATS)}; known: auto, {', '.join(FORMATS)}"
        )
    if format != "auto" and format not in formats_of(task):
        raise DataError(
            f"data.format={format} does not work with train.task={task}; it takes: {', '.join(formats_of(task))}"
        )
    mapped = set(columns or ())
    candidates = _candidates(format, task)
    if any(mapped <= _columns_of(known) for known in candidates):
        return
    expected = sorted(set().union(*map(_columns_of, candidates)))
    for name in sorted(mapped - set(expected)):
        raise DataError(
            f"data.columns: {name} is not an expected column{nearest(name, expected)}; expected: "
            f"{', '.join(expected)} (written as expected name: name in the file)"
        )
    raise DataError(f"data.columns: no single format has the columns {', '.join(sorted(mapped))}")


def _match(row: Columns, known: Sequence[Format], columns: Mapping[str, str]) -> tuple[Format, Columns]:
    """The format of the row, and the row under the names that the format expects."""
    try:
        renamed = under(row, columns)
    except LookupError as error:
        expected, name = next((expected, name) for expected, name in columns.items() if name == error.args[0])
        raise DataError(
            f"column {name!r} (data.columns maps it to {expected}) is missing{nearest(name, row)}; found: {named(row)}"
        ) from None
    # A map says what is meant: a format that knows nothing of the mapped columns is not a candidate.
    candidates = [each for each in known if columns.keys() <= _columns_of(each)]
    # A table of several formats holds null in the columns of the others; where no format is left, null is what is told.
    said = {name: value for name, value in renamed.items() if value is not None}
    for found in (said, renamed):
        for each in candidates:
            if found.keys() >= set(each.required):
                return each, found
    raise DataError(_unmatched(renamed, candidates, known, is_mapped=bool(columns)))


def _built(chosen: Format, row: Columns, known: Sequence[Format]) -> Example:
    """The example that a row is; where it may have its prompt under another name, that goes with the fault."""
    try:
        return chosen.build(row)
    except DataError as error:
        lacks_prompt = "prompt" in chosen.optional and "prompt" not in row
        raise DataError(f"{error}{hint(row, known) if lacks_prompt else ''}") from None


def _unmatched(row: Columns, candidates: Sequence[Format], known: Sequence[Format], *, is_mapped: bool) -> str:
    """What is wrong with a row that no candidate can be made of."""
    none_fits = f"missing the columns of any format; found columns: {named(row)}"
    if found := "" if is_mapped else hint(row, known):
        return f"{none_fits}{_other_tasks(row, known)}{found}"
    wanted = max(candidates, key=lambda each: _likeness(each, row))
    missing = [name for name in wanted.required if name not in row]
    near = "".join(nearest(name, set(row) - set(wanted.required), likeness=0.75) for name in missing)
    others = f"(data.columns maps other names{_other_tasks(row, known)})"
    if near or len(candidates) == 1 or _columns_of(wanted) & row.keys():
        expected = ", ".join(wanted.required)
        return (
            f"missing {', '.join(map(repr, missing))}{near}; found columns: {named(row)}; expected: {expected} {others}"
        )
    formats = ", or ".join(" and ".join(each.required) for each in candidates)
    return f"{none_fits}; expected: {formats} {others}"


def _other_tasks(row: Columns, known: Sequence[Format]) -> str:
    """What a row may have been meant for: tasks that take none of the known formats, and learn from it."""
    formats = {name: [FORMATS[each] for each in task.formats] for name, task in TASKS.items()}
    names = [
        name
        for name, taken in formats.items()
        if not any(each in known for each in taken) and any(reads(row, each) for each in taken)
    ]
    return f"; such rows are for train.task={', '.join(names)}" if names else ""


def _candidates(format: str, task: str) -> list[Format]:
    return [FORMATS[name] for name in (formats_of(task) if format == "auto" else [format])]


def _columns_of(known: Format) -> set[str]:
    return {*known.required, *known.optional}


def _likeness(known: Format, row: Columns) -> float:
    """How near the columns of a row are to those a format requires, 0 to 1, and the share of them that it knows."""
    best = [max((SequenceMatcher(None, name, found).ratio() for found in row), default=0.0) for name in known.required]
    return sum(best) / len(best) + len(_columns_of(known) & row.keys()) / max(1, len(row))
