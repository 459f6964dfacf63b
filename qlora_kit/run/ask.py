"""Ask a trained model: prompts from a line or a file, answered at once, and formatted as in training."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qlora_kit.data import Prompt, ask, content_of, read_prompts
from qlora_kit.data.thinking import Thinking
from qlora_kit.errors import DataError, RunError
from qlora_kit.recipe import Recipe
from qlora_kit.run.recorded import exported_way_to_ask, recorded_data
from qlora_kit.run.rows import column_maps, positions_of
from qlora_kit.run.use import load_any, run_of, tells_apart
from qlora_kit.train.generate import GREEDY, Sampling, generate_texts


@dataclass(frozen=True, slots=True)
class Speaker:
    """A model that can be asked.

    Attributes:
        model: ready to generate.
        tokenizer: with the chat template of its run.
        is_chat: whether what it is asked is a turn of a chat.
        thinking: what its run made of thoughts.
        columns: of its run, for each way to name them: expected name -> name in the rows.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    is_chat: bool
    thinking: Thinking = "keep"
    columns: Sequence[Mapping[str, str]] = ()

    def given(self, text: str | list[dict[str, Any]]) -> list[int]:
        """What the model is given to answer a text, or the turns of a chat so far.

        Raises:
            DataError: as `ask`.
        """
        return ask(text, self.tokenizer, is_chat=self.is_chat, thinking=self.thinking).ids

    def room(self, prompt: Sequence[int]) -> int | None:
        """Tokens that an answer may have behind a prompt; None if the model has no limit.

        Raises:
            DataError: the prompt leaves none.
        """
        positions = positions_of(self.model.config)
        if positions is not None and len(prompt) >= positions:
            raise DataError(
                f"a prompt has {len(prompt):,} tokens, and the model has {positions:,} positions for it and its "
                "answer; shorten it"
            )
        return None if positions is None else positions - len(prompt)


def load_speaker(
    folder: Path,
    *,
    raw: bool = False,
    bare_base: bool = False,
    force: bool = False,
    trust_remote_code: bool = False,
) -> Speaker:
    """The model of a run, of one of its checkpoints, or of a folder with weights.

    Args:
        folder: of it.
        raw: leave the chat template away.
        bare_base: leave away what was trained.
        force: take the adapter although its base's fingerprint differs.
        trust_remote_code: let the model's own code run.

    Raises:
        QloraKitError: as `load_run`.
    """
    if tells_apart(folder):
        raise RunError(f"{folder} is a classifier and generates no text; use qlora-kit classify {folder} --text TEXT")
    run = run_of(folder)
    model, tokenizer, recipe = load_any(folder, bare_base=bare_base, force=force, trust_remote_code=trust_remote_code)
    if run is None or recipe is None:
        is_chat, thinking = exported_way_to_ask(folder)
        return Speaker(model, tokenizer, is_chat and tokenizer.chat_template is not None and not raw, thinking)
    return speaker_of(run, recipe, model, tokenizer, raw=raw)


def speaker_of(
    run: Path, recipe: Recipe, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, raw: bool = False
) -> Speaker:
    """The model of a run, which is asked as the run asked it; `raw` leaves the chat template away."""
    is_chat = bool(recorded_data(run).get("chats"))
    return Speaker(model, tokenizer, is_chat and not raw, recipe.data.thinking, column_maps(recipe.data))


def answer(
    speaker: Speaker,
    prompts: Sequence[str] | Path,
    *,
    max_new_tokens: int,
    system: str | None = None,
    sampling: Sampling = GREEDY,
    tell: Callable[[Sequence[dict[str, Any]], int], None] = lambda answers, of: None,
) -> list[dict[str, Any]]:
    """What a model says to prompts, in their order.

    Args:
        speaker: from `load_speaker`.
        prompts: texts, or a file as `read_prompts` takes it.
        max_new_tokens: most tokens of an answer; the model's positions may leave fewer.
        system: what a chat opens with, unless it has a system turn already.
        sampling: how tokens are chosen.
        tell: is given answers as they come, a few at a time and those to the longest prompts first, and how many
            prompts there are.

    Returns:
        For each `prompt` (a text, or turns), `answer`, and `reference` where the file has one.

    Raises:
        DataError: a prompt cannot be put to the model, or is longer than its positions.
    """
    how: dict[str, Any] = {"is_chat": speaker.is_chat, "system": system, "thinking": speaker.thinking}
    if isinstance(prompts, Path):
        asked = read_prompts(prompts, speaker.tokenizer, columns=speaker.columns, **how)
    else:
        asked = [ask(prompt, speaker.tokenizer, **how) for prompt in prompts]
    for prompt in asked:
        speaker.room(prompt.ids)
    texts = generate_texts(
        speaker.model,
        speaker.tokenizer,
        [prompt.ids for prompt in asked],
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        positions=positions_of(speaker.model.config),
        tell=lambda texts: tell([_told(asked[row], text, speaker) for row, text in texts.items()], len(asked)),
    )
    return [_told(prompt, text, speaker) for prompt, text in zip(asked, texts, strict=True)]


def _told(prompt: Prompt, text: str, speaker: Speaker) -> dict[str, Any]:
    if isinstance(prompt.shown, list):
        text = content_of(text, prompt.shown, speaker.tokenizer)
    reference = {} if prompt.reference is None else {"reference": prompt.reference}
    return {"prompt": prompt.shown, "answer": text, **reference}
