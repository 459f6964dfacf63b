"""Before any weight is read: where the model lies, the rows as tokens, and the numbers of the run."""

from dataclasses import dataclass
from datetime import date as Date
from functools import partial
from pathlib import Path

import torch
from transformers import AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase

from qlora_kit.base import locate_model
from qlora_kit.base.dense import parameter_count
from qlora_kit.base.files import has_tokenizer
from qlora_kit.base.hub import is_folder
from qlora_kit.base.load import build_model, read_config
from qlora_kit.base.vocabulary import longer_config
from qlora_kit.data import (
    FALLBACK,
    Batch,
    Chat,
    Encoded,
    EncodedSet,
    Example,
    Faults,
    Filling,
    check_turn_tokens,
    collate_rows,
    conversations,
    encode_rows,
    fill,
    find_template,
    fix_tokenizer,
    load_rows,
    longest_pack,
    remarks_on,
    split_eval,
    swap_answers,
)
from qlora_kit.errors import DataError
from qlora_kit.recipe import Recipe
from qlora_kit.run.full_finetune import check_full_finetune
from qlora_kit.run.task import check_task
from qlora_kit.train.pace import ROWS_A_STEP, TOKENS_A_MICRO_BATCH, Pace, set_pace
from qlora_kit.train.tasks import sequences_of
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
    recipe: Recipe, watch: Watch, *, weights: bool, today: Date | None = None, trust_remote_code: bool = False
) -> Prepared:
    """`gather`, and tell what became of the rows and what is odd about them."""
    prepared = gather(recipe, watch, weights=weights, today=today, trust_remote_code=trust_remote_code)
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
    config = read_config(folder, trust_remote_code=trust_remote_code)
    check_task(recipe)
    check_full_finetune(recipe, config, watch)
    tokenizer = load_tokenizer(folder, recipe, trust_remote_code=trust_remote_code)
    config = longer_config(config, rows_needed(tokenizer, recipe))
    train_rows, eval_rows, date = _read_rows(recipe, tokenizer, config, watch, today)
    if train_rows.counts.turns:
        watch.note(
            "the chat template writes earlier turns otherwise than inference saw them: chats are one row an answer, "
            f"{counted(train_rows.counts.turns, 'row')} more"
        )
    pace, packed = pace_of(recipe, train_rows, count_parameters(config))
    return Prepared(config, tokenizer, train_rows, eval_rows, pace, packed, date)


def pace_of(recipe: Recipe, rows: EncodedSet, parameters: int) -> tuple[Pace, int | None]:
    """The pace of a run, and the most tokens of a sequence where rows are packed; None where every row is its own.

    Args:
        recipe: the run.
        rows: its training rows.
        parameters: of the base.

    Raises:
        DataError: a step has fewer rows than its task needs.
    """
    counts, is_packed, max_tokens = rows.counts, recipe.data.packing is True, recipe.data.max_tokens
    longest = max(max_tokens, rows.longest) if is_packed else rows.longest
    pace = set_pace(
        recipe.train,
        rows=counts.rows,
        longest=longest * sequences_of(recipe.train.task),
        tokens=counts.tokens,
        trained_tokens=counts.trained_tokens,
        parameters=parameters,
    )
    if recipe.train.task == "kto" and pace.rows_a_step < 2:
        raise DataError("train.task=kto holds answers of other rows against a prompt, so a step needs two rows: "
                        "raise train.accumulation, or give more rows")  # fmt: skip
    return pace, longest_pack(rows.lengths, max_tokens, pace.rows_a_step) if is_packed else None


def fill_batches(recipe: Recipe, rows: EncodedSet, pace: Pace, packed_tokens: int | None) -> Filling:
    """How full the batches of a run's first epoch are."""
    return fill(
        rows.lengths,
        seed=recipe.train.seed,
        steps=pace.steps,
        rows_a_step=pace.rows_a_step,
        micro_batch=pace.micro_batch,
        max_tokens=packed_tokens,
    )


