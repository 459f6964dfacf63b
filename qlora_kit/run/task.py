"""Settings that a task cannot be combined with, refused before anything is read."""

from qlora_kit.errors import RecipeError
from qlora_kit.recipe import TASKS, Recipe


def check_task(recipe: Recipe) -> None:
    """See that a recipe's task goes with its other settings.

    Raises:
        RecipeError: it does not; names both and the way out.
    """
    task, kind = recipe.train.task, TASKS[recipe.train.task]
    if kind.can_pack:
        return
    if recipe.data.packing is True:
        raise RecipeError(
            f"data.packing=true is for tasks that learn each row on its own; leave it out for train.task={task}"
        )
    if recipe.data.loss_on == "all":
        raise RecipeError(
            f"data.loss_on=all does not work with train.task={task}, which does not train on prompts; leave it out"
        )
    if recipe.data.over_length == "split":
        raise RecipeError(
            f"data.over_length=split would cut a row into pieces that lose its meaning; for train.task={task} set "
            "drop, truncate or error"
        )
    if recipe.train.sample_every is not None and task == "classify":
        raise RecipeError("train.sample_every writes answers, which train.task=classify does not train; leave it out")
    if recipe.train.full_finetune and kind.holds_to_start:
        raise RecipeError(
            f"train.task={task} compares with the model that training starts from, which train.full_finetune changes; "
            "leave that out, or set train.task=orpo"
        )
