"""`qlora-kit recipes`: list, show and copy the shipped recipes, and print every key that a recipe may hold."""

import shutil
from pathlib import Path
from typing import Annotated

import typer

from qlora_kit import recipe
from qlora_kit.errors import QloraKitError

recipes_app = typer.Typer(
    help="List, show and copy shipped recipes; print the schema.", no_args_is_help=True, rich_markup_mode=None
)


@recipes_app.command("list")
def list_recipes() -> None:
    """Names of the shipped recipes and what each is for."""
    names = recipe.names()
    width = max(map(len, names), default=0)
    for name in names:
        typer.echo(f"{name:{width}}  {recipe.summary(recipe.find(name))}")


@recipes_app.command()
def show(name: str) -> None:
    """Print a shipped recipe."""
    typer.echo(_find(name).read_text(encoding="utf-8"), nl=False)


@recipes_app.command()
def copy(name: str, to: Annotated[Path | None, typer.Argument(help="File to write.")] = None) -> None:
    """Copy a shipped recipe to a file of your own."""
    target = to or Path(f"{name}.yaml")
    source = _find(name)
    if target.exists():
        typer.echo(f"error: {target} exists already; name another file", err=True)
        raise typer.Exit(2)
    shutil.copyfile(source, target)
    typer.echo(f"{target} written; run it with: qlora-kit train {target}")


@recipes_app.command()
def schema() -> None:
    """Every key with its type, default and meaning."""
    typer.echo(recipe.schema_text())


def _find(name: str) -> Path:
    try:
        return recipe.find(name)
    except QloraKitError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(error.exit_code) from None
