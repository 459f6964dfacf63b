"""Whether the rows of a step share sequences."""

from typing import Literal

from qlora_kit.recipe.schema import Recipe
from qlora_kit.recipe.tasks import TASKS

Layout = Literal["apart", "joined", "packed"]
"""How the rows of a forward pass lie: a sequence each, with padding; end to end in one sequence, which has as many
places; or in sequences of at most `data.max_tokens`, filled as well as may be."""


def layout_of(recipe: Recipe, *, reads_apart: bool) -> Layout:
    """What `data.packing` comes to.

    Where attention reads each document alone, rows end to end cost what they cost by themselves, without padding and in
    fewer passes. Under a dense mask attention grows with the square of a whole sequence, which costs more than it saves
    (benchmarks/LOG.md, "Rows end to end").

    Args:
        recipe: the run.
        reads_apart: whether its attention computes no pair of tokens from two documents.
    """
    if recipe.data.packing == "auto":
        return "joined" if reads_apart and TASKS[recipe.train.task].can_pack else "apart"
    return "packed" if recipe.data.packing else "apart"
