"""Thinking: the thoughts of assistant turns, kept, left out, or emptied before a chat goes through its template.

A thought stands in a key of its own (`reasoning_content`, or `thinking` or `reasoning`, as other programs name it), or
at the start of the content:

    <think>thought</think>answer      and      thought</think>answer      for a prompt that opens the thought itself

Other marks of thoughts (gpt-oss has channels, Magistral [THINK]) belong to their templates and are left as they are.
"""

import re
from dataclasses import replace
from typing import Any, Literal, TypeAlias

from qlora_kit.data.examples import Chat, Completion, Example, Labelled, Preference
from qlora_kit.errors import DataError

Thinking: TypeAlias = Literal["keep", "strip", "empty"]

KEYS = ("reasoning_content", "thinking", "reasoning")
EMPTY = "<think>\n\n</think>\n\n"
"""What models of both modes write, or are given, where they do not think: Qwen3's form."""
CLOSE = "\n</think>\n\n"

_BLOCK = re.compile(r"\A\s*(?:<think>(.*?)|((?:(?!<think>).)*?))</think>\s*", re.DOTALL)
_OPENING = re.compile(r"(?:<think>\s*)?(?:</think>\s*)?\Z")
_ASKS = re.compile(rf"[.'\"]({'|'.join(KEYS)})\b")  # message.thinking, message['thinking']


def with_thinking(example: Example, mode: Thinking) -> Example:
    """The example with its assistant's thoughts treated as `data.thinking` says.

    Args:
        example: only chats hold thoughts, be they its answers or itself.
        mode: keep; strip: without thoughts; empty: without, an empty block in their place.

    Raises:
        DataError: a turn that is to lose its thought opens one and does not close it.
    """
    if mode == "keep":
        return example
    match example:
        case Chat():
            return _without(example, mode)
        case Preference():
            return replace(example, chosen=_without(example.chosen, mode), rejected=_without(example.rejected, mode))
        case Labelled():
            return replace(example, answer=_without(example.answer, mode))
        case _:
            return example


def _without(answer: Chat | Completion, mode: Thinking) -> Chat | Completion:
    if isinstance(answer, Completion):
        return answer
    return replace(answer, messages=[_bare(message, mode) for message in answer.messages])


def _bare(message: dict[str, Any], mode: Thinking) -> dict[str, Any]:
    if message["role"] != "assistant":
        return message
    bare = {key: value for key, value in message.items() if key not in KEYS}
    content = message.get("content")
    if content is None:
        return bare
    rest = _BLOCK.sub("", content, count=1)
    if rest == content and content.lstrip().startswith("<think>"):
        raise DataError(
            "an assistant turn opens <think> and does not close it, so where its answer begins is not known"
        )
    return bare | {"content": EMPTY + rest if mode == "empty" else rest}


def thought_closed(content: str) -> str:
    """What a turn said, its thought ended where it was cut in the middle of that."""
    is_cut = content.lstrip().startswith("<think>") and "</think>" not in content
    return content + CLOSE if is_cut else content


def thought_of(message: dict[str, Any]) -> str:
    """The thought of an assistant turn without white space around it; empty if it has none."""
    found = _BLOCK.match(message.get("content") or "")
    inside = "" if found is None else found[1] or found[2] or ""
    return (_apart(message) or inside).strip()


def _apart(message: dict[str, Any]) -> str:
    """The thought that stands in a key of its own; empty where there is none."""
    return next((str(message[key]) for key in KEYS if message.get(key)), "")


def written_out(message: dict[str, Any], template: str) -> dict[str, Any]:
    """The turn with its thought where the template looks for it: in the key that it asks for, or in the content."""
    asked = _ASKS.findall(template)
    thought = _apart(message)
    if message["role"] != "assistant" or not thought.strip() or any(map(message.get, asked)):
        return message
    bare = {key: value for key, value in message.items() if key not in KEYS}
    if asked:
        return bare | {asked[0]: thought}
    return bare | {"content": f"<think>\n{thought.strip()}{CLOSE}{message.get('content') or ''}"}


def after_prompt(prompt: str, turn: str, thought: str) -> str | None:
    """What has to follow a prompt so that the turn is said, where the template writes past turns otherwise.

    Templates of models that think may open the thought in the prompt (DeepSeek-R1: `<think>`), or close it
    (`</think>`, or an empty block, where they are told not to think), and leave that out of the turns that they write
    down. The prompt stands, since inference gives it; the thought goes on from there.

    Args:
        prompt: as inference renders it.
        turn: the chat up to and with the turn, as the template renders it.
        thought: of the turn.

    Returns:
        the text behind the prompt; None if the two do not go together.
    """
    if turn.startswith(prompt):
        return turn[len(prompt) :]
    stem = _OPENING.sub("", prompt, count=1)
    if stem == prompt or not turn.startswith(stem):
        return None
    said = _BLOCK.sub("", turn[len(stem) :], count=1)
    return said if prompt.rstrip().endswith("</think>") else thought + CLOSE + said
