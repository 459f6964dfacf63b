"""Text from elsewhere, such as rows and file names, in a form that can do nothing to a terminal."""

import unicodedata

_KEPT = "\u200c\u200d"  # joiners, without which some scripts and many emoji come apart
_HIDDEN = ("Cc", "Cf", "Zl", "Zp", "Cs")


def visible(text: str, *, keep: str = "") -> str:
    """`text` with control characters, marks that turn writing round and the like spelt as Python spells them.

    Args:
        text: anything.
        keep: characters that stay as they are.

    >>> visible("red \\x1b[31m, bell \\x07")
    'red \\\\x1b[31m, bell \\\\x07'
    """
    return "".join(
        character if character in keep or character in _KEPT or unicodedata.category(character) not in _HIDDEN
        else ascii(character)[1:-1]
        for character in text
    )  # fmt: skip
