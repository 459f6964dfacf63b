"""How a run is cut into steps: the recipe's `auto` numbers made definite, with the reasons that the plan states."""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from transformers import PretrainedConfig

from qlora_kit.data import Room
from qlora_kit.recipe import Train
from qlora_kit.train.schedule import SHORT_RUN, automatic_rate
from qlora_kit.units import counted

ROWS_A_STEP = 16
"""Rows that `accumulation: auto` aims at, as in QLoRA's scripts; LoRA pays for larger batches (LoRA Without Regret)."""
TOKENS_A_MICRO_BATCH = 2048
"""Tokens that `micro_batch: auto` aims at: enough to keep matrix products busy, few enough for the smallest cards."""
EVAL_TOKENS = (TOKENS_A_MICRO_BATCH, 512, 128, 1)
"""What `memory.eval_tokens: auto` may become, the fastest first; the last has each row alone."""
MANY_ROWS = 32
"""Rows a step up to which LoRA keeps up with full fine-tuning; beyond, the more the larger the step, whatever the rank
(LoRA Without Regret)."""
FEW_STEPS = SHORT_RUN
"""Below this the optimizer hardly gets anywhere (LoRA Without Regret's short runs)."""
EVALUATIONS_A_RUN = 10
OVERHEAD_TOKENS = {"cuda": 200, "cpu": 20}
"""Tokens that take as long as a pass costs beside its tokens. On a card that is decoding all weights, an estimate (see
`plan/solve`); on a CPU, where products are slow, it is 17 to 20 (benchmarks/LOG.md)."""


class Rate(NamedTuple):
    """A peak learning rate, and where it comes from."""

    lr: float
    reason: str


@dataclass(frozen=True, slots=True)
class Pace:
    """The numbers of a run.

    Attributes:
        steps: optimizer steps.
        micro_batch: rows of the longest kind in one forward pass; where rows lie end to end, more of the others.
        accumulation: micro-batches in one step, at most.
        eval_every: steps between evaluations.
        save_every: steps between checkpoints; None means by the clock.
        lr: peak learning rate.
        lr_reason: where it comes from.
        tokens: that the run will see, padding aside, by the mean of the rows.
        trained_tokens: those of them that the loss counts.
        eval_tokens: of held-out rows that go together at most, unless one alone has more.
    """

    steps: int
    micro_batch: int
    accumulation: int
    eval_every: int
    save_every: int | None
    lr: float
    lr_reason: str
    tokens: int
    trained_tokens: int
    eval_tokens: int = TOKENS_A_MICRO_BATCH

    @property
    def rows_a_step(self) -> int:
        """Rows that one optimizer step consumes."""
        return self.micro_batch * self.accumulation

    @property
    def warning(self) -> str | None:
        """What a person should know about a run this short."""
        if self.steps >= FEW_STEPS:
            return None
        smaller = f", or {self._smaller}" if self.rows_a_step > 1 else ""
        return (
            f"only {counted(self.steps, 'optimizer step')}: a run of fewer than {FEW_STEPS} seldom gets far; raise "
            f"train.epochs or train.steps{smaller}"
        )

    @property
    def warning_of_lora(self) -> str | None:
        """What a person should know about steps this large, where adapters are trained."""
        if self.rows_a_step <= MANY_ROWS:
            return None
        return (
            f"{self.rows_a_step} rows a step: above {MANY_ROWS} LoRA falls behind full fine-tuning, at any rank; "
            f"{self._smaller}"
        )

    @property
    def _smaller(self) -> str:
        """The way to smaller steps."""
        setting = "accumulation" if self.accumulation > 1 else "micro_batch"
        return f"lower train.{setting} (now {getattr(self, setting)})"


def room_of(train: Train, pace: Pace, longest: int, device: torch.device) -> Room:
    """What one forward pass of a run may take whose rows are a sequence each: as many places as its largest, which the
    plan knows.

    Args:
        train: that section of the recipe; a micro-batch that it names is not exceeded in rows either.
        pace: of the run.
        longest: tokens of the longest sequence.
        device: where it runs.
    """
    most = None if train.micro_batch == "auto" else train.micro_batch
    return Room(pace.micro_batch, longest, most, OVERHEAD_TOKENS[device.type])


def gradients_stand(micro_batch: int, accumulation: int, *, is_packed: bool) -> bool:
    """Whether the gradients of a micro-batch may stand through the forward pass of another in the same step.

    Rows that are a sequence each are cut so that the step takes least time (`data/pack.side_by_side`), which may be
    into more micro-batches than `accumulation` says, each of fewer rows.

    Args:
        micro_batch: sequences in one forward pass.
        accumulation: micro-batches in one step, as planned.
        is_packed: whether rows share sequences; then there are never more.
    """
    return accumulation > 1 or (micro_batch > 1 and not is_packed)


def set_pace(
    train: Train, *, rows: int, longest: int, tokens: int, trained_tokens: int, config: PretrainedConfig
) -> Pace:
    """Make the recipe's `auto` numbers definite.

    Args:
        train: that section of the recipe.
        rows: of the training set.
        longest: tokens of the longest row.
        tokens: in all rows together.
        trained_tokens: those of them that the loss counts.
        config: of the base; its family and width decide the learning rate.
    """
    fitting = max(1, min(ROWS_A_STEP, TOKENS_A_MICRO_BATCH // longest, rows))
    micro_batch = fitting if train.micro_batch == "auto" else train.micro_batch
    enough = math.ceil(min(ROWS_A_STEP, rows) / micro_batch)
    accumulation = enough if train.accumulation == "auto" else train.accumulation
    per_step = micro_batch * accumulation
    passes = train.epochs if train.tokens is None else train.tokens / tokens
    steps = train.steps or max(1, math.ceil(passes * rows / per_step))
    body = config.get_text_config()
    automatic = automatic_rate(body.model_type, body.hidden_size, steps, train.full_finetune, train.task)
    lr, reason = automatic if train.lr == "auto" else (train.lr, "the recipe")
    return Pace(
        steps=steps,
        micro_batch=micro_batch,
        accumulation=accumulation,
        eval_every=max(1, steps // EVALUATIONS_A_RUN) if train.eval_every == "auto" else train.eval_every,
        save_every=None if train.save_every == "auto" else train.save_every,
        lr=lr,
        lr_reason=reason,
        tokens=round(tokens / rows * per_step * steps),
        trained_tokens=round(trained_tokens / rows * per_step * steps),
    )
