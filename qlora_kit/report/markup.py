"""Elements of HTML and SVG whose text is escaped by construction.

A child or attribute that is a plain `str` is data and is escaped; only what `element` itself has made is a `Markup` and
goes in as it is. So a model name or a data row can hold anything and still cannot become a tag.
"""

import re
from collections.abc import Iterable
from html import escape

# What XML 1.0 cannot hold even when escaped: control characters and lone halves of surrogate pairs (JSON has both).
_UNPRINTABLE = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


class Markup(str):
    """Text that is already markup and must not be escaped again."""

    __slots__ = ()


def escaped(text: str) -> Markup:
    """`text` as markup: itself if it is markup already, with its special characters escaped otherwise.

    >>> escaped("a < b")
    'a &lt; b'
    """
    return text if isinstance(text, Markup) else Markup(escape(_UNPRINTABLE.sub("\N{REPLACEMENT CHARACTER}", text)))


def joined(parts: Iterable[str]) -> Markup:
    """`parts` one after the other, each escaped where it needs to be."""
    return Markup("".join(map(escaped, parts)))


def element(tag: str, *children: str, **attributes: str | float) -> Markup:
    """One element. In attribute names a trailing `_` is dropped and an inner one becomes `-`.

    >>> element("p", "1 < 2", class_="note", aria_label="a claim")
    '<p class="note" aria-label="a claim">1 &lt; 2</p>'
    """
    named = "".join(
        f' {name.rstrip("_").replace("_", "-")}="{escaped(str(value))}"' for name, value in attributes.items()
    )
    return Markup(f"<{tag}{named}>{joined(children)}</{tag}>")


def clipped(text: str, longest: int) -> str:
    """`text` on one line, cut to `longest` characters with an ellipsis if it is longer.

    >>> clipped("a very long name", 8)
    'a very …'
    """
    text = " ".join(text.split())
    return text if len(text) <= longest else text[: longest - 1] + "…"