def load_tokenizer(
    folder: Path, recipe: Recipe | None = None, *, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """The model's tokenizer, with the chat template and the added tokens of the recipe, so that every export has them.

    Raises:
        DataError: there is no tokenizer in the folder, no such template, or it has not the tokens that one needs.
    """
    if not has_tokenizer(folder):
        raise DataError(
            f"{folder} has no tokenizer (tokenizer.json or the like); put the model's own beside its config"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{folder} has no tokenizer that can be read: {str(error).splitlines()[0]}") from error
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
        rows = load_rows(str(data), format=recipe.data.format, columns=recipe.data.columns, task=recipe.train.task)
        return _encode(rows, recipe, tokenizer, config)
    return _read_rows(recipe, tokenizer, config)[1]


def training_rows(
    recipe: Recipe, tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig, count: int
) -> list[Encoded]:
    """Some of the run's training rows, as far apart as they can be."""
    rows = _read_rows(recipe, tokenizer, config)[0].rows
    return rows[:: max(1, len(rows) // max(1, count))][:count]


def eval_batches(rows: list[Encoded], pad: int, device: torch.device) -> list[Batch]:
    """Held-out rows side by side, those of like length together, never more tokens than a training batch may have."""
    if rows and rows[0].is_good is not None:
        rows = swap_answers(rows)
    return [collate_rows([[row] for row in group], pad).to(device) for group in _groups(rows)]


def largest_eval_shape(rows: list[Encoded]) -> tuple[int, int] | None:
    """Rows and tokens of the largest of `eval_batches`; None where there are no rows."""
    shapes = ((len(group), group[-1].longest) for group in _groups(rows))
    return max(shapes, key=lambda shape: shape[0] * shape[1], default=None)


def _groups(rows: list[Encoded]) -> list[list[Encoded]]:
    """Rows of a batch each, the longest of them last."""
    groups: list[list[Encoded]] = [[]]
    for row in sorted(rows, key=lambda row: row.longest):
        tokens = (len(groups[-1]) + 1) * row.longest * (1 if row.other is None else 2)
        if groups[-1] and (tokens > TOKENS_A_MICRO_BATCH or len(groups[-1]) == ROWS_A_STEP):
            groups.append([])
        groups[-1].append(row)
    return groups if rows else []


def count_parameters(config: PretrainedConfig) -> int:
    """Parameters of the model, counted on a model without storage."""
    with torch.device("meta"):
        return parameter_count(build_model(config, torch.bfloat16, "eager"))


def positions_of(config: PretrainedConfig) -> int | None:
    """The longest row that the model was made for; None if it has no such limit."""
    positions: int | None = getattr(config.get_text_config(), "max_position_embeddings", None)
    return positions


def _read_rows(
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerBase,
    config: PretrainedConfig,
    watch: Watch | None = None,
    today: Date | None = None,
) -> tuple[EncodedSet, EncodedSet, Date | None]:
    """Training rows, held-out rows, and the date that their template writes."""
    data = recipe.data
    sources = (
        data.train
        if isinstance(data.train, str)
        else [item if isinstance(item, str) else item.model_dump(exclude_none=True) for item in data.train]
    )
    read = partial(load_rows, format=data.format, columns=data.columns, task=recipe.train.task)
    train_faults, eval_faults = Faults(), Faults()
    examples = read(sources, faults=train_faults)
    held_out: list[Example] = []
    if data.eval == "auto":
        examples, held_out = split_eval(examples)
    elif data.eval is not None:
        held_out = read(data.eval, faults=eval_faults)
    unread = train_faults + eval_faults
    if data.on_error == "stop" or unread.hides_rows:
        unread.stop()  # before the rows are encoded, which may take minutes
    chats = any(isinstance(part, Chat) for example in (*examples, *held_out) for part in conversations(example))
    date = _settle_template(tokenizer, recipe, today, watch or Watch()) if chats else None
    train_rows = _encode(examples, recipe, tokenizer, config, faults=train_faults)
    # A few rows that the split chose may all be too long: then nothing is held out, as the counts say.
    may_be_empty = not held_out or data.eval == "auto"
    eval_rows = _encode(held_out, recipe, tokenizer, config, faults=eval_faults, may_be_empty=may_be_empty)
    if data.on_error == "stop":
        (train_faults + eval_faults).stop()
    return train_rows, eval_rows, date


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


def _encode(
    examples: list[Example],
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerBase,
    config: PretrainedConfig,
    *,
    faults: Faults | None = None,
    may_be_empty: bool = False,
) -> EncodedSet:
    return encode_rows(
        examples,
        tokenizer,
        loss_on="all" if recipe.train.task == "pretrain" else recipe.data.loss_on,
        max_tokens=recipe.data.max_tokens,
        over_length=recipe.data.over_length,
        thinking=recipe.data.thinking,
        vocab_size=config.get_text_config().vocab_size,
        max_positions=positions_of(config),
        faults=faults,
        may_be_empty=may_be_empty,
    )
