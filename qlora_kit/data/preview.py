"""Preview: what a run will be given to learn, as plain values to be shown: rows token by token, lengths, padding.

Of a row every token has its text. A character whose bytes are spread over several tokens is one piece with all of
them, so that no half of it has to be shown.
"""

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from qlora_kit.data.classes import Classes
from qlora_kit.data.collate import Sampler, as_stepped
from qlora_kit.data.columns import ReadAs
from qlora_kit.data.encoded import Encoded
from qlora_kit.data.encoded_set import Counts, EncodedSet, Fate, Part
from qlora_kit.data.pack import Packing, Room, lay_out, places
from qlora_kit.data.remarks import Remark, sides
from qlora_kit.recipe import Layout

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MOST_TOKENS_A_PIECE = 16
"""Tokens after which a piece ends though its last character does not seem whole: the text may hold U+FFFD itself."""
MOST_STEPS = 1000
"""Steps that are laid out to see how much of them is padding."""


_KEPT_IN_PART: tuple[Fate, ...] = ("truncated", "split")


@dataclass(frozen=True, slots=True)
class Piece:
    """Tokens that can only be shown together, nearly always one.

    Attributes:
        text: of them; of all pieces in a row it is what the tokenizer decodes.
        ids: token ids.
        trained: whether the loss counts them.
        special: whether it is a token with a meaning of its own, such as the end token.
    """

    text: str
    ids: list[int]
    trained: bool
    special: bool


@dataclass(frozen=True, slots=True)
class ShownSide:
    """One sequence of a row.

    Attributes:
        name: what it is in the row; empty where the row is one sequence.
        tokens: how many it has.
        trained_tokens: how many the loss counts.
        pieces: its tokens in order.
    """

    name: str
    tokens: int
    trained_tokens: int
    pieces: list[Piece]


@dataclass(frozen=True, slots=True)
class ShownRow:
    """A row, where it stands, and whether it is truncated or a piece of one that was split."""

    where: str
    fate: Fate | None
    sides: list[ShownSide]


@dataclass(frozen=True, slots=True)
class Lengths:
    """Tokens of the rows before anything is cut or left out: that many are enough for so many of them."""

    median: int
    p95: int
    p99: int
    longest: int


@dataclass(frozen=True, slots=True)
class Filling:
    """How full the batches of the first epoch are; of a long one, of its first 1,000 steps.

    Attributes:
        steps: laid out.
        micro_batch: rows of the longest kind, or packed sequences, that one forward pass has room for, before a plan
            fits them to a budget.
        sequences: in them; fewer than rows where rows are packed, two a row where answers are held against each other.
        efficiency: share of the places that hold a token and no padding.
    """

    steps: int
    micro_batch: int
    sequences: int
    efficiency: float


@dataclass(frozen=True, slots=True)
class Preview:
    """What `qlora-kit preview` shows.

    Attributes:
        max_tokens: of the recipe.
        train: what became of the training rows.
        eval: what became of the held-out rows.
        sources: what each source of training rows gave.
        lengths: of the training rows.
        layout: how the rows of a forward pass lie in the run.
        apart: how full its batches are with every row a sequence of its own.
        packed: the same where sequences hold several, as in the run or else with data.packing=true; None where that is
            not possible.
        remarks: what a person should know.
        rows: the first rows that are trained on.
        classes: of texts that are classified, the number of training rows of each, the most first; of others empty.
        read_as: by source, how its first row is read, which need not be how all are.
        positions: the most tokens that the model takes; None where it has no such limit.
    """

    max_tokens: int
    train: Counts
    eval: Counts
    sources: list[Part]
    lengths: Lengths
    layout: Layout
    apart: Filling
    packed: Filling | None
    remarks: list[Remark]
    rows: list[ShownRow]
    classes: dict[str, int] = field(default_factory=dict)
    read_as: dict[str, ReadAs] = field(default_factory=dict)
    positions: int | None = None

    def as_json(self) -> dict[str, Any]:
        """Plain lists and numbers."""
        return asdict(self)


def show_rows(
    rows: EncodedSet, tokenizer: "PreTrainedTokenizerBase", most: int, classes: Classes | None = None
) -> list[ShownRow]:
    """The first `most` rows as text, piece by piece; those of a classification with the names of their classes."""
    fates: dict[str, Fate] = {where: fate for fate in _KEPT_IN_PART for where in rows.places[fate]}
    return [_shown(row, fates.get(row.where), tokenizer, classes) for row in rows.rows[:most]]


