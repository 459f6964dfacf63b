"""Chat template: which one a run uses, made to say the same on every day, and the tokens that it is written in.

What a run fixes is written into the template itself, in front of it. So whatever renders a chat for the run's model
(`generate`, `eval`, a chat, an exported folder that another program loads) renders what training rendered, and none of
them has to be told. Three things are fixed:

    today's date             of `strftime_now`, which transformers gives to templates; a template without it writes a
                             date that stands in it, or none
    the mode of thinking     of templates that ask for `enable_thinking`, where `data.thinking` leaves thoughts out
    the template             `plain` for a tokenizer that has none
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date as Date
from difflib import get_close_matches
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from jinja2 import TemplateError

from qlora_kit.data.thinking import Thinking
from qlora_kit.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Messages: TypeAlias = list[dict[str, Any]]
"""Turns of a chat, as templates take them."""

FALLBACK = "plain"
"""The shipped template for a tokenizer without one: words and the end of text, which every base has learnt."""

_CHATML = ("<|im_start|>", "<|im_end|>")
_SHIPPED = Path(__file__).parent / "templates"
_ASKED, _SAID = "\ue001", "\ue000"  # Unicode keeps these for private use: no template writes them
_TODAY = "strftime_now"
_DIRECTIVES = ("-d", "-m", *"aAbBcdeHIjmMpSuUVwWxXyYzZ")
"""Of `strftime`, what today's date is asked for in; %% is a percent sign."""

_TEMPLATE_FAULTS = (TemplateError, TypeError, ValueError, AttributeError, LookupError, ArithmeticError, RecursionError,
                    MemoryError)  # fmt: skip
"""What a template raises: Jinja's own errors, among them what its sandbox forbids, and those of Python that its
expressions lead to: it adds text to something else that a message holds, asks for a range above 100,000 or calls
itself."""


@dataclass(frozen=True, slots=True)
class Renderer:
    """A chat template bound to a tokenizer and the tools of one chat."""

    tokenizer: "PreTrainedTokenizerBase"
    template: str
    tools: list[Any] | None = None

    def __call__(self, messages: Messages, *, prompt: bool = False) -> str:
        """The text of `messages`; `prompt` opens the assistant's next turn, as inference does."""
        try:
            text = self.tokenizer.apply_chat_template(
                messages, tools=self.tools, chat_template=self.template, add_generation_prompt=prompt, tokenize=False
            )
            return str(text)
        except _TEMPLATE_FAULTS as error:
            raise DataError(f"the chat template rejects the chat: {' '.join(str(error).split())}") from error


# ---- which template ------------------------------------------------------------------------------------------------


def find_template(name: str) -> str | None:
    """The source of a chat template.

    Args:
        name: `auto` for the tokenizer's own, the name of a shipped template (chatml, plain), or a file.

    Returns:
        Jinja source; None for `auto`.

    Raises:
        DataError: if there is no such template, or the file is not UTF-8.
    """
    if name == "auto":
        return None
    shipped = {path.stem: path for path in sorted(_SHIPPED.glob("*.jinja"))}
    path = shipped.get(name, Path(name))
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise DataError(f"data.template={name}: the file is not UTF-8") from None
    except OSError as error:
        near = "".join(f" (did you mean {close}?)" for close in get_close_matches(name, shipped, n=1))
        raise DataError(
            f"data.template={name} is neither a shipped template ({', '.join(shipped)}) nor a readable file: "
            f"{error.strerror}{near}"
        ) from None


def check_turn_tokens(name: str, tokenizer: "PreTrainedTokenizerBase") -> None:
    """Refuse a shipped template whose marks are no tokens: pieces of text would never end an answer.

    Raises:
        DataError: names a template that does without them, or the missing end token.
    """
    missing = [token for token in _CHATML if token not in tokenizer.get_vocab()]
    if name == "chatml" and missing:
        raise DataError(f"data.template=chatml needs the tokens {', '.join(missing)}, which this tokenizer lacks: "
                        "set data.template=plain, or teach them with lora.added_tokens")  # fmt: skip
    if name == "plain" and tokenizer.eos_token is None:
        raise DataError(
            "the template plain ends answers with the tokenizer's end token (eos_token), and it has none: name a "
            ".jinja file with data.template"
        )


