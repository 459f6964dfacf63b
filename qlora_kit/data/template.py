"""Template: from an example to token ids, and which of them the loss counts.

Which tokens are trained is known from where they stand, never from what they are: a padding token that is also the
end token, or a marker that a user quotes, changes nothing. The ids are those that inference would see:

    Completion   [BOS] prompt | completion EOS          the prompt tokenised as if it stood alone
    Text         [BOS] text EOS
    Chat         the chat template's rendering, tokenised as it is: the template writes BOS and end tokens, or does not

Of preferences and answers with a verdict, what is trained is the last turn or the completion.
"""

import re
from dataclasses import replace
from typing import TYPE_CHECKING

from qlora_kit.data.classes import Classes
from qlora_kit.data.encoded import Encoded, LossOn, Odd, all_but_bos, gone_on, token_ids, tokenised, with_end
from qlora_kit.data.examples import Chat, Classified, Completion, Example, Labelled, Preference, Text
from qlora_kit.data.turns import encode_chat
from qlora_kit.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def encode(
    example: Example,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    loss_on: LossOn = "assistant",
    template: str | None = None,
) -> Encoded:
    """Render and tokenise one example that is one row; takes what `encode_turns` takes.

    Raises:
        DataError: as `encode_turns`, or if the example makes several rows.
    """
    rows = encode_turns(example, tokenizer, loss_on=loss_on, template=template)
    if len(rows) > 1:
        raise DataError(
            "the chat template writes earlier turns differently from what inference saw, so this chat makes "
            f"{len(rows)} rows where one is wanted: set data.loss_on=last"
        )
    return rows[0]


def encode_turns(
    example: Example,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    loss_on: LossOn = "assistant",
    template: str | None = None,
) -> list[Encoded]:
    """Render and tokenise one example: one row, or one for each answer of a chat that cannot be trained as one.

    Args:
        example: what `read_row` made.
        tokenizer: any for completions and texts; a fast one, which knows where its tokens stand, for chats.
        loss_on: assistant: every assistant turn that is not given; last, completion: the last one; all: everything but
            BOS. Completions train the completion unless it is `all`; texts are always trained from end to end.
        template: source of a chat template; None takes the tokenizer's own. See `find_template`.

    Raises:
        DataError: if there is no chat template or end token, the template refuses the chat, or what it writes for a
            turn does not go on from the prompt that it gives for it, or leaves out its thought or its calls of tools.
            The message does not name the row.
    """
    match example:
        case Chat():
            return encode_chat(example, tokenizer, loss_on, template)
        case Completion():
            return [_encode_completion(example, tokenizer, loss_on)]
        case Text():
            ids = with_end(_tokenise(example.text, tokenizer), tokenizer)
            return [Encoded(ids, all_but_bos(ids, tokenizer), where=example.where)]
        case Preference():
            answers = (example.chosen, example.rejected)
            chosen, rejected = (encode(each, tokenizer, loss_on="last", template=template) for each in answers)
            return [replace(chosen, other=rejected, where=example.where)]
        case Labelled():
            answer = encode(example.answer, tokenizer, loss_on="last", template=template)
            return [replace(answer, is_good=example.is_good, where=example.where)]
        case Classified():
            raise ValueError("texts that are classified go through encode_text")


def encode_text(example: Classified, tokenizer: "PreTrainedTokenizerBase", classes: Classes) -> Encoded:
    """Tokenise a text as its model reads it, with the tokens that its tokenizer puts around every text.

    Raises:
        DataError: its label is none of the classes, or the tokenizer makes nothing of it.
    """
    ids = tokenised(example.text, tokenizer)["input_ids"]
    if not ids:
        raise DataError("the tokenizer makes no tokens from the text")
    target, ending = classes.target(example.labels), _tokens_behind(tokenizer)
    return Encoded(ids, [False] * len(ids), where=example.where, target=target, ending=ending)


def _encode_completion(example: Completion, tokenizer: "PreTrainedTokenizerBase", loss_on: LossOn) -> Encoded:
    prompt = _tokenise(example.prompt, tokenizer)
    whole = _tokenise(example.prompt + example.completion, tokenizer)
    ids = with_end(gone_on(prompt, whole, example.completion, tokenizer), tokenizer)
    trained = [False] * len(prompt) + [True] * (len(ids) - len(prompt))
    if loss_on == "all":
        trained = all_but_bos(ids, tokenizer)
    odd: tuple[Odd, ...] = ("joined",) if _JOINED.search(f"{example.prompt[-1:]}{example.completion[:1]}") else ()
    return Encoded(ids, trained, prompt, example.completion, example.where, odd=odd)


_JOINED = re.compile(r"[\w.?!\u3002\uff1f\uff01]\w")
"""The end of a question and the beginning of its answer, where nobody has thought of how they are joined."""


def _tokenise(text: str, tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """Token ids of a text as a prompt: with one BOS if the tokenizer has the habit of adding it, and no end token."""
    ids, bos = token_ids(text, tokenizer), [tokenizer.bos_token_id]
    if bos == [None] or ids[:1] == bos or tokenised("a", tokenizer)["input_ids"][:1] != bos:
        return ids
    return bos + ids


def _tokens_behind(tokenizer: "PreTrainedTokenizerBase") -> int:
    """How many tokens of its own the tokenizer puts behind every text."""
    alone, whole = token_ids("a", tokenizer), tokenised("a", tokenizer)["input_ids"]
    start = next(start for start in range(len(whole)) if whole[start : start + len(alone)] == alone)
    return len(whole) - start - len(alone)
