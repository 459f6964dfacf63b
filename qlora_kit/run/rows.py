"""The rows of a run: sources opened, read, encoded and split; and the batches that are evaluated."""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import date as Date
from functools import cache, partial
from pathlib import Path
from typing import Literal

import torch
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from qlora_kit.data import (
    Batch,
    Classes,
    Encoded,
    EncodedSet,
    Example,
    Part,
    ReadAs,
    Reader,
    Scan,
    cache_key,
    cached,
    classes_of,
    collate_rows,
    encode_rows,
    fixed_templates,
    held_out,
    open_sources,
    scan,
    swap_answers,
)
from qlora_kit.errors import AdapterError, listed
from qlora_kit.recipe import Data, Recipe
from qlora_kit.recipe.schema import DataName, Places, Sources
from qlora_kit.run.start import classes_at_start
from qlora_kit.run.tokenizer import pad_id, settle_template
from qlora_kit.train.classes import classes_in, known_classes, name_classes
from qlora_kit.train.pace import EVAL_TOKENS, ROWS_A_STEP
from qlora_kit.watch import Watch

_FEW_ROWS = 2_000
"""That are encoded in seconds, so that a fault may wait for the others."""

Shapes = dict[int, tuple[int, int]]
"""Rows, and tokens of the longest, of a batch, by the tokens that may go together."""


def held_out_rows(
    recipe: Recipe, tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig, data: Path | None
) -> EncodedSet:
    """The run's held-out rows, or those of another file encoded as the run's own are."""
    if data is not None:
        none = EncodedSet(classes=classes_in(config) if recipe.train.task == "classify" else None)
        rows = _encode_sets([], _open_sources(recipe, str(data)), [], none, recipe, tokenizer, config)
        rows.faults.stop(may_skip=False)
        rows.check_left(recipe.data.max_tokens, "score", may_set=False)
        return rows
    return read_rows(recipe, tokenizer, config)[1]


def column_maps(data: Data) -> list[Mapping[str, str]]:
    """What the rows of a run call the columns that a format expects: by `data.columns`, and in sources of their own."""
    sources = [each for given in (data.train, data.eval) if isinstance(given, list) for each in given]
    return [data.columns, *(each.columns for each in sources if not isinstance(each, str) and each.columns)]


