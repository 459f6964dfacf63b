"""y = w x / rms(x), rms(x)^2 = mean(x^2) + epsilon, in one pass and with x alone kept: RMSNorm with a frozen weight.

Families differ in how they round (`Form`). In the backward pass that makes no difference:

    dx = (g w - x mean(g w x) / rms^2) / rms        with 1 + w for w where there is an offset

Written out in torch, both directions take eight passes over memory, and autograd keeps x in fp32.

Axes: T rows (all leading axes), H width. Source: RMSNorm, arXiv 1910.07467.
"""

from ctypes import c_float
from typing import Any, Literal

import torch
from torch import Tensor

from qlora_kit.ops.native import address, size, threads, typed_kernel
from qlora_kit.ops.rows import as_rows, row_parts
from qlora_kit.ops.triton import device_kernel

Form = Literal["twice", "once", "offset"]
"""twice: w times what x / rms(x) is in the dtype of x, as in Llama; once: all in fp32, as in OLMo 2; offset: the same
with 1 + w, as in Gemma."""

torch.library.define(
    "qlora_kit::rms_norm",
    "(Tensor x, Tensor weight, float epsilon, str form) -> (Tensor, Tensor)",
    tags=torch.Tag.pt2_compliant_tag,
)
torch.library.define(
    "qlora_kit::rms_norm_backward",
    "(Tensor grad, Tensor x, Tensor weight, Tensor inverse, str form) -> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)


def rms_norm(x: Tensor, weight_H: Tensor, epsilon: float, form: Form = "twice") -> Tensor:
    """x / rms(x) times a frozen weight.

    Args:
        x: (..., H), any floating dtype.
        weight_H: frozen, in the dtype of x.
        epsilon: added to the mean square.
        form: how it is rounded.

    Returns:
        (..., H), in the dtype of x.
    """
    return _RmsNorm.apply(x, weight_H, epsilon, form)


def rms_norm_plain(x: Tensor, weight_H: Tensor, epsilon: float, form: Form = "twice") -> Tensor:
    """The same function in plain torch, for autograd to differentiate: the oracle of the tests."""
    x32 = x.float()
    normed = x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + epsilon)
    if form == "twice":
        return weight_H * normed.to(x.dtype)
    return (normed * _factor(weight_H, form)).to(x.dtype)


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_H: Tensor, epsilon: float, form: Form) -> Tensor:
        y, inverse = torch.ops.qlora_kit.rms_norm(x, weight_H, epsilon, form)
        ctx.save_for_backward(x, weight_H, inverse)
        ctx.form = form
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight_H, inverse = ctx.saved_tensors
        dx = torch.ops.qlora_kit.rms_norm_backward(grad, x, weight_H, inverse, ctx.form)
        return dx, None, None, None


def _forward(x: Tensor, weight: Tensor, epsilon: float, form: Form) -> tuple[Tensor, Tensor]:
    y, inverse = _results(x, weight)
    for part in row_parts(x):
        x32 = as_rows(x)[part].float()
        inverse[part] = torch.rsqrt(x32.square().mean(-1) + epsilon)
        normed = x32 * inverse[part, None]
        if form == "twice":
            torch.mul(normed.to(x.dtype), weight, out=as_rows(y)[part])
        else:
            as_rows(y)[part] = normed.mul_(_factor(weight, form))
    return y, inverse


def _backward(grad: Tensor, x: Tensor, weight: Tensor, inverse: Tensor, form: Form) -> Tensor:
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    factor_H = _factor(weight, form)
    for part in row_parts(x):
        scaled = as_rows(grad)[part].float() * factor_H
        x32, scale = as_rows(x)[part].float(), inverse[part, None]
        along = (scaled * x32).mean(-1, keepdim=True).mul_(scale.square())
        as_rows(dx)[part] = scaled.sub_(x32 * along).mul_(scale)
    return dx


torch.library.impl("qlora_kit::rms_norm", "default", _forward)
torch.library.impl("qlora_kit::rms_norm_backward", "default", _backward)


@torch.library.impl("qlora_kit::rms_norm", "cpu")
def _forward_cpu(x: Tensor, weight: Tensor, epsilon: float, form: Form) -> tuple[Tensor, Tensor]:
    kernel = typed_kernel("rms_norm", x, weight)
    if kernel is None:
        return _forward(x, weight, epsilon, form)
    y, inverse = _results(x, weight)
    x, weight = x.contiguous(), weight.contiguous()
    shape = size(len(inverse)), size(x.shape[-1])
    how = c_float(epsilon), form != "twice", c_float(form == "offset")
    kernel(address(x), address(weight), *how, *shape, address(y), address(inverse), threads())
    return y, inverse


@torch.library.impl("qlora_kit::rms_norm_backward", "cpu")
def _backward_cpu(grad: Tensor, x: Tensor, weight: Tensor, inverse: Tensor, form: Form) -> Tensor:
    kernel = typed_kernel("rms_norm_backward", x, weight, grad)
    if kernel is None:
        return _backward(grad, x, weight, inverse, form)
    _check(x, weight, grad)
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    grad, x, weight = grad.contiguous(), x.contiguous(), weight.contiguous()
    shape = size(len(inverse)), size(x.shape[-1])
    sources = (address(each) for each in (grad, x, weight, inverse))
    kernel(*sources, c_float(form == "offset"), *shape, address(dx), threads())
    return dx


def _forward_cuda(x: Tensor, weight: Tensor, epsilon: float, form: Form) -> tuple[Tensor, Tensor]:
    kernel = device_kernel("rms_norm", x, weight)
    if kernel is None:
        return _forward(x, weight, epsilon, form)
    y, inverse = _results(x, weight)
    kernel(x.contiguous(), weight.contiguous(), epsilon, form, y, inverse)
    return y, inverse


def _backward_cuda(grad: Tensor, x: Tensor, weight: Tensor, inverse: Tensor, form: Form) -> Tensor:
    kernel = device_kernel("rms_norm_backward", x, weight, grad)
    if kernel is None:
        return _backward(grad, x, weight, inverse, form)
    _check(x, weight, grad)
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    kernel(grad.contiguous(), x.contiguous(), weight.contiguous(), inverse, form, dx)
    return dx


torch.library.impl("qlora_kit::rms_norm", "cuda", _forward_cuda)
torch.library.impl("qlora_kit::rms_norm_backward", "cuda", _backward_cuda)


@torch.library.register_fake("qlora_kit::rms_norm")
def _forward_fake(x: Tensor, weight: Tensor, epsilon: float, form: Form) -> tuple[Tensor, Tensor]:
    return _results(x, weight)


@torch.library.register_fake("qlora_kit::rms_norm_backward")
def _backward_fake(grad: Tensor, x: Tensor, weight: Tensor, inverse: Tensor, form: Form) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _check(x: Tensor, weight: Tensor, grad: Tensor | None = None) -> None:
    """Kernels read as many as they are told: so they must be there."""
    torch._check(weight.shape == x.shape[-1:], lambda: f"a weight of {tuple(weight.shape)} for {tuple(x.shape)}")
    if grad is not None:
        torch._check(grad.shape == x.shape, lambda: f"a gradient of {tuple(grad.shape)} for {tuple(x.shape)}")


def _results(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Memory for y and, (T,) in fp32, for 1 / rms(x)."""
    _check(x, weight)
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    return y, x.new_empty(x.numel() // x.shape[-1], dtype=torch.float32)


def _factor(weight_H: Tensor, form: Form) -> Tensor:
    """What multiplies x / rms(x), fp32."""
    return 1 + weight_H.float() if form == "offset" else weight_H.float()
