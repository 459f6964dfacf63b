"""Tables and sentences as lines for a terminal of 80 columns."""

import re
from collections.abc import Iterable
from textwrap import wrap

TERMINAL_COLUMNS = 80

Table = list[list[str]]


def in_words(name: str) -> str:
    """A key of a JSON file as words: `exact_match` is `exact match`."""
    return name.replace("_", " ")


def wrapped(sentences: Iterable[str]) -> list[str]:
    """Sentences as lines of a terminal."""
    # A number stays on one line with its unit.
    joined = (re.sub(r"(?<=\d) (?=[KMGT]?i?B\b)", "\N{NO-BREAK SPACE}", sentence) for sentence in sentences)
    return [line.replace("\N{NO-BREAK SPACE}", " ") for each in joined for line in wrap(each, TERMINAL_COLUMNS)]


def aligned(table: Table, rules_before: tuple[str, ...] = ()) -> str:
    """`table` as lines: the first column to the left, the others to the right, a rule under the header.

    A rule stands also above each row whose first cell is in `rules_before`.
    """
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    rule = "  ".join("-" * width for width in widths)
    lines = []
    for index, (name, *cells) in enumerate(table):
        if index == 1 or name in rules_before:
            lines.append(rule)
        numbers = (cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True))
        lines.append("  ".join([name.ljust(widths[0]), *numbers]))
    return "\n".join(lines)
