"""The verb that trains a grid of recipes, or with no axis picks the learning rate."""

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
        typer.Argument(
            help="Axes such as lora.rank=4,16,64, and settings for all runs such as train.steps=100.",
            show_default=False,
        ),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Train the runs that are missing.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the sweep in the folder.")] = False,
    as_json: AsJson = False,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Train a grid of settings, or pick the learning rate.

    With axes: trains every combination, each in its own run folder, and writes one table and one page that compare
    them. Rows and base are read once.

    Without an axis: tries learning rates in short runs, side by side on one base, and leaves nothing on disk.
    """
    from qlora_kit.recipe import has_axes

    if resume and overwrite:
        raise RecipeError("--resume continues a sweep and --overwrite removes it; give only one of them")
    if has_axes(overrides or []):
        _train_grid(recipe, overrides or [], resume, overwrite, as_json, trust_remote_code)
        return
    if resume or overwrite:
        raise RecipeError(
            f"{'--resume' if resume else '--overwrite'} is for a sweep over an axis, such as train.lr=1e-4,2e-4; "
            "without one the learning rate is picked and nothing is left on disk: leave it out, or give an axis"
        )
    _pick_rate(recipe, overrides or [], as_json, trust_remote_code)


def _train_grid(
    recipe: str, overrides: list[str], resume: bool, overwrite: bool, as_json: bool, trust_remote_code: bool
) -> None:
    from qlora_kit.cli.show import import_libraries
    from qlora_kit.cli.sweeping import SweepScreen
    from qlora_kit.recipe import read_grid

    grid = read_grid(recipe, overrides)
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
        typer.echo("stopped; the state is saved. Continue with the same command and --resume", err=True)
        raise typer.Exit(128 + screen.signal)


def _pick_rate(recipe: str, overrides: list[str], as_json: bool, trust_remote_code: bool) -> None:
    from qlora_kit.cli.show import import_libraries
    from qlora_kit.cli.sweeping import SweepScreen
    from qlora_kit.recipe import read_recipe

    checked = read_recipe(recipe, overrides)
    screen = SweepScreen(to_stderr=as_json)
    with screen.catching_signals(), screen.showing():
        import_libraries()
        from qlora_kit import run
        from qlora_kit.report import rates_text

        search = run.pick_rate(checked, watch=screen, trust_remote_code=trust_remote_code).as_json()
    typer.echo(json.dumps({"schema": 1, **search}, indent=2) if as_json else f"\n{rates_text(search)}")
    if screen.signal is not None and search["best"] is None:
        raise typer.Exit(128 + screen.signal)