def check_template(tokenizer: "PreTrainedTokenizerBase", template: str | None) -> None:
    """Refuse chats for which there is no template.

    Raises:
        DataError: says which settings give one.
    """
    if template is None and tokenizer.chat_template is None:
        raise DataError(
            "the rows are chats and the tokenizer has no chat template: set data.template=plain (or chatml), "
            "or name a .jinja file"
        )


# ---- what a run fixes ----------------------------------------------------------------------------------------------


def fix_template(source: str, *, thinking: Thinking = "keep", today: Date | None = None) -> str:
    """A template that says the same on every day, and whose default mode is the one that is trained.

    The lines that come in front leave no trace in what it renders, and change nothing where they stand already.

    Args:
        source: Jinja source.
        thinking: `strip` and `empty` turn off `enable_thinking` where the template asks for it; who renders may still
            give it another value.
        today: the date that `strftime_now` says from now on, at midnight; None leaves it to the clock.
    """
    lines = []
    if thinking != "keep" and "enable_thinking" in source:
        lines.append("{% if enable_thinking is not defined %}{% set enable_thinking = false %}{% endif %}\n")
    if today is not None and writes_date(source):
        values = [("%" + code, today.strftime("%" + code)) for code in _DIRECTIVES] + [("%%", "%")]
        replaced = "".join(f" | replace({code!r}, {value!r})" for code, value in values)
        lines.append(f"{{% macro {_TODAY}(format) %}}{{{{ format{replaced} }}}}{{% endmacro %}}\n")
    return "".join(line for line in lines if line not in source) + source


def writes_date(source: str) -> bool:
    """Whether what a template renders changes from day to day."""
    return _TODAY in source and f"macro {_TODAY}(" not in source


def fix_tokenizer(tokenizer: "PreTrainedTokenizerBase", thinking: Thinking, today: Date) -> Date | None:
    """Fix every template of a tokenizer in place; gives `today` if one of them writes it."""
    sources = _sources(tokenizer)
    if sources:
        fixed = fixed_templates(tokenizer, thinking, today)
        tokenizer.chat_template = fixed if isinstance(tokenizer.chat_template, dict) else fixed["default"]
    return today if any(map(writes_date, sources.values())) else None


def fixed_templates(tokenizer: "PreTrainedTokenizerBase", thinking: Thinking, today: Date) -> dict[str, str]:
    """The templates that a tokenizer has when a run has fixed it, be that to come or done; see `fix_tokenizer`."""
    sources = _sources(tokenizer) or {"default": find_template(FALLBACK) or ""}
    return {name: fix_template(source, thinking=thinking, today=today) for name, source in sources.items()}


def _sources(tokenizer: "PreTrainedTokenizerBase") -> dict[str, str]:
    """The templates of a tokenizer by name."""
    held = tokenizer.chat_template
    return held if isinstance(held, dict) else {} if held is None else {"default": held}


# ---- the tokens that it is written in ------------------------------------------------------------------------------


def special_tokens(tokenizer: "PreTrainedTokenizerBase") -> tuple[str, ...]:
    """The texts of all special tokens."""
    return tuple(token.content for token in tokenizer.added_tokens_decoder.values() if token.special)


def behind_answers(render: Renderer) -> str:
    """What the template writes behind an answer; empty where it refuses a plain chat.

    It is found by looking: one question and one answer are rendered.
    """
    try:
        text = render([{"role": "user", "content": _ASKED}, {"role": "assistant", "content": _SAID}])
    except DataError:
        return ""
    _, is_said, behind = text.rpartition(_SAID)
    return behind if is_said else ""