def training_rows(
    recipe: Recipe, tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig, count: int
) -> list[Encoded]:
    """Some of the run's training rows, as far apart as they can be."""
    rows = read_rows(recipe, tokenizer, config)[0].rows
    return rows[:: max(1, len(rows) // max(1, count))][:count]


def columns_read(recipe: Recipe) -> dict[str, ReadAs]:
    """How the first row of each source of training rows is read, by its name."""
    found = {reader.source.path: reader.read_as() for reader in _open_sources(recipe, recipe.data.train)}
    return {name: how for name, how in found.items() if how is not None}


def read_rows(
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerBase,
    config: PretrainedConfig,
    watch: Watch | None = None,
    today: Date | None = None,
) -> tuple[EncodedSet, EncodedSet, Date | None]:
    """Training rows, held-out rows, and the date that their template writes.

    Args:
        recipe: the run.
        tokenizer: that encodes; it is given the template that the run writes.
        config: of the base; a classifier's is told its classes.
        watch: is told what a person would not expect of the template, and which files of folders are not read.
        today: the date that a template may write; None asks the clock.

    Raises:
        DataError: rows cannot be read or used, each by its place; or none is left.
    """
    data = recipe.data
    readers = _open_sources(recipe, data.train)
    eval_readers = [] if data.eval in ("auto", None) else _open_sources(recipe, data.eval)
    today, watch = today or Date.today(), watch or Watch()
    for unread in filter(None, (reader.unread() for reader in (*readers, *eval_readers))):
        watch.note(unread)
    settle = cache(partial(settle_template, tokenizer, recipe, today, watch))

    def encode(train_rows: EncodedSet) -> EncodedSet:
        """Read the sources twice: what there is, and what becomes of it."""
        found, eval_found = scan(readers), scan(eval_readers)
        unread = found.faults + eval_found.faults
        is_few = len(found.digests) + len(eval_found.digests) <= _FEW_ROWS and recipe.train.task != "classify"
        if unread.hides_rows or (data.on_error == "stop" and not is_few):
            unread.stop()  # before the rows are encoded, which may take minutes, or classes are made of the others
        if recipe.train.task == "classify":
            train_rows.classes = _classes(recipe, found, config)
        if found.has_chats or eval_found.has_chats:
            settle()
        least = 2 if recipe.train.task == "kto" else 1  # a verdict is held against another row's answer
        is_held = held_out(found.digests, least=least) if data.eval == "auto" else [False] * len(found.digests)
        told = _Told(watch, len(found.digests) + len(eval_found.digests))
        eval_rows = _encode_sets(readers, eval_readers, is_held, train_rows, recipe, tokenizer, config, told)
        train_rows.check_left(data.max_tokens)
        if eval_readers:  # rows that the split chose may all be too long: then nothing is held out, as the counts say
            eval_rows.check_left(data.max_tokens, "hold out")
        if data.on_error == "stop":
            (train_rows.faults + eval_rows.faults).stop()
        return eval_rows

    decides = {
        "data": data.model_dump(exclude={"train", "packing", "template"}),
        "task": recipe.train.task,
        "sizes": (config.get_text_config().vocab_size, positions_for(recipe.train.task, tokenizer, config)),
        "classes": (known_classes(config), classes_at_start(recipe)),
        "templates": fixed_templates(tokenizer, data.thinking, today),
    }
    train_rows, eval_rows = cached(cache_key([*readers, *eval_readers], tokenizer, decides), encode)
    for part, reader in zip(train_rows.parts, readers, strict=True):
        part.weight = reader.source.weight
    if train_rows.classes is not None:
        name_classes(config, train_rows.classes, pad_id(tokenizer))
    date = settle() if train_rows.has_chats or eval_rows.has_chats else None
    return train_rows, eval_rows, date


def eval_batches(
    rows: Sequence[Encoded], pad: int, device: torch.device, asked: int | Literal["auto"] = "auto"
) -> list[Batch]:
    """Held-out rows side by side, those of like length together.

    Args:
        rows: held out; may be none.
        pad: id of the token that fills up.
        device: where the batches lie.
        asked: tokens of a batch at most, unless one row alone has more; auto: the usual.
    """
    return list(each_eval_batch(rows, pad, device, asked))


def each_eval_batch(
    rows: Sequence[Encoded], pad: int, device: torch.device, asked: int | Literal["auto"]
) -> Iterator[Batch]:
    """`eval_batches`, made one by one."""
    for group in _groups(rows, EVAL_TOKENS[0] if asked == "auto" else asked):
        yield collate_rows([[row] for row in group], pad).to(device)


def eval_shapes(rows: Sequence[Encoded], asked: int | Literal["auto"]) -> Shapes:
    """Rows and tokens of the largest of `eval_batches`, by the tokens that may go together; none without rows.

    Args:
        rows: held out.
        asked: `memory.eval_tokens`; auto makes several, the usual first.
    """

    def largest(most: int) -> tuple[int, int]:
        return max(((len(group), group[-1].longest) for group in _groups(rows, most)), key=math.prod)

    return _distinct(largest, asked) if rows else {}


def eval_shapes_of(longest: int, asked: int | Literal["auto"]) -> Shapes:
    """`eval_shapes` of many rows of one length, of which nothing else is known."""
    return _distinct(lambda most: (min(ROWS_A_STEP, max(1, most // longest)), longest), asked)


def _distinct(shape: Callable[[int], tuple[int, int]], asked: int | Literal["auto"]) -> Shapes:
    shapes: Shapes = {}
    for most in EVAL_TOKENS if asked == "auto" else [asked]:
        if shape(most) not in shapes.values():
            shapes[most] = shape(most)
    return shapes


def _groups(rows: Sequence[Encoded], most: int) -> list[list[Encoded]]:
    """Rows of a batch each, the longest of them last; answers with a verdict each with the one that they are swapped
    with."""
    if rows and rows[0].is_good is not None:
        rows = swap_answers(rows)
    groups: list[list[Encoded]] = [[]]
    for row in sorted(rows, key=lambda row: row.longest):
        tokens = (len(groups[-1]) + 1) * row.longest * (1 if row.other is None else 2)
        if groups[-1] and (tokens > most or len(groups[-1]) == ROWS_A_STEP):
            groups.append([])
        groups[-1].append(row)
    return groups if rows else []


def positions_of(config: PretrainedConfig) -> int | None:
    """The longest row that the model was made for; None if it has no such limit."""
    positions: int | None = getattr(config.get_text_config(), "max_position_embeddings", None)
    return positions


def positions_for(task: str, tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig) -> int | None:
    """The longest row of a task; of a model that classifies, which its tokenizer says, too: RoBERTa's kind has two
    positions that no token can take."""
    positions = positions_of(config)
    if task != "classify" or positions is None:
        return positions
    return min(positions, tokenizer.model_max_length)


def _classes(recipe: Recipe, found: Scan, config: PretrainedConfig) -> Classes:
    """The classes of a run.

    Raises:
        AdapterError: it goes on from an adapter that tells others apart.
        DataError: as `classes_of`.
    """
    start = classes_at_start(recipe)
    strange = sorted(found.labels - set(found.labels if start is None else start.names))
    if start is not None and strange:
        raise AdapterError(
            f"lora.from={recipe.lora.from_} has the classes {listed(start.names)}; the rows have {listed(strange)}; "
            "give rows of its classes, or leave out lora.from"
        )
    return classes_of(found.labels, found.is_multi, known_classes(config) if start is None else start.names)


def _open_sources(recipe: Recipe, sources: DataName | Sources | Places) -> list[Reader]:
    data = recipe.data
    listed = [sources] if isinstance(sources, str) else sources
    named = [each if isinstance(each, str) else each.model_dump(exclude_none=True) for each in listed]
    return open_sources(named, format=data.format, columns=data.columns, task=recipe.train.task)


def _encode_sets(
    readers: Sequence[Reader],
    eval_readers: Sequence[Reader],
    is_held: Sequence[bool],
    train_rows: EncodedSet,
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerBase,
    config: PretrainedConfig,
    passed_on: Callable[[Iterable[Example]], Iterator[Example]] = iter,
) -> EncodedSet:
    """Read all sources and encode each row as it comes: those to train on into their set, and those held out."""
    encode = partial(
        encode_rows,
        tokenizer=tokenizer,
        loss_on="all" if recipe.train.task == "pretrain" else recipe.data.loss_on,
        max_tokens=recipe.data.max_tokens,
        over_length=recipe.data.over_length,
        thinking=recipe.data.thinking,
        vocab_size=config.get_text_config().vocab_size,
        max_positions=positions_for(recipe.train.task, tokenizer, config),
        classes=train_rows.classes,
    )
    eval_rows, held, sides = EncodedSet(), list[Example](), iter(is_held)
    for reader in readers:
        rows = _kept(passed_on(reader.read(train_rows.faults)), sides, held)
        encode(rows, onto=train_rows, part=Part(reader.source.path))
    encode(held, onto=eval_rows)
    for reader in eval_readers:
        encode(passed_on(reader.read(eval_rows.faults)), onto=eval_rows, part=Part(reader.source.path))
    return eval_rows


class _Told:
    """Passes rows on, and tells how far it is with all of them."""

    def __init__(self, watch: Watch, total: int) -> None:
        self.watch, self.total, self.done = watch, total, 0
        self.begun, self.due_s = time.monotonic(), 5.0

    def __call__(self, rows: Iterable[Example]) -> Iterator[Example]:
        for row in rows:
            yield row
            self.done += 1
            if time.monotonic() - self.begun > self.due_s:
                self.due_s *= 2
                self.watch.encoded(self.done, self.total)


def _kept(rows: Iterable[Example], is_held: Iterator[bool], held: list[Example]) -> Iterator[Example]:
    """The rows to train on; the few that are held out are put aside."""
    for row in rows:
        if next(is_held):
            held.append(row)
        else:
            yield row
