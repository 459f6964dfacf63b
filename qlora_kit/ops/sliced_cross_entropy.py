"""Summed cross entropy behind a frozen head that is decoded a few rows at a time: no token's logits ever stand whole.

    loss = sum over n with y_n != IGNORED of (log total_n + top_n - z_n,y_n) / divisor
    total_n = sum over v of exp(z_nv - top_n),   top_n = max over v of z_nv

A head that has to be decoded is better read seldom. So the slices of the vocabulary are the outer loop, and there are
two of them: one that finds top and total, where each slice corrects what the slices before it made of them, and one
that makes the logits once more, turns them into their gradient, and multiplies that with the slice. Chunks of tokens
(`linear_cross_entropy.py`) would decode the head twice a chunk; this decodes it twice for `TOKENS` tokens, and takes
three products with the head in place of two.

Axes: N tokens, D width of the head's input, V vocabulary; C tokens of a chunk, S rows of a slice.

Source: a softmax whose top is corrected as it goes is Milakov and Gimelshein's, arXiv 1805.02867; both loops without
whole logits are Cut Cross-Entropy's, arXiv 2411.09009.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qlora_kit.ops.linear_cross_entropy import scaled_gradients, split_factor, token_chunks
from qlora_kit.ops.lora_linear import compute_dtype
from qlora_kit.ops.slices import DecodeRows, row_slices
from qlora_kit.ops.softmax_gradient import IGNORED, PLAIN, LogitRule, apply_rule, apply_rule_backward, wide_dtype
from qlora_kit.ops.wide import linear, linear_back

TOKENS = 1024
"""Tokens for which the head is decoded twice. With 152 k rows of 3,584 that is a ninth of the time of its products."""
ROWS = 2**11
"""Rows of the head in a slice, so that its logits are 8 MiB in fp32, up to 24 with product, gradient and the slope of a
cap: four times as many take a tenth more time on a CPU, whose cache does not hold them. For fewer tokens there are no
more rows: no batch takes more memory than a longer one."""


def sliced_cross_entropy(
    h_ND: Tensor,
    labels_N: Tensor,
    decode_rows: DecodeRows,
    shape: tuple[int, int],
    bias_V: Tensor | None = None,
    *,
    rule: LogitRule = PLAIN,
    divisor: float = 1.0,
) -> Tensor:
    """The loss behind a frozen head; differentiable in h.

    Args:
        h_ND: the head's input, in the compute dtype; under autocast that is autocast's, whatever h has.
        labels_N: int64, what each token is to predict, or IGNORED.
        decode_rows: reads rows of the weight; it must return the same values at every call.
        shape: (vocabulary, width) of the weight.
        bias_V: frozen, or None.
        rule: what follows the product.
        divisor: of the sum, above 0.

    Returns:
        Scalar, at least fp32, in nats.
    """
    return _SlicedHead.apply(h_ND, labels_N, decode_rows, shape, bias_V, rule, divisor)


class _SlicedHead(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        h_ND: Tensor,
        labels_N: Tensor,
        decode_rows: DecodeRows,
        shape: tuple[int, int],
        bias_V: Tensor | None,
        rule: LogitRule,
        divisor: float,
    ) -> Tensor:
        weight, ctx.power = split_factor(1 / divisor)
        dtype = compute_dtype(h_ND)
        dh_ND = torch.empty_like(h_ND) if ctx.needs_input_grad[0] else None
        head = _Head(decode_rows, shape, bias_V, rule)
        losses = []
        for rows in token_chunks(len(h_ND), TOKENS):
            h_CD, labels_C1 = h_ND[rows].to(dtype), labels_N[rows, None]
            is_ignored_C1 = labels_C1 == IGNORED
            label_C1 = labels_C1.masked_fill(is_ignored_C1, 0)  # any that is there, since its weight is zero
            weight_C1 = torch.full_like(is_ignored_C1, weight, dtype=wide_dtype(dtype)).masked_fill_(is_ignored_C1, 0)
            top_C1, total_C1, said_C1 = head.totals(h_CD, label_C1)
            losses.append((total_C1.log() + top_C1 - said_C1).mul_(weight_C1).sum())
            if dh_ND is not None:
                dh_ND[rows] = head.gradient(h_CD, label_C1, weight_C1, top_C1, total_C1)
        ctx.dtype = h_ND.dtype
        ctx.save_for_backward(dh_ND)
        return torch.stack(losses).sum() * ctx.power

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (dh,) = scaled_gradients(ctx.saved_tensors, grad * ctx.power, [ctx.dtype])
        return dh, None, None, None, None, None, None


@dataclass(frozen=True, slots=True)
class _Head:
    """Both loops over the slices of the vocabulary, for one chunk of tokens."""

    decode_rows: DecodeRows
    shape: tuple[int, int]
    bias_V: Tensor | None
    rule: LogitRule

    def totals(self, h_CD: Tensor, label_C1: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of every token the largest logit, the sum of exponentials over it, and its label's logit; (C, 1) each."""
        one = torch.zeros(1, 1, dtype=wide_dtype(h_CD.dtype), device=h_CD.device)
        said_C1 = one.expand(len(h_CD), self.shape[0]).gather(1, label_C1)  # which refuses a label that is no token
        lowest = torch.finfo(said_C1.dtype).min  # and not -inf, from which a slice of -inf could not be subtracted
        top_C1, total_C1 = torch.full_like(said_C1, lowest), torch.zeros_like(said_C1)
        for rows, w_SD in self._slices(h_CD):
            z_CS, _ = self._logits(h_CD, w_SD, rows)
            place_C1, is_here_C1 = _place(label_C1, rows)
            said_C1 = torch.where(is_here_C1, z_CS.gather(1, place_C1), said_C1)
            higher_C1 = torch.maximum(top_C1, z_CS.amax(1, keepdim=True))
            total_C1.mul_(top_C1.sub_(higher_C1).exp_()).add_(z_CS.sub_(higher_C1).exp_().sum(1, keepdim=True))
            top_C1 = higher_C1
        return top_C1, total_C1, said_C1

    def gradient(self, h_CD: Tensor, label_C1: Tensor, weight_C1: Tensor, top_C1: Tensor, total_C1: Tensor) -> Tensor:
        """dh of the weighted loss, (C, D), summed over slices: not in 16 bits, where every slice would round it."""
        dh_CD = torch.zeros_like(h_CD, dtype=wide_dtype(h_CD.dtype))
        share_C1 = weight_C1 / total_C1
        for rows, w_SD in self._slices(h_CD):
            z_CS, slope_CS = self._logits(h_CD, w_SD, rows)
            place_C1, is_here_C1 = _place(label_C1, rows)
            z_CS.sub_(top_C1).exp_().mul_(share_C1)
            z_CS.scatter_add_(1, place_C1, weight_C1.neg().mul_(is_here_C1))
            apply_rule_backward(z_CS, slope_CS, self.rule)
            dh_CD.add_(linear_back(z_CS.to(h_CD.dtype), w_SD))
        return dh_CD

    def _slices(self, h_CD: Tensor) -> Iterator[tuple[slice, Tensor]]:
        for rows in row_slices(self.shape, h_CD, at_most=ROWS):
            yield rows, self.decode_rows(rows, h_CD.dtype)

    def _logits(self, h_CD: Tensor, w_SD: Tensor, rows: slice) -> tuple[Tensor, Tensor | None]:
        """In fp32 or wider, from a product in the compute dtype; and the slope of a cap."""
        bias_S = None if self.bias_V is None else self.bias_V[rows].to(h_CD.dtype)
        product_CS = linear(h_CD, w_SD, bias_S)  # which adds the bias before it rounds
        z_CS = product_CS.to(wide_dtype(product_CS.dtype))
        return z_CS, apply_rule(z_CS, self.rule)


def _place(label_C1: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
    """Where in a slice each label is, and whether it is there at all."""
    place_C1 = label_C1 - rows.start
    is_here_C1 = (place_C1 >= 0) & (place_C1 < rows.stop - rows.start)
    return place_C1.clamp(0, rows.stop - rows.start - 1), is_here_C1
