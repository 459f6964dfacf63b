"""Encode: all rows of a data set as token ids, each one accounted for.

Rows that are too long, cannot be trained on, or do not fit the model are dropped, cut or refused by choice, and always
counted: rows given + turns = rows + dropped + no_trained + faults, and one more for each further piece of a row that
was split.
"""

from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import replace
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Literal, TypeAlias

from qlora_kit.crew import each_done
from qlora_kit.data.chat_template import check_template
from qlora_kit.data.classes import Classes
from qlora_kit.data.encoded import Encoded, LossOn
from qlora_kit.data.encoded_set import EncodedSet, Part
from qlora_kit.data.examples import Classified, Example, is_chat
from qlora_kit.data.template import encode_text, encode_turns
from qlora_kit.data.thinking import Thinking, with_thinking
from qlora_kit.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

OverLength: TypeAlias = Literal["drop", "truncate", "split", "error"]


def encode_rows(
    examples: Iterable[Example],
    tokenizer: "PreTrainedTokenizerBase",
    *,
    loss_on: LossOn = "assistant",
    max_tokens: int = 2048,
    over_length: OverLength = "drop",
    template: str | None = None,
    thinking: Thinking = "keep",
    vocab_size: int | None = None,
    max_positions: int | None = None,
    classes: Classes | None = None,
    onto: EncodedSet | None = None,
    part: Part | None = None,
    may_be_empty: bool = False,
) -> EncodedSet:
    """Encode the rows of one source, one by one as they are read.

    Args:
        examples: from `load_rows` or `read_source`.
        tokenizer: as for `encode`.
        loss_on: as for `encode`.
        max_tokens: length above which `over_length` applies.
        over_length: drop; truncate: keep the first max_tokens; split: into pieces of max_tokens, each beginning with
            the last token of the one before, so that every token is still predicted once; error.
        template: as for `encode`.
        thinking: what becomes of thoughts in assistant turns: keep, strip or empty.
        vocab_size: rows of the model's embedding; None if it is not known.
        max_positions: positions of the model; None if it has no such limit.
        classes: of texts that are classified.
        onto: a set that the rows are put behind. Rows that cannot be encoded are left among its faults, as are those
            that `examples` leaves there while it is read; without it they are an error.
        part: name and weight of the source.
        may_be_empty: whether it is no error if no row is left; with `onto` it never is, see `check_left`.

    Raises:
        DataError: if max_tokens is above max_positions, a row cannot be encoded or has a token that the model has not,
            a row is too long and `over_length` is error, or no row is left.
    """
    check_lengths(max_tokens, max_positions)
    encoded = EncodedSet() if onto is None else onto
    faults, before = encoded.faults, encoded.faults.count
    encoded.parts.append(Part() if part is None else part)
    encode = partial(
        _encode_one,
        tokenizer=tokenizer,
        loss_on=loss_on,
        template=template,
        thinking=thinking,
        vocab_size=vocab_size,
        most_tokens=max_tokens if over_length == "error" else None,
        classes=classes,
    )
    with closing(each_done(encode, examples)) as done:
        for example, rows in done:
            if not encoded.has_chats and is_chat(example):
                check_template(tokenizer, template)
                encoded.has_chats = True
            if isinstance(rows, DataError):
                faults.add(f"{example.where}: {rows}")
                continue
            encoded.see(rows, example.where)
            for piece in chain.from_iterable(_fit(row, max_tokens, over_length, encoded) for row in rows):
                encoded.add(piece)
    encoded.parts[-1].counts.faults = faults.count - before
    if onto is None:
        faults.stop()
        if not may_be_empty:
            encoded.check_left(max_tokens)
    return encoded


def _encode_one(
    example: Example,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    loss_on: LossOn,
    template: str | None,
    thinking: Thinking,
    vocab_size: int | None,
    most_tokens: int | None,
    classes: Classes | None,
) -> list[Encoded] | DataError:
    """The rows of an example, or what is wrong with it; takes what `encode_rows` takes, and the length of an error."""
    try:
        if isinstance(example, Classified) and classes is not None:
            rows = [encode_text(example, tokenizer, classes)]
        else:
            rows = encode_turns(with_thinking(example, thinking), tokenizer, loss_on=loss_on, template=template)
        for row in rows:
            _check_row(row, vocab_size, most_tokens)
    except DataError as error:
        return error
    return rows


def check_lengths(max_tokens: int, max_positions: int | None) -> None:
    """See that rows of `max_tokens` can be trained on, where the model has `max_positions`; None if it has no limit.

    Raises:
        DataError: they are too short to predict a token, or longer than the model's positions.
    """
    if max_tokens < 2:
        raise DataError(f"data.max_tokens={max_tokens}: a row needs two tokens for one to be predicted")
    if max_positions is not None and max_tokens > max_positions:
        raise DataError(
            f"data.max_tokens={max_tokens} is more than the {max_positions} positions of the model: "
            f"set data.max_tokens={max_positions} or less"
        )


def _check_row(row: Encoded, vocab_size: int | None, most_tokens: int | None) -> None:
    highest = max(row.input_ids, default=0)
    if vocab_size is not None and highest >= vocab_size:
        raise DataError(
            f"token {highest} is beyond the model's vocabulary of {vocab_size}: the tokenizer is another model's, "
            "or has tokens that were added later (lora.added_tokens)"
        )
    if row.other is not None:
        _check_row(row.other, vocab_size, most_tokens)
    if most_tokens is not None and len(row.input_ids) > most_tokens:
        raise DataError(
            f"{len(row.input_ids)} tokens, more than data.max_tokens={most_tokens} (data.over_length=error)"
        )


def _fit(row: Encoded, max_tokens: int, over_length: OverLength, encoded: EncodedSet) -> Iterator[Encoded]:
    """The row, or what `over_length` leaves of it."""
    tokens = row.longest
    if tokens <= max_tokens:
        yield row
    elif over_length == "truncate":
        encoded.count("truncated", row.where)
        yield _cut(row, max_tokens)
    elif over_length == "split" and row.other is None and row.is_good is None and row.target is None:
        encoded.count("split", row.where)
        for start in range(0, tokens - 1, max_tokens - 1):
            yield _piece(row, start, start + max_tokens)
    else:
        encoded.count("dropped", row.where)


def _cut(row: Encoded, max_tokens: int) -> Encoded:
    """The beginning of a row, with what stands behind every text."""
    kept, ending = _piece(row, 0, max_tokens - row.ending), row.input_ids[len(row.input_ids) - row.ending :]
    return replace(kept, input_ids=[*kept.input_ids, *ending], trained=[*kept.trained, *[False] * row.ending])


def _piece(row: Encoded, start: int, end: int) -> Encoded:
    """A part of a row; it has no prompt and answer, since neither is whole."""
    other = None if row.other is None else _piece(row.other, start, end)
    part = Encoded(row.input_ids[start:end], row.trained[start:end], where=row.where)
    return replace(part, other=other, is_good=row.is_good, target=row.target)
