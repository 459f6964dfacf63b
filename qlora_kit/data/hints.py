"""Hints: what to write where no format has the columns of a row, found by trying.

Data sets call the same things by other names. A map from these is told only where the row can be read under it, so
that what a person is told to write works. It is never used unasked: the names are guesses.
"""

import json
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence

from qlora_kit.data.chats import speaker
from qlora_kit.data.formats import FORMATS, Columns, Format
from qlora_kit.data.values import at, has, under
from qlora_kit.errors import DataError, listed

OTHER_NAMES: dict[str, tuple[str, ...]] = {
    "instruction": (
        "question", "query", "problem", "prompt", "inputs", "input", "input_text", "user", "human", "article",
        "document", "dialogue", "context", "question.full_text", "text",
    ),
    "input": ("context", "passage"),
    "output": (
        "response", "answer", "completion", "target", "targets", "output_text", "long_answer", "answers.text.0",
        "answers", "solution", "summary", "highlights", "assistant", "query", "sql", "code",
    ),
    "system": ("system_prompt", "system_message", "systemInstruction.parts", "system_instruction"),
    "tools": ("input.tools",),
    "prompt": ("input.messages", "conversations", "messages"),
    "completion": ("response", "output", "answer"),
    "chosen": ("preferred_output", "preferred", "chosen_response"),
    "rejected": ("non_preferred_output", "dispreferred", "rejected_response"),
    "text": ("content", "sentence", "code", "raw_content", "review", "comment", "comment_text", "body", "sms", "tweet"),
    "label": ("labels", "category", "class", "sentiment", "intent", "target", "class index", "kto_tag"),
}  # fmt: skip
"""What data sets call the columns of the formats, the likeliest first; `a.b` is b in the object a."""
_DIALOGUES = ("conversation", "dialog", "dialogue", "data")
"""Columns whose texts are turns; texts in others may be anything."""
_TEXTS = ("instruction", "input", "output", "text")
_ANSWERS = ("output", "response", "answer", "completion", "summary", "highlights")
"""Columns that are answers and no facts about a text beside them."""
_SEPARATOR = re.compile(r"[;\t|]")
_PLAIN = re.compile(r"(?!(?:null|true|false)$)[^\W\d][\w.-]*(?: [\w.-]+)*", re.IGNORECASE)
"""Names that YAML reads as texts without quotes."""


def hint(row: Columns, formats: Sequence[Format]) -> str:
    """What would make a row readable, as words to put behind a fault; empty where nothing is known that would.

    Args:
        row: of which no format is, or of whose columns its format can make nothing.
        formats: those that may be meant, the likeliest first.
    """
    said = {name: value for name, value in row.items() if value is not None}
    if len(row) == 1 and (separator := _SEPARATOR.search(next(iter(row)))):
        return f"; columns are separated by {separator[0]!r}: save the file with commas"
    maps = ((known, names) for known in formats for names in _maps(said, known) if names)
    if found := next(((known, names) for known, names in maps if reads(said, known, names)), None):
        known, names = found
        others = unread(said, known, names)
        return f"; set {_setting(names)}" + (f" (not read: {listed(others)})" if others else "")
    if any("label" in known.required and "text" in known.required for known in formats):
        label = _name_of("label", said, {}, FORMATS["classification"])
        texts = [name for name, value in said.items() if isinstance(value, str) and name != label]
        return f"; a class is told from one text: join {listed(texts)} in a column text" if label and texts[1:] else ""
    for name, value in said.items():
        if isinstance(value, list) and value and any(_is_row(value[0], known) for known in formats):
            return f"; column {name!r} holds the rows: save that list alone as the file"
    if objects := [(name, value) for name, value in said.items() if isinstance(value, dict) and value]:
        name, value = objects[0]
        return f"; data.columns reads what is in an object, too, as {name}.{next(iter(value))}"
    return ""


def check_whole(row: Columns) -> None:
    """Refuse to learn a text that is one turn of several rows, or the question to an answer beside it.

    Raises:
        DataError: says how to read such rows, or how to learn their texts all the same.
    """
    if speaker(row) is not None and row.keys() & {"message_id", "parent_id"}:
        raise DataError(
            "the row is one turn of a conversation: write a conversation as one row with messages (or set "
            "data.format=text to learn each turn by itself)"
        )
    names = next(_maps(row, FORMATS["alpaca"]), {})
    answer = names.get("output", "output")
    if names.get("instruction") != "text" or answer not in _ANSWERS or not reads(row, FORMATS["alpaca"], names):
        return
    if row[answer] not in row["text"]:
        raise DataError(
            f"column 'text' would be learnt without {answer!r}: set {_setting(names)} to learn that as its answer (or "
            "data.format=text)"
        )


def reads(row: Columns, known: Format, names: dict[str, str] | None = None) -> bool:
    """Whether a format makes an example of a row, under a map of its columns."""
    renamed = under(row, names or {})
    if not renamed.keys() >= {*known.required}:
        return False
    try:
        known.build(renamed)
    except DataError:
        return False
    return True


def _is_row(value: object, known: Format) -> bool:
    return isinstance(value, dict) and reads(value, known)


def _maps(row: Columns, known: Format) -> Iterator[dict[str, str]]:
    """The maps that may be meant: expected name -> name in the row, where the two differ."""
    lists = [name for name in row if _may_be_turns(row, name)] if known.required == ("messages",) else []
    for first in [{"messages": name} for name in lists] or [{}]:
        names: dict[str, str] = dict(first)
        for expected in (*known.required, *known.optional):
            if expected not in names and (name := _name_of(expected, row, names, known)):
                names[expected] = name
        if names.keys() >= {*known.required}:
            yield {expected: name for expected, name in names.items() if expected != name}


def _may_be_turns(row: Columns, name: str) -> bool:
    value = row[name]
    return isinstance(value, list) and (name in _DIALOGUES or all(isinstance(each, dict) for each in value))


def _name_of(expected: str, row: Columns, taken: dict[str, str], known: Format) -> str | None:
    """What the row calls an expected column, in letters of either case."""
    lowered = {name.lower(): name for name in row}
    names = (lowered.get(name, name) for name in (expected, *OTHER_NAMES.get(expected, ())))
    free = (name for name in names if has(row, name) and name not in taken.values())
    found = next((name for name in free if expected not in _TEXTS or isinstance(at(row, name), str)), None)
    texts = [name for name, value in row.items() if isinstance(value, str)]
    is_alone = found is None and expected == "text" and "label" in known.required and len(texts) == 1
    return texts[0] if is_alone else found


def _setting(names: dict[str, str]) -> str:
    """The map as a command takes it."""
    pairs = (f"{expected}: {name if _PLAIN.fullmatch(name) else json.dumps(name)}" for expected, name in names.items())
    return shlex.quote(f"data.columns={{{', '.join(pairs)}}}")


def unread(row: Columns, known: Format, names: Mapping[str, str]) -> list[str]:
    """The columns of a row that hold something and that a format does not read under a map."""
    read = {*known.required, *known.optional} - names.keys()
    read |= {name if name in row else name.split(".")[0] for name in names.values()}
    return [name for name, value in row.items() if value is not None and name not in read]
