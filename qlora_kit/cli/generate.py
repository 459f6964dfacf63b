"""`qlora-kit generate`: answers to one prompt, or to a file of them."""

from pathlib import Path
from typing import Annotated, Any

import typer

from qlora_kit.cli.answers import Out, Tell, check_new, gather, show
from qlora_kit.cli.options import (
    AsJson,
    Force,
    MaxNewTokens,
    MinP,
    Penalty,
    RunOrExport,
    Seed,
    System,
    Temperature,
    TopK,
    TopP,
    TrustRemoteCode,
    UseBase,
    sampling_of,
)
from qlora_kit.errors import RecipeError


def generate(
    run: RunOrExport,
    prompt: Annotated[str | None, typer.Option(help="One prompt.", show_default=False)] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            help="File of prompts: .txt with one per line, or rows in any format that training reads.",
            show_default=False,
        ),
    ] = None,
    out: Out = None,
    system: System = None,
    max_new_tokens: MaxNewTokens = 256,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    top_k: TopK = 0,
    min_p: MinP = 0.0,
    repetition_penalty: Penalty = 1.0,
    seed: Seed = 0,
    stop: Annotated[
        list[str] | None, typer.Option(help="Text that ends an answer; may be given several times.", show_default=False)
    ] = None,
    raw: Annotated[
        bool, typer.Option("--raw", help="Continue the prompt as plain text, without a chat template.")
    ] = False,
    base: UseBase = False,
    as_json: AsJson = False,
    force: Force = False,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Answer prompts with a run, a checkpoint or an export."""
    from qlora_kit.cli.show import import_libraries

    if (prompt is None) == (prompts is None):
        raise RecipeError("give either --prompt TEXT or --prompts FILE")
    check_new(out)
    import_libraries()
    from qlora_kit.run import answer, load_speaker

    sampling = sampling_of(temperature, top_p, top_k, min_p, repetition_penalty, seed, tuple(stop or ()))

    def ask(tell: Tell) -> list[dict[str, Any]]:
        speaker = load_speaker(run, raw=raw, bare_base=base, force=force, trust_remote_code=trust_remote_code)
        asked = prompts if prompts is not None else [prompt or ""]
        return answer(speaker, asked, max_new_tokens=max_new_tokens, system=system, sampling=sampling, tell=tell)

    answers = gather(out, ask)
    show(answers, out, as_json=as_json, said=None if prompt is None else answers[0]["answer"] + "\n")
