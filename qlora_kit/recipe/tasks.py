"""The tasks that `train.task` may name, and what the rest of the kit must know of each: one row per task.

What a task minimises stands in `train/tasks.py`, which knows torch.
"""

from dataclasses import dataclass
from typing import Literal

TaskName = Literal["sft", "pretrain", "classify", "dpo", "ipo", "orpo", "kto"]


@dataclass(frozen=True, slots=True)
class TaskKind:
    """What a task takes and needs.

    Attributes:
        formats: of rows that it can use, in the order in which `data.format: auto` tries them.
        can_pack: whether every row is learnt by itself, so that rows may share a sequence.
        is_preference: whether answers are held against each other: a row is two sequences then.
        holds_to_start: whether it holds to the model that training starts from, the reference.
        more_passes: forward passes of every token of a row from which nothing is learnt: the reference's; and of an
            answer with a verdict those of the one that it is swapped with, about as long, through what is trained and
            through the reference.
    """

    formats: tuple[str, ...]
    can_pack: bool = False
    is_preference: bool = False
    holds_to_start: bool = False
    more_passes: int = 0

    @property
    def sequences(self) -> int:
        """Sequences of a row in a batch."""
        return 2 if self.is_preference else 1


_ANSWERS = ("messages", "sharegpt", "alpaca", "completion", "text")
"""The more a format says about a row, the earlier."""

TASKS: dict[str, TaskKind] = {
    "sft": TaskKind(_ANSWERS, can_pack=True),
    "pretrain": TaskKind(_ANSWERS, can_pack=True),
    "classify": TaskKind(("classification",)),
    "dpo": TaskKind(("preference",), is_preference=True, holds_to_start=True, more_passes=1),
    "ipo": TaskKind(("preference",), is_preference=True, holds_to_start=True, more_passes=1),
    "orpo": TaskKind(("preference",), is_preference=True),
    "kto": TaskKind(("labelled", "preference"), is_preference=True, holds_to_start=True, more_passes=3),
}
