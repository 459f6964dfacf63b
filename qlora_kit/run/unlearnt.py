"""Tokens that a chat template writes and the base has never learnt, told once the weights are there."""

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qlora_kit.base.vocabulary import are_tied, row_count, unlearnt_rows
from qlora_kit.data import template_tokens
from qlora_kit.errors import AdapterError, ModelError
from qlora_kit.lora.targets import adaptable_weights, match_targets
from qlora_kit.lora.vocabulary import check_rows, end_names
from qlora_kit.recipe import Recipe

UNUSED = 64
"""Rows behind the tokenizer's last token that are looked at, at most."""


def unlearnt_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Special tokens of the chat template whose rows of the embedding, or of a head of its own, were never trained.

    Args:
        model: the base, without adapters.
        tokenizer: with the run's chat template.
    """
    names = template_tokens(tokenizer)
    if not names:
        return []
    added = {token.content: place for place, token in tokenizer.added_tokens_decoder.items()}
    ids = sorted(added[name] for name in names)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    matrices = [embedding] if head is None or are_tied(embedding, head) else [embedding, head]
    found: set[int] = set()
    for matrix in matrices:
        rows = row_count(matrix)
        known = {place for place in added.values() if place < rows}
        unused = range(max(len(tokenizer), rows - UNUSED), rows)
        found.update(unlearnt_rows(matrix, ids, sorted(({*known, *unused}) - set(ids))))
    return [name for name in names if added[name] in found]


def tokens_to_learn(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, recipe: Recipe
) -> tuple[list[str], str | None]:
    """What a run does about tokens that its chats are written in and the base has not learnt.

    Args:
        model: the base, without adapters.
        tokenizer: with the run's chat template.
        recipe: of the run.

    Returns:
        tokens whose rows are trained in `lora.added_tokens`, none where the recipe trains the rows otherwise, names
        tokens of its own or cannot have rows trained; and what to tell, None where there is nothing to tell.
    """
    ends = end_names(model)
    trains_ends = any(end == name or end.endswith(f".{name}") for end in ends for name in recipe.lora.also_train)
    if recipe.train.full_finetune or trains_ends:
        return [], None
    names = [name for name in unlearnt_tokens(model, tokenizer) if name not in recipe.lora.added_tokens]
    if not names:
        return [], None
    found = (
        f"the chat template writes {', '.join(names)}, which the base has not learnt (their rows of the "
        "embedding or the head are zero or alike)"
    )
    if _can_learn(model, tokenizer, recipe, names):
        return names, f"{found}: those rows are trained, as by lora.added_tokens; data.template=plain does without them"
    every = ", ".join([*recipe.lora.added_tokens, *names])
    return [], (
        f"{found}: train them with 'lora.added_tokens=[{every}]', or write chats without them with data.template=plain"
    )


def _can_learn(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, recipe: Recipe, names: list[str]) -> bool:
    """Whether a recipe that names no tokens can have rows trained beside the rest of its adapter."""
    lora = recipe.lora
    if lora.added_tokens or lora.from_ is not None:
        return False
    added = {token.content: place for place, token in tokenizer.added_tokens_decoder.items()}
    chosen = match_targets(model, adaptable_weights(model), lora.targets, untie_head=lora.untie_head)
    try:
        check_rows(model, [added[name] for name in names], chosen)
    except (AdapterError, ModelError):
        return False
    return True
