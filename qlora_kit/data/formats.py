"""Formats: from the columns of a row to what it means.

    messages     messages: [{role, content}, ...]                        -> Chat
    sharegpt     conversations: [{from, value}, ...]                     -> Chat
    alpaca       instruction, input, output, history                     -> Chat
    completion   prompt, completion: texts, or turns                     -> Completion, Chat
    text         text                                                    -> Text
    preference   prompt, chosen, rejected: texts, or turns               -> Preference
    labelled     label; prompt, completion or messages                   -> Labelled
    classification   text, label: a name, a number, or a list of them    -> Classified

The words of the system, and tools, may stand in the turns or in columns of their own, `system` and `tools`; beside
such a column a prompt and its answer are turns, too, though they are texts. Where answers are judged, `instruction`
and `input` may stand in place of `prompt`.

A format is one line in `FORMATS` and one function that builds its example; `columns.py` finds the format of a row.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from qlora_kit.data.chats import CHAT_COLUMNS, chat_of, dialogue_of, in_turns, is_in_turns, opened, spoken
from qlora_kit.data.examples import Chat, Classified, Completion, Example, Labelled, Preference, Text
from qlora_kit.data.values import filled, kind, named, string
from qlora_kit.errors import DataError

Columns: TypeAlias = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Format:
    """Which columns a format has, and how a row of it becomes an example."""

    required: tuple[str, ...]
    optional: tuple[str, ...]
    build: Callable[[Columns], Example]


# ---- one builder a format ------------------------------------------------------------------------------------------


def _messages(row: Columns) -> Chat:
    _check_wanted(row)
    return chat_of(opened(dialogue_of(row["messages"], "messages"), row), row)


def _sharegpt(row: Columns) -> Chat:
    return chat_of(opened(dialogue_of(row["conversations"], "conversations"), row), row)


def _alpaca(row: Columns) -> Chat:
    answer = {"role": "assistant", "content": filled(row["output"], "output")}
    return chat_of(opened([*_history(row), _question(row), answer], row), row)


def _question(row: Columns) -> dict[str, Any]:
    question = string(row["instruction"], "instruction")
    if row.get("input"):
        question = f"{question}\n\n{string(row['input'], 'input')}"
    return {"role": "user", "content": question}


def _history(row: Columns) -> list[dict[str, Any]]:
    """The turns before, as LLaMA-Factory's rows have them: questions with their answers, which are learnt, too."""
    pairs = row.get("history") or []
    if not isinstance(pairs, list) or any(not isinstance(pair, list) or len(pair) != 2 for pair in pairs):
        raise DataError(
            f"history is {kind(pairs)}, wanted a list of [question, answer]; rename it if it is something else"
        )
    return [
        {"role": role, "content": string(text, f"history {number}")}
        for number, pair in enumerate(pairs, 1)
        for role, text in zip(("user", "assistant"), pair, strict=True)
    ]


def _completion(row: Columns) -> Completion | Chat:
    _check_wanted(row)
    prompt, completion = row["prompt"], row["completion"]
    if not is_in_turns(row, prompt, completion):
        return Completion(string(prompt, "prompt"), filled(completion, "completion"))
    given = opened(spoken(prompt, "prompt", "user"), row)
    return chat_of([*given, *spoken(completion, "completion", "assistant")], row, given=len(given))


def _check_wanted(row: Columns) -> None:
    """Refuse to teach an answer that its row calls bad. The word alone says so: a 0 may be the number of a class."""
    if str(row.get("label")).strip().lower() == "false":
        raise DataError(
            "column 'label' is false: the answer is marked as bad, and would be learnt: leave the row out, or "
            "set train.task=kto"
        )


def _text(row: Columns) -> Text:
    return Text(filled(row["text"], "text"))


def _classified(row: Columns) -> Classified:
    value = row["label"]
    is_multi = isinstance(value, list)
    labels = [_class_name(each) for each in (value if is_multi else [value])]
    if len(set(labels)) < len(labels):
        raise DataError(f"column 'label' names a class twice: {', '.join(labels)}")
    return Classified(filled(row["text"], "text"), tuple(labels), is_multi)


def _class_name(value: object) -> str:
    """The name of a class, which may be a number that counts from 0."""
    if isinstance(value, str) and value.strip():
        return string(value, "column 'label'").strip()
    if isinstance(value, int | float) and value >= 0 and value == value // 1:  # tables with gaps make counts 1.0
        return str(int(value))
    unknown = "; -1 often says that the class is not known: leave such rows out" if value == -1 else ""
    raise DataError(f"column 'label' is {kind(value)}, wanted a name, a number from 0, or a list of them{unknown}")


def _preference(row: Columns) -> Preference:
    row = _parted(_with_prompt(row, "chosen", "rejected"))
    chosen, rejected = (_answer(row.get("prompt"), row[name], name, row) for name in ("chosen", "rejected"))
    if chosen == rejected:
        raise DataError("chosen and rejected are the same: nothing to learn from")
    if prompt_of(chosen) != prompt_of(rejected):
        raise DataError(_NO_PAIR)
    return Preference(chosen, rejected)


