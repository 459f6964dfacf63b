"""`qlora-kit generate`: answers to one prompt, or to a file of them."""

import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from qlora_kit.cli.options import (
    AsJson,
    Force,
    MaxNewTokens,
    MinP,
    Penalty,
    RunFolder,
    Seed,
    System,
    Temperature,
    TopK,
    TopP,
    TrustRemoteCode,
    UseBase,
    sampling_of,
)
from qlora_kit.cli.visible import visible
from qlora_kit.errors import RecipeError, RunError
from qlora_kit.storage import SCHEMA, write_text
from qlora_kit.units import counted


def generate(
    run: RunFolder,
    prompt: Annotated[str | None, typer.Option(help="What to answer.", show_default=False)] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            help="A file of prompts: .txt with one a line, or rows in any format that training reads.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="A new file for the answers, one JSON object a line; default: print.", show_default=False),
    ] = None,
    system: System = None,
    max_new_tokens: MaxNewTokens = 256,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    top_k: TopK = 0,
    min_p: MinP = 0.0,
    repetition_penalty: Penalty = 1.0,
    seed: Seed = 0,
    stop: Annotated[
        list[str] | None, typer.Option(help="A text that ends an answer; may be given again.", show_default=False)
    ] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Continue the text as it is, without a chat template.")] = False,
    base: UseBase = False,
    as_json: AsJson = False,
    force: Force = False,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Answer prompts with a run, one of its checkpoints, or an exported model."""
    from qlora_kit.cli.show import import_libraries

    if (prompt is None) == (prompts is None):
        raise RecipeError("give one of --prompt TEXT and --prompts FILE")
    if out is not None and out.exists():
        raise RunError(f"{out} exists already; name a new file with --out")
    import_libraries()
    from qlora_kit.run import answer, load_speaker

    sampling = sampling_of(temperature, top_p, top_k, min_p, repetition_penalty, seed, tuple(stop or ()))
    asked = prompts if prompts is not None else [prompt or ""]
    with _kept(out) as keep, _progress() as progress:
        speaker = load_speaker(run, raw=raw, bare_base=base, force=force, trust_remote_code=trust_remote_code)

        def tell(answers: Sequence[Mapping[str, Any]], of: int) -> None:
            keep(answers)
            progress(len(answers), of)

        answers = answer(speaker, asked, max_new_tokens=max_new_tokens, system=system, sampling=sampling, tell=tell)
        lines = _lines(answers)
        if out is not None:
            write_text(out, lines)
    if as_json:
        typer.echo(json.dumps({"schema": SCHEMA, "answers": answers}, indent=2))
    elif out is not None:
        typer.echo(f"{len(answers):,} answers in {visible(str(out))}")
    else:
        said = lines if prompts is not None else answers[0]["answer"] + "\n"
        typer.echo(visible(said, keep="\n\t") if sys.stdout.isatty() else said, nl=False)


def _lines(answers: Sequence[Mapping[str, Any]]) -> str:
    return "".join(json.dumps(each, ensure_ascii=False) + "\n" for each in answers)


@contextmanager
def _kept(out: Path | None) -> Iterator[Callable[[Sequence[Mapping[str, Any]]], None]]:
    """Takes answers as they come, so that a stop loses none: they stand in FILE.part until FILE has them all.

    Raises:
        RunError: there can be no such file, or answers of a run that was stopped stand there.
    """
    if out is None:
        yield lambda answers: None
        return
    part, made = out.with_name(f"{out.name}.part"), 0
    if part.exists():
        raise RunError(f"{part} holds answers of a run that was stopped; move it away, or name a new file with --out")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        file = open(part, "x", encoding="utf-8")  # noqa: SIM115 - the block below closes it
    except OSError as error:
        raise RunError(f"{out} cannot be written: {error.strerror}; name another file with --out") from error

    def keep(answers: Sequence[Mapping[str, Any]]) -> None:
        nonlocal made
        file.write(_lines(answers))
        file.flush()
        made += len(answers)

    try:
        with file:
            yield keep
    finally:
        if made and not out.exists():
            typer.echo(f"stopped: {counted(made, 'answer')} are in {part}", err=True)
        else:
            part.unlink()


@contextmanager
def _progress() -> Iterator[Callable[[int, int], None]]:
    """Is told how many more prompts are answered, and of how many; shows it on standard error: a bar, or a line now and
    then where there is no terminal."""
    console = Console(stderr=True, highlight=False)
    columns = TextColumn("[bold]answers[/]"), BarColumn(bar_width=24), MofNCompleteColumn(), TimeRemainingColumn()
    bar = Progress(*columns, console=console, disable=not console.is_terminal)
    task, done, told = bar.add_task("answers", total=None), 0, 0

    def tell(more: int, of: int) -> None:
        nonlocal done, told
        done += more
        bar.update(task, completed=done, total=of)
        if not console.is_terminal and of > 1 and (done - told >= of / 10 or done == of):
            told = done
            console.print(f"answered {done:,} of {of:,}")

    with bar:
        yield tell
