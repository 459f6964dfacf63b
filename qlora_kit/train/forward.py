"""A forward pass and the likelihood of what was to be said: the same code on real tensors and, in the dry run, on fake
ones.

So nothing here reads a value off a tensor: counts come from the host, and whether a loss is finite is asked elsewhere.
A causal model gets no attention mask: rows are padded on the right, and no real token looks to its right. Where rows
are packed, it gets positions that begin anew at every document, and attention keeps the documents apart.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from qlora_kit.base.documents import reading
from qlora_kit.base.text import text_body
from qlora_kit.train.head import chunked_loss_sum, has_own_head
from qlora_kit.train.objectives import causal_loss_sum

Phase = Callable[[str], AbstractContextManager[None]]
"""Marks a block as one phase of the step, for a ledger."""


class Rows(Protocol):
    """What a step reads of a micro-batch."""

    @property
    def input_ids(self) -> Tensor:
        """(batch, tokens), int64, padded on the right."""

    @property
    def labels(self) -> Tensor:
        """(batch, tokens), int64, -100 where not trained; or of classified texts (batch,) or (batch, classes)."""

    @property
    def position_ids(self) -> Tensor | None:
        """(batch, tokens), int64, of packed rows."""

    @property
    def documents(self) -> tuple[int, ...] | None:
        """Tokens of each packed row, through all sequences, with padding."""

    @property
    def attention_mask(self) -> Tensor | None:
        """(batch, tokens), bool, for padded rows of a model that looks both ways."""

    @property
    def is_good(self) -> Tensor | None:
        """(batch / 2,), bool, of answers with a verdict."""


def no_phase(name: str) -> AbstractContextManager[None]:
    """The phase marker of a step that nobody watches."""
    return nullcontext()


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
    if loss_chunk is not None and has_own_head(model):
        with phase("forward"):
            hidden = _passed(text_body(model), rows)[0]
        with phase("loss"):
            return chunked_loss_sum(model, hidden, rows.labels, loss_chunk, divisor)
    logits = whole_logits(model, rows, phase)
    with phase("loss"):
        return causal_loss_sum(logits, rows.labels) / divisor


def sequence_losses(model: nn.Module, rows: Rows, phase: Phase = no_phase, loss_chunk: int | None = None) -> Tensor:
    """Forward pass of one micro-batch, and -log p of what is trained of each of its sequences.

    The arguments are those of `loss_sum`.

    Returns:
        (batch,), fp32, in nats.
    """
    labels_BT = rows.labels
    if loss_chunk is not None and has_own_head(model):
        with phase("forward"):
            hidden = _passed(text_body(model), rows)[0]
        with phase("loss"):
            each = zip(hidden.split(1), labels_BT.split(1), strict=True)
            return torch.stack([chunked_loss_sum(model, h_1TD, labels, loss_chunk) for h_1TD, labels in each])
    logits = whole_logits(model, rows, phase)
    with phase("loss"):
        each = zip(logits.split(1), labels_BT.split(1), strict=True)
        return torch.stack([causal_loss_sum(logits_1TV, labels) for logits_1TV, labels in each])


def whole_logits(model: nn.Module, rows: Rows, phase: Phase = no_phase) -> Tensor:
    """Forward pass of one micro-batch: (batch, tokens, vocabulary), or (batch, classes)."""
    with phase("forward"):
        logits: Tensor = _passed(model, rows).logits
    return logits


def _passed(model: nn.Module, rows: Rows) -> Any:
    """What the model, or its body, says to the tokens and to what it must be told beside them."""
    told = {"position_ids": rows.position_ids, "attention_mask": rows.attention_mask}
    with reading(rows.documents):
        return model(input_ids=rows.input_ids, **{k: v for k, v in told.items() if v is not None}, use_cache=False)
