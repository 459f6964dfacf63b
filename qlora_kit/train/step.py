"""One optimizer step: the same code on real tensors and, in the dry run, on fake ones.

So nothing here reads a value off a tensor: counts come from the host, and whether a loss is finite is asked elsewhere.
A causal model gets no attention mask: rows are padded on the right, and no real token looks to its right. Where rows
are packed, it gets positions that begin anew at every document, from which transformers makes the mask.
"""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import torch
from torch import Tensor, nn

from qlora_kit.train.head import chunked_loss_sum, has_own_head
from qlora_kit.train.objectives import causal_loss_sum, classification_loss_sum

Phase = Callable[[str], AbstractContextManager[None]]
"""Marks a block as one phase of the step, for a ledger."""


class Rows(Protocol):
    """What a step reads of a micro-batch."""

    @property
    def input_ids(self) -> Tensor:
        """(batch, tokens), int64, padded on the right."""

    @property
    def labels(self) -> Tensor:
        """(batch, tokens), int64, -100 where not trained; or (batch,): the class of each text."""

    @property
    def position_ids(self) -> Tensor | None:
        """(batch, tokens), int64, of packed rows."""

    @property
    def attention_mask(self) -> Tensor | None:
        """(batch, tokens), bool, for padded rows of a model that looks both ways."""


def no_phase(name: str) -> AbstractContextManager[None]:
    """The phase marker of a step that nobody watches."""
    return nullcontext()


def loss_sum(
    model: nn.Module, rows: Rows, phase: Phase = no_phase, loss_chunk: int | None = None, divisor: float = 1.0
) -> Tensor:
    """Forward pass and loss of one micro-batch.

    Args:
        model: whose logits are those of the next token.
        rows: the micro-batch.
        phase: marker for a ledger.
        loss_chunk: tokens whose logits stand at one time; None, or a model without a head of its own, takes them whole.
        divisor: of the sum; given here, since 16 bits are then rounded once less.

    Returns:
        fp32 scalar, summed over the trained tokens, in nats, and divided.
    """
    if loss_chunk is not None and rows.labels.ndim == 2 and has_own_head(model):
        with phase("forward"):
            hidden = model.base_model(input_ids=rows.input_ids, **_structure(rows), use_cache=False)[0]
        with phase("loss"):
            return chunked_loss_sum(model, hidden, rows.labels, loss_chunk, divisor)
    with phase("forward"):
        logits = model(input_ids=rows.input_ids, **_structure(rows), use_cache=False).logits
    with phase("loss"):
        objective = classification_loss_sum if rows.labels.ndim == 1 else causal_loss_sum
        return objective(logits, rows.labels) / divisor


def _structure(rows: Rows) -> dict[str, Tensor]:
    """What the model must be told beside the tokens."""
    told = {"position_ids": rows.position_ids, "attention_mask": rows.attention_mask}
    return {name: tensor for name, tensor in told.items() if tensor is not None}


def accumulate_gradients(
    model: nn.Module,
    micro_batches: Iterable[Rows],
    trained_tokens: int,
    backward: Callable[[Tensor], None] = Tensor.backward,
    phase: Phase = no_phase,
    loss_chunk: int | None = None,
) -> Tensor:
    """Add up the gradients of one optimizer step, weighted by tokens.

    Args:
        model: in training mode.
        micro_batches: that make the step.
        trained_tokens: in all of them together.
        backward: how a loss goes backward (accelerate has its own).
        phase: marker for a ledger.
        loss_chunk: as for `loss_sum`.

    Returns:
        Mean loss in nats per trained token, fp32 scalar, without a graph.
    """
    losses = []
    for rows in micro_batches:
        loss = loss_sum(model, rows, phase, loss_chunk, trained_tokens)
        with phase("backward"):
            backward(loss)
        losses.append(loss.detach())
        del loss  # or the graph would live on beside the next forward pass
    return torch.stack(losses).sum()
