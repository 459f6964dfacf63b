"""Before any weight is read: where the model lies, the rows as tokens, and the numbers of the run."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import date as Date
from functools import cache, partial
from pathlib import Path

import torch
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from qlora_kit.base import locate_model
from qlora_kit.base.hub import is_folder
from qlora_kit.base.load import read_config, resolve_device
from qlora_kit.base.tokenizer import read_tokenizer
from qlora_kit.base.vocabulary import longer_config
from qlora_kit.data import (
    FALLBACK,
    Batch,
    Classes,
    Encoded,
    EncodedSet,
    Example,
    Filling,
    Part,
    Reader,
    Scan,
    cache_key,
    cached,
    check_turn_tokens,
    classes_of,
    collate_rows,
    encode_rows,
    fill,
    find_template,
    fix_tokenizer,
    fixed_templates,
    held_out,
    longest_pack,
    open_sources,
    remarks_on,
    scan,
    swap_answers,
)
from qlora_kit.errors import AdapterError, DataError, listed
from qlora_kit.recipe import TASKS, Recipe
from qlora_kit.recipe.schema import DataName, Sources
from qlora_kit.run.full_finetune import check_full_finetune
from qlora_kit.run.start import classes_at_start
from qlora_kit.run.task import check_task
from qlora_kit.train.classes import classes_in, head_for, known_classes, name_classes
from qlora_kit.train.pace import ROWS_A_STEP, TOKENS_A_MICRO_BATCH, Pace, Rate, room_of, set_pace
from qlora_kit.units import counted
from qlora_kit.watch import Watch


@dataclass(frozen=True, slots=True)
class Prepared:
    """What is known before any weight is read.

    Attributes:
        config: of the model.
        tokenizer: with the chat template that the recipe names, fixed for the run.
        train: encoded training rows.
        eval: encoded held-out rows; empty where the recipe wants none.
        pace: steps and batch sizes.
        packed_tokens: most tokens of a sequence where rows are packed; None where every row is its own.
        date: that the chat template writes; None where it writes none.
    """

    config: PretrainedConfig
    tokenizer: PreTrainedTokenizerBase
    train: EncodedSet
    eval: EncodedSet
    pace: Pace
    packed_tokens: int | None = None
    date: Date | None = None

    @property
    def longest(self) -> int:
        """Tokens that no sequence exceeds."""
        return self.train.longest if self.packed_tokens is None else self.packed_tokens


def prepare(
    recipe: Recipe,
    watch: Watch,
    *,
    weights: bool,
    today: Date | None = None,
    rate: Rate | None = None,
    trust_remote_code: bool = False,
) -> Prepared:
    """`gather`, and tell what became of the rows and what is odd about them.

    A run that is resumed keeps the learning `rate` that it began with: of more steps `auto` would make another.
    """
    prepared = gather(recipe, watch, weights=weights, today=today, trust_remote_code=trust_remote_code)
    if rate is not None:
        prepared = replace(prepared, pace=replace(prepared.pace, lr=rate.lr, lr_reason=rate.reason))
    watch.prepared(prepared)
    for remark in remarks_on(prepared.train, prepared.eval, prepared.tokenizer):
        if remark.is_for_runs:
            watch.note(str(remark))
    if recipe.train.early_stopping is not None and not prepared.eval.rows:
        watch.note("train.early_stopping has no effect: no rows are held out; set data.eval")
    if prepared.pace.warning is not None:
        watch.note(prepared.pace.warning)
    return prepared


def gather(
    recipe: Recipe, watch: Watch, *, weights: bool, today: Date | None = None, trust_remote_code: bool = False
) -> Prepared:
    """Find the model, read and encode the rows, and set the pace. From the hub, config and tokenizer alone are fetched.

    Args:
        recipe: the run.
        watch: is told of downloads.
        weights: whether a model folder is asked for sound weights, too.
        today: the date that a chat template may write; None asks the clock.
        trust_remote_code: let the model's own code run.
    """
    name, weights_now = recipe.base.model, weights and is_folder(recipe.base.model)
    folder = locate_model(name, recipe.base.revision, weights=weights_now, code=trust_remote_code, notify=watch.note)
    check_task(recipe)
    config = read_config(folder, head=head_for(recipe.train.task), trust_remote_code=trust_remote_code)
    check_full_finetune(recipe, config, watch)
    tokenizer = load_tokenizer(folder, recipe, trust_remote_code=trust_remote_code)
    config = longer_config(config, rows_needed(tokenizer, recipe))
    _check_pad(tokenizer, config)
    train_rows, eval_rows, date = _read_rows(recipe, tokenizer, config, watch, today)
    if train_rows.counts.turns:
        watch.note(
            "the chat template writes earlier turns otherwise than inference saw them: chats are one row an answer, "
            f"{counted(train_rows.counts.turns, 'row')} more"
        )
    pace, packed = pace_of(recipe, train_rows, config)
    return Prepared(config, tokenizer, train_rows, eval_rows, pace, packed, date)


def pace_of(recipe: Recipe, rows: EncodedSet, config: PretrainedConfig) -> tuple[Pace, int | None]:
    """The pace of a run, and the most tokens of a sequence where rows are packed; None where every row is its own.

    Args:
        recipe: the run.
        rows: its training rows.
        config: of the base.

    Raises:
        DataError: a step has fewer rows than its task needs.
    """
    epoch, is_packed, max_tokens = rows.epoch, recipe.data.packing is True, recipe.data.max_tokens
    longest = max(max_tokens, rows.longest) if is_packed else rows.longest
    pace = set_pace(
        recipe.train,
        rows=epoch.rows,
        longest=longest * TASKS[recipe.train.task].sequences,
        tokens=epoch.tokens,
        trained_tokens=epoch.trained_tokens,
        config=config,
    )
    if recipe.train.task == "kto" and pace.rows_a_step < 2:
        raise DataError("train.task=kto holds answers of other rows against a prompt, so a step needs two rows: "
                        "raise train.accumulation, or give more rows")  # fmt: skip
    return pace, longest_pack(rows.lengths, max_tokens, pace.rows_a_step) if is_packed else None


def fill_batches(recipe: Recipe, rows: EncodedSet, pace: Pace, packed_tokens: int | None) -> Filling:
    """How full the batches of a run's first epoch are."""
    return fill(
        rows.lengths,
        decks=rows.decks,
        seed=recipe.train.seed,
        steps=pace.steps,
        rows_a_step=pace.rows_a_step,
        room=room_of(recipe.train, pace, packed_tokens or rows.longest, resolve_device(recipe.base.device)),
        is_packed=packed_tokens is not None,
    )


