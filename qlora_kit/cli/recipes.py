"""`qlora-kit recipes`: list, show and copy the shipped recipes, and print every key that a recipe may hold."""

import shutil
from pathlib import Path
from typing import Annotated

import typer

from qlora_kit import recipe
from qlora_kit.cli.guard import reports_errors
from qlora_kit.cli.visible import visible
from qlora_kit.errors import RecipeError

recipes_app = typer.Typer(
    help="List, show and copy shipped recipes; print the schema.", no_args_is_help=True, rich_markup_mode=None
)


@recipes_app.command("list")
@reports_errors
def list_recipes() -> None:
    """Names of the shipped recipes and what each is for."""
    names = recipe.names()
    width = max(map(len, names), default=0)
    for name in names:
        typer.echo(f"{name:{width}}  {recipe.summary(recipe.find(name))}")


@recipes_app.command()
@reports_errors
def show(name: str) -> None:
    """Print a shipped recipe."""
    typer.echo(recipe.find(name).read_text(encoding="utf-8"), nl=False)


@recipes_app.command()
@reports_errors
def copy(name: str, to: Annotated[Path | None, typer.Argument(help="File to write.")] = None) -> None:
    """Copy a shipped recipe to a file of your own."""
    target = to or Path(f"{name}.yaml")
    source = recipe.find(name)
    if target.exists():
        raise RecipeError(f"{target} exists already; name another file")
    try:
        shutil.copyfile(source, target)
    except OSError as error:
        raise RecipeError(f"{target} cannot be written: {error.strerror}; name another file") from error
    typer.echo(visible(f"{target} written; run it with: qlora-kit train {target}"))


@recipes_app.command()
@reports_errors
def schema() -> None:
    """Every key with its type, default and meaning."""
    typer.echo(recipe.schema_text())
