"""What may be written to a terminal of what a model says."""

import unicodedata

_KEPT = "\n\t"


def printable(text: str) -> str:
    """The text without control characters: no answer moves the cursor, renames the window or types into the shell.

    >>> printable("red: \\x1b[31mhot\\x1b[0m\\r\\n")
    'red: [31mhot[0m\\n'
    """
    return "".join(each for each in text if each in _KEPT or unicodedata.category(each) != "Cc")