def load_tokenizer(
    folder: Path, recipe: Recipe | None = None, *, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """The model's tokenizer, with the chat template and the added tokens of the recipe, so that every export has them.

    Raises:
        DataError: there is no tokenizer in the folder, no such template, or it has not the tokens that one needs.
        ModelError: the tokenizer cannot be read.
    """
    tokenizer = read_tokenizer(folder, trust_remote_code=trust_remote_code)
    if tokenizer is None:
        raise DataError(
            f"{folder} has no tokenizer (tokenizer.json or the like); put the model's own beside its config"
        )
    if recipe is None:
        return tokenizer
    tokenizer.add_tokens(recipe.lora.added_tokens)  # those that are there already stay as they are
    source = find_template(recipe.data.template)
    if source is not None:
        check_turn_tokens(recipe.data.template, tokenizer)
        tokenizer.chat_template = source
    return tokenizer


def set_template(tokenizer: PreTrainedTokenizerBase, recipe: Recipe, today: Date | None) -> Date | None:
    """Give the tokenizer of a run whose rows are chats its chat template, as `chat_template.py` fixes it, in place.

    Args:
        tokenizer: from `load_tokenizer`.
        recipe: the run.
        today: the date that the run's template writes, if it writes any; None asks the clock.

    Returns:
        the date that the template writes; None if it writes none.

    Raises:
        DataError: there is no template, and none that ships would do.
    """
    if tokenizer.chat_template is None:
        check_turn_tokens(FALLBACK, tokenizer)
        tokenizer.chat_template = find_template(FALLBACK)
    return fix_tokenizer(tokenizer, recipe.data.thinking, today or Date.today())


def added_ids(tokenizer: PreTrainedTokenizerBase, recipe: Recipe) -> list[int]:
    """Ids of the tokens whose rows the recipe trains."""
    ids = tokenizer.convert_tokens_to_ids(recipe.lora.added_tokens)
    return ids if isinstance(ids, list) else [ids]


def rows_needed(tokenizer: PreTrainedTokenizerBase, recipe: Recipe) -> int:
    """Rows that the embedding must have for the tokens that the recipe adds; 0 where it adds none."""
    return max(added_ids(tokenizer, recipe), default=-1) + 1


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """A token to fill rows with; labels go by position, so any will do."""
    return tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0


def held_out_rows(
    recipe: Recipe, tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig, data: Path | None
) -> EncodedSet:
    """The run's held-out rows, or those of another file encoded as the run's own are."""
    if data is not None:
        none = EncodedSet(classes=classes_in(config) if recipe.train.task == "classify" else None)
        rows = _encode_sets([], _open_sources(recipe, str(data)), [], none, recipe, tokenizer, config)
        rows.faults.stop()
        rows.check_left(recipe.data.max_tokens)
        return rows
    return _read_rows(recipe, tokenizer, config)[1]


def eval_batches(rows: Sequence[Encoded], pad: int, device: torch.device) -> list[Batch]:
    """Held-out rows side by side, those of like length together, never more tokens than a training batch may have."""
    return [collate_rows([[row] for row in group], pad).to(device) for group in _groups(rows)]


def largest_eval_shape(rows: Sequence[Encoded]) -> tuple[int, int] | None:
    """Rows and tokens of the largest of `eval_batches`; None where there are no rows."""
    shapes = ((len(group), group[-1].longest) for group in _groups(rows))
    return max(shapes, key=lambda shape: shape[0] * shape[1], default=None)


def _groups(rows: Sequence[Encoded]) -> list[list[Encoded]]:
    """Rows of a batch each, the longest of them last; answers with a verdict each with the one that they are swapped
    with."""
    if rows and rows[0].is_good is not None:
        rows = swap_answers(rows)
    groups: list[list[Encoded]] = [[]]
    for row in sorted(rows, key=lambda row: row.longest):
        tokens = (len(groups[-1]) + 1) * row.longest * (1 if row.other is None else 2)
        if groups[-1] and (tokens > TOKENS_A_MICRO_BATCH or len(groups[-1]) == ROWS_A_STEP):
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


def _check_pad(tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig) -> None:
    """See that the model has the token that rows are filled with.

    Raises:
        DataError: it has not.
    """
    pad, rows = pad_id(tokenizer), config.get_text_config().vocab_size
    if pad >= rows:
        raise DataError(
            f"rows would be filled with {tokenizer.convert_ids_to_tokens(pad)!r}, number {pad}, which is beyond the "
            f"model's vocabulary of {rows}: name it in lora.added_tokens, or give tokenizer_config.json a pad_token "
            "that the model has"
        )


def _read_rows(
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerBase,
    config: PretrainedConfig,
    watch: Watch | None = None,
    today: Date | None = None,
) -> tuple[EncodedSet, EncodedSet, Date | None]:
    """Training rows, held-out rows, and the date that their template writes; a classifier's `config` is told its
    classes."""
    data = recipe.data
    readers = _open_sources(recipe, data.train)
    eval_readers = [] if data.eval in ("auto", None) else _open_sources(recipe, data.eval)
    today = today or Date.today()
    settle = cache(partial(_settle_template, tokenizer, recipe, today, watch or Watch()))

    def encode(train_rows: EncodedSet) -> EncodedSet:
        """Read the sources twice: what there is, and what becomes of it."""
        found, eval_found = scan(readers), scan(eval_readers)
        unread = found.faults + eval_found.faults
        if data.on_error == "stop" or unread.hides_rows:
            unread.stop()  # before the rows are encoded, which may take minutes
        if recipe.train.task == "classify":
            train_rows.classes = _classes(recipe, found, config)
        if found.has_chats or eval_found.has_chats:
            settle()
        is_held = held_out(found.digests) if data.eval == "auto" else [False] * len(found.digests)
        eval_rows = _encode_sets(readers, eval_readers, is_held, train_rows, recipe, tokenizer, config)
        train_rows.check_left(data.max_tokens)
        if eval_readers:  # rows that the split chose may all be too long: then nothing is held out, as the counts say
            eval_rows.check_left(data.max_tokens)
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
            f"lora.from={recipe.lora.from_} tells {listed(start.names)} apart; the rows have {listed(strange)}; give "
            "rows of its classes, or leave out lora.from"
        )
    return classes_of(found.labels, found.is_multi, known_classes(config) if start is None else start.names)


def _open_sources(recipe: Recipe, sources: DataName | Sources) -> list[Reader]:
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
        rows = _kept(reader.read(train_rows.faults), sides, held)
        encode(rows, onto=train_rows, part=Part(reader.source.path))
    encode(held, onto=eval_rows)
    for reader in eval_readers:
        encode(reader.read(eval_rows.faults), onto=eval_rows, part=Part(reader.source.path))
    return eval_rows


def _kept(rows: Iterable[Example], is_held: Iterator[bool], held: list[Example]) -> Iterator[Example]:
    """The rows to train on; the few that are held out are put aside."""
    for row in rows:
        if next(is_held):
            held.append(row)
        else:
            yield row


def _settle_template(
    tokenizer: PreTrainedTokenizerBase, recipe: Recipe, today: Date | None, watch: Watch
) -> Date | None:
    """`set_template`, and say of it what a person would not expect."""
    if tokenizer.chat_template is None:
        watch.note(
            f"the tokenizer has no chat template: chats are written by the shipped template {FALLBACK}, in words and "
            "the end of text, which every base has learnt (data.template)"
        )
    date = set_template(tokenizer, recipe, today)
    if date is not None:
        watch.note(f"the chat template writes today's date: it stays {date} in this run and its exports")
    return date
