"""`qlora-kit generate`: answers to one prompt, or to a file of them."""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Protocol

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
from qlora_kit.cli.terminal import printable
from qlora_kit.errors import RecipeError, RunError
from qlora_kit.storage import SCHEMA, write_text


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
    speaker = load_speaker(run, raw=raw, bare_base=base, force=force, trust_remote_code=trust_remote_code)
    asked = prompts if prompts is not None else [prompt or ""]
    with _progress() as progress:
        answers = answer(
            speaker, asked, max_new_tokens=max_new_tokens, system=system, sampling=sampling, progress=progress
        )
    lines = "".join(json.dumps(each, ensure_ascii=False) + "\n" for each in answers)
    if out is not None:
        write_text(out, lines)
    if as_json:
        typer.echo(json.dumps({"schema": SCHEMA, "answers": answers}, indent=2))
    elif out is not None:
        typer.echo(f"{len(answers):,} answers in {out}")
    else:
        said = lines if prompts is not None else answers[0]["answer"] + "\n"
        typer.echo(printable(said) if sys.stdout.isatty() else said, nl=False)


class _Tells(Protocol):
    def __call__(self, done: int, of: int) -> None: ...


@contextmanager
def _progress() -> Iterator[_Tells]:
    """How many prompts are answered, on standard error: a bar, or a line now and then where there is no terminal."""
    console = Console(stderr=True, highlight=False)
    columns = TextColumn("[bold]answers[/]"), BarColumn(bar_width=24), MofNCompleteColumn(), TimeRemainingColumn()
    bar = Progress(*columns, console=console, disable=not console.is_terminal)
    task, told = bar.add_task("answers", total=None), 0

    def tell(done: int, of: int) -> None:
        nonlocal told
        bar.update(task, completed=done, total=of)
        if not console.is_terminal and of > 1 and (done - told >= of / 10 or done == of):
            told = done
            console.print(f"answered {done:,} of {of:,}")

    with bar:
        yield tell
