"""The verbs. Each one reads its arguments, calls the room that does the work, and shows what came out.

Exit codes: 0 done; 2 the user can mend it, one line `error: ...` on standard error (and below it a line for each
further bad row); 3 does not fit the budget; 130 and 143 stopped by a signal, state saved if there was any. `--debug`
anywhere shows the traceback instead of the line.
"""

import io
import json
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Annotated, NoReturn

import typer

from qlora_kit import __version__
from qlora_kit.cli.chat import chat
from qlora_kit.cli.classify import classify
from qlora_kit.cli.export import export
from qlora_kit.cli.generate import generate
from qlora_kit.cli.guard import DEBUG, reports_errors
from qlora_kit.cli.options import AsJson, Force, RunOrExport, TrustRemoteCode, UseBase
from qlora_kit.cli.recipes import recipes_app
from qlora_kit.cli.sweep import sweep
from qlora_kit.cli.verify import verify
from qlora_kit.cli.visible import visible
from qlora_kit.errors import FitError, QloraKitError, RecipeError

app = typer.Typer(
    name="qlora-kit",
    help="QLoRA fine-tuning that plans its memory, keeps to it, and ships what was trained.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    epilog="Start with: qlora-kit train quickstart. Add --debug to any command to see the traceback of an error. "
    "Exit codes: 0 done, 2 an error that you can fix, 3 not enough memory, 130 or 143 stopped by a signal.",
)
app.add_typer(recipes_app, name="recipes")

