"""The verb that trains a grid of recipes."""

import json
from typing import Annotated

import typer

from qlora_kit.cli.options import AsJson, TrustRemoteCode
from qlora_kit.cli.visible import visible
from qlora_kit.errors import RecipeError


def sweep(
    recipe: Annotated[str, typer.Argument(help="A recipe file, or the name of a shipped recipe.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="Axes such as lora.rank=4,16,64, and settings for all runs.", show_default=False),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Make the runs that are missing.")] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the sweep that stands in the folder.")
    ] = False,
    as_json: AsJson = False,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Train a grid of settings, a run folder each; one table and one page. Rows and base are read once."""
    from qlora_kit.cli.show import import_libraries
    from qlora_kit.cli.sweeping import SweepScreen
    from qlora_kit.recipe import read_grid

    if resume and overwrite:
        raise RecipeError("--resume goes on with a sweep and --overwrite removes it; give one of them")
    grid = read_grid(recipe, overrides or [])
    screen = SweepScreen(to_stderr=as_json)
    screen.opened(grid)
    with screen.catching_signals(), screen.showing():
        import_libraries()
        from qlora_kit import run
        from qlora_kit.report import read_sweep, sweep_facts, sweep_text

        run.sweep(grid, resume=resume, overwrite=overwrite, watch=screen, trust_remote_code=trust_remote_code)
    swept = read_sweep(grid.folder)
    if as_json:
        typer.echo(json.dumps({"schema": 1, **sweep_facts(swept)}, indent=2))
    else:
        typer.echo(f"\n{visible(sweep_text(swept), keep=chr(10))}\n\n{visible(str(grid.folder / 'report.html'))}")
    if screen.signal is not None and swept.missing:
        typer.echo("stopped; the state is saved. Go on with the same command and --resume", err=True)
        raise typer.Exit(128 + screen.signal)
