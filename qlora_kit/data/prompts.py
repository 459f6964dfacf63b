"""Prompts: what a trained model is asked, formatted as its prompts were in training.

A prompt is a row whose answer is not known yet: it is given a placeholder answer, encoded like a row of training, and
the part before the answer is the prompt. So no second rendering can drift from the first.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_kit.data.chat_template import Renderer
from qlora_kit.data.chats import in_turns, speaker
from qlora_kit.data.columns import read_row
from qlora_kit.data.examples import Chat, Completion, Example, Preference
from qlora_kit.data.faults import Faults
from qlora_kit.data.sources import raw_rows
from qlora_kit.data.template import encode
from qlora_kit.data.thinking import Thinking, with_thinking
from qlora_kit.data.values import has, under
from qlora_kit.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

UNSAID = "(to be said)"
"""Stands for an answer that is to come: a row without any could not be trained on, and is refused."""
_ANSWERS = {"prompt": "completion", "instruction": "output"}
"""Columns that ask, and those that answer them."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """What is asked.

    Attributes:
        ids: what the model is given.
        shown: the prompt as it was written: a text, or the turns of a chat.
        reference: the answer that the row has; None where it has none.
    """

    ids: list[int]
    shown: Any
    reference: str | None = None


def ask(
    text: str | list[dict[str, Any]],
    tokenizer: "PreTrainedTokenizerBase",
    *,
    is_chat: bool,
    system: str | None = None,
    thinking: Thinking = "keep",
) -> Prompt:
    """A text, or the turns of a chat so far, as a prompt.

    Args:
        text: what to answer; of turns the last is to be answered.
        tokenizer: of the model, with the chat template of its run.
        is_chat: whether a text is a turn of a chat, and not the beginning of a text to go on with.
        system: what a chat opens with, unless it has a system turn already.
        thinking: what the run made of thoughts, which earlier turns may have.

    Raises:
        DataError: it is empty or no text, a system turn is wanted where there is no chat, or the template refuses the
            turns.
    """
    raw = {"prompt": text} if isinstance(text, str) else {"messages": text}
    return _prompt(read_row(_answered(raw), "the prompt"), tokenizer, is_chat, system, thinking)


def content_of(said: str, turns: list[dict[str, Any]], tokenizer: "PreTrainedTokenizerBase") -> str:
    """What a turn has to hold for the chat template to write what was said: without white space that it writes itself.

    Args:
        said: by a model, behind the prompt that the turns make.
        turns: so far.
        tokenizer: with the chat template of its run.
    """
    render, spaces = Renderer(tokenizer, tokenizer.get_chat_template()), len(said) - len(said.lstrip())
    try:
        written = render(turns, prompt=True) + said if spaces else ""
        for content in (said[count:] for count in range(min(spaces, 4), 0, -1)):  # no template writes more
            if render([*turns, {"role": "assistant", "content": content}]).startswith(written):
                return content
    except DataError:  # it was asked in another form
        pass
    return said


def read_prompts(
    path: Path,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    is_chat: bool,
    system: str | None = None,
    thinking: Thinking = "keep",
    columns: Sequence[Mapping[str, str]] = (),
) -> list[Prompt]:
    """The prompts of a file.

    Args:
        path: .txt with a prompt a line, or rows in any format that training reads; an answer may be missing, and where
            it is there it is the reference.
        tokenizer: as `ask` takes it, like the rest.
        is_chat: whether texts are turns of a chat.
        system: what chats open with that have no system turn.
        thinking: as for `ask`.
        columns: as for `renamed`; a row may have the names that a format expects all the same.

    Raises:
        DataError: there is no such file, or no prompt in it, or there are bad rows: the first 20, with their lines.
    """
    faults, prompts = Faults(), []
    for where, raw in asked_rows(path, "prompt", faults):
        try:
            prompts.append(_prompt(_read(raw, where, columns), tokenizer, is_chat, system, thinking))
        except DataError as error:
            told = str(error)
            faults.add(told if told.startswith(where) else f"{where}: {told}")
    faults.stop(may_skip=False)
    if not prompts:
        raise DataError(f"{path} holds no prompts")
    return prompts


def asked_rows(path: Path, column: str, faults: Faults) -> Iterable[tuple[str, Any]]:
    """The rows of a file that a model is asked, each with its place.

    Args:
        path: .txt with one a line, or rows in a file that training reads.
        column: that the lines of a text are.
        faults: what cannot be read is left here.

    Raises:
        DataError: there is no such file, or it cannot be read.
    """
    if not path.is_file():
        raise DataError(f"{path} is a folder; give one file" if path.is_dir() else f"{path}: there is no such file")
    return _lines(path, column) if path.suffix.lower() == ".txt" else raw_rows(path, faults)


def renamed(raw: Any, columns: Sequence[Mapping[str, str]]) -> Any:
    """A row under the names that a format expects; what is no row stays.

    Args:
        raw: the row.
        columns: for each way to name them, expected name -> name in the rows; of several that counts of which the row
            has most.
    """
    if not isinstance(raw, Mapping):
        return raw
    likely: Mapping[str, str] = max(
        columns, key=lambda names: sum(has(raw, name) for name in names.values()), default={}
    )
    return under(raw, {expected: name for expected, name in likely.items() if has(raw, name)})


def _lines(path: Path, column: str) -> list[tuple[str, Any]]:
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 (byte {error.start})") from error
    return [(f"{path}:{number}", {column: line.rstrip("\r")}) for number, line in enumerate(lines, 1) if line.strip()]


def _read(raw: Any, where: str, columns: Sequence[Mapping[str, str]]) -> Example:
    """What a row asks; of a pair of answers it is what the one that is preferred answers."""
    raw = renamed(raw, columns)
    if isinstance(raw, Mapping) and raw.get("chosen") is not None and raw.get("rejected") is not None:
        pair = read_row(raw, where, format="preference", task="dpo")
        return pair.chosen if isinstance(pair, Preference) else pair
    return read_row(_answered(raw), where)


def _answered(raw: Any) -> Any:
    """The row with an answer, one that stands for it where it has none, and without the verdict on it."""
    if not isinstance(raw, Mapping):
        return raw
    given: dict[str, Any] = {
        answer: UNSAID for asks, answer in _ANSWERS.items() if asks in raw and raw.get(answer) is None
    }
    for column in ("messages", "conversations"):
        turns: Any = in_turns(raw.get(column))
        last = turns[-1] if isinstance(turns, list) and turns else None
        if isinstance(last, Mapping) and speaker(last) != "assistant":
            given[column] = [*turns, {"role": "assistant", "content": UNSAID}]
    return {name: value for name, value in {**raw, **given}.items() if name != "label"}


def _prompt(
    example: Example, tokenizer: "PreTrainedTokenizerBase", is_chat: bool, system: str | None, thinking: Thinking
) -> Prompt:
    if isinstance(example, Completion) and is_chat:
        turns = [("user", example.prompt), ("assistant", example.completion)]
        example = Chat([{"role": role, "content": content} for role, content in turns], where=example.where)
    if system is not None:
        example = _with_system(example, system)
    row = encode(with_thinking(example, thinking), tokenizer, loss_on="last")
    if not row.prompt:
        raise DataError("there is no prompt, or its answer is not plain text; wanted a prompt, or turns of a chat")
    shown = example.messages[:-1] if isinstance(example, Chat) else example.prompt  # type: ignore[union-attr]
    is_open = (row.answer or "").endswith(UNSAID)  # an empty thought may stand before it
    return Prompt(row.prompt, shown, None if is_open else row.answer)


def _with_system(example: Example, system: str) -> Chat:
    if not isinstance(example, Chat):
        raise DataError("a system turn (--system) is for chats, and this model was trained on plain prompts")
    if example.messages[0]["role"] == "system":
        return example
    return Chat([{"role": "system", "content": system}, *example.messages], example.tools, where=example.where)
