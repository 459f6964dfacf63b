"""What `train.task` means: the loss of a micro-batch for each, as a share of the step's mean.

    sft, pretrain, classify     -log p of the trained tokens, or of the classes of texts, a mean over these
    dpo, ipo, orpo              two sequences a row: the first halves of a batch are chosen, the second rejected
    kto                         two sequences a row: an answer, and another row's answer to the same prompt

The formulas are in `objectives`. A reference model is never loaded: it is the base with its adapters off, or the frozen
adapter that training started from, on the same base.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, NamedTuple, Protocol, cast

import torch
from torch import Tensor, nn

from qlora_kit.lora import REFERENCE, adapter_used
from qlora_kit.ops import IGNORED
from qlora_kit.recipe import TASKS, Recipe, Train
from qlora_kit.train.forward import Phase, Rows, evaluation_mode, loss_sum, no_phase, sequence_losses, whole_logits
from qlora_kit.train.objectives import classification_loss_sum, dpo_losses, ipo_losses, kto_losses, odds_ratio_losses


class Loss(NamedTuple):
    """What a task makes of a micro-batch: shares of means over the step, so that micro-batches are added up."""

    value: Tensor
    """Scalar, fp32, in nats: what is minimised."""
    measures: dict[str, Tensor]
    """Scalars without a graph, that a person wants to see beside it, by the names they have in metrics.jsonl."""
    said: Tensor | None = None
    """Of texts that are classified what the model holds them to be, as `said_classes` tells it."""


AGAINST_REFERENCE = ("reward_margin", "reward_accuracy", "kl")
"""Measures that say how far a model has moved, and nothing of one that has not."""

StepLoss = Callable[[nn.Module, Rows, Phase, int | None, float], Loss]
"""Forward pass and loss of one micro-batch with a `loss_chunk`, divided by a count: the rows or tokens of the step."""


class Task(Protocol):
    """What a run minimises."""

    @property
    def answers(self) -> bool:
        """Whether what is trained can be asked for an answer to a prompt."""

    def begun(self, model: nn.Module, micro_batches: Sequence[Rows], loss_chunk: int | None) -> StepLoss:
        """The losses of one step, once what must be known of all its micro-batches is."""


class Likelihood:
    """Next tokens."""

    answers: ClassVar[bool] = True

    def begun(self, model: nn.Module, micro_batches: Sequence[Rows], loss_chunk: int | None) -> StepLoss:
        """Nothing need be known."""
        return self._loss

    def _loss(self, model: nn.Module, rows: Rows, phase: Phase, loss_chunk: int | None, count: float) -> Loss:
        return Loss(loss_sum(model, rows, phase, loss_chunk, count), {})


LIKELIHOOD = Likelihood()


class Classification:
    """Classes of texts."""

    answers: ClassVar[bool] = False

    def begun(self, model: nn.Module, micro_batches: Sequence[Rows], loss_chunk: int | None) -> StepLoss:
        """Nothing need be known."""
        return self._loss

    def _loss(self, model: nn.Module, rows: Rows, phase: Phase, loss_chunk: int | None, count: float) -> Loss:
        logits_BL = whole_logits(model, rows, phase)
        with phase("loss"):
            value = classification_loss_sum(logits_BL, rows.labels) / count
            said = said_classes(logits_BL.detach(), is_multi=rows.labels.is_floating_point())
            agree = said == rows.labels
            is_right = agree.all(1) if agree.ndim == 2 else agree
            return Loss(value, {"accuracy": is_right.float().sum() / count}, said)


CLASSIFICATION = Classification()


def said_classes(logits_BL: Tensor, *, is_multi: bool) -> Tensor:
    """The class of each text that a model holds likeliest, (batch,); or (batch, classes), which it holds likely."""
    return (logits_BL > 0).float() if is_multi else logits_BL.argmax(1)


@dataclass(frozen=True, slots=True)
class Dpo:
    """Direct preference optimisation, or its identity form.

    Attributes:
        beta: how strongly it holds to the reference.
        is_ipo: whether it is the identity form.
        reference: adapter that it holds to; None is the base.
    """

    beta: float
    is_ipo: bool = False
    reference: str | None = None
    answers: ClassVar[bool] = True

    def begun(self, model: nn.Module, micro_batches: Sequence[Rows], loss_chunk: int | None) -> StepLoss:
        """Nothing need be known."""
        return self._loss

    def _loss(self, model: nn.Module, rows: Rows, phase: Phase, loss_chunk: int | None, count: float) -> Loss:
        now_2P, before_2P = _likelihoods(model, self.reference, rows, phase, loss_chunk)
        with phase("loss"):
            ratios_2P, lengths_2P = now_2P - before_2P, _lengths(rows)
            measures = _rewards(self.beta * ratios_2P.detach(), now_2P.detach() / lengths_2P, count)
            chosen_P, rejected_P = (ratios_2P / lengths_2P if self.is_ipo else ratios_2P).chunk(2)
            losses_P = (ipo_losses if self.is_ipo else dpo_losses)(chosen_P, rejected_P, self.beta)
            return Loss(losses_P.sum() / count, measures)


@dataclass(frozen=True, slots=True)
class Orpo:
    """Odds ratio preference optimisation: the chosen answer's likelihood a token, and beta times the odds ratio's part.

    Attributes:
        beta: lambda of the paper.
    """

    beta: float
    answers: ClassVar[bool] = True

    def begun(self, model: nn.Module, micro_batches: Sequence[Rows], loss_chunk: int | None) -> StepLoss:
        """Nothing need be known."""
        return self._loss

    def _loss(self, model: nn.Module, rows: Rows, phase: Phase, loss_chunk: int | None, count: float) -> Loss:
        losses_2P = sequence_losses(model, rows, phase, loss_chunk)
        with phase("loss"):
            log_p_2P = -losses_2P / _lengths(rows)
            chosen_P, rejected_P = log_p_2P.chunk(2)
            losses_P = self.beta * odds_ratio_losses(chosen_P, rejected_P) - chosen_P
            rewards_2P = self.beta * log_p_2P.detach()
            return Loss(losses_P.sum() / count, _rewards(rewards_2P, rewards_2P, count))


@dataclass(frozen=True, slots=True)
class Kto:
    """Kahneman-Tversky optimisation.

    Attributes:
        beta: how strongly it holds to the reference.
        reference: adapter that it holds to; None is the base.
    """

    beta: float
    reference: str | None = None
    answers: ClassVar[bool] = True

    def begun(self, model: nn.Module, micro_batches: Sequence[Rows], loss_chunk: int | None) -> StepLoss:
        """How far the model has moved, by answers that belong to other prompts: mean over the step, or 0 if below."""
        with evaluation_mode(model):
            parts = [
                _likelihoods(model, self.reference, _half(rows, 1), no_phase, loss_chunk) for rows in micro_batches
            ]
        kl = torch.cat([now_P - before_P for now_P, before_P in parts]).mean().clamp_(min=0)
        return partial(self._loss, kl)

    def _loss(
        self, kl: Tensor, model: nn.Module, rows: Rows, phase: Phase, loss_chunk: int | None, count: float
    ) -> Loss:
        now_P, before_P = _likelihoods(model, self.reference, _half(rows, 0), phase, loss_chunk)
        is_good_P = cast(Tensor, rows.is_good)
        with phase("loss"):
            ratio_P = now_P - before_P
            losses_P = kto_losses(ratio_P, is_good_P, kl, self.beta)
            agrees_P = (ratio_P.detach() > kl) == is_good_P
            measures = {"reward_accuracy": agrees_P.float().sum() / count, "kl": kl * (len(losses_P) / count)}
            return Loss(losses_P.sum() / count, measures)


def has_reference(recipe: Recipe) -> bool:
    """Whether a run holds to a frozen copy of the adapter that it goes on from, and not to the base."""
    return recipe.lora.from_ is not None and TASKS[recipe.train.task].holds_to_start


def task_of(train: Train, *, has_reference: bool = False) -> Task:
    """The task that a recipe names.

    Args:
        train: that section of it.
        has_reference: whether it holds to the frozen adapter `REFERENCE`, and not to the base.
    """
    reference = REFERENCE if has_reference else None
    match train.task:
        case "dpo" | "ipo":
            return Dpo(train.beta, train.task == "ipo", reference)
        case "classify":
            return CLASSIFICATION
        case "orpo":
            return Orpo(train.beta)
        case "kto":
            return Kto(train.beta, reference)
        case _:
            return LIKELIHOOD


@dataclass(frozen=True, slots=True)
class _Half:
    """Some sequences of a batch."""

    input_ids: Tensor
    labels: Tensor
    position_ids: None = None
    documents: None = None
    attention_mask: None = None
    is_good: None = None


def _half(rows: Rows, number: int) -> _Half:
    """The first (0) or second (1) sequences of all rows."""
    return _Half(rows.input_ids.chunk(2)[number], rows.labels.chunk(2)[number])


def _lengths(rows: Rows) -> Tensor:
    """Trained tokens of each sequence, (batch,)."""
    return (rows.labels[:, 1:] != IGNORED).sum(1)


def _likelihoods(
    model: nn.Module, reference: str | None, rows: Rows, phase: Phase, loss_chunk: int | None
) -> tuple[Tensor, Tensor]:
    """log p of what is trained of each sequence, now and under the reference, (batch,) each."""
    with evaluation_mode(model), adapter_used(model, reference):
        before_S = -sequence_losses(model, rows, phase, loss_chunk)
    return -sequence_losses(model, rows, phase, loss_chunk), before_S


def _rewards(rewards_2P: Tensor, a_token_2P: Tensor, count: float) -> dict[str, Tensor]:
    """By how much chosen answers are worth more than the others, how often, and how often they are likelier a token.

    Args:
        rewards_2P: of the chosen answers, then of the others.
        a_token_2P: mean log p of their tokens.
        count: of pairs in the step.
    """
    chosen_P, rejected_P = rewards_2P.chunk(2)
    likelier_P = torch.gt(*a_token_2P.chunk(2))
    return {
        "reward_margin": (chosen_P - rejected_P).sum() / count,
        "reward_accuracy": (chosen_P > rejected_P).float().sum() / count,
        "accuracy": likelier_P.float().sum() / count,
    }
