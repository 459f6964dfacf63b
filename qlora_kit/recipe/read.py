"""From a recipe file and overrides to a checked `Recipe`, and from a `Recipe` back to text.

Nothing is read here but the recipe itself: whether a model or a data file exists is for the rooms that open them.
"""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from qlora_kit.errors import RecipeError
from qlora_kit.recipe import shipped, yaml12
from qlora_kit.recipe.draft import Draft, Origin
from qlora_kit.recipe.schema import Recipe
from qlora_kit.recipe.words import brief

MOST_BYTES = 2**20
"""Largest recipe file, in bytes; a full recipe takes about 2,000."""


def read_recipe(recipe: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Recipe:
    """Read and check a recipe; all paths in the result are absolute.

    Args:
        recipe: a path if it exists, ends in .yaml or .yml or holds a separator; otherwise a shipped recipe's name.
        overrides: `key=value` each, the value in YAML, as in `lora.targets=[q_proj, v_proj]`; the last of one key wins.

    Raises:
        RecipeError: if anything is wrong. It lists every mistake: its line, what was wanted and what was found.
    """
    source = _locate(os.fspath(recipe))
    draft = Draft(Origin(0, source.label, source.folder))
    draft.add_file(_parse(source))
    for number, override in enumerate(overrides, start=1):
        draft.add_override(override, Origin(number, f"override {brief(override)}", Path.cwd()))
    draft.complete(source.name)
    checked = draft.check()
    mistakes = draft.mistakes()
    if checked is None or mistakes:
        head = [f"{len(mistakes)} mistakes in {source.label}"] if len(mistakes) > 1 else []
        raise RecipeError("\n".join(head + mistakes))
    return checked


def dump_recipe(recipe: Recipe) -> str:
    """The recipe as YAML with every key written out; reading the text gives an equal recipe."""
    return yaml12.dump(recipe.model_dump(by_alias=True))


@dataclass(frozen=True, slots=True)
class _Source:
    """A recipe file: what the user called it, what it is relative to, and the name of its run folder."""

    path: Path
    label: str
    folder: Path
    name: str


def _locate(recipe: str) -> _Source:
    path = Path(recipe)
    is_yaml = path.suffix in (".yaml", ".yml")
    if re.match(r"[a-z_.]+=", recipe) and not is_yaml and not os.path.exists(recipe):
        raise RecipeError(
            f"{brief(recipe, 200)} is a setting, and a recipe comes first: default, another shipped one, or a file"
        )
    if is_yaml or os.sep in recipe or os.path.exists(recipe):
        return _Source(path, brief(recipe, 200), Path(os.path.abspath(path)).parent, path.stem)
    path = shipped.find(recipe)
    return _Source(path, recipe, path.parent if shipped.brings_files(path) else Path.cwd(), recipe)


def _parse(source: _Source) -> yaml.MappingNode:
    """The file as a mapping of nodes; a file that has none is one mistake, and nothing more can be said about it."""
    try:
        root = yaml12.parse(_text(source))
    except yaml12.Unreadable as error:
        raise RecipeError(f"{source.label}:{error.line}: {brief(str(error), 200)}") from None
    if root is None:
        raise RecipeError(f"{source.label} is empty; a recipe needs at least base.model and data.train")
    if not isinstance(root, yaml.MappingNode):
        sections = ", ".join(Recipe.model_fields)
        raise RecipeError(f"{source.label}:{root.start_mark.line + 1}: a recipe is a mapping of {sections}")
    return root


def _text(source: _Source) -> str:
    path, label = source.path, source.label
    if os.path.isdir(path):
        hint = "; did you mean the recipe.yaml in it?" if os.path.exists(path / "recipe.yaml") else ""
        raise RecipeError(f"{label} is a folder, and a recipe is a file{hint}")
    if not os.path.isfile(path):
        raise RecipeError(f"{label} is not a regular file" if os.path.exists(path) else f"{label} does not exist")
    try:
        if path.stat().st_size > MOST_BYTES:
            raise RecipeError(f"{label} is larger than 1 MiB, and a recipe is a short YAML text")
        content = path.read_bytes()
    except OSError as error:
        raise RecipeError(f"{label} cannot be read: {error.strerror}") from error
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise RecipeError(f"{label}:{line}: this is not UTF-8 text") from None
