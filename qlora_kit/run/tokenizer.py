"""The tokenizer of a run: the model's own, with the chat template and the tokens that the recipe adds."""

from datetime import date as Date
from pathlib import Path

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from qlora_kit.base.tokenizer import read_tokenizer
from qlora_kit.data import (
    FALLBACK,
    add_tokens,
    check_turn_tokens,
    find_template,
    fix_tokenizer,
)
from qlora_kit.errors import DataError
from qlora_kit.recipe import Recipe
from qlora_kit.watch import Watch


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
    source = find_template(recipe.data.template)
    if source is not None:
        tokenizer.chat_template = source
    add_tokens(tokenizer, recipe.lora.added_tokens)
    if source is not None:
        check_turn_tokens(recipe.data.template, tokenizer)
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


def settle_template(
    tokenizer: PreTrainedTokenizerBase, recipe: Recipe, today: Date | None, watch: Watch
) -> Date | None:
    """`set_template`, and say of it what a person would not expect.

    Args:
        tokenizer: gets the template.
        recipe: that names it.
        today: as for `set_template`.
        watch: is told.
    """
    if tokenizer.chat_template is None:
        watch.note(
            f"the tokenizer has no chat template: chats are written by the shipped template {FALLBACK}, using only "
            "plain words and the end-of-text token, which every base has learnt (data.template)"
        )
    date = set_template(tokenizer, recipe, today)
    if date is not None:
        watch.note(f"the chat template writes today's date: it stays {date} in this run and its exports")
    return date


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


def check_pad(tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig) -> None:
    """See that the model has the token that rows are filled with.

    Raises:
        DataError: it has not.
    """
    pad, rows = pad_id(tokenizer), config.get_text_config().vocab_size
    if pad >= rows:
        raise DataError(
            f"rows would be padded with {tokenizer.convert_ids_to_tokens(pad)!r}, number {pad}, which is beyond the "
            f"model's vocabulary of {rows}: name it in lora.added_tokens, or give tokenizer_config.json a pad_token "
            "that the model has"
        )
