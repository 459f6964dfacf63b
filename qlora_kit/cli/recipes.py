"""`qlora-kit recipes`: list, show and copy the shipped recipes, and print every key that a recipe may hold."""

import json
import re
from pathlib import Path
from typing import Annotated

import typer

from qlora_kit import recipe
from qlora_kit.cli.guard import reports_errors
from qlora_kit.cli.visible import visible
from qlora_kit.errors import RecipeError

recipes_app = typer.Typer(
    help="List, show or copy the shipped recipes; print every setting.", no_args_is_help=True, rich_markup_mode=None
)

Name = Annotated[str, typer.Argument(help="Name of a shipped recipe.")]


@recipes_app.command("list")
@reports_errors
def list_recipes() -> None:
    """List the shipped recipes and what each is for."""
    names = recipe.names()
    width = max(map(len, names), default=0)
    for name in names:
        typer.echo(f"{name:{width}}  {recipe.summary(recipe.find(name))}")


@recipes_app.command()
@reports_errors
def show(name: Name) -> None:
    """Print a shipped recipe."""
    typer.echo(recipe.find(name).read_text(encoding="utf-8"), nl=False)


@recipes_app.command()
@reports_errors
def copy(
    name: Name, to: Annotated[Path | None, typer.Argument(help="File to write; default: NAME.yaml.")] = None
) -> None:
    """Copy a shipped recipe to a new file that you can edit; what it names beside itself is named where it is."""
    target = to or Path(f"{name}.yaml")
    source = recipe.find(name)
    if target.exists():
        raise RecipeError(f"{target} already exists; name another file")
    beside = re.compile(r"(?<=: )\./\S+")
    text = beside.sub(lambda found: json.dumps(str(source.parent / found[0])), source.read_text(encoding="utf-8"))
    try:
        target.write_text(text, encoding="utf-8")
    except OSError as error:
        raise RecipeError(f"{target} cannot be written: {error.strerror}; name another file") from error
    typer.echo(visible(f"{target} written; run it with: qlora-kit train {target}"))


@recipes_app.command()
@reports_errors
def schema() -> None:
    """Print every setting with its default, its values and its meaning."""
    typer.echo(recipe.schema_text())
