"""What a run will be trained on, shown before anything else: no weights are needed, and none are read."""

from typing import Literal

from qlora_kit.data import Filling, Preview, count_classes, measure_lengths, remarks_on, show_rows
from qlora_kit.recipe import TASKS, Recipe
from qlora_kit.run.prepare import fill_batches, gather, pace_of
from qlora_kit.run.rows import columns_read, positions_of
from qlora_kit.run.start import as_it_starts
from qlora_kit.train.classes import classes_in
from qlora_kit.watch import Watch


def preview(recipe: Recipe, watch: Watch | None = None, *, rows: int = 3, trust_remote_code: bool = False) -> Preview:
    """Read and encode the rows of a recipe as its run would, and look at them.

    Args:
        recipe: the run.
        watch: is told of downloads.
        rows: that are shown token by token, from the first that is trained on.
        trust_remote_code: let the model's own code run.

    Raises:
        QloraKitError: as `train`, as far as it gets.
    """
    recipe = as_it_starts(recipe)
    prepared = gather(recipe, watch or Watch(), weights=False, trust_remote_code=trust_remote_code)
    train, held_out, tokenizer = prepared.train, prepared.eval, prepared.tokenizer
    classes = classes_in(prepared.config) if recipe.train.task == "classify" else None

    def filling(packing: bool | Literal["auto"]) -> Filling:
        variant = recipe.model_copy(update={"data": recipe.data.model_copy(update={"packing": packing})})
        return fill_batches(variant, train, *pace_of(variant, train, prepared.config))

    return Preview(
        max_tokens=recipe.data.max_tokens,
        train=train.counts,
        eval=held_out.counts,
        sources=train.parts,
        lengths=measure_lengths(train),
        layout=prepared.layout,
        apart=filling(False),
        packed=filling("auto" if prepared.layout == "joined" else True) if TASKS[recipe.train.task].can_pack else None,
        remarks=remarks_on(train, held_out, tokenizer),
        rows=show_rows(train, tokenizer, rows, classes),
        classes={} if classes is None else count_classes(train, classes),
        read_as=columns_read(recipe),
        positions=positions_of(prepared.config),
    )
