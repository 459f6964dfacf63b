"""`qlora-kit classify`: the class of one text, or of each in a file."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from qlora_kit.cli.answers import Answer, Out, Tell, check_new, gather, show
from qlora_kit.cli.options import AsJson, Force, RunOrExport, TrustRemoteCode
from qlora_kit.cli.visible import visible
from qlora_kit.errors import RecipeError

MOST_SHOWN = 10
"""Classes of one text that a person is shown."""


def classify(
    run: RunOrExport,
    text: Annotated[str | None, typer.Option(help="One text.", show_default=False)] = None,
    texts: Annotated[
        Path | None,
        typer.Option(
            help="File of texts: .txt with one per line, or rows as for training, with or without a label.",
            show_default=False,
        ),
    ] = None,
    out: Out = None,
    as_json: AsJson = False,
    force: Force = False,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Classify texts with a classifier run or its export. Prints the probability of each class."""
    from qlora_kit.cli.show import import_libraries

    if (text is None) == (texts is None):
        raise RecipeError("give either --text TEXT or --texts FILE")
    check_new(out)
    import_libraries()
    from qlora_kit.run import classify as run_classify

    def ask(tell: Tell) -> list[dict[str, Any]]:
        asked = texts if texts is not None else [text or ""]
        return run_classify(run, asked, force=force, tell=tell, trust_remote_code=trust_remote_code)

    answers = gather(out, ask)
    show(answers, out, as_json=as_json, said=None if text is None else _likeliest(answers[0]))


def _likeliest(answer: Answer) -> str:
    """A line for each class, the likeliest first."""
    probabilities: Mapping[str, float] = answer["probabilities"]
    ordered = sorted(probabilities, key=lambda name: -probabilities[name])
    told = [f"{probabilities[name]:7.2%}  {visible(name)}\n" for name in ordered[:MOST_SHOWN]]
    more = len(ordered) - len(told)
    return "".join(told) + (f"and {more:,} more, less likely\n" if more else "")
