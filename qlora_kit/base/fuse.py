"""RMS norms and gated MLPs of a model as one operator each, whatever family they are of.

Families write the same few lines under many names, so they are known by what they do: a norm or an MLP is tried on
small random numbers, in bf16, and fused where the operator gives the same bits. What the state dict holds, and what the
modules are called, stays.
"""

import copy
import inspect
from collections.abc import Callable
from functools import partial
from typing import Any, get_args

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from qlora_kit.ops import Form, Gate, activate, gated, gated_plain, rms_norm, rms_norm_plain

_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


def fuse(model: nn.Module) -> None:
    """Let each norm and gated MLP that is known run as one operator."""
    for module in model.modules():
        forward = _norm(module) or _mlp(module)
        if forward is not None:
            module.forward = forward


def _norm(module: nn.Module) -> Callable[[Tensor], Tensor] | None:
    """The fused forward pass of an RMS norm."""
    epsilons = [value for name, value in vars(module).items() if name in ("variance_epsilon", "eps", "epsilon")]
    if len(epsilons) != 1 or module._parameters.keys() != {"weight"} or module._modules or not _takes_one(module):
        return None
    weight: Any = module._parameters["weight"]
    if weight.ndim != 1:
        return None
    with _disable_current_modes(), torch.no_grad():
        x, w = _numbers(3, len(weight)), _numbers(len(weight))
        found = type(module).forward(_twin(module, parameters={"weight": nn.Parameter(w)}), x)
        for form in get_args(Form):
            if torch.equal(found, rms_norm_plain(x, w, epsilons[0], form)):
                return partial(_norm_forward, module, epsilons[0], form)
    return None


def _norm_forward(module: Any, epsilon: float, form: Form, x: Tensor) -> Tensor:
    """Fused but where the weight is trained, and where torch would promote one dtype to the other."""
    weight = module.weight
    if weight.dtype != x.dtype or (weight.requires_grad and torch.is_grad_enabled()):
        return type(module).forward(module, x)
    return rms_norm(x, weight, epsilon, form)


def _mlp(module: nn.Module) -> Callable[[Tensor], Tensor] | None:
    """The fused forward pass of a gated MLP."""
    act = vars(module).get("act_fn", module._modules.get("act_fn"))
    if not {*_PROJECTIONS} <= module._modules.keys() <= {*_PROJECTIONS, "act_fn"} or act is None:
        return None
    if not _takes_one(module):
        return None
    with _disable_current_modes(), torch.no_grad():
        linears = {name: _linear(4, seed) for seed, name in enumerate(_PROJECTIONS)}
        x = _numbers(3, 4)
        found = type(module).forward(_twin(module, modules={**linears, "act_fn": act}), x)
        inward, upward, outward = linears.values()
        for gate in get_args(Gate):
            is_same = torch.equal(act(x), activate(x, gate))
            if is_same and torch.equal(found, outward(gated_plain(inward(x), upward(x), gate))):
                return partial(_mlp_forward, module, gate)
    return None


def _mlp_forward(module: Any, gate: Gate, x: Tensor) -> Tensor:
    g, u = module.gate_proj(x), module.up_proj(x)
    return module.down_proj(gated(g, u, gate))


def _takes_one(module: nn.Module) -> bool:
    """Whether a forward pass is a function of one tensor."""
    return len(inspect.signature(type(module).forward).parameters) == 2


def _twin(module: nn.Module, *, parameters: dict[str, Any] | None = None, modules: dict[str, Any] | None = None) -> Any:
    """The same module around others' parameters and modules."""
    twin = copy.copy(module)
    twin._parameters = parameters or {}
    twin._modules = modules or {}
    return twin


def _linear(width: int, seed: int) -> nn.Linear:
    linear = nn.Linear(width, width, bias=False, device="meta")
    linear.weight = nn.Parameter(_numbers(width, width, seed=seed))
    return linear


def _numbers(*shape: int, seed: int = 0) -> Tensor:
    """Normal numbers in bf16 that take nothing from torch's global random state."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()
