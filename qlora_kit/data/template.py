"""Template: from an example to token ids, and which of them the loss counts.

Which tokens are trained is known from where they stand, never from what they are: a padding token that is also the
end token, or a marker that a user quotes, changes nothing. The ids are those that inference would see:

    Completion   [BOS] prompt | completion EOS          the prompt tokenised as if it stood alone
    Text         [BOS] text EOS
    Chat         the chat template's rendering, tokenised as it is: the template writes BOS and end tokens, or does not

Of preferences and answers with a verdict, what is trained is the last turn or the completion.

In a chat the assistant's turns are found through the template itself, in characters of the rendering:

    1. between `{% generation %}` and `{% endgeneration %}`, where the template has these marks; otherwise
    2. from the end of render(messages[:i], generation prompt) to the end of render(messages[:i + 1]), after checking
       that each is a prefix of the whole.

transformers' `return_assistant_tokens_mask` reads the same marks, but is not used: where an answer begins with a space
it loses that turn and all later ones, and where one ends with a space it marks all that follows (5.23, tokenizers that
trim offsets; tests/test_data.py shows it).
"""

import re
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from jinja2 import TemplateError

from qlora_kit.data.classes import Classes
from qlora_kit.data.formats import Chat, Classified, Completion, Example, Labelled, Preference, Text
from qlora_kit.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LossOn: TypeAlias = Literal["assistant", "last", "completion", "all"]
Span: TypeAlias = tuple[int, int]
"""Characters of a rendering, [start, end)."""

_CHATML = ("<|im_start|>", "<|im_end|>")
_SHIPPED = Path(__file__).parent / "templates"


@dataclass(frozen=True, slots=True)
class Encoded:
    """One row as the model sees it. `input_ids` and `trained` have the same length."""

    input_ids: list[int]
    trained: list[bool]
    """Whether the loss counts the prediction of this token. The first token of a row is never predicted."""
    prompt: list[int] | None = None
    """What inference would be given to produce `answer`; None where a row has no single answer at its end."""
    answer: str | None = None
    """The reference answer in plain text, without end token."""
    where: str = ""
    """`file:line` or `source row N`."""
    other: "Encoded | None" = None
    """What goes with it as a sequence of its own: the answer to the same prompt that was not preferred."""
    is_good: bool | None = None
    """The verdict on its answer, where there is one."""
    target: int | tuple[float, ...] | None = None
    """Of a text that is classified: its class, or for every class whether it is one. No token of it is predicted."""

    @property
    def trained_tokens(self) -> int:
        """Tokens that the loss counts, the other sequence's aside; one for the class of a text."""
        return sum(self.trained[1:]) if self.target is None else 1

    @property
    def longest(self) -> int:
        """Tokens of its longest sequence."""
        return max(len(self.input_ids), 0 if self.other is None else len(self.other.input_ids))


def encode(
    example: Example,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    loss_on: LossOn = "assistant",
    template: str | None = None,
) -> Encoded:
    """Render and tokenise one example.

    Args:
        example: what `read_row` made.
        tokenizer: any for completions and texts; a fast one, which knows where its tokens stand, for chats.
        loss_on: assistant: every assistant turn; last, completion: the last one; all: everything but BOS. Completions
            train the completion unless it is `all`; texts are always trained from end to end.
        template: source of a chat template; None takes the tokenizer's own. See `find_template`.

    Raises:
        DataError: if there is no chat template or end token, the template refuses the chat or is not prefix-stable.
            The message does not name the row.
    """
    match example:
        case Chat():
            return _encode_chat(example, tokenizer, loss_on, template)
        case Completion():
            return _encode_completion(example, tokenizer, loss_on)
        case Text():
            ids = _ended(_tokenise(example.text, tokenizer), tokenizer)
            return Encoded(ids, _all_but_bos(ids, tokenizer), where=example.where)
        case Classified():
            raise ValueError("texts that are classified go through encode_text")
        case Preference():
            answers = (example.chosen, example.rejected)
            chosen, rejected = (encode(each, tokenizer, loss_on="last", template=template) for each in answers)
            return replace(chosen, other=rejected, where=example.where)
        case Labelled():
            answer = encode(example.answer, tokenizer, loss_on="last", template=template)
            return replace(answer, is_good=example.is_good, where=example.where)


