"""What several verbs take, and what of it becomes a `Sampling`. Nothing here imports torch."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qlora_kit.errors import RecipeError

if TYPE_CHECKING:
    from qlora_kit.train.generate import Sampling

RunFolder = Annotated[Path, typer.Argument(help="A run folder (the output of `qlora-kit train`).")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]
UseBase = Annotated[bool, typer.Option("--base", help="Leave away what was trained: the bare base.")]
Force = Annotated[bool, typer.Option("--force", help="Take the adapter although it was trained on another base.")]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run Python code that the model folder brings.")
]
System = Annotated[str | None, typer.Option(help="What a chat opens with, as its system turn.", show_default=False)]
MaxNewTokens = Annotated[int, typer.Option(min=1, help="Most tokens of an answer.")]
Temperature = Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest token each time.")]
TopP = Annotated[float, typer.Option(min=0.01, max=1.0, help="Draw from the likeliest tokens of this share together.")]
TopK = Annotated[int, typer.Option(min=0, help="Draw from as many of the likeliest tokens; 0: all.")]
MinP = Annotated[float, typer.Option(min=0.0, max=1.0, help="Draw from tokens of this share of the likeliest one's.")]
Penalty = Annotated[float, typer.Option(min=0.01, help="Above 1 holds tokens back that were there already.")]
Seed = Annotated[int, typer.Option(min=0, help="Of the draws: the same seed gives the same answers.")]


def sampling_of(
    temperature: float,
    top_p: float,
    top_k: int,
    min_p: float,
    repetition_penalty: float,
    seed: int,
    stop: tuple[str, ...] = (),
) -> "Sampling":
    """The options as one value.

    Raises:
        RecipeError: one of them would change nothing, or a stop text is empty.
    """
    from qlora_kit.train.generate import Sampling

    idle = [name for name, is_set in (("--top-p", top_p < 1), ("--top-k", top_k > 0), ("--min-p", min_p > 0)) if is_set]
    if idle and temperature == 0:
        raise RecipeError(f"{idle[0]} changes nothing at --temperature 0, which takes the likeliest token; raise it")
    if "" in stop:
        raise RecipeError("--stop is empty, which every answer begins with; give the text that ends an answer")
    return Sampling(temperature, top_p, top_k, min_p, repetition_penalty, stop, seed)
