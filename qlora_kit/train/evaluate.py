"""How good a model is on held-out rows: loss and perplexity, and exact match where the answers are short.

Evaluation changes nothing: no gradient, no random state, and the mode is put back. Answers: `generate.py`.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from qlora_kit.ops import IGNORED
from qlora_kit.train.step import Phase, Rows, loss_sum, no_phase


@dataclass(frozen=True, slots=True)
class Score:
    """Loss of a model on a set of rows.

    Attributes:
        loss: mean over trained tokens, in nats.
        perplexity: exp(loss).
        tokens: trained tokens that counted.
        rows: rows that they came from.
        exact_match: share of the rows answered exactly, or None where nothing was generated.
    """

    loss: float
    perplexity: float
    tokens: int
    rows: int
    exact_match: float | None = None

    def as_json(self) -> dict[str, Any]:
        """The fields that are known."""
        return {key: value for key, value in asdict(self).items() if value is not None}


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients inside the block, whatever mode was before."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


def evaluate_loss(
    model: nn.Module, batches: Sequence[Rows], phase: Phase = no_phase, loss_chunk: int | None = None
) -> Score:
    """Mean loss over the trained tokens of all batches.

    Args:
        model: any causal language model.
        batches: with at least one trained token in all.
        phase: marker for a ledger.
        loss_chunk: tokens whose logits stand at one time, or None.
    """
    total, tokens, rows = 0.0, 0, 0
    with evaluation_mode(model), phase("evaluate"):
        for batch in batches:
            total += loss_sum(model, batch, loss_chunk=loss_chunk).item()
            tokens += int((batch.labels[:, 1:] != IGNORED).sum())
            rows += len(batch.labels)
    loss = total / tokens
    return Score(loss, math.exp(min(loss, 700.0)), tokens, rows)


def rehearse_evaluation(model: PreTrainedModel, rows: Rows, phase: Phase, loss_chunk: int | None = None) -> None:
    """What an evaluation of one batch allocates, its values aside: for the dry run.

    Answers are generated over as many tokens: their keys and values stay in a cache, which grows by a copy a step.
    """
    with evaluation_mode(model), phase("evaluate"):
        loss_sum(model, rows, loss_chunk=loss_chunk)
    body, ids = model.base_model, rows.input_ids
    with evaluation_mode(model), phase("evaluate/answer"):
        begun = body(input_ids=ids[:, :-1] if ids.shape[1] > 1 else ids, use_cache=True)
        cache = begun.get("past_key_values")  # other kinds of state do not grow
        if cache is not None and ids.shape[1] > 1:
            body(input_ids=ids[:, -1:], past_key_values=cache, use_cache=True)


def exact_match(answers: Sequence[str], references: Sequence[str]) -> float:
    """Share of the answers that equal their reference, white space around them aside."""
    equal = [answer.strip() == reference.strip() for answer, reference in zip(answers, references, strict=True)]
    return sum(equal) / len(equal)
