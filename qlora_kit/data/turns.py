"""Turns: from a chat to token ids, and which of them the assistant said.

The assistant's turns are found through the template itself. A turn is what has to follow the prompt that inference
renders for it, render(messages[:i], generation prompt), to make render(messages[:i + 1]), up to the token
that ends it. Where all turns stand so in the rendering of the whole chat, token by token, the chat is one row, and the
turns are (in characters of the rendering)

    1. between `{% generation %}` and `{% endgeneration %}`, where the template has these marks and they lie within the
       turns: later than their prompts, as behind a thought that is not to be learnt, and no further than their ends;
    2. otherwise behind their prompts.

Marks that reach out of the turns are no fault of the rows, and not refused but told of (see `remarks.py`): SmolLM3's
own template marks the header of a turn with it, TRL's for Qwen2.5 the line break behind the header, its one for Phi-3
the end of the text. What has to follow a prompt is known without them, and is what such a template means.

Where a turn does not stand so (Qwen3 writes earlier turns without their thoughts; a line break that an answer begins
with joins the one before it in one token), every turn is a row of its own, prompt | turn, as inference has it.

transformers' `return_assistant_tokens_mask` reads the same marks, but is not used: where an answer begins with a space
it loses that turn and all later ones, and where one ends with a space it marks all that follows (5.23, tokenizers that
trim offsets; tests/test_data.py shows it).
"""

import re
from bisect import bisect_left
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import TYPE_CHECKING, Any, TypeAlias

from qlora_kit.data.calls import with_arguments
from qlora_kit.data.chat_template import (
    Messages,
    Renderer,
    behind_answers,
    check_template,
    special_tokens,
    through_end,
)
from qlora_kit.data.chats import answers_of
from qlora_kit.data.encoded import Encoded, LossOn, Odd, all_but_bos, gone_on, token_ids, tokenised
from qlora_kit.data.examples import Chat
from qlora_kit.data.thinking import after_prompt, thought_of, written_out
from qlora_kit.data.unwritten import loses_calls, unwritten
from qlora_kit.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Span: TypeAlias = tuple[int, int]
"""Characters of a rendering, [start, end)."""
_First: TypeAlias = Callable[[int, bool], str]
"""Renders so many turns of a chat, as a prompt or not."""


@dataclass(frozen=True, slots=True)
class _Turn:
    """One answer as inference has it: what it is given, and what is to be said, end token included."""

    prompt: str
    said: str
    answer: str | None
    """Its plain text, where it is nothing but text."""

    def stands_in(self, whole: "_Whole") -> bool:
        """Whether a rendering of the whole chat has the turn, and all before it, in the same characters and tokens."""
        if not whole.text.startswith(self.prompt + self.said):
            return False
        ids = whole.ids_of(self.prompt)
        return whole.ids[: len(ids)] == ids

    @property
    def span(self) -> Span:
        """Where it stands in such a rendering."""
        return len(self.prompt), len(self.prompt) + len(self.said)

    def row(self, tokenizer: "PreTrainedTokenizerBase", where: str, odd: tuple[Odd, ...]) -> Encoded:
        """The turn as a row of its own."""
        prompt = token_ids(self.prompt, tokenizer)
        ids = gone_on(prompt, token_ids(self.prompt + self.said, tokenizer), self.said, tokenizer)
        return Encoded(ids, [place >= len(prompt) for place in range(len(ids))], prompt, self.answer, where, odd=odd)


@dataclass(frozen=True, slots=True)
class _Whole:
    """A rendering of a whole chat and its tokens."""

    text: str
    ids: list[int]
    offsets: list[Span]
    added: Collection[int]
    """Ids of all added tokens."""
    tokens: Callable[[str], list[int]]
    """Token ids of another text; each is asked for once."""

    def ids_of(self, prompt: str) -> list[int]:
        """The token ids of a prompt, which are those that the whole begins with in nearly every chat.

        Added tokens are cut out of a text before anything else, so that what is behind the last one is enough to look
        at: to tokenise every prompt of a long chat would take time by the square of its turns. Where a text that stands
        alone begins otherwise (SentencePiece puts a space there), all of the prompt is tokenised.
        """
        if self.text.startswith(prompt):
            count = bisect_left(self.offsets, (len(prompt),))
            last = next((place for place in reversed(range(count)) if self.ids[place] in self.added), None)
            if last is not None and self.offsets[last][1] <= len(prompt):
                behind = self.tokens(prompt[self.offsets[last][1] :])
                if behind == self.ids[last + 1 : count]:
                    return self.ids[:count]
        return self.tokens(prompt)


