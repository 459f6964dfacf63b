"""How a preview looks: colours on a terminal, brackets around what is trained where there are none."""

from collections.abc import Iterator, Sequence
from itertools import groupby

from rich.console import Console
from rich.text import Text

from qlora_kit.cli.visible import visible
from qlora_kit.data import Counts, Filling, Piece, Preview
from qlora_kit.errors import listed
from qlora_kit.units import counted, format_count

OPEN, CLOSE = "⟦", "⟧"
"""Around what is trained, where there is no colour; in rows themselves they are spelt."""
LONG_STRETCH, ITS_ENDS = 400, 150
"""Pieces of a stretch above which only its first and last ones are shown."""
MOST_CLASSES = 20
"""Classes that are shown with their rows."""
_TRAINED, _PROMPT = ("bold green", "bold bright_green"), ("dim", "dim italic")
"""Two tones each, so that one sees where a token ends."""
_FATES: dict[str | None, str] = {"truncated": "cut short", "split": "a piece"}
_SPECIAL = {True: "bold magenta", False: "magenta"}


def draw(preview: Preview, console: Console) -> None:
    """Show counts, lengths, padding, remarks and rows."""
    has_colours = console.color_system is not None and not console.no_color
    console.print(Text("\n".join(_summary(preview))))
    for remark in preview.remarks:
        console.print(Text.assemble(("note: ", "yellow"), visible(str(remark))))
    for row in preview.rows:
        for side in row.sides:
            names = "".join(f", {name}" for name in (_FATES.get(row.fate, ""), side.name) if name)
            trained = "" if preview.classes else f", {side.trained_tokens:,} trained on"
            heading = f"{row.where}{names}  {counted(side.tokens, 'token')}{trained}"
            console.print(Text(f"\n{visible(heading)}", "bold cyan"))
            text = _coloured(side.pieces) if has_colours else Text(_bracketed(side.pieces))
            console.print(text, end="" if text.plain.endswith("\n") else "\n")
    if preview.rows:
        trained = "bold and green" if has_colours else f"{OPEN}in brackets{CLOSE}"
        told = "the class follows the location of each text" if preview.classes else f"trained on: {trained}"
        console.print(Text(f"\n{told}; --rows N shows a different number of rows", "dim"))


def _summary(preview: Preview) -> Iterator[str]:
    train, lengths = preview.train, preview.lengths
    used, scored = ("", "") if preview.classes else (" trained on", " scored")
    yield f"train     {_kept(train, used)}"
    for part in preview.sources if len(preview.sources) > 1 else ():
        drawn = "" if part.weight == 1 else f"; weight {part.weight:g}, {counted(part.deck.drawn, 'row')} per epoch"
        yield f"          {visible(part.name)}: {_kept(part.counts, used)}{drawn}"
    yield f"held out  {_kept(preview.eval, scored)}"
    for name, how in preview.read_as.items():
        others = f"; not read: {visible(listed(how.unread))}" if how.unread else ""
        place = f"{visible(name)}: " if len(preview.read_as) > 1 else ""
        yield f"format    {place}{how.format} ({visible(', '.join(how.columns))}){others}"
    if preview.classes:
        shown = [f"{visible(name)} {count:,}" for name, count in [*preview.classes.items()][:MOST_CLASSES]]
        more = len(preview.classes) - len(shown)
        yield f"classes   {', '.join(shown)}{f' and {more:,} more' if more else ''}"
    yield (
        f"tokens    half of the rows have up to {lengths.median:,}, 95 % {lengths.p95:,}, 99 % {lengths.p99:,}, the "
        f"longest {lengths.longest:,}"
    )
    if preview.positions is None or lengths.p99 <= preview.positions:
        yield f"          data.max_tokens={lengths.p99} keeps 99 % of them whole (now {preview.max_tokens})"
    else:
        yield f"          the model takes {preview.positions:,}: longer rows can be cut or split (data.over_length)"
    apart, packed = preview.apart, preview.packed
    yield f"padding   {_padding(apart)} of {counted(apart.micro_batch, 'row')}{_now(preview.layout == 'apart')}"
    if packed is not None:
        joined, asked = "with rows end to end", f"of {packed.micro_batch} with data.packing=true"
        way = (joined if preview.layout == "joined" else asked) + _now(preview.layout != "apart")
        yield f"          {_padding(packed)} {way}: {counted(packed.sequences, 'sequence')}, not {apart.sequences:,}"


def _kept(counts: Counts, used: str) -> str:
    words = {
        "left out as faulty": counts.faults,
        "with nothing to train": counts.no_trained,
        "left out as too long": counts.dropped,
        "cut short": counts.truncated,
        "split": counts.split,
    }
    others = "".join(f"; {count:,} {text}" for text, count in words.items() if count)
    share = f"{format_count(counts.trained_tokens)} of " if used else ""
    tokens = f", {share}{format_count(counts.tokens)} tokens{used}"
    return f"{counted(counts.rows, 'row')}{tokens if counts.rows else ''}{others}"


def _padding(filling: Filling) -> str:
    return f"{1 - filling.efficiency:.1%} of the places in batches"


def _now(is_so: bool) -> str:
    return " (now)" if is_so else ""


# ---- rows ----------------------------------------------------------------------------------------------------------


def _coloured(pieces: Sequence[Piece]) -> Text:
    text = Text()
    for number, piece in enumerate(_shortened(pieces)):
        tones = _TRAINED if piece.trained else _PROMPT
        text.append(_shown(piece.text), _SPECIAL[piece.trained] if piece.special else tones[number % 2])
    return text


def _bracketed(pieces: Sequence[Piece]) -> str:
    text = ""
    for is_trained, stretch in groupby(_shortened(pieces), lambda piece: piece.trained):
        inside = "".join(map(_shown, (piece.text for piece in stretch)))
        inside = inside.replace(OPEN, ascii(OPEN)[1:-1]).replace(CLOSE, ascii(CLOSE)[1:-1])
        text += f"{OPEN}{inside}{CLOSE}" if is_trained else inside
    return text


def _shown(text: str) -> str:
    """Line breaks and tabs do what they do and are seen, too."""
    return visible(text, keep="\n\t").replace("\n", "⏎\n").replace("\t", "⇥\t")


def _shortened(pieces: Sequence[Piece]) -> Iterator[Piece]:
    """The pieces, without the middle of a long stretch."""
    for is_trained, group in groupby(pieces, lambda piece: piece.trained):
        stretch = list(group)
        if len(stretch) <= LONG_STRETCH:
            yield from stretch
            continue
        yield from stretch[:ITS_ENDS]
        left_out = sum(len(piece.ids) for piece in stretch[ITS_ENDS:-ITS_ENDS])
        yield Piece(f"\n[... {counted(left_out, 'token')} ...]\n", [], is_trained, special=True)
        yield from stretch[-ITS_ENDS:]