def _shown(row: Encoded, fate: Fate | None, tokenizer: "PreTrainedTokenizerBase", classes: Classes | None) -> ShownRow:
    parts = sides(row) if row.target is None or classes is None else {classes.words(row.target): row}
    shown = [
        ShownSide(name, len(side.input_ids), side.trained_tokens, list(_pieces(side, tokenizer)))
        for name, side in parts.items()
    ]
    return ShownRow(row.where, fate, shown)


def count_classes(rows: EncodedSet, classes: Classes) -> dict[str, int]:
    """How many rows are of each class, the most first."""
    counts = Counter(dict.fromkeys(classes.names, 0))
    counts.update(name for row in rows.rows if row.target is not None for name in classes.named(row.target))
    return dict(counts.most_common())


def measure_lengths(rows: EncodedSet) -> Lengths:
    """The lengths that half, 95 % and 99 % of the rows keep to, and the longest."""
    lengths = sorted(rows.lengths_given)
    median, p95, p99, longest = (lengths[math.ceil(percent * len(lengths) / 100) - 1] for percent in (50, 95, 99, 100))
    return Lengths(median, p95, p99, longest)


def fill(rows: EncodedSet, *, seed: int, steps: int, rows_a_step: int, room: Room, packing: Packing | None) -> Filling:
    """Lay out the batches of an epoch as the training loop does.

    Args:
        rows: to train on.
        seed: of the run, which decides their order.
        steps: of the run.
        rows_a_step: rows that one optimizer step consumes.
        room: what a forward pass may take where every row is a sequence of its own.
        packing: where sequences hold several; None where none does.
    """
    sampler, lengths, tokens, filled, sequences = Sampler(rows.decks, seed), rows.lengths, 0, 0, 0
    is_one = rows.rows[0].other is None and rows.rows[0].is_good is None
    steps = min(steps, math.ceil(sampler.epoch_rows / rows_a_step), MOST_STEPS)
    for _ in range(steps):
        chosen = sampler.next_rows(rows_a_step)
        # Rows of one sequence need not be read, which may be many.
        sizes = [(lengths[row],) for row in chosen] if is_one else _sizes([rows.rows[row] for row in chosen])
        own, of_each = [max(size) for size in sizes], len(sizes[0])
        arranged = lay_out(own, packing or room)
        tokens += sum(map(sum, sizes))
        filled += of_each * places(own, arranged)
        sequences += of_each * sum(map(len, arranged))
    return Filling(steps, room.micro_batch, sequences, tokens / filled)


def _sizes(rows: list[Encoded]) -> list[tuple[int, ...]]:
    """Tokens of each sequence of the rows of a step."""
    return [tuple(len(side.input_ids) for side in row.sequences) for row in as_stepped(rows)]


# ---- text ----------------------------------------------------------------------------------------------------------


def _pieces(side: Encoded, tokenizer: "PreTrainedTokenizerBase") -> Iterator[Piece]:
    special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    before: list[int] = []
    group: list[int] = []
    text, is_trained = "", False
    for place, (token, trained) in enumerate(zip(side.input_ids, side.trained, strict=True)):
        counts = trained and place > 0  # nothing predicts the first token
        if group and (token in special or counts != is_trained):
            yield Piece(text, group, is_trained, special=False)
            before, group = group, []
        group, is_trained = [*group, token], counts
        text = _text_after(before, group, tokenizer)
        if token in special or not text.endswith("\ufffd") or len(group) == MOST_TOKENS_A_PIECE:
            yield Piece(text, group, counts, token in special)
            before, group = group, []
    if group:
        yield Piece(text, group, is_trained, special=False)


def _text_after(before: list[int], ids: list[int], tokenizer: "PreTrainedTokenizerBase") -> str:
    """What `ids` add to the text of the tokens before them: alone, many tokenizers would take their space away."""
    earlier, whole = _decode(before, tokenizer), _decode([*before, *ids], tokenizer)
    return whole.removeprefix(earlier) if whole.startswith(earlier) else _decode(ids, tokenizer)


def _decode(ids: list[int], tokenizer: "PreTrainedTokenizerBase") -> str:
    return str(tokenizer.decode(ids, clean_up_tokenization_spaces=False)) if ids else ""