@dataclass(frozen=True, slots=True)
class _Form:
    """How chats are written down: the template, all special tokens, and what it writes behind an answer."""

    render: Renderer
    specials: tuple[str, ...]
    behind: str

    def turn(self, messages: Messages, i: int, first: _First) -> _Turn:
        """The answer number `i`. One that opens the chat answers no prompt, and all that is written is said.

        Args:
            messages: of the chat.
            i: number of the turn.
            first: renders the turns up to one.

        Raises:
            DataError: what the template writes for the turn does not go on from the prompt that it gives for it, or
                leaves out its thought or its calls of tools.
        """
        message = messages[i]
        prompt = first(i, True) if i > 0 else ""
        whole = first(i + 1, False)
        said = after_prompt(prompt, whole, thought_of(message))
        if said is None:
            at = next(n for n, (a, b) in enumerate(zip(prompt + "\0", whole + "\1", strict=False)) if a != b)
            raise DataError(
                f"turn {i + 1}, as rendered by the chat template, does not start with its own prompt: "
                f"{_excerpt(prompt, at)} where the turn has {_excerpt(whole, at)}; what inference would see cannot be "
                "trained: correct the template and name it with data.template=FILE"
            )
        if thought_of(message) not in said:
            raise DataError(
                f"the chat template leaves out the thought of turn {i + 1}: set data.thinking=strip, or name a "
                "template that writes it with data.template=FILE"
            )
        if loses_calls(messages[: i + 1], whole, self.render):
            raise DataError(
                f"the chat template leaves out the tool calls of turn {i + 1}, so an answer without them would be "
                "learnt: name a template that writes them with data.template=FILE, or leave the row out"
            )
        return _Turn(prompt, through_end(said, self.behind, self.specials), _plain(message))


def encode_chat(
    chat: Chat, tokenizer: "PreTrainedTokenizerBase", loss_on: LossOn, template: str | None
) -> list[Encoded]:
    """One row of a chat, or one for each answer where it cannot be trained as one; takes what `encode_turns` takes.

    Raises:
        DataError: as `encode_turns`.
    """
    check_template(tokenizer, template)
    if not tokenizer.is_fast:
        raise DataError(
            f"{type(tokenizer).__name__} does not say where its tokens stand in a chat: use a fast tokenizer"
        )
    render = Renderer(tokenizer, tokenizer.get_chat_template(template, chat.tools), chat.tools)
    messages = with_arguments([written_out(message, render.template) for message in chat.messages], render)

    @cache
    def first(count: int, is_prompt: bool) -> str:
        """The first turns as text; a prompt opens the assistant's next."""
        return render(messages[:count], prompt=is_prompt)

    text = first(len(messages), False)
    # The template's word on BOS stands: adding special tokens here is how peers get two.
    tokens = tokenised(text, tokenizer, add_special_tokens=False, return_offsets_mapping=True)
    added, again = tokenizer.added_tokens_decoder.keys(), cache(partial(token_ids, tokenizer=tokenizer))
    whole = _Whole(text, tokens["input_ids"], tokens["offset_mapping"], added, again)
    answers = answers_of(chat)
    if loss_on in ("last", "completion"):
        answers = answers[-1:]
    asked = _asked(messages, first, whole) if answers[-1] == len(messages) - 1 else (None, None)
    odd = tuple(unwritten(messages, text, render, said=() if loss_on == "all" else answers))
    if loss_on == "all":
        odd = (*odd, "thoughts") if any(thought_of(messages[i]) not in text for i in answers) else odd
        return [Encoded(whole.ids, all_but_bos(whole.ids, tokenizer), *asked, chat.where, odd=odd)]

    specials = special_tokens(tokenizer)
    form = _Form(render, specials, behind_answers(render))
    turns = [form.turn(messages, i, first) for i in answers]
    is_one_row = all(turn.stands_in(whole) for turn in turns)
    spans = [turn.span for turn in turns]
    marked = _spans_by_marks(messages, text, form) if is_one_row else []
    marked = _of_learnt(marked, messages, answers, first)
    believed = _within(spans, marked)
    if answers[0] == 0 and not believed:
        raise DataError(
            "the chat opens with an assistant turn, which answers nothing: put a user or system turn before it"
        )
    if not is_one_row:
        return [turn.row(tokenizer, chat.where, odd) for turn in turns]
    trained = _begin_in(believed or spans, whole.offsets)
    return [Encoded(whole.ids, trained, *asked, chat.where, odd=(*odd, "marks") if marked and not believed else odd)]


