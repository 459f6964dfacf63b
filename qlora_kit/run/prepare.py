"""Before any weight is read: where the model lies, the rows as tokens, and the numbers of the run."""

from dataclasses import dataclass, replace
from datetime import date as Date
from typing import NamedTuple

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from qlora_kit.base import locate_model
from qlora_kit.base.architecture import lacks_sdpa, read_config
from qlora_kit.base.attention import reads_apart
from qlora_kit.base.device import resolve_device
from qlora_kit.base.hub import is_folder
from qlora_kit.base.vocabulary import longer_config
from qlora_kit.data import (
    EncodedSet,
    Filling,
    Packing,
    fill,
    longest_pack,
    remarks_on,
)
from qlora_kit.errors import DataError
from qlora_kit.recipe import TASKS, Layout, Recipe, layout_of
from qlora_kit.run.common import Common
from qlora_kit.run.full_finetune import check_full_finetune
from qlora_kit.run.rows import read_rows
from qlora_kit.run.task import check_task
from qlora_kit.run.tokenizer import check_pad, load_tokenizer, rows_needed
from qlora_kit.train.classes import head_for
from qlora_kit.train.pace import Pace, Rate, room_of, set_pace
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
        layout: how the rows of a forward pass lie.
        longest: tokens that no row exceeds, or where rows are packed no sequence.
        date: that the chat template writes; None where it writes none.
    """

    config: PretrainedConfig
    tokenizer: PreTrainedTokenizerBase
    train: EncodedSet
    eval: EncodedSet
    pace: Pace
    layout: Layout
    longest: int
    date: Date | None = None

    @property
    def packing(self) -> Packing | None:
        """Sequences that hold several rows, by the pace; None where every row is a sequence of its own."""
        return packing_of(self.layout, self.pace, self.longest)


def prepare(
    recipe: Recipe,
    watch: Watch,
    *,
    weights: bool,
    today: Date | None = None,
    rate: Rate | None = None,
    trust_remote_code: bool = False,
    common: Common | None = None,
) -> Prepared:
    """`gather`, and tell what became of the rows and what is odd about them.

    A run that is resumed keeps the learning `rate` that `auto` began it with: of more steps it would make another.
    """
    prepared = gather(recipe, watch, weights=weights, today=today, trust_remote_code=trust_remote_code, common=common)
    if rate is not None:
        prepared = replace(prepared, pace=replace(prepared.pace, lr=rate.lr, lr_reason=rate.reason))
    prepared.train.check_most_fit(recipe.data.max_tokens)
    if recipe.train.task == "kto" and len(prepared.eval.rows) == 1:
        raise DataError("train.task=kto pairs each prompt with another row's answer, and only one row is held out: "
                        "give data.eval two rows or more, or set data.eval=null")  # fmt: skip
    watch.prepared(prepared)
    for remark in remarks_on(prepared.train, prepared.eval, prepared.tokenizer):
        if remark.is_for_runs:
            watch.note(str(remark))
    if recipe.train.early_stopping is not None and not prepared.eval.rows:
        watch.note("train.early_stopping has no effect: no rows are held out; set data.eval")
    if prepared.pace.warning is not None:
        watch.note(prepared.pace.warning)
    note_large_steps(recipe, prepared.pace, watch)
    note_attention(recipe, prepared.config, watch)
    return prepared


def note_attention(recipe: Recipe, config: PretrainedConfig, watch: Watch) -> None:
    """Tell that attention is not what was asked for, which takes more memory."""
    if recipe.base.attention == "sdpa" and lacks_sdpa(config, head_for(recipe.train.task)):
        watch.note(f"transformers has no sdpa for a {config.model_type}: base.attention is eager here")


def note_large_steps(recipe: Recipe, pace: Pace, watch: Watch) -> None:
    """Tell of steps that have more rows than adapters make good use of."""
    if pace.warning_of_lora is not None and not recipe.train.full_finetune:
        watch.note(pace.warning_of_lora)


def gather(
    recipe: Recipe,
    watch: Watch,
    *,
    weights: bool,
    today: Date | None = None,
    trust_remote_code: bool = False,
    common: Common | None = None,
) -> Prepared:
    """Find the model, read and encode the rows, and set the pace. From the hub, config and tokenizer alone are fetched.

    Args:
        recipe: the run.
        watch: is told of downloads.
        weights: whether a model folder is asked for sound weights, too.
        today: the date that a chat template may write; None asks the clock.
        trust_remote_code: let the model's own code run.
        common: where runs of one process leave their rows for each other.
    """
    check_task(recipe)

    def read() -> _Material:
        return _read(recipe, watch, weights, today, trust_remote_code)

    material = read() if common is None else common.take("rows", (*_decides_rows(recipe), today), read)
    config, tokenizer, train_rows, eval_rows, date = material
    check_full_finetune(recipe, config, watch)
    return Prepared(config, tokenizer, train_rows, eval_rows, *pace_of(recipe, train_rows, config), date)


class _Material(NamedTuple):
    """What `Prepared` says of it, before there is a pace."""

    config: PretrainedConfig
    tokenizer: PreTrainedTokenizerBase
    train: EncodedSet
    eval: EncodedSet
    date: Date | None


def _read(recipe: Recipe, watch: Watch, weights: bool, today: Date | None, trust_remote_code: bool) -> _Material:
    name, weights_now = recipe.base.model, weights and is_folder(recipe.base.model)
    folder = locate_model(name, recipe.base.revision, weights=weights_now, code=trust_remote_code, notify=watch.note)
    config = read_config(folder, head=head_for(recipe.train.task), trust_remote_code=trust_remote_code)
    tokenizer = load_tokenizer(folder, recipe, trust_remote_code=trust_remote_code)
    config = longer_config(config, rows_needed(tokenizer, recipe))
    check_pad(tokenizer, config)
    train_rows, eval_rows, date = read_rows(recipe, tokenizer, config, watch, today)
    if train_rows.counts.turns:
        watch.note(
            "the chat template writes earlier turns differently from what inference saw: chats are one row an answer, "
            f"{counted(train_rows.counts.turns, 'row')} more"
        )
    return _Material(config, tokenizer, train_rows, eval_rows, date)


def _decides_rows(recipe: Recipe) -> tuple[object, ...]:
    """All of a recipe that its rows may depend on."""
    return recipe.base, recipe.data, recipe.train.task, recipe.lora.from_, recipe.lora.added_tokens


def pace_of(recipe: Recipe, rows: EncodedSet, config: PretrainedConfig) -> tuple[Pace, Layout, int]:
    """The pace of a run, how rows lie, and the tokens that none of them exceeds, or where they are packed no sequence.

    Args:
        recipe: the run.
        rows: its training rows.
        config: of the base.

    Raises:
        DataError: a step has fewer rows than its task needs.
    """
    epoch, max_tokens = rows.epoch, recipe.data.max_tokens
    layout = layout_of(recipe, reads_apart=reads_apart(recipe.base.attention, config))
    longest = max(max_tokens, rows.longest) if layout == "packed" else rows.longest
    pace = set_pace(
        recipe.train,
        rows=epoch.rows,
        longest=longest * TASKS[recipe.train.task].sequences,
        tokens=epoch.tokens,
        trained_tokens=epoch.trained_tokens,
        config=config,
    )
    if recipe.train.task == "kto" and pace.rows_a_step < 2:
        raise DataError("train.task=kto pairs each prompt with another row's answer, so a step needs two rows: "
                        "raise train.accumulation, or give more rows")  # fmt: skip
    full = longest_pack(rows.lengths, max_tokens, pace.rows_a_step) if layout == "packed" else longest
    return pace, layout, full


def packing_of(layout: Layout, pace: Pace, longest: int) -> Packing | None:
    """Sequences that hold several rows each; None where none does.

    Args:
        layout: how rows lie.
        pace: of the run.
        longest: tokens that no row exceeds, or where rows are packed no sequence.
    """
    if layout == "apart":
        return None
    return Packing(1, pace.micro_batch * longest) if layout == "joined" else Packing(pace.micro_batch, longest)


def fill_batches(recipe: Recipe, rows: EncodedSet, pace: Pace, layout: Layout, longest: int) -> Filling:
    """How full the batches of a run's first epoch are. The arguments are those of `packing_of`."""
    return fill(
        rows,
        seed=recipe.train.seed,
        steps=pace.steps,
        rows_a_step=pace.rows_a_step,
        room=room_of(recipe.train, pace, longest, resolve_device(recipe.base.device)),
        packing=packing_of(layout, pace, longest),
    )
