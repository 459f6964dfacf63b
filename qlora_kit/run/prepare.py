"""Before any weight is read: where the model lies, the rows as tokens, and the numbers of the run."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase

from qlora_kit.base import locate_model
from qlora_kit.base.files import has_tokenizer
from qlora_kit.base.hub import is_folder
from qlora_kit.base.load import read_config
from qlora_kit.base.vocabulary import longer_config
from qlora_kit.data import (
    Batch,
    Encoded,
    EncodedSet,
    check_turn_tokens,
    collate,
    encode_rows,
    find_template,
    load_rows,
    longest_pack,
    split_eval,
)
from qlora_kit.errors import DataError
from qlora_kit.recipe import Recipe
from qlora_kit.run.full_finetune import check_full_finetune
from qlora_kit.train.pace import ROWS_A_STEP, TOKENS_A_MICRO_BATCH, Pace, set_pace
from qlora_kit.watch import Watch


@dataclass(frozen=True, slots=True)
class Prepared:
    """What is known before any weight is read.

    Attributes:
        config: of the model.
        tokenizer: with the chat template that the recipe names.
        train: encoded training rows.
        eval: encoded held-out rows; empty where the recipe wants none.
        pace: steps and batch sizes.
        packed_tokens: most tokens of a sequence where rows are packed; None where every row is its own.
    """

    config: PretrainedConfig
    tokenizer: PreTrainedTokenizerBase
    train: EncodedSet
    eval: EncodedSet
    pace: Pace
    packed_tokens: int | None = None

    @property
    def longest(self) -> int:
        """Tokens that no sequence exceeds."""
        return self.train.longest if self.packed_tokens is None else self.packed_tokens


def prepare(recipe: Recipe, watch: Watch, *, weights: bool, trust_remote_code: bool = False) -> Prepared:
    """Find the model, read and encode the rows, and set the pace. From the hub, config and tokenizer alone are fetched.

    Args:
        recipe: the run.
        watch: is told of downloads and of what became of the rows.
        weights: whether a model folder is asked for sound weights, too.
        trust_remote_code: let the model's own code run.
    """
    name, weights_now = recipe.base.model, weights and is_folder(recipe.base.model)
    folder = locate_model(name, recipe.base.revision, weights=weights_now, code=trust_remote_code, notify=watch.note)
    config = read_config(folder, trust_remote_code=trust_remote_code)
    check_full_finetune(recipe, config, watch)
    tokenizer = load_tokenizer(folder, recipe, trust_remote_code=trust_remote_code)
    config = longer_config(config, rows_needed(tokenizer, recipe))
    train_rows, eval_rows = _read_rows(recipe, tokenizer, config)
    counts, is_packed = train_rows.counts, recipe.data.packing is True
    pace = set_pace(
        recipe.train,
        rows=counts.rows,
        longest=max(recipe.data.max_tokens, train_rows.longest) if is_packed else train_rows.longest,
        tokens=counts.tokens,
        trained_tokens=counts.trained_tokens,
        config=config,
    )
    packed = longest_pack(train_rows.lengths, recipe.data.max_tokens, pace.rows_a_step) if is_packed else None
    prepared = Prepared(config, tokenizer, train_rows, eval_rows, pace, packed)
    watch.prepared(prepared)
    if recipe.train.early_stopping is not None and not prepared.eval.rows:
        watch.note("train.early_stopping has no effect: no rows are held out; set data.eval")
    if pace.warning is not None:
        watch.note(pace.warning)
    return prepared


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
        rows = load_rows(str(data), format=recipe.data.format, columns=recipe.data.columns)
        return _encode(rows, recipe, tokenizer, config)
    return _read_rows(recipe, tokenizer, config)[1]


def eval_batches(rows: list[Encoded], pad: int, device: torch.device) -> list[Batch]:
    """Held-out rows side by side, those of like length together, never more tokens than a training batch may have."""
    return [collate(group, pad).to(device) for group in _groups(rows)]


def largest_eval_shape(rows: list[Encoded]) -> tuple[int, int] | None:
    """Rows and tokens of the largest of `eval_batches`; None where there are no rows."""
    shapes = ((len(group), len(group[-1].input_ids)) for group in _groups(rows))
    return max(shapes, key=lambda shape: shape[0] * shape[1], default=None)


def _groups(rows: list[Encoded]) -> list[list[Encoded]]:
    """Rows of a batch each, the longest of them last."""
    groups: list[list[Encoded]] = [[]]
    for row in sorted(rows, key=lambda row: len(row.input_ids)):
        tokens = (len(groups[-1]) + 1) * len(row.input_ids)
        if groups[-1] and (tokens > TOKENS_A_MICRO_BATCH or len(groups[-1]) == ROWS_A_STEP):
            groups.append([])
        groups[-1].append(row)
    return groups if rows else []


def positions_of(config: PretrainedConfig) -> int | None:
    """The longest row that the model was made for; None if it has no such limit."""
    positions: int | None = getattr(config.get_text_config(), "max_position_embeddings", None)
    return positions


def _read_rows(
    recipe: Recipe, tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig
) -> tuple[EncodedSet, EncodedSet]:
    data = recipe.data
    sources = (
        data.train
        if isinstance(data.train, str)
        else [item if isinstance(item, str) else item.model_dump(exclude_none=True) for item in data.train]
    )
    examples = load_rows(sources, format=data.format, columns=data.columns)
    held_out: list[Any] = []
    if data.eval == "auto":
        examples, held_out = split_eval(examples)
    elif data.eval is not None:
        held_out = load_rows(data.eval, format=data.format, columns=data.columns)
    encoded = _encode(examples, recipe, tokenizer, config)
    # A few rows that the split chose may all be too long: then nothing is held out, as the counts say.
    return encoded, _encode(held_out, recipe, tokenizer, config, may_be_empty=not held_out or data.eval == "auto")


def _encode(
    examples: list[Any],
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerBase,
    config: PretrainedConfig,
    may_be_empty: bool = False,
) -> EncodedSet:
    return encode_rows(
        examples,
        tokenizer,
        loss_on="all" if recipe.train.task == "pretrain" else recipe.data.loss_on,
        max_tokens=recipe.data.max_tokens,
        over_length=recipe.data.over_length,
        vocab_size=config.get_text_config().vocab_size,
        max_positions=positions_of(config),
        may_be_empty=may_be_empty,
    )
