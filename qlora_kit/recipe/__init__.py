"""What the user asks for, checked before anything is read or downloaded: recipes, their schema and their errors."""

from qlora_kit.recipe.read import dump_recipe, read_recipe
from qlora_kit.recipe.schema import Base, Data, Lora, Memory, Recipe, Source, Train
from qlora_kit.recipe.shipped import find, folder, names, schema_text, summary

__all__ = [
    "Base",
    "Data",
    "Lora",
    "Memory",
    "Recipe",
    "Source",
    "Train",
    "dump_recipe",
    "find",
    "folder",
    "names",
    "read_recipe",
    "schema_text",
    "summary",
]
