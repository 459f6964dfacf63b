"""A Modelfile, by which Ollama takes a GGUF: where it lies, how chats are written, what ends an answer.

Ollama writes chats by a Go template. It is made from the tokenizer's own by watching what that puts around messages,
and kept only if it then writes whole chats as the tokenizer does.

Source: github.com/ollama/ollama, docs/modelfile.mdx and docs/template.mdx.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from qlora_kit.export.gguf.vocabulary import puts_bos

_U, _A, _S = "q1w2e3", "r4t5y6", "u7i8o9"
"""Contents that no template looks into or holds itself."""

_SEEN = (
    [("user", _U)],
    [("system", _S), ("user", _U)],
    [("user", _U), ("assistant", _A), ("user", "z9")],
    [("system", _S), ("user", _U), ("assistant", _A), ("user", "x8"), ("assistant", "c7"), ("user", "v6")],
)
"""Chats that a template made must write as the tokenizer does."""


@dataclass(frozen=True, slots=True)
class ChatShape:
    """What a chat template puts around the messages, if that depends on their roles alone."""

    around: Mapping[str, tuple[str, str]]
    """Role -> what stands before and after its content."""
    cue: str
    """What asks for an answer, after the last message."""
    opening: str
    """What stands before a chat that has no system message."""

    def write(self, chat: Sequence[tuple[str, str]]) -> str:
        """A chat, with the cue for an answer."""
        opening = "" if chat[0][0] == "system" else self.opening
        body = "".join(f"{self.around[role][0]}{content}{self.around[role][1]}" for role, content in chat)
        return opening + body + self.cue


def modelfile(
    weights: str, tokenizer: PreTrainedTokenizerBase | None, ends: Sequence[int], *, is_chat: bool = True
) -> str:
    """The text of a Modelfile.

    Args:
        weights: name of the GGUF file beside it.
        tokenizer: with its chat template, if it has one.
        ends: tokens that end an answer.
        is_chat: whether the model is asked by its chat template; otherwise a prompt is all that it is given.
    """
    lines = [f"FROM ./{weights}"]
    shape = None if tokenizer is None else chat_shape(tokenizer)
    if tokenizer is None or not is_chat or not isinstance(tokenizer.chat_template, str):
        lines.append('TEMPLATE """{{ .Prompt }}"""')
    elif shape is not None and not any('"""' in text or "{{" in text for text in _texts(shape)):
        lines.append(f'TEMPLATE """{go_template(shape)}"""')
    else:
        lines.append("# The chat template is more than words around messages: Ollama takes that of the GGUF file.")
    if tokenizer is not None:
        stops = [token for token in tokenizer.convert_ids_to_tokens(list(ends)) if '"' not in token]
        lines += [f'PARAMETER stop "{token}"' for token in stops]
    return "\n".join(lines) + "\n"


def chat_shape(tokenizer: PreTrainedTokenizerBase) -> ChatShape | None:
    """What the tokenizer's template puts around messages, without the token that runtimes put before a text; None where
    that is not all that it does."""
    put = tokenizer.bos_token if puts_bos(tokenizer) else ""

    def render(chat: Sequence[tuple[str, str]], cue: bool = True) -> str:
        messages = [{"role": role, "content": content} for role, content in chat]
        text = str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=cue))
        return text.removeprefix(put)

    if not isinstance(tokenizer.chat_template, str):
        return None
    try:
        # A whole chat, without the cue, may end with a token that nothing else stands behind.
        for end in ("", tokenizer.eos_token or ""):
            asked, answered = (render(chat, cue=False).removesuffix(end) for chat in (_SEEN[0], _SEEN[2][:2]))
            shape = _guess(render(_SEEN[3]), render(_SEEN[0]), asked, answered)
            if shape is not None and all(shape.write(chat) == render(chat) for chat in _SEEN):
                return shape
    except TemplateError:  # some refuse a system message
        pass
    return None


def go_template(shape: ChatShape) -> str:
    """The same shape as Ollama's templates are written."""
    turns = [
        f'if eq .Role "{role}" }}}}{before}{{{{ .Content }}}}{after}' for role, (before, after) in shape.around.items()
    ]
    opening = f"{{{{ if not .System }}}}{shape.opening}{{{{ end }}}}" if shape.opening else ""
    written = "{{ " + "{{ else ".join(turns) + "{{ end }}"
    return f"{opening}{{{{ range .Messages }}}}{written}{{{{ end }}}}{shape.cue}"


def _guess(long: str, short: str, uncued: str, answered: str) -> ChatShape | None:
    """Read a shape off chats: of all roles, of one question with the cue and without it, and of a question answered."""
    pieces, contents = [long], [content for _, content in _SEEN[3]]
    for content in contents:
        pieces[-1:] = pieces[-1].split(content)
    if len(pieces) != len(contents) + 1 or not short.startswith(uncued) or answered.count(_A) != 1:
        return None
    cue = short[len(uncued) :]
    after_answer, after_user = answered.split(_A)[1], pieces[-1].removesuffix(cue)
    before_user = pieces[3].removeprefix(after_answer)
    return ChatShape(
        {
            "system": (pieces[0], pieces[1].removesuffix(before_user)),
            "user": (before_user, after_user),
            "assistant": (pieces[2].removeprefix(after_user), after_answer),
        },
        cue,
        opening=short.split(_U)[0].removesuffix(before_user),
    )


def _texts(shape: ChatShape) -> list[str]:
    return [shape.cue, shape.opening, *(text for pair in shape.around.values() for text in pair)]
