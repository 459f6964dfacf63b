"""What the user asks for, checked before anything is read or downloaded: recipes, their schema and their errors."""

from qlora_kit.recipe.grid import Cell, Grid, has_axes, read_grid
from qlora_kit.recipe.method import Method, base_as_held, method_of, not_read, with_adapters
from qlora_kit.recipe.packing import Layout, layout_of
from qlora_kit.recipe.read import dump_recipe, read_recipe
from qlora_kit.recipe.schema import Base, Data, Lora, Memory, Recipe, Source, Train
from qlora_kit.recipe.shipped import find, folder, names, schema_text, summary
from qlora_kit.recipe.tasks import TASKS, TaskKind

__all__ = [
    "TASKS",
    "Base",
    "Cell",
    "Data",
    "Grid",
    "Layout",
    "Lora",
    "Memory",
    "Method",
    "Recipe",
    "Source",
    "TaskKind",
    "Train",
    "base_as_held",
    "dump_recipe",
    "find",
    "folder",
    "has_axes",
    "layout_of",
    "method_of",
    "names",
    "not_read",
    "read_grid",
    "read_recipe",
    "schema_text",
    "summary",
    "with_adapters",
]
