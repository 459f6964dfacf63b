"""out = act(g) * u, the middle of a gated MLP, in one pass and with g and u alone kept; act is SiLU or GELU (tanh).

    dg = d u act'(g)        du = d act(g)

Written out in torch, autograd keeps act(g), too: a quarter of what a gated MLP keeps.

Source: GLU variants, arXiv 2002.05202; its GELU by tanh as in arXiv 1606.08415.
"""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from qlora_kit.ops.native import address, size, threads, typed_kernel
from qlora_kit.ops.rows import as_rows, row_parts
from qlora_kit.ops.triton import device_kernel

Gate = Literal["silu", "gelu"]
"""SiLU, x sigmoid(x); GELU by its tanh formula."""

torch.library.define("qlora_kit::gated", "(Tensor g, Tensor u, str gate) -> Tensor", tags=torch.Tag.pt2_compliant_tag)
torch.library.define(
    "qlora_kit::gated_backward",
    "(Tensor grad, Tensor g, Tensor u, str gate) -> (Tensor, Tensor)",
    tags=torch.Tag.pt2_compliant_tag,
)


def gated(g: Tensor, u: Tensor, gate: Gate) -> Tensor:
    """act(g) * u, each of the two rounded to the dtype of g.

    Args:
        g: what goes through the gate, (..., H), any floating dtype.
        u: what it lets through, as g.
        gate: the activation.
    """
    return _Gated.apply(g, u, gate)


def gated_plain(g: Tensor, u: Tensor, gate: Gate) -> Tensor:
    """The same function in plain torch, for autograd to differentiate: the oracle of the tests."""
    return activate(g, gate) * u


def activate(g: Tensor, gate: Gate) -> Tensor:
    """act(g)."""
    return F.silu(g) if gate == "silu" else F.gelu(g, approximate="tanh")


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, g: Tensor, u: Tensor, gate: Gate) -> Tensor:
        ctx.save_for_backward(g, u)
        ctx.gate = gate
        return torch.ops.qlora_kit.gated(g, u, gate)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        g, u = ctx.saved_tensors
        return *torch.ops.qlora_kit.gated_backward(grad, g, u, ctx.gate), None


def _forward(g: Tensor, u: Tensor, gate: Gate) -> Tensor:
    out = torch.empty_like(g, memory_format=torch.contiguous_format)
    for part in row_parts(g):
        torch.mul(activate(as_rows(g)[part], gate), as_rows(u)[part], out=as_rows(out)[part])
    return out


def _backward(grad: Tensor, g: Tensor, u: Tensor, gate: Gate) -> tuple[Tensor, Tensor]:
    dg, du = (torch.empty_like(g, memory_format=torch.contiguous_format) for _ in range(2))
    for part in row_parts(g):
        grad_part, g_part = as_rows(grad)[part], as_rows(g)[part]
        torch.mul(grad_part, activate(g_part, gate), out=as_rows(du)[part])
        through = grad_part * as_rows(u)[part]
        slope = torch.ops.aten.silu_backward if gate == "silu" else torch.ops.aten.gelu_backward
        as_rows(dg)[part] = slope(through, g_part) if gate == "silu" else slope(through, g_part, approximate="tanh")
    return dg, du


torch.library.impl("qlora_kit::gated", "default", _forward)
torch.library.impl("qlora_kit::gated_backward", "default", _backward)


@torch.library.impl("qlora_kit::gated", "cpu")
def _forward_cpu(g: Tensor, u: Tensor, gate: Gate) -> Tensor:
    kernel = typed_kernel("gated", g, u)
    if kernel is None:
        return _forward(g, u, gate)
    _check(g, u)
    out = torch.empty_like(g, memory_format=torch.contiguous_format)
    g, u = g.contiguous(), u.contiguous()
    kernel(address(g), address(u), gate == "gelu", size(g.numel()), address(out), threads())
    return out


@torch.library.impl("qlora_kit::gated_backward", "cpu")
def _backward_cpu(grad: Tensor, g: Tensor, u: Tensor, gate: Gate) -> tuple[Tensor, Tensor]:
    kernel = typed_kernel("gated_backward", grad, g, u)
    if kernel is None:
        return _backward(grad, g, u, gate)
    _check(g, u, grad)
    dg, du = (torch.empty_like(g, memory_format=torch.contiguous_format) for _ in range(2))
    grad, g, u = grad.contiguous(), g.contiguous(), u.contiguous()
    sources = (address(each) for each in (grad, g, u))
    kernel(*sources, gate == "gelu", size(g.numel()), address(dg), address(du), threads())
    return dg, du


def _forward_cuda(g: Tensor, u: Tensor, gate: Gate) -> Tensor:
    kernel = device_kernel("gated", g, u)
    if kernel is None:
        return _forward(g, u, gate)
    _check(g, u)
    out = torch.empty_like(g, memory_format=torch.contiguous_format)
    kernel(g.contiguous(), u.contiguous(), gate, out)
    return out


def _backward_cuda(grad: Tensor, g: Tensor, u: Tensor, gate: Gate) -> tuple[Tensor, Tensor]:
    kernel = device_kernel("gated_backward", grad, g, u)
    if kernel is None:
        return _backward(grad, g, u, gate)
    _check(g, u, grad)
    dg, du = (torch.empty_like(g, memory_format=torch.contiguous_format) for _ in range(2))
    kernel(grad.contiguous(), g.contiguous(), u.contiguous(), gate, dg, du)
    return dg, du


torch.library.impl("qlora_kit::gated", "cuda", _forward_cuda)
torch.library.impl("qlora_kit::gated_backward", "cuda", _backward_cuda)


def _check(g: Tensor, *others: Tensor) -> None:
    """Kernels read as many as they are told: so they must be there."""
    for each in others:
        torch._check(each.shape == g.shape, lambda each=each: f"{tuple(each.shape)} beside {tuple(g.shape)}")


@torch.library.register_fake("qlora_kit::gated")
def _forward_fake(g: Tensor, u: Tensor, gate: Gate) -> Tensor:
    _check(g, u)
    return torch.empty_like(g, memory_format=torch.contiguous_format)


@torch.library.register_fake("qlora_kit::gated_backward")
def _backward_fake(grad: Tensor, g: Tensor, u: Tensor, gate: Gate) -> tuple[Tensor, Tensor]:
    return _forward_fake(g, u, gate), _forward_fake(g, u, gate)
