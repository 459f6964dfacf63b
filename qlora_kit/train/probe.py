"""Before the first step: are the logits whose loss is taken a few tokens at a time those of the model itself?

What a family does between its body and its logits is its code's business, and `train/head` knows the usual cases. A
model that differs is trained with whole logits, which take more memory, rather than with another loss.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from qlora_kit.base.text import text_body
from qlora_kit.train.evaluate import evaluation_mode
from qlora_kit.train.head import has_own_head, head_logits

TOKENS = 16
"""Of a row that are asked about."""
TOLERANCE, TOLERANCE_16_BITS = 1e-4, 2e-2
"""Largest relative difference that is rounding; in 16 bits a family rounds its logits up to four times."""


def settled_chunk(model: PreTrainedModel, ids: Sequence[int], chunk: int | None) -> tuple[int | None, str | None]:
    """The chunk itself where the model's loss may be taken so; otherwise None, and one line that says why.

    Args:
        model: to be trained or evaluated; it is left as it was, and no random number is drawn.
        ids: a row of tokens, of which a few are used.
        chunk: tokens whose logits are to stand at one time, or None for whole logits.
    """
    if chunk is None:
        return None, None
    if not has_own_head(model):
        return None, f"{type(model).__name__} has no head that can be called on its own: {_WHOLE}"
    with evaluation_mode(model):
        error = _logit_error(model, torch.tensor([ids[:TOKENS]], device=model.device))
    if not error <= (TOLERANCE_16_BITS if model.dtype.itemsize == 2 else TOLERANCE):  # NaN is no agreement
        return None, f"{type(model).__name__} does something unknown between its body and its logits: {_WHOLE}"
    return chunk, None


_WHOLE = "memory.loss_chunk is ignored and whole logits are used, which take more memory"


def _logit_error(model: PreTrainedModel, ids_1T: Tensor) -> float:
    """By how much the logits differ from the model's own, relative to these."""
    wanted = model(input_ids=ids_1T, use_cache=False).logits.float()
    found = head_logits(model, text_body(model)(input_ids=ids_1T, use_cache=False)[0]).float()
    return ((found - wanted).norm() / wanted.norm()).item()
