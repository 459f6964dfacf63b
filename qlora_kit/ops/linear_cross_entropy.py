"""Summed cross entropy behind an output head, a few tokens at a time: the logits never stand whole.

    loss = sum over n with y_n != IGNORED of (logsumexp_v z_nv - z_n,y_n) / divisor        z = scale (h W^T + bias)
    dl = scale (softmax(z) - onehot(y)) / divisor        dh = dl W        dW = dl^T h        l = h W^T + bias

or, with a soft cap, z = cap tanh(scale l / cap) and dl times 1 - (z / cap)^2.

A sum has a gradient that depends on no other token. So everything is done in the forward pass, where a chunk's logits
stand anyway: they become their own gradient in place, that is multiplied with W, and the next chunk begins. Autograd
keeps dh alone (and dW where the head is trained), and backward multiplies it by the scalar that comes from above. The
divisor is given here and not divided by outside, where 16 bits would be rounded once more: what is kept is of the size
of one, and the factor that is left a power of two.

How the loss and the gradient come from a chunk's logits: `softmax_gradient.py`.

Axes: N tokens, D width of the head's input, V vocabulary; C tokens of a chunk.

Source: the gradient in the forward pass, chunk by chunk, is Liger Kernel's, arXiv 2410.10989.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qlora_kit.ops.lora_linear import compute_dtype
from qlora_kit.ops.softmax_gradient import IGNORED, PLAIN, SLICE_ELEMENTS, LogitRule, loss_and_gradient, wide_dtype
from qlora_kit.ops.wide import linear, linear_back


def linear_cross_entropy(
    h_ND: Tensor,
    labels_N: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None = None,
    *,
    chunk: int,
    rule: LogitRule = PLAIN,
    divisor: float = 1.0,
) -> Tensor:
    """The loss behind a dense head; differentiable in h and, where they ask for it, in weight and bias.

    dW is summed over chunks in its own dtype, like gradients over micro-batches: in fp32 it would often be larger than
    the logits that chunks save.

    Args:
        h_ND: the head's input, in the compute dtype; under autocast that is autocast's, whatever h has.
        labels_N: int64, what each token is to predict, or IGNORED.
        weight_VD: of the head.
        bias_V: of the head, or None.
        chunk: tokens whose logits stand at one time, at least 1.
        rule: what follows the product.
        divisor: of the sum, above 0.

    Returns:
        Scalar, at least fp32, in nats.
    """
    if not torch.is_grad_enabled():  # else the node would ask the tensors, and sum up a gradient of W for nobody
        weight_VD, bias_V = weight_VD.detach(), None if bias_V is None else bias_V.detach()
    return _DenseHead.apply(h_ND, labels_N, weight_VD, bias_V, chunk, rule, divisor)


def head_cross_entropy(
    h_ND: Tensor,
    labels_N: Tensor,
    head: Callable[[Tensor], Tensor],
    parameters: Sequence[Tensor],
    *,
    chunk: int,
    rule: LogitRule = PLAIN,
    divisor: float = 1.0,
) -> Tensor:
    """The loss behind any head, called once a chunk; differentiable in h and in the head's parameters.

    Args:
        head: (C, D) -> (C, V), logits that nobody else holds, each row a function of its own input row.
        parameters: those of the head that ask for a gradient; their gradients are summed over chunks in fp32.

    The rest is as for `linear_cross_entropy`.
    """
    trained = parameters if torch.is_grad_enabled() else ()
    return _AnyHead.apply(h_ND, labels_N, head, chunk, rule, divisor, *trained)


def linear_cross_entropy_plain(
    h_ND: Tensor,
    labels_N: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None = None,
    rule: LogitRule = PLAIN,
    divisor: float = 1.0,
) -> Tensor:
    """The same function in plain torch: the oracle of the tests. It keeps the logits until backward."""
    logits = rule(F.linear(h_ND, weight_VD, bias_V))
    return (
        F.cross_entropy(logits.to(wide_dtype(logits.dtype)), labels_N, ignore_index=IGNORED, reduction="sum") / divisor
    )


class _DenseHead(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        h_ND: Tensor,
        labels_N: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        chunk: int,
        rule: LogitRule,
        divisor: float,
    ) -> Tensor:
        weight, ctx.power = split_factor(1 / divisor)
        needs_h, _, needs_w, needs_b, *_ = ctx.needs_input_grad
        dtype = compute_dtype(h_ND)
        w_VD, bias = weight_VD.to(dtype), None if bias_V is None else bias_V.to(dtype)
        dh_ND = torch.empty_like(h_ND) if needs_h else None
        dw_VD = torch.zeros_like(w_VD) if needs_w else None
        db_V = w_VD.new_zeros(len(w_VD), dtype=wide_dtype(dtype)) if needs_b else None
        memory_CV = h_ND.new_empty(min(chunk, len(h_ND)), len(w_VD), dtype=dtype)
        losses = []
        for rows in token_chunks(len(h_ND), chunk):
            h_CD = h_ND[rows].to(dtype)
            logits_CV = memory_CV[: len(h_CD)]
            linear(h_CD, w_VD, bias, out=logits_CV)
            losses.append(loss_and_gradient(logits_CV, labels_N[rows], rule, weight))
            if dh_ND is not None:
                dh_ND[rows] = linear_back(logits_CV, w_VD)
            if dw_VD is not None:
                dw_VD.addmm_(logits_CV.t(), h_CD)
            if db_V is not None:
                db_V.add_(logits_CV.sum(0, dtype=db_V.dtype))
        ctx.dtypes = h_ND.dtype, weight_VD.dtype, None if bias_V is None else bias_V.dtype
        ctx.save_for_backward(dh_ND, dw_VD, db_V)
        return torch.stack(losses).sum() * ctx.power

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        dh, dw, db = scaled_gradients(ctx.saved_tensors, grad * ctx.power, ctx.dtypes)
        return dh, None, dw, db, None, None, None


class _AnyHead(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        h_ND: Tensor,
        labels_N: Tensor,
        head: Callable[[Tensor], Tensor],
        chunk: int,
        rule: LogitRule,
        divisor: float,
        *parameters: Tensor,
    ) -> Tensor:
        weight, ctx.power = split_factor(1 / divisor)
        needs_h = ctx.needs_input_grad[0]
        dh_ND = torch.empty_like(h_ND) if needs_h else None
        sums: list[Tensor | None] = [None] * len(parameters)
        losses = []
        for rows in token_chunks(len(h_ND), chunk):
            h_CD = h_ND[rows].detach().requires_grad_(needs_h)
            loss, dh_CD, gradients = _through(head, parameters, h_CD, labels_N[rows], rule, weight)
            losses.append(loss)
            if dh_ND is not None and dh_CD is not None:
                dh_ND[rows] = dh_CD
            sums = [_added(total, gradient, chunk < len(h_ND)) for total, gradient in zip(sums, gradients, strict=True)]
        ctx.dtypes = [each.dtype for each in (h_ND, *parameters)]
        ctx.save_for_backward(dh_ND, *sums)
        return torch.stack(losses).sum() * ctx.power

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        dh, *gradients = scaled_gradients(ctx.saved_tensors, grad * ctx.power, ctx.dtypes)
        return dh, None, None, None, None, None, *gradients


def _through(
    head: Callable[[Tensor], Tensor],
    parameters: Sequence[Tensor],
    h_CD: Tensor,
    labels_C: Tensor,
    rule: LogitRule,
    weight: float,
) -> tuple[Tensor, Tensor | None, Sequence[Tensor | None]]:
    """The loss of a chunk, and its gradients in h, where it asks for one, and in the parameters."""
    with torch.set_grad_enabled(h_CD.requires_grad or bool(parameters)):
        logits_CV = head(h_CD)
    gradient_CV = logits_CV.detach()
    loss = loss_and_gradient(gradient_CV, labels_C, rule, weight)
    if not logits_CV.requires_grad:
        return loss, None, [None] * len(parameters)
    inputs = [h_CD, *parameters] if h_CD.requires_grad else parameters
    gradients = torch.autograd.grad(logits_CV, inputs, gradient_CV, allow_unused=True)
    return (loss, gradients[0], gradients[1:]) if h_CD.requires_grad else (loss, None, gradients)


def token_chunks(tokens: int, chunk: int) -> Iterator[slice]:
    """Tokens that go together; of no tokens one chunk without any."""
    for begin in range(0, max(1, tokens), chunk):
        yield slice(begin, begin + chunk)


def split_factor(share: float) -> tuple[float, float]:
    """A number from 0.5 to 1 and a power of two, of which it is the product."""
    mantissa, exponent = math.frexp(share)
    return mantissa, 2.0**exponent


def _added(total: Tensor | None, gradient: Tensor | None, has_more: bool) -> Tensor | None:
    """The sum of a parameter's gradients over chunks: not in 16 bits, where every chunk would round it once more."""
    if total is not None and gradient is not None:
        return total.add_(gradient)
    if gradient is None or not has_more:
        return gradient
    return gradient.to(wide_dtype(gradient.dtype), copy=True)


def scaled_gradients(
    gradients: Sequence[Tensor | None], factor: Tensor, dtypes: Sequence[torch.dtype | None]
) -> Iterator[Tensor | None]:
    """Every gradient times the factor, rounded to its dtype once: in 16 bits the factor itself would be rounded."""
    for gradient, dtype in zip(gradients, dtypes, strict=True):
        if gradient is None:
            yield None
            continue
        scaled = torch.empty_like(gradient, dtype=dtype)
        rows = max(1, SLICE_ELEMENTS // math.prod(gradient.shape[1:]))
        for into, part in zip(scaled.split(rows), gradient.split(rows), strict=True):
            into.copy_(part.to(factor.dtype).mul(factor))
        yield scaled