def encode_text(example: Classified, tokenizer: "PreTrainedTokenizerBase", classes: Classes) -> Encoded:
    """Tokenise a text as its model reads it, with the tokens that its tokenizer puts around every text.

    Raises:
        DataError: its label is none of the classes.
    """
    ids = tokenizer(example.text, verbose=False)["input_ids"]
    return Encoded(ids, [False] * len(ids), where=example.where, target=classes.target(example.labels))


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
            f"data.template={name} is neither a shipped template ({', '.join(shipped)}) nor a file that "
            f"can be read: {error.strerror}{near}"
        ) from None


def check_turn_tokens(name: str, tokenizer: "PreTrainedTokenizerBase") -> None:
    """Refuse the shipped chatml where its marks are no tokens: pieces of text would never end an answer.

    Raises:
        DataError: names a template that does without them.
    """
    missing = [token for token in _CHATML if token not in tokenizer.get_vocab()]
    if name == "chatml" and missing:
        raise DataError(f"data.template=chatml wants the tokens {', '.join(missing)}, which this tokenizer has not: "
                        "set data.template=plain")  # fmt: skip


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


# ---- completions and texts -----------------------------------------------------------------------------------------


def _encode_completion(example: Completion, tokenizer: "PreTrainedTokenizerBase", loss_on: LossOn) -> Encoded:
    prompt = _tokenise(example.prompt, tokenizer)
    whole = _tokenise(example.prompt + example.completion, tokenizer)
    # Tokens of the whole text are the most natural; where one of them straddles the seam, the two are tokenised apart.
    if whole[: len(prompt)] != prompt:
        whole = prompt + _continuation(example.completion, tokenizer)
    ids = _ended(whole, tokenizer)
    trained = [False] * len(prompt) + [True] * (len(ids) - len(prompt))
    if loss_on == "all":
        trained = _all_but_bos(ids, tokenizer)
    return Encoded(ids, trained, prompt, example.completion, example.where)


