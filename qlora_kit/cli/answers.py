"""What verbs that ask a model have in common: a file that loses no answer, a bar, and how answers are shown."""

import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, TypeAlias

import typer

from qlora_kit.cli.visible import visible
from qlora_kit.errors import RunError
from qlora_kit.storage import SCHEMA, write_text
from qlora_kit.units import counted

Answer: TypeAlias = Mapping[str, Any]
Tell: TypeAlias = Callable[[Sequence[Answer], int], None]
"""Is given answers as they come, and how many are to come in all."""

Out = Annotated[
    Path | None,
    typer.Option(help="New file for the answers, one JSON object per line; default: print them.", show_default=False),
]


def check_new(out: Path | None) -> None:
    """Refuse to write over a file.

    Raises:
        RunError: it exists.
    """
    if out is not None and out.exists():
        raise RunError(f"{out} already exists; name a new file with --out")


def gather(out: Path | None, ask: Callable[[Tell], list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """All answers, which are kept in a file and counted on the screen as they come.

    Args:
        out: the file; None for none.
        ask: gives the answers in their order, and tells them as they come.

    Raises:
        RunError: there can be no such file, or answers of a run that was stopped stand there.
    """
    with _kept(out) as keep, _progress() as progress:

        def tell(answers: Sequence[Answer], of: int) -> None:
            keep(answers)
            progress(len(answers), of)

        answers = ask(tell)
        if out is not None:
            write_text(out, _lines(answers))
    return answers


def show(answers: Sequence[Answer], out: Path | None, *, as_json: bool, said: str | None = None) -> None:
    """Print the answers, or where they are.

    Args:
        answers: all of them.
        out: the file that they are in.
        as_json: whether standard output is one JSON object.
        said: what a person is shown in place of a JSON line for each.
    """
    if as_json:
        typer.echo(json.dumps({"schema": SCHEMA, "answers": answers}, indent=2))
    elif out is not None:
        typer.echo(f"{counted(len(answers), 'answer')} in {visible(str(out))}")
    else:
        text = _lines(answers) if said is None else said
        typer.echo(visible(text, keep="\n\t") if sys.stdout.isatty() else text, nl=False)


def _lines(answers: Sequence[Answer]) -> str:
    return "".join(json.dumps(each, ensure_ascii=False) + "\n" for each in answers)


@contextmanager
def _kept(out: Path | None) -> Iterator[Callable[[Sequence[Answer]], None]]:
    """Takes answers as they come, so that a stop loses none: they stand in FILE.part until FILE has them all."""
    if out is None:
        yield lambda answers: None
        return
    part, made = out.with_name(f"{out.name}.part"), 0
    if part.exists():
        raise RunError(f"{part} holds answers from a stopped run; move it away, or name a new file with --out")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        file = open(part, "x", encoding="utf-8")  # noqa: SIM115 - the block below closes it
    except OSError as error:
        raise RunError(f"{out} cannot be written: {error.strerror}; name another file with --out") from error

    def keep(answers: Sequence[Answer]) -> None:
        nonlocal made
        file.write(_lines(answers))
        file.flush()
        made += len(answers)

    try:
        with file:
            yield keep
    finally:
        if made and not out.exists():
            typer.echo(f"stopped: {part} has {counted(made, 'answer')}", err=True)
        else:
            part.unlink()


@contextmanager
def _progress() -> Iterator[Callable[[int, int], None]]:
    """Is told how many more are answered, and of how many; shows it on standard error: a bar, or a line now and
    then where there is no terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

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
