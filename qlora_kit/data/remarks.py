"""Remarks: what a person should know about the rows before they are trained on, and which rows are meant.

None of this stops a run: what does is an error where it is found (formats, load, encode).
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qlora_kit.data.encoded import Encoded, Odd
from qlora_kit.data.encoded_set import EncodedSet
from qlora_kit.data.faults import Faults
from qlora_kit.units import counted

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

WORTH_A_WORD = 0.01
"""Share of the rows above which one hears of those that are left out for their length, or say nothing new."""
NAMED = 3
"""Rows that a sentence names."""


@dataclass(frozen=True, slots=True)
class Remark:
    """Something about several rows.

    Attributes:
        kind: a word for programs: refused, faults, no_trained, dropped, truncated, tools, tool_calls, system, thoughts,
            joined, marks, no_end, two_bos, repeated, leaked.
        text: what is the matter with how many rows.
        count: how many.
        rows: where the first 20 stand, each as `file:line` or `source row N`; of faults what is wrong with them, too.
        is_for_runs: whether it is said before training as well, where the counts say part of it already.
    """

    kind: str
    text: str
    count: int
    rows: list[str]
    is_for_runs: bool

    def __str__(self) -> str:
        more = f"; and {self.count - NAMED:,} more" if self.count > NAMED else ""
        return f"{self.text}: {'; '.join(self.rows[:NAMED])}{more}"


def remarks_on(train: EncodedSet, held_out: EncodedSet, tokenizer: "PreTrainedTokenizerBase") -> list[Remark]:
    """What there is to say about the rows of a run.

    Args:
        train: the rows to train on.
        held_out: those to evaluate on; may be empty.
        tokenizer: that encoded them.
    """
    seen, seen_held = _look(train, tokenizer), _look(held_out, tokenizer)
    left_out = [*_refused(train), *_left_out(train, seen, "row"), *_left_out(held_out, seen_held, "held-out row")]
    return [*left_out, *_odd(train, "row"), *_odd(held_out, "held-out row"), *_kept(seen, seen_held)]


@dataclass(frozen=True, slots=True)
class _Seen:
    """What one look at each kept row shows; many rows lie in a file, and are not read twice.

    Attributes:
        said: where each stands, and a hash of what it says.
        endless: where those stand that teach no end.
        doubled: where those stand that begin with two BOS tokens.
    """

    said: list[tuple[str, int]]
    endless: list[str]
    doubled: list[str]


def _look(rows: EncodedSet, tokenizer: "PreTrainedTokenizerBase") -> _Seen:
    ends, bos = _end_tokens(tokenizer), tokenizer.bos_token_id
    cut = {*rows.places["truncated"], *rows.places["split"]}  # these have no end for a reason
    seen = _Seen([], [], [])
    for row in rows.rows:
        seen.said.append((row.where, contents(row)))
        if row.where not in cut and not _all_end(row, ends, tokenizer):
            seen.endless.append(row.where)
        if _begins_with(row, [bos, bos]):
            seen.doubled.append(row.where)
    return seen


def _refused(train: EncodedSet) -> Iterator[Remark]:
    """What `check_most_fit` stops a run with."""
    if train.is_mostly_dropped:
        why = "longer than data.max_tokens: `train` refuses a set of which it would leave out most"
        yield _remark("refused", why, train.places["dropped"])


def _left_out(rows: EncodedSet, seen: _Seen, thing: str) -> Iterator[Remark]:
    """What did not come through whole."""
    counts, places = rows.counts, rows.places
    if counts.faults:
        why = "left out as unusable (data.on_error=skip)"
        yield _remark("faults", why, rows.faults.shown, counts.faults, thing=thing)
    kept_in_part = {where for where, _ in seen.said}  # a row that was split may well have pieces that are all prompt
    if untrained := [where for where in dict.fromkeys(places["no_trained"]) if where not in kept_in_part]:
        why = "left out for lack of a trained token (see data.loss_on), or because both answers are the same"
        yield _remark("no_trained", why, untrained, thing=thing)
    if counts.dropped > WORTH_A_WORD * counts.given:
        share = f"{counts.dropped / counts.given:.1%} of all"
        why = f"left out for being longer than data.max_tokens, {share} (see data.over_length)"
        yield _remark("dropped", why, places["dropped"], thing=thing)
    if counts.truncated:
        why = "cut at data.max_tokens: the rest is not learnt, nor how the answer ends"
        yield _remark("truncated", why, places["truncated"], thing=thing, is_for_runs=False)


_ODD: dict[Odd, str] = {
    "tools": "with tools that the chat template does not write: answers are learnt without them (see data.template)",
    "tool_calls": "with tool calls that the chat template does not write: what follows them is learnt without them "
    "(see data.template)",
    "system": "with a system text that the chat template does not write: answers are learnt without it "
    "(see data.template)",
    "thoughts": "with thoughts that the chat template does not write: data.loss_on=all learns the chat without them "
    "(data.loss_on=assistant learns each turn as it is asked for)",
    "joined": "whose answer follows the prompt without a space: texts are joined as they stand (data.columns="
    "{instruction: prompt, output: completion} makes turns of a chat of them; of pairs, {instruction: prompt})",
    "marks": "for which the chat template's generation marks cover more than the assistant's answers: the marks are "
    "not used, and what follows each prompt is learnt (see data.template)",
}


def _odd(rows: EncodedSet, thing: str) -> Iterator[Remark]:
    """What becomes of rows, mostly by their chat templates."""
    return (_remark(odd, why, rows.places[odd], thing=thing) for odd, why in _ODD.items() if rows.places[odd])


def _kept(train: _Seen, held_out: _Seen) -> Iterator[Remark]:
    """What is odd about rows that are trained on."""
    if endless := [*dict.fromkeys(train.endless)]:  # a chat of which every answer is a row stands in one place
        why = "with an answer that has no end token after it: the model may not learn to stop (see data.template)"
        yield _remark("no_end", why, endless)
    if train.doubled:
        why = "with two BOS tokens at the start: the text or the template adds another"
        yield _remark("two_bos", why, train.doubled)
    # The pieces of a row, and rows of a source that is named twice, stand in one place and repeat nothing.
    first: dict[int, str] = {}
    if repeated := [
        f"{here} (as {there})" for here, key in train.said if here != (there := first.setdefault(key, here))
    ]:
        share = len(repeated) / len(train.said)
        why = f"identical to an earlier row, {share:.1%} of all"
        yield _remark("repeated", why, repeated, is_for_runs=share > WORTH_A_WORD)
    held = {key: where for where, key in held_out.said}
    if leaked := [f"{here} (as {held[key]})" for here, key in train.said if key in held]:
        yield _remark("leaked", "both trained on and held out: held-out scores look too good", leaked)


def sides(row: Encoded) -> dict[str, Encoded]:
    """The sequences that a row is made of, by what they are called; most rows are one, which needs no name."""
    if row.other is not None:
        return {"chosen": row, "rejected": row.other}
    if row.is_good is not None:
        return {"good" if row.is_good else "bad": row}
    return {"" if row.target is None else f"class {row.target}": row}


def _end_tokens(tokenizer: "PreTrainedTokenizerBase") -> set[int | None]:
    """Ids that may end an answer: the end token's, and those of other special ones."""
    special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    return special | {tokenizer.eos_token_id}