def _tokenise(text: str, tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """Token ids of a text as a prompt: with one BOS if the tokenizer has the habit of adding it, and no end token."""
    ids = _ids(text, tokenizer)
    habit = tokenizer("a", verbose=False)["input_ids"][:1]
    if habit != [tokenizer.bos_token_id] or ids[:1] == habit:
        return ids
    return habit + ids


def _continuation(text: str, tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """Token ids of a text that goes on from another: without the space that SentencePiece puts before every text."""
    line, ids = _ids("\n", tokenizer), _ids("\n" + text, tokenizer)
    return ids[len(line) :] if ids[: len(line)] == line else _ids(text, tokenizer)


def _ids(text: str, tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    # verbose=False: a length above the tokenizer's own idea of a maximum is ours to judge, and counted.
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def _ended(ids: list[int], tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """The ids with one end token, which the text may have brought along."""
    if tokenizer.eos_token_id is None:
        raise DataError("the tokenizer has no end token (eos_token): a model trained with it would never stop")
    return ids if ids[-1:] == [tokenizer.eos_token_id] else [*ids, tokenizer.eos_token_id]


def _all_but_bos(ids: list[int], tokenizer: "PreTrainedTokenizerBase") -> list[bool]:
    return [place > 0 or token != tokenizer.bos_token_id for place, token in enumerate(ids)]


# ---- chats ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Renderer:
    """A chat template bound to a tokenizer and the tools of one chat."""

    tokenizer: "PreTrainedTokenizerBase"
    template: str
    tools: list[Any] | None

    def __call__(self, messages: list[dict[str, Any]], *, prompt: bool = False) -> str:
        """The text of `messages`; `prompt` opens the assistant's next turn, as inference does."""
        try:
            text = self.tokenizer.apply_chat_template(
                messages, tools=self.tools, chat_template=self.template, add_generation_prompt=prompt, tokenize=False
            )
            return str(text)
        # A TypeError is the template's too: it adds text to something else that a message holds.
        except (TemplateError, TypeError) as error:
            raise DataError(f"the chat template refuses the chat: {error}") from error


def _encode_chat(chat: Chat, tokenizer: "PreTrainedTokenizerBase", loss_on: LossOn, template: str | None) -> Encoded:
    check_template(tokenizer, template)
    if not tokenizer.is_fast:
        raise DataError(
            f"{type(tokenizer).__name__} does not say where its tokens stand in a chat: use a fast tokenizer"
        )
    render = _Renderer(tokenizer, tokenizer.get_chat_template(template, chat.tools), chat.tools)
    answers = [i for i, message in enumerate(chat.messages) if message["role"] == "assistant"]
    if loss_on in ("last", "completion"):
        answers = answers[-1:]

    text = render(chat.messages)
    # The template's word on BOS stands: adding special tokens here is how peers get two.
    tokens = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids = tokens["input_ids"]
    if loss_on == "all":
        trained = _all_but_bos(ids, tokenizer)
    else:
        spans = [_without_separator(text, span, tokenizer) for span in _spans(chat, text, answers, render)]
        trained = [any(_stands_in(token, span) for span in spans) for token in tokens["offset_mapping"]]

    *before, last = chat.messages
    is_plain_answer = last.get("content") is not None and not last.get("tool_calls")
    if answers != [len(before)] or not before or not is_plain_answer:
        return Encoded(ids, trained, where=chat.where)
    return Encoded(ids, trained, _ids(render(before, prompt=True), tokenizer), last["content"], chat.where)


def _spans(chat: Chat, text: str, answers: list[int], render: _Renderer) -> list[Span]:
    """Where in `text` the turns number `answers` stand."""
    marked = _spans_by_marks(chat, text, render)
    turns = sum(message["role"] == "assistant" for message in chat.messages)
    if len(marked) == turns:
        return marked[-len(answers) :]
    return [_span_by_prefixes(chat, text, i, render) for i in answers]


_MARK = re.compile(r"\{%([-+]?)\s*(end)?generation\s*([-+]?)%\}")
_OPEN, _CLOSE = "\ue000", "\ue001"  # Unicode keeps these for private use


def _spans_by_marks(chat: Chat, text: str, render: _Renderer) -> list[Span]:
    """The spans between generation marks; none where the template has no marks, or the text hides them.

    The template is rendered once more, printing a private character in place of each mark.
    """

    def visible(mark: re.Match[str]) -> str:
        return f"{{%{mark[1]} print '{_CLOSE if mark[2] else _OPEN}' {mark[3]}%}}"

    source, marks = _MARK.subn(visible, render.template)
    if marks == 0:
        return []
    pieces = re.split(f"([{_OPEN}{_CLOSE}])", _Renderer(render.tokenizer, source, render.tools)(chat.messages))
    if "".join(pieces[::2]) != text:
        return []
    places, end = [], 0
    for piece, _mark in zip(pieces[::2], pieces[1::2], strict=False):
        end += len(piece)
        places.append(end)
    ends = _special_tokens(render.tokenizer)
    return [_through_end_token(text, span, ends) for span in zip(places[::2], places[1::2], strict=True)]


def _through_end_token(text: str, span: Span, ends: tuple[str, ...]) -> Span:
    """The span with the end token behind it: marks that stop short of it would teach a model that never stops."""
    start, end = span
    if text[start:end].rstrip().endswith(ends):
        return span
    return start, end + max((len(token) for token in ends if text.startswith(token, end)), default=0)


def _span_by_prefixes(chat: Chat, text: str, i: int, render: _Renderer) -> Span:
    """The span of turn `i`, between two renderings that end before and after it.

    Raises:
        DataError: if one of the two is not a prefix of the whole rendering.
    """
    if i == 0:
        raise DataError(
            "the chat opens with an assistant turn, which answers nothing: put a user or system turn before it"
        )
    before, after = render(chat.messages[:i], prompt=True), render(chat.messages[: i + 1])
    for prefix, turns in ((before, i), (after, i + 1)):
        if not text.startswith(prefix):
            at = next(n for n, (a, b) in enumerate(zip(prefix + "\0", text + "\1", strict=False)) if a != b)
            raise DataError(
                f"the chat template is not prefix-stable: turns 1 to {turns} alone render as {_excerpt(prefix, at)} "
                f"where the whole chat has {_excerpt(text, at)}, so turn {i + 1} is not trained as inference would "
                "see it: set data.loss_on=last, or give a template with {% generation %} marks"
            )
    return len(before), len(after)


def _excerpt(text: str, at: int) -> str:
    return repr(text[max(0, at - 20) : at + 20])


def _without_separator(text: str, span: Span, tokenizer: "PreTrainedTokenizerBase") -> Span:
    """The span up to its end token: inference stops there, so the line break that some templates add is not learnt."""
    start, end = span
    bare = text[start:end].rstrip()
    return (start, start + len(bare)) if bare.endswith(_special_tokens(tokenizer)) else span


def _special_tokens(tokenizer: "PreTrainedTokenizerBase") -> tuple[str, ...]:
    return tuple(token.content for token in tokenizer.added_tokens_decoder.values() if token.special)


def _stands_in(token: Span, span: Span) -> bool:
    """Whether a token begins in a span. One without width at its start is trimmed spaces of what precedes it."""
    return span[0] <= token[0] < span[1] and token[1] > span[0]
