"""What a page is made of, and how it is written: one file that needs no network, no script and no other file.

All text goes through `element`, which escapes it; a content security policy bars the page from loading anything
besides. A `generator` in its head tells a page of ours from any other file, so that no other is overwritten.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal

from qlora_kit.errors import RunError
from qlora_kit.report.bars import category_class
from qlora_kit.report.lines import Series, line_chart
from qlora_kit.report.markup import Markup, element
from qlora_kit.report.text import Table, in_words
from qlora_kit.storage import write_text

Kind = Literal["report", "comparison"]
_POLICY = "default-src 'none'; style-src 'unsafe-inline'"
_HEAD_CHARACTERS = 1000
"""Of a page, within which its generator stands."""


def page(kind: Kind, title: str, *sections: Markup) -> str:
    """A whole page."""
    style = Path(__file__).with_name("page.css").read_text(encoding="utf-8")
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
{_generator(kind)}
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
{element("title", title)}
<style>
{style}</style>
</head>
<body>
<main>
{"".join(sections)}
</main>
</body>
</html>
"""


def check_place(path: Path, kind: Kind) -> None:
    """See that a page may be written to `path`: nothing is there, or an older page of its kind.

    Raises:
        RunError: something else is there.
    """
    if not path.exists():
        return
    if path.is_file():
        with path.open(encoding="utf-8", errors="replace") as file:
            if _generator(kind) in file.read(_HEAD_CHARACTERS):
                return
    raise RunError(f"{path} already exists and is not a {kind} by qlora-kit; give another name with --out")


def write_page(path: Path, text: str) -> None:
    """Write a page, which is there whole or not at all.

    Raises:
        RunError: it cannot be written.
    """
    try:
        write_text(path, text)
    except OSError as error:
        raise RunError(f"{path} cannot be written: {error.strerror}") from error


def section(heading: str, *content: str) -> Markup:
    """A part of the page under its heading."""
    return element("section", element("h2", heading), *content)


def lead(sentence: str) -> Markup:
    """The sentence under a heading."""
    return element("p", sentence, class_="lead")


def note(sentence: str) -> Markup:
    """A sentence beside what it explains."""
    return element("p", sentence, class_="note")


def part(heading: str, *content: str) -> Markup:
    """A part of a section."""
    return element("div", element("h3", heading), *content, class_="group")


def figure(number: str, meaning: str) -> Markup:
    """A number of the headline."""
    return element("div", element("strong", number), element("span", meaning), class_="figure")


def chart(series: Sequence[Series], *, title: str, y_label: str, height: int = 260, from_zero: bool = False) -> Markup:
    """Curves over steps with their legend; nothing if there are none."""
    if not series:
        return Markup()
    drawn = line_chart(series, title=title, x_label="step", y_label=y_label, height=height, from_zero=from_zero)
    return element("figure", legend((one.name, one.style) for one in series), drawn)


def legend(entries: Iterable[tuple[str, str]], key: str = "key") -> Markup:
    """Names, each with its colour's class; `key` is the class of the sign that shows it."""
    items = (element("li", element("i", class_=f"{key} {style}"), name) for name, style in entries)
    return element("ul", *items, class_="legend")


def table(cells: Table, caption: str, coloured: Iterable[str] = (), kind: str = "numbers") -> Markup:
    """`cells` with the first row and column as headings; rows named after one of `coloured` show its colour."""
    swatches = {in_words(name): element("i", class_=f"swatch {category_class(name)}") for name in coloured}
    head, *rows = cells
    body = [
        element(
            "tr",
            element("th", swatches.get(name, Markup()), name, scope="row"),
            *(element("td", cell) for cell in row),
            class_="total" if name == "peak" else "coloured" if name in swatches else "plain",
        )
        for name, *row in rows
    ]
    return element(
        "table",
        element("caption", caption),
        element("thead", element("tr", *(element("th", name, scope="col") for name in head))),
        element("tbody", *body),
        class_=kind,
    )


def wide(content: Markup) -> Markup:
    """What may be wider than the page, and is then scrolled by itself."""
    return element("div", content, class_="wide", tabindex=0)


def _generator(kind: Kind) -> str:
    return f'<meta name="generator" content="qlora-kit {kind}">'
