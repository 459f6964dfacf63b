"""A run that goes on from an adapter, `lora.from`: its recipe with the shape that the adapter brings."""

from qlora_kit.export.trained_against import read_added_tokens
from qlora_kit.lora import adapter_folder, shaped
from qlora_kit.recipe import Recipe


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