@lru_cache(maxsize=8)
def end_token(behind: str, specials: tuple[str, ...]) -> str | None:
    """The special token that opens what a template writes behind an answer; None where none does."""
    return max((token for token in specials if behind.lstrip().startswith(token)), key=len, default=None)


def end_token_id(tokenizer: "PreTrainedTokenizerBase") -> int | None:
    """The id of the token that ends an answer in the tokenizer's chat template; None where there is neither."""
    render = _own(tokenizer)
    token = None if render is None else end_token(behind_answers(render), special_tokens(tokenizer))
    return next((id for id, added in tokenizer.added_tokens_decoder.items() if added.content == token), None)


def template_tokens(tokenizer: "PreTrainedTokenizerBase") -> list[str]:
    """The special tokens that the tokenizer's chat template writes around turns, sorted."""
    ids = set(tokenizer(_plain_chat(tokenizer), add_special_tokens=False)["input_ids"])
    added = tokenizer.added_tokens_decoder
    return sorted(added[token].content for token in ids & added.keys() if added[token].special)


def add_tokens(tokenizer: "PreTrainedTokenizerBase", tokens: Sequence[str]) -> None:
    """Add tokens to a tokenizer, in place; those that its chat template writes around turns are special.

    One that is there stays what it is: transformers makes a special token plain whose name it is given again, and then
    no answer ends with it.

    Args:
        tokenizer: with its chat template.
        tokens: texts, of which some may be there already.
    """
    there = {token.content for token in tokenizer.added_tokens_decoder.values()}
    new = [token for token in tokens if token not in there]
    tokenizer.add_tokens(new)
    chat = _plain_chat(tokenizer)
    # A word that is a token stands in the names of roles by chance.
    marks = [token for token in new if token in chat and not token.isalnum()]
    tokenizer.add_tokens(marks, special_tokens=True)


def _plain_chat(tokenizer: "PreTrainedTokenizerBase") -> str:
    """What the tokenizer's chat template writes around three turns; empty where it has none or refuses them."""
    render = _own(tokenizer)
    if render is None:
        return ""
    try:
        return render([{"role": role, "content": "a"} for role in ("user", "assistant", "user")], prompt=True)
    except DataError:
        return ""


def _own(tokenizer: "PreTrainedTokenizerBase") -> Renderer | None:
    """The template of a tokenizer that chats without tools go through; None where it has none."""
    held = tokenizer.chat_template
    source = held.get("default") if isinstance(held, dict) else held
    return None if source is None else Renderer(tokenizer, source)


def through_end(said: str, behind: str, specials: tuple[str, ...]) -> str:
    """What of a turn is learnt: all up to its end token, where inference stops.

    Line breaks behind it, what some templates write at the end of a whole chat (Phi-3: the end of text), and words that
    one writes behind every answer's end token are not. A turn that ends in none of these is learnt as it is.

    Args:
        said: the turn as the template writes it behind the prompt.
        behind: what it writes behind an answer, from `behind_answers`.
        specials: from `special_tokens`.
    """
    bare, end = said.rstrip(), end_token(behind, specials)
    if end is not None and said.endswith(behind):
        return said[: len(said) - len(behind) + behind.find(end) + len(end)]
    if not bare.endswith(specials):
        return said
    last = _run_at_the_end(specials).search(bare)
    at = -1 if end is None or last is None else bare.rfind(end, last.start())
    return bare if at < 0 or end is None else bare[: at + len(end)]


@lru_cache(maxsize=8)
def _run_at_the_end(specials: tuple[str, ...]) -> re.Pattern[str]:
    """Special tokens, one behind the other, white space between them aside."""
    one = "|".join(map(re.escape, sorted(specials, key=len, reverse=True)))
    return re.compile(rf"(?:(?:{one})\s*)+\Z")