RecipeName = Annotated[str, typer.Argument(help="A recipe file, or the name of a shipped recipe.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(help="Settings that override the recipe, such as lora.rank=32.", show_default=False),
]


def main() -> None:
    """Entry point of `qlora-kit`."""
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    DEBUG["on"] = len(arguments) < len(sys.argv) - 1
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # as standard error does: what it cannot write is spelt
    signal.signal(signal.SIGTERM, _end)
    try:
        sys.exit(app(args=arguments, prog_name="qlora-kit", standalone_mode=False) or 0)
    except typer.TyperException as error:
        typer.echo(visible(_misuse(error, arguments), keep="\n"), err=True)
    except typer.Abort:
        typer.echo("error: the input ended before an answer was read", err=True)
    sys.exit(QloraKitError.exit_code)


def _misuse(error: typer.TyperException, arguments: list[str]) -> str:
    """What is told of a command line that cannot be read: one line, or help where a command stands alone."""
    message = error.format_message()
    if message.startswith("Usage:"):
        return message
    context = getattr(error, "ctx", None)
    verb = f"qlora-kit {arguments[0]}"  # of an option without its value typer does not say
    command = verb if context is None else context.command_path
    said = f"{message[0].lower()}{message[1:].rstrip('.')}"
    return f"error: {said}{' ' if said.endswith('?') else '; '}see {command} --help"


def _end(number: int, _: FrameType | None) -> NoReturn:
    """Leave as after Ctrl-C, so that what is half written is taken away; training takes signals itself."""
    raise SystemExit(128 + number)


def _show_version(asked: bool) -> None:
    if asked:
        typer.echo(f"qlora-kit {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """QLoRA fine-tuning that plans its memory, keeps to it, and ships what was trained."""


@app.command()
@reports_errors
def plan(
    recipe: RecipeName,
    overrides: Overrides = None,
    budget: Annotated[str | None, typer.Option(help="Memory that the run may use, such as 24GiB.")] = None,
    gpu: Annotated[
        str | None, typer.Option(help='Plan for this card, such as "RTX 4090"; it need not be in this machine.')
    ] = None,
    as_json: AsJson = False,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Plan a run's memory, next to 16-bit LoRA and full fine-tuning. Exit code 3 if it does not fit."""
    from qlora_kit.cli.show import Screen, import_libraries
    from qlora_kit.recipe import read_recipe

    changes = [*(overrides or []), *([] if budget is None else [f"memory.budget={json.dumps(budget)}"])]
    checked = read_recipe(recipe, changes)
    import_libraries()
    from qlora_kit.run import check_budget, plan_memory

    screen = Screen(to_stderr=as_json)
    planned = plan_memory(checked, screen, gpu=gpu, trust_remote_code=trust_remote_code)
    if as_json:
        typer.echo(json.dumps({"schema": 1, **planned}, indent=2))
    else:
        screen.planned(planned)
    try:
        check_budget(planned)
    except FitError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(error.exit_code) from None


@app.command()
@reports_errors
def preview(
    recipe: RecipeName,
    overrides: Overrides = None,
    rows: Annotated[int, typer.Option(min=0, help="Number of rows to show token by token.")] = 3,
    as_json: AsJson = False,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Show what will be trained on, token by token. Counts every row, and needs no weights."""
    from qlora_kit.cli.show import Screen, import_libraries
    from qlora_kit.recipe import read_recipe

    checked = read_recipe(recipe, overrides or [])
    import_libraries()
    from qlora_kit.cli.preview import draw
    from qlora_kit.run import preview as run_preview

    screen = Screen(to_stderr=as_json)
    seen = run_preview(checked, screen, rows=rows, trust_remote_code=trust_remote_code)
    if as_json:
        typer.echo(json.dumps({"schema": 1, **seen.as_json()}, indent=2))
    else:
        draw(seen, screen.console)


@app.command()
@reports_errors
def train(
    recipe: RecipeName,
    overrides: Overrides = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue the run in the folder from its newest intact checkpoint.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the run in the folder.")] = False,
    force: Annotated[
        bool, typer.Option("--force", help="With --resume: continue even if recipe, rows or base have changed.")
    ] = False,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Train a recipe: plan, load, train, score, report. Writes a run folder."""
    from qlora_kit.cli.show import Screen, import_libraries
    from qlora_kit.recipe import read_recipe

    if resume and overwrite:
        raise RecipeError("--resume continues a run and --overwrite removes it; give only one of them")
    if force and not resume:
        raise RecipeError("--force is for resuming a run; add --resume, or leave --force out")
    checked = read_recipe(recipe, overrides or [])
    if resume and not any(override.startswith("output=") for override in overrides or []):
        _check_place(Path(recipe), Path(checked.output))
    screen = Screen()
    with screen.catching_signals(), screen.showing():
        import_libraries()
        from qlora_kit.run import train as run_train

        result = run_train(
            checked,
            resume=resume,
            overwrite=overwrite,
            force=force,
            watch=screen,
            trust_remote_code=trust_remote_code,
        )
    screen.ended(result, checked.train.task)
    if screen.signal is not None and not result.finished:
        raise typer.Exit(128 + screen.signal)


def _check_place(recipe: Path, output: Path) -> None:
    """Refuse to go on elsewhere than in the run folder that a recipe lies in: it was moved, or copied."""
    folder = recipe.absolute().parent
    is_of_run = recipe.name == "recipe.yaml" and (folder / "plan.json").is_file()
    if is_of_run and folder.resolve() != output.resolve():
        raise RecipeError(
            f"{folder} was moved or copied from {output}: add output={folder} to go on where it is now"
            + (f", or output={output} to go on there" if output.exists() else "")
        )


@app.command("eval")
@reports_errors
def evaluate(
    run: RunOrExport,
    data: Annotated[
        Path | None, typer.Option(help="Rows to score on; default: the held-out rows of the run (an export has none).")
    ] = None,
    base: UseBase = False,
    as_json: AsJson = False,
    force: Force = False,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Score a run, its base, or an export: loss, perplexity, exact match."""
    from qlora_kit.cli.show import Screen, import_libraries, score_lines

    import_libraries()
    from qlora_kit.run import evaluate as run_evaluate

    screen = Screen(to_stderr=as_json)
    score = run_evaluate(run, data=data, bare_base=base, force=force, watch=screen, trust_remote_code=trust_remote_code)
    typer.echo(json.dumps({"schema": 1, **score.as_json()}, indent=2) if as_json else score_lines(score))


app.command()(reports_errors(generate))
app.command()(reports_errors(classify))
app.command()(reports_errors(chat))
app.command()(reports_errors(sweep))
app.command()(reports_errors(verify))
app.command()(reports_errors(export))


@app.command()
@reports_errors
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="One run folder, or several to compare.")],
    out: Annotated[
        Path | None,
        typer.Option(
            help="Page to write; default: report.html in the run folder, or in the working directory if there are "
            "several runs. Only an older page of the same kind is overwritten.",
            show_default=False,
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write a run's report.html again, or compare runs on one page. Reads only the run folders."""
    from qlora_kit.report import (
        compare_runs,
        comparison_facts,
        comparison_text,
        read_run,
        report_facts,
        write_comparison,
        write_report,
    )

    if len(runs) == 1:
        path = write_report(runs[0], out)
        text, facts = str(path), report_facts(read_run(runs[0])) if as_json else {}
    else:
        compared = compare_runs(runs)
        path = write_comparison(compared, out or Path("report.html"))
        text, facts = f"{comparison_text(compared)}\n\n{path}", comparison_facts(compared) if as_json else {}
    shown = json.dumps({"schema": 1, "report": str(path), **facts}, indent=2) if as_json else visible(text, keep="\n")
    typer.echo(shown)


@app.command()
def doctor(as_json: AsJson = False) -> None:
    """Try out what training needs here: torch, bitsandbytes, GPU, disk, hub."""
    from qlora_kit.cli.doctor import run_doctor
    from qlora_kit.cli.show import quiet_environment

    quiet_environment()
    raise typer.Exit(run_doctor(as_json))
