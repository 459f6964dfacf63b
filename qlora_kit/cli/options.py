"""What several verbs take, and what of it becomes a `Sampling`. Nothing here imports torch."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qlora_kit.errors import RecipeError

if TYPE_CHECKING:
    from qlora_kit.train.generate import Sampling

RunFolder = Annotated[Path, typer.Argument(help="A run folder, or one of its checkpoints.")]
RunOrExport = Annotated[Path, typer.Argument(help="A run folder, one of its checkpoints, or an exported model.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]
UseBase = Annotated[bool, typer.Option("--base", help="Use the base model without what was trained.")]
Force = Annotated[bool, typer.Option("--force", help="Load the adapter even if it was trained on a different base.")]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Allow Python code that comes with the model to run.")
]
System = Annotated[str | None, typer.Option(help="System prompt of the chat.", show_default=False)]
MaxNewTokens = Annotated[int, typer.Option(min=1, help="Maximum number of tokens in an answer.")]
Temperature = Annotated[float, typer.Option(min=0.0, help="Sampling temperature; 0 is greedy.")]
TopP = Annotated[
    float, typer.Option(min=0.01, max=1.0, help="Sample from the likeliest tokens that add up to this probability.")
]
TopK = Annotated[int, typer.Option(min=0, help="Sample from this many of the likeliest tokens; 0 is all.")]
MinP = Annotated[
    float,
    typer.Option(
        min=0.0, max=1.0, help="Sample from tokens with at least this share of the likeliest one's probability."
    ),
]
Penalty = Annotated[
    float, typer.Option(min=0.01, help="Above 1, tokens that have occurred already become less likely.")
]
Seed = Annotated[int, typer.Option(min=0, help="Seed for sampling; the same seed gives the same answers.")]


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
        raise RecipeError(f"{idle[0]} has no effect at --temperature 0, which takes the likeliest token; raise it")
    if "" in stop:
        raise RecipeError("--stop is empty, which would end every answer at once; give the text that ends an answer")
    return Sampling(temperature, top_p, top_k, min_p, repetition_penalty, stop, seed)
