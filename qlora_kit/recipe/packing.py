"""Whether the rows of a step share sequences."""

from qlora_kit.recipe.schema import Recipe
from qlora_kit.recipe.tasks import TASKS

READS_APART = ("flex", "flash")
"""Attention that reads of packed documents only what may see each other; the rest is given a mask of every pair."""


def is_packed(recipe: Recipe) -> bool:
    """What `data.packing` comes to.

    Where attention reads each document alone, packed rows cost what they cost by themselves, less padding and passes.
    Under a dense mask attention grows with the square of a whole sequence, which costs more than it saves
    (benchmarks/LOG.md, "Rows side by side").
    """
    if recipe.data.packing == "auto":
        return TASKS[recipe.train.task].can_pack and recipe.base.attention in READS_APART
    return recipe.data.packing