def _with_prompt(row: Columns, *answers: str) -> Columns:
    """The row with what is answered in `prompt`, which may be an Alpaca question; conversations have their own."""
    are_conversations = any(isinstance(row[name], list) and len(row[name]) > 1 for name in answers)
    if row.get("prompt") is not None or "instruction" not in row or are_conversations:
        return row
    return {**row, "prompt": [_question(row)]}


def _parted(row: Columns) -> Columns:
    """The row with the prompt of Anthropic's dialogues apart: both are texts, of which all but the last turn is shared.

    Raises:
        DataError: more than that differs, or the row is a chat, in which a turn would be all that is shared.
    """
    chosen, rejected = row["chosen"], row["rejected"]
    if row.get("prompt") is not None or not isinstance(chosen, str) or not isinstance(rejected, str):
        return row
    ends = [match.end() for match in re.finditer(_ASSISTANT, chosen) if rejected.startswith(chosen[: match.end()])]
    if not ends:
        return row
    if is_in_turns(row):
        beside = ", ".join(name for name in CHAT_COLUMNS if name in row)
        raise DataError(
            f"chosen and rejected are dialogues in one text, beside {beside}, which only turns take: write them as "
            "lists of turns"
        )
    answers = {"chosen": chosen[ends[-1] :], "rejected": rejected[ends[-1] :]}
    if any(_HUMAN in answer for answer in answers.values()):
        raise DataError(_NO_PAIR)
    return {**row, "prompt": chosen[: ends[-1]], **answers}


_HUMAN, _ASSISTANT = "\n\nHuman:", "\n\nAssistant:"
_NO_PAIR = "chosen and rejected differ before their last turn, so they do not answer the same prompt"


def _labelled(row: Columns) -> Labelled:
    value, name = row["label"], "messages" if "messages" in row else "completion"
    is_good = _VERDICTS.get(str(value).strip().lower())
    if is_good is None:
        raise DataError(f"column 'label' is {kind(value)}, wanted true (the answer is good) or false, or 1 or 0")
    if name not in row:
        raise DataError(
            f"there is a label and no answer; found columns: {named(row)}; expected: completion or messages"
        )
    answer = in_turns(row[name]) if name == "messages" else row[name]
    return Labelled(_answer(_with_prompt(row, name).get("prompt"), answer, name, row), is_good)


_VERDICTS = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}
"""As text, since a table of text (CSV) has no other; some programs write the whole numbers of a column as fractions."""


def labelled_pair(pair: Preference) -> list[Labelled]:
    """Both answers of a pair as answers with a verdict."""
    return [Labelled(answer, answer is pair.chosen, pair.where) for answer in (pair.chosen, pair.rejected)]


def _answer(prompt: object, answer: object, name: str, row: Columns) -> Chat | Completion:
    """An answer that ends a conversation, or follows a text.

    Turns that begin with the assistant's go on from `prompt`, be it turns or what the user says; others are the whole
    conversation, beside which data sets often keep its first words in `prompt`.
    """
    if prompt is None and not isinstance(answer, list):
        raise DataError(f"{name} is {kind(answer)} and there is no column 'prompt': give prompt, or turns")
    if not is_in_turns(row, prompt, answer):
        return Completion(string(prompt, "prompt"), filled(answer, name))
    turns = spoken(answer, name, "assistant")
    if turns[0]["role"] == "assistant":
        turns = [*spoken(prompt, "prompt", "user"), *turns]
    if turns[-1]["role"] != "assistant":
        raise DataError(f"{name} ends with a turn by the {turns[-1]['role']}, wanted one by the assistant")
    if turns[-1].get("weight", 1) == 0:
        raise DataError(
            f"{name} ends with an answer of weight 0, which is not learnt: take the weight away, or leave the row out"
        )
    return chat_of(opened(turns, row), row)


def prompt_of(answer: Chat | Completion) -> object:
    """What an answer answers."""
    return answer.messages[:-1] if isinstance(answer, Chat) else answer.prompt


_QUESTION = ("instruction", "input")
"""What may stand in place of a prompt."""

FORMATS: dict[str, Format] = {
    "messages": Format(("messages",), CHAT_COLUMNS, _messages),
    "sharegpt": Format(("conversations",), CHAT_COLUMNS, _sharegpt),
    "alpaca": Format(("instruction", "output"), ("input", "history", *CHAT_COLUMNS), _alpaca),
    "completion": Format(("prompt", "completion"), CHAT_COLUMNS, _completion),
    "text": Format(("text",), (), _text),
    "preference": Format(("chosen", "rejected"), ("prompt", *_QUESTION, *CHAT_COLUMNS), _preference),
    "labelled": Format(("label",), ("prompt", "completion", "messages", *_QUESTION, *CHAT_COLUMNS), _labelled),
    "classification": Format(("text", "label"), (), _classified),
}
