"""A conversation with a trained model: turns, the adapter that speaks, and the positions that the model has for both.

Several runs on one base speak with one model: each is an adapter of it. A run on prompts and completions has no turns:
each line is put to it by itself, as training did.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from qlora_kit.base import locate_model
from qlora_kit.base.tokenizer import read_tokenizer
from qlora_kit.data import content_of
from qlora_kit.data.thinking import thought_closed
from qlora_kit.errors import AdapterError, DataError
from qlora_kit.lora import adapters_off, load_adapter, use_adapter
from qlora_kit.lora.several import adapter_names
from qlora_kit.recipe import Recipe, read_recipe
from qlora_kit.run.ask import Speaker, load_speaker, speaker_of
from qlora_kit.run.folder import RECIPE, trained_folder
from qlora_kit.run.recorded import check_adapter
from qlora_kit.run.rows import positions_of
from qlora_kit.run.use import load_run_tokenizer, run_of
from qlora_kit.train.generate import Sampling, stream_text

Turns = list[dict[str, Any]]


class _Voice(NamedTuple):
    """Who answers: an adapter of the model, or None where the model has none; and how it is asked."""

    adapter: str | None
    speaker: Speaker


class Conversation:
    """Turns with one of several adapters on one base.

    Args:
        folders: runs; the first may be a checkpoint or a model folder. They are called by the names of their folders.
        max_new_tokens: most tokens of an answer.
        sampling: how tokens are chosen; the seed moves on with every answer.
        force: take adapters although their base's fingerprint differs.
        trust_remote_code: let the model's own code run.

    Attributes:
        messages: the turns so far, a system turn among them.
        speaks: whose turn it is to answer: a name of `names`, or None for the bare base.

    Raises:
        QloraKitError: as `load_run`; an `AdapterError` if the runs have different bases.
    """

    def __init__(
        self,
        folders: Sequence[Path],
        *,
        max_new_tokens: int,
        sampling: Sampling,
        force: bool = False,
        trust_remote_code: bool = False,
    ) -> None:
        self._force, self._trust = force, trust_remote_code
        self._max_new_tokens, self._sampling, self._answers = max_new_tokens, sampling, 0
        self._run = run_of(folders[0])
        for folder in folders[1:]:
            self._check_base(folder)
        speaker = load_speaker(folders[0], force=force, trust_remote_code=trust_remote_code)
        self.model, name = speaker.model, folders[0].absolute().name
        self._voices = {name: _Voice(next(iter(adapter_names(self.model)), None), speaker)}
        self.speaks: str | None = name
        self.messages: Turns = []
        for folder in folders[1:]:
            self.load(folder)
        self.use(name)

    @property
    def names(self) -> list[str]:
        """Who may speak, the bare base aside."""
        return list(self._voices)

    @property
    def is_chat(self) -> bool:
        """Whether who speaks knows of turns."""
        return self._speaker.is_chat

    @property
    def rows(self) -> list[dict[str, Any]]:
        """What was said, as rows of training data: one chat or, where lines stand by themselves, each with its answer,
        empty ones left out."""
        said = _without_system(self.messages)
        if self.is_chat or not said:
            return [{"messages": self.messages}] if said else []
        pairs = zip(said[::2], said[1::2], strict=True)
        rows = [{"prompt": asked["content"], "completion": answer["content"]} for asked, answer in pairs]
        return [row for row in rows if row["completion"].strip()]

    def use(self, name: str | None) -> None:
        """Let another one speak: one of `names`, a run or adapter folder that is loaded first, or None for the base.

        Raises:
            QloraKitError: there is no adapter of that name and no such folder, or it does not fit the base.
        """
        if name is None:
            if not adapter_names(self.model):
                raise AdapterError(
                    "there is no adapter to switch off: in this model base and training are the same weights"
                )
            self.speaks = None
            return
        if name not in self._voices:
            name = self.load(Path(name))
        adapter = self._voices[name].adapter
        if adapter is not None:
            use_adapter(self.model, adapter)
        self.speaks = name

    def load(self, folder: Path) -> str:
        """Put another adapter on the model; the name by which it is called."""
        self._check_base(folder)
        if not adapter_names(self.model):
            raise AdapterError("this model has no adapters to switch between; start with a run that trained one")
        run, name = run_of(folder), folder.absolute().name
        if name in self._voices:
            raise AdapterError(f"there is already an adapter called {name}; rename the folder {folder}")
        adapter, speaker = f"adapter_{len(self._voices)}", self._speaker
        if run is not None and not self._force:
            check_adapter(run)
        load_adapter(self.model, folder if run is None else _adapter_of(run), name=adapter, force=self._force)
        if run is not None:  # an adapter's own files do not say how it was asked: then as who speaks now is
            tokenizer = load_run_tokenizer(run, trust_remote_code=self._trust)
            speaker = speaker_of(run, read_recipe(run / RECIPE), self.model, tokenizer)
        self._voices[name] = _Voice(adapter, speaker)
        return name

    def answer(
        self, text: str, *, tell: Callable[[str], None], note: Callable[[str], None], stopped: Callable[[], bool]
    ) -> str:
        """Put a text to the model, and keep it and the answer as turns.

        Args:
            text: of the user.
            tell: is given the answer in pieces as it comes.
            note: is told what a person should know, such as turns that no longer fit.
            stopped: asked after every token; a true answer ends the answer, which is kept as far as it came.

        Raises:
            DataError: the text alone is too long for the model, or its template refuses it; no turn is kept.
        """
        asked, speaker = [*self.messages, {"role": "user", "content": text}], self._speaker
        ids = self._fit(asked, note) if speaker.is_chat else speaker.given(text)
        most = min(self._max_new_tokens, speaker.room(ids) or self._max_new_tokens)
        sampling = replace(self._sampling, seed=self._sampling.seed + self._answers)  # no two answers are drawn alike
        with adapters_off(self.model) if self.speaks is None else nullcontext():
            said = stream_text(
                self.model,
                speaker.tokenizer,
                ids,
                max_new_tokens=most,
                sampling=sampling,
                tell=tell,
                stopped=stopped,
            )
        kept = content_of(said, asked, speaker.tokenizer) if speaker.is_chat else said
        kept = kept if speaker.thinking == "keep" else thought_closed(kept)  # or the next line could not be put
        self.messages = [*asked, {"role": "assistant", "content": kept}]
        self._answers += 1
        return said

    def set_system(self, text: str) -> None:
        """Give the conversation a system turn, in place of the one it has.

        Raises:
            DataError: who speaks knows of no turns.
        """
        if not self.is_chat:
            raise DataError("this run was trained on plain prompts, which have no system turn")
        self.messages = [{"role": "system", "content": text}, *_without_system(self.messages)]

    def start_anew(self) -> None:
        """Forget all turns but the system's."""
        self.messages = _system_of(self.messages)

    def undo(self) -> bool:
        """Take back the last question and its answer; whether there was one."""
        if not _without_system(self.messages):
            return False
        self.messages = self.messages[:-2]
        return True

    @property
    def _speaker(self) -> Speaker:
        name = next(iter(self._voices)) if self.speaks is None else self.speaks
        return self._voices[name].speaker

    def _fit(self, asked: Turns, note: Callable[[str], None]) -> list[int]:
        """The ids of a chat; the oldest turns go from `asked` until there is room for an answer."""
        positions, before = positions_of(self.model.config), len(asked)
        wanted = 0 if positions is None else min(self._max_new_tokens, positions // 2)
        ids = self._speaker.given(asked)
        while positions is not None and len(ids) + wanted > positions and len(_without_system(asked)) > 2:
            start = len(_system_of(asked))
            del asked[start : start + 2]
            ids = self._speaker.given(asked)
        if len(asked) < before:
            note(f"the model has {positions:,} positions: the first {before - len(asked)} turns were dropped")
        return ids

    def _check_base(self, folder: Path) -> None:
        """Refuse a run of another base before anything of it is loaded; an adapter's files are checked elsewhere."""
        run = run_of(folder)
        if run is None or self._run is None:
            return
        if run != folder:
            raise AdapterError(f"{folder} is a checkpoint; only the first run given may be one")
        mine, other = _base_of(read_recipe(self._run / RECIPE)), _base_of(read_recipe(run / RECIPE))
        odd = [f"{key} is {other[key]}, not {mine[key]}" for key in mine if mine[key] != other[key]]
        if odd:
            raise AdapterError(f"{folder} was trained on another base than {self._run}: {'; '.join(odd)}")


def _adapter_of(run: Path) -> Path:
    recipe = read_recipe(run / RECIPE)
    trained = trained_folder(run, recipe)
    if recipe.train.full_finetune or not trained.is_dir():
        raise AdapterError(f"{run} has no adapter")
    return trained


def _base_of(recipe: Recipe) -> dict[str, Any]:
    """What of the base must be equal for two adapters to share it; tokens that it has already are not added to it."""
    base, tokens = recipe.base, recipe.lora.added_tokens
    if tokens:
        tokenizer = read_tokenizer(locate_model(base.model, base.revision, weights=False))
        tokens = [token for token in tokens if tokenizer is None or token not in tokenizer.get_vocab()]
    keys = ("model", "revision", "quantization", "double_quant", "block_size", "skip", "quantize_head")
    return {f"base.{key}": getattr(base, key) for key in keys} | {"tokens added to the base": tokens}


def _system_of(messages: Turns) -> Turns:
    return [turn for turn in messages[:1] if turn["role"] == "system"]


def _without_system(messages: Turns) -> Turns:
    return messages[len(_system_of(messages)) :]
