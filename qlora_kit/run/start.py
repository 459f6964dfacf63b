"""A run that goes on from an adapter, `lora.from`: its recipe with the shape that the adapter brings."""

from qlora_kit.data import Classes
from qlora_kit.export.trained_against import read_added_tokens, read_classes
from qlora_kit.lora import adapter_folder, shaped
from qlora_kit.recipe import Recipe


def classes_at_start(recipe: Recipe) -> Classes | None:
    """The classes that the adapter of `lora.from` tells apart; None where a recipe names none, or it has no such head.

    Raises:
        AdapterError: there is no adapter, or it is damaged.
    """
    start = recipe.lora.from_
    return None if start is None or recipe.train.full_finetune else read_classes(adapter_folder(start))


def as_it_starts(recipe: Recipe) -> Recipe:
    """The recipe with rank, targets and so on of the adapter that it names; any other as it is.

    Raises:
        AdapterError: there is no adapter, or what it is made of cannot be told.
        RecipeError: the recipe asks for another shape.
    """
    start = recipe.lora.from_
    if start is None or recipe.train.full_finetune:
        return recipe
    return recipe.model_copy(update={"lora": shaped(recipe.lora, read_added_tokens(adapter_folder(start)))})
