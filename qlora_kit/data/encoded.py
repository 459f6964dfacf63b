"""A row as the model sees it, and the ids that it is made of."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, TypeAlias

from qlora_kit.errors import DataError, tokenizing

if TYPE_CHECKING:
    from transformers import BatchEncoding, PreTrainedTokenizerBase

LossOn: TypeAlias = Literal["assistant", "last", "completion", "all"]
Odd: TypeAlias = Literal["tools", "tool_calls", "system", "thoughts", "marks", "joined"]
"""What becomes of a row that one should know of, mostly by its chat template; `remarks.py` says it."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """One row as the model sees it. `input_ids` and `trained` have the same length."""

    input_ids: list[int]
    trained: list[bool]
    """Whether the loss counts the prediction of this token. The first token of a row is never predicted."""
    prompt: list[int] | None = None
    """What inference would be given to produce `answer`; None where a row has no answer at its end."""
    answer: str | None = None
    """The reference answer in plain text, the last one of a chat, without end token."""
    where: str = ""
    """`file:line` or `source row N`."""
    other: "Encoded | None" = None
    """What goes with it as a sequence of its own: the answer to the same prompt that was not preferred."""
    is_good: bool | None = None
    """The verdict on its answer, where there is one."""
    target: int | tuple[float, ...] | None = None
    """Of a text that is classified: its class, or for every class whether it is one. No token of it is predicted."""
    ending: int = 0
    """Tokens at its end that stand behind every text, and so also behind one that is cut."""
    odd: tuple[Odd, ...] = field(default=(), compare=False)
    """What becomes of it that one should know of; it is counted, and not kept with the row."""

    @property
    def sequences(self) -> "tuple[Encoded, ...]":
        """Itself, and the other one if there is one."""
        return (self,) if self.other is None else (self, self.other)

    @property
    def trained_tokens(self) -> int:
        """Tokens that the loss counts, the other sequence's aside; one for the class of a text."""
        return sum(self.trained[1:]) if self.target is None else 1

    @property
    def longest(self) -> int:
        """Tokens of its longest sequence."""
        return max(len(sequence.input_ids) for sequence in self.sequences)


def gone_on(prompt: list[int], whole: list[int], text: str, tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """A prompt's ids and those of the text that goes on from it.

    Tokens of the whole are the most natural; where one of them straddles the seam, the two are tokenised apart.
    """
    return whole if whole[: len(prompt)] == prompt else prompt + _continuation(text, tokenizer)


def _continuation(text: str, tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """Token ids of a text that goes on from another: without the space that SentencePiece puts before every text."""
    line, ids = token_ids("\n", tokenizer), token_ids("\n" + text, tokenizer)
    return ids[len(line) :] if ids[: len(line)] == line else token_ids(text, tokenizer)


def token_ids(text: str, tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """Token ids of a text, no special ones added."""
    return tokenised(text, tokenizer, add_special_tokens=False)["input_ids"]


def tokenised(text: str, tokenizer: "PreTrainedTokenizerBase", **options: bool) -> "BatchEncoding":
    """What the tokenizer makes of a text.

    Raises:
        DataError: it makes nothing of it: a word that it has no token for, or tables that lead its library astray.
    """
    with tokenizing(DataError, "the tokenizer cannot read the text"):
        # verbose=False: a length above the tokenizer's own idea of a maximum is ours to judge, and counted.
        return tokenizer(text, verbose=False, **options)


def with_end(ids: list[int], tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """The ids with one end token, which the text may have brought along.

    Raises:
        DataError: the tokenizer has none.
    """
    if tokenizer.eos_token_id is None:
        raise DataError("the tokenizer has no end token (eos_token): a model trained with it would never stop")
    return ids if ids[-1:] == [tokenizer.eos_token_id] else [*ids, tokenizer.eos_token_id]


def all_but_bos(ids: list[int], tokenizer: "PreTrainedTokenizerBase") -> list[bool]:
    """Every token but a BOS that the row begins with."""
    return [place > 0 or token != tokenizer.bos_token_id for place, token in enumerate(ids)]
