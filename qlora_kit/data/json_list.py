"""A JSON file with a list of rows, read row by row, so that as much of it stands in memory as one row takes.

A row is read from a window of the file. Where it does not end there the window grows; behind a row it moves on.
"""

import codecs
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from qlora_kit.data.values import DECODER, not_utf8
from qlora_kit.errors import DataError

WINDOW_BYTES = 2**20
"""Of a file, that are read at one time."""
CUT_SHORT = 16
"""Characters before the end of a window within which JSON that goes on behind it may look malformed, or complete."""
_SPACE = re.compile(r"[ \t\n\r]*")


def json_values(path: Path) -> Iterator[Any]:
    """The elements of the list that a file holds, or the one value that it holds in place of a list; none of spaces.

    Raises:
        DataError: it is not JSON, not UTF-8, or has an object with a key twice; says where.
    """
    with path.open("rb") as file:
        window = _Window(path, file)
        if window.next() == "[":
            yield from _elements(window)
        elif window.next():
            yield window.value()
        if window.next():
            raise window.fault("extra text after its end")


def _elements(window: "_Window") -> Iterator[Any]:
    window.step()
    if window.next() != "]":
        yield window.value()
        while window.next() == ",":
            window.step()
            yield window.value()
    if window.next() != "]":
        raise window.fault("wanted a comma or the end of the list")
    window.step()


class _Window:
    """A part of a file as text, and a place in it."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self.path, self.file = path, file
        self.decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self.text, self.at, self.is_last = "", 0, False
        self.line, self.column = 1, 1  # of the first character of the text

    def next(self) -> str:
        """The next character that is no space, which the place moves to; "" at the end of the file."""
        while True:
            self.at = _end_of_space(self.text, self.at)
            if self.at < len(self.text) or self.is_last:
                return self.text[self.at : self.at + 1]
            self._more()

    def step(self) -> None:
        """Go behind the character that is there."""
        self.at += 1

    def value(self) -> Any:
        """The value that begins here; the place moves behind it."""
        self.next()
        while True:
            try:
                value, end = DECODER.raw_decode(self.text, self.at)
            except json.JSONDecodeError as error:
                goes_on = error.msg.startswith("Unterminated string") or error.pos >= len(self.text) - CUT_SHORT
                if self.is_last or not goes_on:
                    self.at = error.pos
                    raise self.fault(error.msg.removesuffix(" at")) from None
            except DataError as error:
                raise DataError(f"{self.path}: {error}") from None
            except (ValueError, RecursionError) as error:  # thousands of digits; thousands of open brackets
                raise DataError(f"{self.path}: not readable JSON: {error}") from None
            else:
                if self.is_last or end < len(self.text) - CUT_SHORT:  # behind the 1 of 1.5 it may be cut
                    self.at = end
                    return value
            self._more()

    def fault(self, what: str) -> DataError:
        """An error that says what is wrong at this place."""
        line, column = _moved(self.line, self.column, self.text[: self.at])
        return DataError(f"{self.path}:{line}: not JSON: {what} at column {column}")

    def _more(self) -> None:
        """Let go of what lies behind, and read on: as much again as there is, so that a long row is soon whole."""
        self.line, self.column = _moved(self.line, self.column, self.text[: self.at])
        self.text, self.at = self.text[self.at :], 0
        data = self.file.read(max(WINDOW_BYTES, len(self.text)))
        self.is_last = not data
        try:
            self.text += self.decoder.decode(data, final=self.is_last)
        except UnicodeDecodeError as error:
            before = self.text + error.object[: error.start].decode()
            line, _ = _moved(self.line, self.column, before)
            raise not_utf8(error, f"{self.path}:{line}") from None


def _end_of_space(text: str, at: int) -> int:
    found = _SPACE.match(text, at)
    return at if found is None else found.end()


def _moved(line: int, column: int, text: str) -> tuple[int, int]:
    """The place behind `text`, which begins at another."""
    lines = text.count("\n")
    return line + lines, column + len(text) if lines == 0 else len(text) - text.rfind("\n")
