"""Ask a trained model: prompts from a line or a file, answered at once; what is given to it is as training gave it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qlora_kit.base.architecture import stored_head
from qlora_kit.data import Prompt, ask, read_prompts
from qlora_kit.errors import DataError, RunError
from qlora_kit.run.folder import recorded_classes, recorded_data
from qlora_kit.run.rows import positions_of
from qlora_kit.run.use import load_any, run_of
from qlora_kit.train.generate import GREEDY, Sampling, generate_texts


@dataclass(frozen=True, slots=True)
class Speaker:
    """A model that can be asked.

    Attributes:
        model: ready to generate.
        tokenizer: with the chat template of its run.
        is_chat: whether what it is asked is a turn of a chat.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    is_chat: bool

    def room(self, prompt: Sequence[int]) -> int | None:
        """Tokens that an answer may have behind a prompt; None if the model has no limit.

        Raises:
            DataError: the prompt leaves none.
        """
        positions = positions_of(self.model.config)
        if positions is not None and len(prompt) >= positions:
            raise DataError(
                f"a prompt has {len(prompt):,} tokens, and the model {positions:,} positions for it and its answer; "
                "shorten it"
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
    run = run_of(folder)
    if _tells_apart(folder if run is None else run, is_run=run is not None):
        raise RunError(f"{folder} tells texts apart and says nothing; ask it with qlora-kit eval {folder} --data FILE")
    model, tokenizer, _ = load_any(folder, bare_base=bare_base, force=force, trust_remote_code=trust_remote_code)
    is_chat = tokenizer.chat_template is not None if run is None else has_chats(run)
    return Speaker(model, tokenizer, is_chat and not raw)


def _tells_apart(folder: Path, *, is_run: bool) -> bool:
    """Whether the model of a run, or of a folder with weights, is a classifier."""
    if is_run:
        return recorded_classes(folder) is not None
    return (folder / "config.json").is_file() and stored_head(folder) == "classification"


def has_chats(run: Path) -> bool:
    """Whether a run was trained on chats."""
    return bool(recorded_data(run).get("chats"))


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
    how: dict[str, Any] = {"is_chat": speaker.is_chat, "system": system}
    if isinstance(prompts, Path):
        asked = read_prompts(prompts, speaker.tokenizer, **how)
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
        tell=lambda texts: tell([_told(asked[row], text) for row, text in texts.items()], len(asked)),
    )
    return [_told(prompt, text) for prompt, text in zip(asked, texts, strict=True)]


def _told(prompt: Prompt, text: str) -> dict[str, Any]:
    reference = {} if prompt.reference is None else {"reference": prompt.reference}
    return {"prompt": prompt.shown, "answer": text, **reference}