def _asked(messages: Messages, first: _First, whole: _Whole) -> tuple[list[int] | None, str | None]:
    """What inference would be given for the last turn, and that turn; None for one that is no plain answer."""
    answer = _plain(messages[-1])
    if len(messages) == 1 or answer is None:
        return None, None
    return whole.ids_of(first(len(messages) - 1, True)), answer


def _plain(message: dict[str, Any]) -> str | None:
    """The text of a turn that is nothing but text."""
    return None if message.get("tool_calls") else message.get("content")


_MARK = re.compile(r"\{%([-+]?)\s*(end)?generation\s*([-+]?)%\}")
_OPEN, _CLOSE = "\ue000", "\ue001"  # Unicode keeps these for private use


def _spans_by_marks(messages: Messages, text: str, form: _Form) -> list[Span]:
    """The spans between generation marks; none where the template has no marks, or the text hides them.

    The template is rendered once more, printing a private character in place of each mark.
    """

    def visible(mark: re.Match[str]) -> str:
        return f"{{%{mark[1]} print '{_CLOSE if mark[2] else _OPEN}' {mark[3]}%}}"

    source, marks = _MARK.subn(visible, form.render.template)
    if marks == 0:
        return []
    pieces = re.split(f"([{_OPEN}{_CLOSE}])", replace(form.render, template=source)(messages))
    if "".join(pieces[::2]) != text:
        return []
    places, end = [], 0
    for piece, _mark in zip(pieces[::2], pieces[1::2], strict=False):
        end += len(piece)
        places.append(end)
    return [_through_end(text, span, form) for span in zip(places[::2], places[1::2], strict=True)]


def _of_learnt(marked: list[Span], messages: Messages, answers: list[int], first: _First) -> list[Span]:
    """The marked spans without those of the answers behind the first learnt one that are not learnt themselves."""
    silent = [i for i in range(answers[0], len(messages)) if messages[i]["role"] == "assistant" and i not in answers]
    for i in silent if marked else ():
        start, end = (len(first(stop, False)) for stop in (i, i + 1))
        marked = [span for span in marked if not start <= span[0] <= span[1] <= end]
    return marked


def _within(turns: list[Span], marked: list[Span]) -> list[Span]:
    """The marked spans but those of turns before these; none unless each lies within a turn and each turn has one."""
    late = [span for span in marked if span[1] > turns[0][0]]
    homes = {next((turn for turn in turns if turn[0] <= start and end <= turn[1]), None) for start, end in late}
    return late if homes == set(turns) else []


def _through_end(text: str, span: Span, form: _Form) -> Span:
    """The span to its end token: marks that stop short of it would teach a model that never stops."""
    start, end = span
    is_whole = form.behind != "" and text[start:end].endswith(form.behind)
    if not is_whole and not text[start:end].rstrip().endswith(form.specials):
        end += max((len(token) for token in form.specials if text.startswith(token, end)), default=0)
    return start, start + len(through_end(text[start:end], form.behind, form.specials))


def _excerpt(text: str, at: int) -> str:
    return repr(text[max(0, at - 20) : at + 20])


def _begin_in(spans: list[Span], tokens: list[Span]) -> list[bool]:
    """Which tokens begin in a span. One without width at its start is trimmed spaces of what precedes it."""
    trained = [False] * len(tokens)
    for start, end in spans:
        for place in range(bisect_left(tokens, (start,)), bisect_left(tokens, (end,))):
            trained[place] = tokens[place][1] > start
    return trained
