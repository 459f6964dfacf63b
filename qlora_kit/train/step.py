"""One optimizer step's gradients: the same code on real tensors and, in the dry run, on fake ones.

fp16 has nothing below 6e-8, and there the share of one token in a mean over ten thousand is lost on its way back. So in
fp16 a loss goes backward as the sum that it is a mean of, to a factor below two, and what has come to the parameters is
divided: by a power of two, which rounds nothing in bf16 and fp32. What overflows stops the run.

Source: loss scaling, arXiv 1710.03740, section 3.2; a scale that is the count of the mean needs no search.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from qlora_kit.train.forward import Phase, Rows, no_phase
from qlora_kit.train.tasks import LIKELIHOOD, Loss, Task


def _nothing() -> None:
    """Where nobody asks before a micro-batch."""


def accumulate_gradients(
    model: nn.Module,
    micro_batches: Sequence[Rows],
    count: int,
    task: Task = LIKELIHOOD,
    *,
    backward: Callable[[Tensor], None] = Tensor.backward,
    phase: Phase = no_phase,
    loss_chunk: int | None = None,
    before: Callable[[], None] = _nothing,
) -> Loss:
    """Add up the gradients of one optimizer step, weighted by what the loss is a mean over.

    Args:
        model: in training mode.
        micro_batches: that make the step.
        count: trained tokens in all of them together, or texts, or pairs: what the task's loss is a mean over.
        task: what is minimised.
        backward: how a loss goes backward (accelerate has its own).
        phase: marker for a ledger.
        loss_chunk: as for `loss_sum`.
        before: is called before each micro-batch; it may end the run.

    Returns:
        The mean loss in nats, fp32 scalar, without a graph, and the task's means of other things.
    """
    told, scale = [], _scale(model, count)
    step = task.begun(model, micro_batches, loss_chunk)
    for rows in micro_batches:
        before()
        loss = step(model, rows, phase, loss_chunk, count)
        with phase("backward"):
            backward(loss.value if scale == 1 else loss.value * scale)
        told.append(Loss(loss.value.detach(), loss.measures))
        del loss  # or the graph would live on beside the next forward pass
    if scale != 1:
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.grad.mul_(1 / scale)
    return added(told)


def _scale(model: nn.Module, count: int) -> float:
    """By what a loss is multiplied before it goes backward, a power of two."""
    embedding: Any = cast(PreTrainedModel, model).get_input_embeddings()  # dense or not, in the compute dtype
    return 2.0 ** math.floor(math.log2(count)) if embedding.weight.dtype == torch.float16 else 1.0


def added(parts: Sequence[Loss]) -> Loss:
    """The loss of a step from those of its micro-batches, each its share of the mean."""
    names = parts[0].measures
    measures = {name: torch.stack([part.measures[name] for part in parts]).sum() for name in names}
    return Loss(torch.stack([part.value for part in parts]).sum(), measures)
