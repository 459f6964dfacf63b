"""How good a model is on held-out rows: loss and perplexity, and exact match where the answers are short.

Evaluation changes nothing: no gradient, no random state, and the mode is put back. Answers: `generate.py`.
"""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from qlora_kit.base.text import text_body
from qlora_kit.data import Batch
from qlora_kit.train.forward import Phase, Rows, evaluation_mode, no_phase
from qlora_kit.train.tasks import LIKELIHOOD, Loss, Task


@dataclass(frozen=True, slots=True)
class Score:
    """Loss of a model on a set of rows.

    Attributes:
        loss: mean over trained tokens, in nats; of preferences over rows, of classes over texts.
        tokens: trained tokens that counted; of texts that are classified, a label each.
        rows: rows that they came from.
        perplexity: exp(loss), where that is a loss a token.
        exact_match: share of the rows answered exactly, or None where nothing was generated.
        measures: what else the task tells, by name.
    """

    loss: float
    tokens: int
    rows: int
    perplexity: float | None = None
    exact_match: float | None = None
    measures: Mapping[str, float] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """The fields that are known."""
        known = {key: value for key, value in asdict(self).items() if value is not None and key != "measures"}
        return known | dict(self.measures)


def evaluate_loss(
    model: nn.Module,
    batches: Sequence[Batch],
    task: Task = LIKELIHOOD,
    *,
    phase: Phase = no_phase,
    loss_chunk: int | None = None,
    see: Callable[[Loss], None] = lambda loss: None,
) -> Score:
    """Mean loss over all batches, and what else the task measures.

    Args:
        model: that the task can be asked of.
        batches: with at least one trained token in all.
        task: what is evaluated.
        phase: marker for a ledger.
        loss_chunk: tokens whose logits stand at one time, or None.
        see: is shown what the task makes of each batch.
    """
    count = sum(batch.count for batch in batches)
    loss, measures = 0.0, Counter[str]()
    with evaluation_mode(model), phase("evaluate"):
        begun = task.begun(model, batches, loss_chunk)
        for batch in batches:
            share = begun(model, batch, no_phase, loss_chunk, 1)
            see(share)
            loss += share.value.item() / count
            measures.update({name: value.item() / count for name, value in share.measures.items()})
    return Score(
        loss,
        tokens=sum(batch.trained_tokens for batch in batches),
        rows=sum(batch.rows for batch in batches),
        perplexity=math.exp(min(loss, 700.0)) if task is LIKELIHOOD else None,
        measures=dict(measures),
    )


def rehearse_evaluation(
    model: PreTrainedModel, rows: Rows, task: Task = LIKELIHOOD, *, phase: Phase, loss_chunk: int | None = None
) -> None:
    """What an evaluation of one batch allocates, its values aside: for the dry run.

    Answers are generated over as many tokens: their keys and values stay in a cache, which grows by a copy a step.
    """
    with evaluation_mode(model), phase("evaluate"):
        task.begun(model, [rows], loss_chunk)(model, rows, no_phase, loss_chunk, 1)
    if not task.answers:
        return
    body, ids = text_body(model), rows.input_ids
    with evaluation_mode(model), phase("evaluate/answer"):
        begun = body(input_ids=ids[:, :-1] if ids.shape[1] > 1 else ids, use_cache=True)
        cache = begun.get("past_key_values")  # other kinds of state do not grow
        if cache is not None and ids.shape[1] > 1:
            body(input_ids=ids[:, -1:], past_key_values=cache, use_cache=True)


def f1_score(said: torch.Tensor, wanted: torch.Tensor, classes: int) -> float:
    """Mean over the classes that are wanted or said of the harmonic mean of precision and recall: macro F1.

    Where texts may have several classes, and none has any or is said to, all is as it should be: 1.

    Args:
        said: of all texts, (texts,), or (texts, classes) of 1 and 0.
        wanted: labels of the same texts.
        classes: how many there are.
    """
    if said.ndim == 1:
        said, wanted = (torch.nn.functional.one_hot(each, classes) for each in (said, wanted))
    hits = (said * wanted).sum(0).double()
    total = (said.sum(0) + wanted.sum(0)).double()
    return (2 * hits[total > 0] / total[total > 0]).mean().item() if total.any() else 1.0


def exact_match(answers: Sequence[str], references: Sequence[str]) -> float:
    """Share of the answers that equal their reference, white space around them aside."""
    equal = [answer.strip() == reference.strip() for answer, reference in zip(answers, references, strict=True)]
    return sum(equal) / len(equal)
