"""Tensors that wait in the host's memory, as operators of torch, so that a ledger and the fake mode see them move.

On CUDA the host's copy is pinned, and both moves are queued beside the kernels: the processor waits for neither. On a
CPU the host is the device; the copy is a plain one, saves nothing, and keeps the same code testable.
"""

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

torch.library.define("qlora_kit::to_host", "(Tensor x) -> Tensor", tags=torch.Tag.pt2_compliant_tag)
torch.library.define("qlora_kit::from_host", "(Tensor x, Device device) -> Tensor", tags=torch.Tag.pt2_compliant_tag)

TO_HOST = torch.ops.qlora_kit.to_host.default
"""The operator whose results a ledger counts as the host's."""


def to_host(x: Tensor) -> Tensor:
    """A copy of `x` in the host's memory; its values are there once the work queued so far is done."""
    copy: Tensor = torch.ops.qlora_kit.to_host(x)
    return copy


def from_host(x: Tensor, device: torch.device) -> Tensor:
    """A copy of a host's tensor on `device`."""
    copy: Tensor = torch.ops.qlora_kit.from_host(x, device)
    return copy


@torch.library.impl("qlora_kit::to_host", "default")
def _to_host(x: Tensor) -> Tensor:
    copy = torch.empty(x.shape, dtype=x.dtype, device="cpu", pin_memory=x.is_cuda)
    return copy.copy_(x, non_blocking=True)


@torch.library.impl("qlora_kit::from_host", "default")
def _from_host(x: Tensor, device: torch.device) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=device).copy_(x, non_blocking=True)


@torch.library.register_fake("qlora_kit::to_host")
def _to_host_fake(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device="cpu")


@torch.library.register_fake("qlora_kit::from_host")
def _from_host_fake(x: Tensor, device: torch.device) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=device)


@register_flop_formula([torch.ops.qlora_kit.to_host, torch.ops.qlora_kit.from_host])
def _no_flops(*_: object, **__: object) -> int:
    return 0