def _all_end(row: Encoded, ends: set[int | None], tokenizer: "PreTrainedTokenizerBase") -> bool:
    """Whether one of `ends` stands last in every stretch of trained tokens."""
    return all(
        _last(side, end, tokenizer) in ends for side in sides(row).values() for end in _stretch_ends(side.trained)
    )


def _stretch_ends(trained: list[bool]) -> Iterator[int]:
    """The last place of every stretch of trained tokens."""
    return (match.start() for match in re.finditer(b"\x01\x00", bytes([*trained, False])))


def _last(side: Encoded, place: int, tokenizer: "PreTrainedTokenizerBase") -> int:
    """The last token up to `place` that is no white space: templates put a line break behind their end token."""
    while place > 0 and not str(tokenizer.decode(side.input_ids[place])).strip():
        place -= 1
    return side.input_ids[place]


def _begins_with(row: Encoded, ids: list[int]) -> bool:
    return any(side.input_ids[: len(ids)] == ids for side in sides(row).values())


def contents(row: Encoded) -> int:
    """A hash of what a row says; 64 bits, so that of a million rows two that differ hardly ever have the same."""
    return hash(tuple((name, *side.input_ids) for name, side in sides(row).items()))


def _remark(
    kind: str, text: str, rows: list[str], count: int | None = None, *, thing: str = "row", is_for_runs: bool = True
) -> Remark:
    count = len(rows) if count is None else count
    return Remark(kind, f"{counted(count, thing)} {text}", count, rows[: Faults.most_shown], is_for_runs)
