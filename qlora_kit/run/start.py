"""A run that goes on from an adapter, `lora.from`: its recipe with the shape that the adapter brings, and whether the
adapter that it holds to is still what it was."""

from collections.abc import Mapping

from qlora_kit.data import Classes
from qlora_kit.errors import AdapterError, RecipeError, listed
from qlora_kit.export.trained_against import read_added_tokens, read_classes
from qlora_kit.lora import adapter_folder, shaped
from qlora_kit.lora.adapters import CONFIG, WEIGHTS
from qlora_kit.recipe import Recipe
from qlora_kit.storage import sha256_file
from qlora_kit.train.tasks import has_reference


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
        RecipeError: the recipe asks for another shape, or does not classify as that adapter does.
    """
    start = recipe.lora.from_
    if start is None or recipe.train.full_finetune:
        return recipe
    classes = classes_at_start(recipe)
    if classes is not None and recipe.train.task != "classify":
        raise RecipeError(
            f"lora.from={start} tells texts apart ({listed(classes.names)}), and train.task={recipe.train.task} does "
            "not; set train.task=classify, or start from another adapter"
        )
    return recipe.model_copy(update={"lora": shaped(recipe.lora, read_added_tokens(adapter_folder(start)))})


def reference_checksums(recipe: Recipe) -> dict[str, str]:
    """SHA-256 of the files of the frozen adapter that a run holds to, by their names; empty where it holds to none.

    Raises:
        AdapterError: there is no such adapter.
    """
    if not has_reference(recipe):
        return {}
    files = (adapter_folder(str(recipe.lora.from_)) / name for name in (CONFIG, WEIGHTS))
    return {file.name: sha256_file(file) for file in files if file.is_file()}


def check_reference(recipe: Recipe, recorded: Mapping[str, str]) -> None:
    """See that a run which reads its frozen adapter again reads what it began with: its losses are against that.

    Args:
        recipe: the run.
        recorded: what `reference_checksums` told when it began.

    Raises:
        AdapterError: there is no adapter any more, or another.
    """
    found = reference_checksums(recipe)
    changed = [name for name in recorded if found.get(name) != recorded[name]]
    if changed:
        raise AdapterError(
            f"{adapter_folder(str(recipe.lora.from_)) / changed[0]} is not what it was when the run began, and the "
            "run's losses are measured against it: put it back, or start a new run"
        )
