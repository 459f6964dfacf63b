"""The recipes that come with the kit, found by name, and the schema as text.

In a checkout they live in the repository's `recipes/`, in the wheel in `qlora_kit/recipes/`. A recipe is a file
`NAME.yaml`, or a folder `NAME/` with a recipe.yaml and the files that it brings.
"""

from difflib import get_close_matches
from pathlib import Path
from textwrap import fill

from qlora_kit.errors import RecipeError
from qlora_kit.recipe import yaml12
from qlora_kit.recipe.words import SLOTS, Slot, brief


def folder() -> Path:
    """The folder of the shipped recipes, in the wheel or in a checkout."""
    package = Path(__file__).resolve().parents[1]
    installed = package / "recipes"
    return installed if installed.is_dir() else package.parent / "recipes"


def names() -> list[str]:
    """The names of the shipped recipes, in alphabetical order."""
    return sorted(_files())


def find(name: str) -> Path:
    """The file of the shipped recipe `name`.

    Raises:
        RecipeError: if there is none of that name; it says which there are.
    """
    files = _files()
    if name not in files:
        close = get_close_matches(name, files, n=1)
        hint = f" (did you mean {close[0]}?)" if close else ""
        raise RecipeError(
            f"there is no file and no shipped recipe {brief(name)!r}{hint}; shipped: {', '.join(names())}"
        )
    return files[name]


def brings_files(path: Path) -> bool:
    """Whether a shipped recipe is a folder of its own, so that its inputs are named relative to it."""
    return path.parent != folder()


def summary(path: Path) -> str:
    """The first comment line of a recipe; empty if it has none."""
    lines = (line.strip() for line in path.read_text(encoding="utf-8").splitlines())
    return next((line.lstrip("#").strip() for line in lines if line.startswith("#")), "")


def schema_text() -> str:
    """Every key with its default, what it may hold and what it is for, grouped by section, at most 100 columns wide."""
    return "\n".join(_described(slot) for slot in SLOTS.values() if slot.field)


def _files() -> dict[str, Path]:
    files = {path.stem: path for path in folder().glob("*.yaml")}
    return files | {path.parent.name: path for path in folder().glob("*/recipe.yaml")}


def _described(slot: Slot) -> str:
    field = slot.field
    assert field is not None, slot.key
    if slot.is_section:
        return f"{slot.key}: {field.annotation.__doc__}\n"
    head = "required" if field.is_required() else yaml12.dump({"default": field.default}).strip()
    about = [_wrapped(field.description or ""), _wrapped(f"Values: {slot.words}.")]
    return "\n".join([f"  {slot.key}  ({head})", *about, ""])


def _wrapped(text: str) -> str:
    return fill(text, 100, initial_indent=" " * 6, subsequent_indent=" " * 6)
