"""A chunk's logits become their own gradient in place: a row a program, read twice and written once, all in fp32.

The twin is `_of_slice` in `ops/softmax_gradient.py`, which makes fp32 copies of a slice and takes ten passes over
them. A row whose label is ignored is not read. A label that is no token gives a loss of NaN, and the run stops: a
kernel cannot raise.

Axes: C tokens of a chunk, V vocabulary.

Source: a softmax whose top is corrected as it goes is Milakov and Gimelshein's, arXiv 1805.02867.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 4096
_WARPS = 8


def softmax_gradient(
    logits_CV: Tensor, labels_C: Tensor, losses_C: Tensor, weight: float, scale: float, cap: float | None, ignored: int
) -> None:
    """Fill losses, fp32, each times `weight`, and put their gradient in the place of the logits."""
    tokens, vocabulary = logits_CV.shape
    block = min(_BLOCK, triton.next_power_of_2(vocabulary))
    how = weight, scale, 0.0 if cap is None else cap
    with torch.cuda.device_of(logits_CV):
        _row[(tokens,)](
            logits_CV, labels_C, losses_C, *how, vocabulary, ignored, cap is not None, block, num_warps=_WARPS
        )


@triton.jit
def _tanh(x: tl.tensor) -> tl.tensor:
    """To some units in the last place: near zero by its series, where the difference of two halves would lose them."""
    square = x * x
    series = x * (1.0 + square * (-1 / 3 + square * (2 / 15 + square * (-17 / 315 + square * (62 / 2835)))))
    return tl.where(square < 0.0625, series, 2.0 / (1.0 + tl.exp(-2.0 * x)) - 1.0)


@triton.jit
def _ruled(product: tl.tensor, scale: tl.tensor, cap: tl.tensor, HAS_CAP: tl.constexpr) -> tl.tensor:
    """What a model makes of a product."""
    z = product * scale
    return cap * _tanh(z / cap) if HAS_CAP else z


@triton.jit
def _row(
    logits: tl.tensor,
    labels: tl.tensor,
    losses: tl.tensor,
    weight: tl.tensor,
    scale: tl.tensor,
    cap: tl.tensor,
    vocabulary: tl.tensor,
    ignored: tl.tensor,
    HAS_CAP: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels + row)
    begin = logits + row * vocabulary
    if label == ignored:
        tl.store(losses + row, 0.0)
        for start in range(0, vocabulary, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            tl.store(begin + columns, tl.zeros((BLOCK,), tl.float32), mask=columns < vocabulary)
    else:
        is_token = (label >= 0) & (label < vocabulary)
        said = _ruled(tl.load(begin + label, mask=is_token, other=float("nan")).to(tl.float32), scale, cap, HAS_CAP)
        tops = tl.full((BLOCK,), -3.4028234663852886e38, tl.float32)  # and not -inf, whose difference is no number
        totals = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, vocabulary, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            product = tl.load(begin + columns, mask=columns < vocabulary, other=0.0).to(tl.float32)
            z = tl.where(columns < vocabulary, _ruled(product, scale, cap, HAS_CAP), float("-inf"))
            higher = tl.maximum(tops, z, propagate_nan=tl.PropagateNan.ALL)
            totals = totals * tl.exp(tops - higher) + tl.exp(z - higher)
            tops = higher
        top = tl.max(tops, 0)
        total = tl.sum(totals * tl.exp(tops - top), 0)
        tl.store(losses + row, weight * (tl.log(total) + (top - said)))
        for start in range(0, vocabulary, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            there = columns < vocabulary
            z = _ruled(tl.load(begin + columns, mask=there, other=0.0).to(tl.float32), scale, cap, HAS_CAP)
            slope = scale * (1.0 - (z / cap) * (z / cap)) if HAS_CAP else scale
            share = tl.exp(z - top) / total
            gradient = weight * (tl.where(columns == label, share - 1.0, share)) * slope
            tl.store(begin + columns, gradient, mask=there)
