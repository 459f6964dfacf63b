"""The loss of some tokens from their logits, which become their own gradient in place.

    loss = sum over n with y_n != IGNORED of (logsumexp_v z_nv - z_n,y_n)        z = scale l
    dl = scale (softmax(z) - onehot(y))

or, with a soft cap, z = cap tanh(scale l / cap) and dl times 1 - (z / cap)^2; both times a weight.

The logits are in the compute dtype, the softmax is in fp32 over a slice of them: 2 bytes a logit in 16 bits, and 4 in
fp32, where the slice is the logits' own memory. A kernel, in C on a CPU and in Triton on a CUDA device, does it row by
row and needs no slice.

Axes: V vocabulary; C tokens, S tokens of a slice.
"""

from collections.abc import Callable
from ctypes import c_float
from dataclasses import dataclass

import torch
from torch import Tensor

from qlora_kit.ops.native import address, size, threads, typed_kernel
from qlora_kit.ops.triton import device_kernel

IGNORED = -100
"""The label of a token that the loss does not count."""

SLICE_ELEMENTS = 2**23
"""Logits that stand in fp32 at one time, in 16 bits: 32 MiB, which a large card's cache holds."""

torch.library.define(
    "qlora_kit::softmax_gradient",
    "(Tensor(a!) logits, Tensor labels, float weight, float scale, float? cap) -> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)


@dataclass(frozen=True, slots=True)
class LogitRule:
    """What a model makes of h W^T + bias.

    Attributes:
        scale: factor.
        cap: bound of a soft cap, cap tanh(scale l / cap), or None.
    """

    scale: float = 1.0
    cap: float | None = None

    def __call__(self, logits: Tensor) -> Tensor:
        """The same on whole logits, for autograd."""
        logits = logits if self.scale == 1 else logits * self.scale
        return logits if self.cap is None else self.cap * torch.tanh(logits / self.cap)


PLAIN = LogitRule()
"""Logits that are the product itself, as in most families."""


def loss_and_gradient(logits_CV: Tensor, labels_C: Tensor, rule: LogitRule, weight: float) -> Tensor:
    """The summed loss, a scalar; its gradient takes the place of the logits.

    Args:
        logits_CV: the products of the head, in the compute dtype; they are written over.
        labels_C: int64, what each token is to predict, or IGNORED.
        rule: what follows the product.
        weight: factor of both.
    """
    if _kernel(logits_CV) is not None:
        losses_C: Tensor = torch.ops.qlora_kit.softmax_gradient(logits_CV, labels_C, weight, rule.scale, rule.cap)
        return losses_C.sum()
    is_ignored_C1 = (labels_C == IGNORED)[:, None]
    weight_C1 = torch.full_like(is_ignored_C1, weight, dtype=wide_dtype(logits_CV.dtype)).masked_fill_(is_ignored_C1, 0)
    label_C1 = labels_C[:, None].masked_fill(is_ignored_C1, 0)  # any that is there, since its weight is zero
    tokens = max(1, SLICE_ELEMENTS // logits_CV.shape[1])
    slices = zip(logits_CV.split(tokens), label_C1.split(tokens), weight_C1.split(tokens), strict=True)
    return torch.stack([_of_slice(*parts, rule) for parts in slices]).sum()


def _of_slice(logits_SV: Tensor, label_S1: Tensor, weight_S1: Tensor, rule: LogitRule) -> Tensor:
    z_SV = logits_SV.to(weight_S1.dtype)  # where that is their dtype, the logits themselves
    slope_SV = apply_rule(z_SV, rule)
    top_S1 = z_SV.amax(1, keepdim=True)
    said_S1 = z_SV.gather(1, label_S1).sub_(top_S1)
    total_S1 = z_SV.sub_(top_S1).exp_().sum(1, keepdim=True)
    loss = (total_S1.log() - said_S1).mul_(weight_S1).sum()
    z_SV.mul_(weight_S1 / total_S1)
    z_SV.scatter_(1, label_S1, said_S1.exp_().div_(total_S1).sub_(1).mul_(weight_S1))
    apply_rule_backward(z_SV, slope_SV, rule)
    if z_SV is not logits_SV:
        logits_SV.copy_(z_SV)
    return loss


def _kernel(logits_CV: Tensor) -> Callable[..., None] | None:
    """What does it row by row; where there is none, slices do, which a ledger sees."""
    if not logits_CV.is_contiguous():
        return None
    compiled = typed_kernel("softmax_gradient", logits_CV) if logits_CV.is_cpu else None
    return compiled or device_kernel("softmax_gradient", logits_CV)


def _on_device(logits_CV: Tensor, labels_C: Tensor, weight: float, scale: float, cap: float | None) -> Tensor:
    kernel = device_kernel("softmax_gradient", logits_CV)
    assert kernel is not None  # or the caller would have taken slices, which a ledger sees
    losses_C = _losses(logits_CV, labels_C)
    kernel(logits_CV, labels_C.contiguous(), losses_C, weight, scale, cap, IGNORED)
    return losses_C


torch.library.impl("qlora_kit::softmax_gradient", "default", _on_device)


@torch.library.impl("qlora_kit::softmax_gradient", "cpu")
def _on_cpu(logits_CV: Tensor, labels_C: Tensor, weight: float, scale: float, cap: float | None) -> Tensor:
    kernel = typed_kernel("softmax_gradient", logits_CV)
    if kernel is None:
        return _on_device(logits_CV, labels_C, weight, scale, cap)
    losses_C, labels_C = _losses(logits_CV, labels_C), labels_C.contiguous()
    (rows, width), how = logits_CV.shape, (c_float(weight), c_float(scale), c_float(cap or 0.0))
    is_label_C = (labels_C == IGNORED) | ((labels_C >= 0) & (labels_C < width))
    torch._check_index(bool(is_label_C.all()), lambda: f"a label that is none of the {width} tokens")
    shape, labels = (size(rows), size(width)), (address(labels_C), size(IGNORED))
    kernel(address(logits_CV), *labels, *how, *shape, address(losses_C), threads())
    return losses_C


@torch.library.register_fake("qlora_kit::softmax_gradient")
def _softmax_gradient_fake(
    logits_CV: Tensor, labels_C: Tensor, weight: float, scale: float, cap: float | None
) -> Tensor:
    return _losses(logits_CV, labels_C)


def _losses(logits_CV: Tensor, labels_C: Tensor) -> Tensor:
    """Memory for the loss of each token, (C,), fp32."""
    torch._check(labels_C.shape == logits_CV.shape[:1], lambda: f"{len(labels_C)} labels for {len(logits_CV)} tokens")
    torch._check(labels_C.dtype == torch.int64, lambda: f"labels in {labels_C.dtype}")
    return logits_CV.new_empty(len(logits_CV), dtype=torch.float32)


def apply_rule(z: Tensor, rule: LogitRule) -> Tensor | None:
    """Make of products what a model makes of them, in place; the slope of a soft cap, which the way back wants."""
    if rule.scale != 1:
        z.mul_(rule.scale)
    if rule.cap is None:
        return None
    z.div_(rule.cap).tanh_()
    slope = z.square().neg_().add_(1)
    z.mul_(rule.cap)
    return slope


def apply_rule_backward(dz: Tensor, slope: Tensor | None, rule: LogitRule) -> None:
    """The gradient of products from that of logits, in place."""
    if slope is not None:
        dz.mul_(slope)
    if rule.scale != 1:
        dz.mul_(rule.scale)


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp32, or wider where the logits are."""
    return torch.promote_types(dtype, torch.float32)
