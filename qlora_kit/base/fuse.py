"""RMS norms, gated MLPs and rotary embeddings of a model as one operator each, whatever family they are of.

Families write the same few lines under many names, so they are known by what they do: each is tried on small random
numbers, in bf16, and fused where the operator gives the same bits. What the state dict holds, and what the modules are
called, stays.
"""

import copy
import inspect
from collections.abc import Callable
from functools import cache, partial
from types import FunctionType
from typing import Any, get_args

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from qlora_kit.ops import Form, Gate, gated, gated_plain, rms_norm, rms_norm_plain, rotary, rotary_plain

_ROTATE = "apply_rotary_pos_emb"
"""What transformers calls the function that turns queries and keys, in each family's file."""

_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")

_FOREIGN = (RuntimeError, ValueError, TypeError, AttributeError, LookupError, ArithmeticError, AssertionError)
"""What a module that is none of these may raise over the numbers that it is tried on."""


def fuse(model: nn.Module) -> None:
    """Let each norm, gated MLP and rotary embedding that is known run as one operator; a forward pass that somebody has
    set stays."""
    for module in model.modules():
        forward = None if "forward" in vars(module) else _norm(module) or _mlp(module) or _attention(module)
        if forward is not None:
            module.forward = forward


def _norm(module: nn.Module) -> Callable[[Tensor], Tensor] | None:
    """The fused forward pass of an RMS norm."""
    epsilons = [value for name, value in vars(module).items() if name in ("variance_epsilon", "eps", "epsilon")]
    weight = module._parameters.get("weight")
    if module._parameters.keys() != {"weight"} or module._modules or weight is None or weight.ndim != 1:
        return None
    if len(epsilons) != 1 or not isinstance(epsilons[0], float):
        return None
    epsilon, own = epsilons[0], {name: value for name, value in vars(module).items() if name not in _OF_ANY}
    known = type(module), type(module).forward, len(weight), *own.items()
    if not all(isinstance(value, int | float | str) for value in own.values()):
        form = _form(module, len(weight), epsilon)
    elif known in _FORMS:
        form = _FORMS[known]
    else:
        form = _FORMS[known] = _form(module, len(weight), epsilon)
    return None if form is None else partial(_norm_forward, module, epsilon, form)


_OF_ANY = vars(nn.Module()).keys() - {"training"}
_FORMS: dict[tuple[Any, ...], Form | None] = {}
"""By the class of a norm, its code and its numbers: a model has hundreds that are alike."""


def _form(module: nn.Module, width: int, epsilon: float) -> Form | None:
    """How an RMS norm treats its weight; None where it is no norm that we know."""
    with _disable_current_modes():
        w = _numbers(width, seed=1)
        x = _at_scales(width, epsilon**0.5)
        for form in get_args(Form):
            wanted = rms_norm_plain(x, w, epsilon, form)
            if _gives(module, x, wanted, parameters={"weight": nn.Parameter(w, requires_grad=False)}):
                return form
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
    with _disable_current_modes(), torch.no_grad():
        linears = {name: _linear(4, seed) for seed, name in enumerate(_PROJECTIONS)}
        inward, upward, outward = linears.values()
        x = _at_scales(4, 1e-3)
        for gate in get_args(Gate):
            wanted = outward(gated_plain(inward(x), upward(x), gate))
            if _gives(module, x, wanted, modules={**linears, "act_fn": act}):
                return partial(_mlp_forward, module, gate)
    return None


def _mlp_forward(module: Any, gate: Gate, x: Tensor) -> Tensor:
    g, u = module.gate_proj(x), module.up_proj(x)
    return module.down_proj(gated(g, u, gate))


def _attention(module: nn.Module) -> Callable[..., Any] | None:
    """The forward pass of an attention layer with its rotary embedding fused."""
    forward: Any = type(module).forward
    if not inspect.isfunction(forward) or _ROTATE not in forward.__code__.co_names:
        return None
    rotate = forward.__globals__.get(_ROTATE)
    return partial(_attention_forward, module) if inspect.isfunction(rotate) and _rotates(rotate) else None


def _attention_forward(module: Any, *args: Any, **named: Any) -> Any:
    return _with_fused_rotation(type(module).forward)(module, *args, **named)


@cache
def _with_fused_rotation(forward: FunctionType) -> FunctionType:
    """The same code, which finds our function under the name of its family's; others go on with that. It sees the other
    names of its file as they are when it runs first."""
    rotate = forward.__globals__[_ROTATE]

    def fused(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *more: Any, **named: Any) -> tuple[Tensor, Tensor]:
        if more or named or not _are_known(q, k, cos, sin):
            turned: tuple[Tensor, Tensor] = rotate(q, k, cos, sin, *more, **named)
            return turned
        return _turned(q, cos, sin, rotary), _turned(k, cos, sin, rotary)

    names = {**forward.__globals__, _ROTATE: fused}
    made = FunctionType(forward.__code__, names, forward.__name__, forward.__defaults__, forward.__closure__)
    made.__kwdefaults__ = forward.__kwdefaults__
    return made


def _are_known(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> bool:
    """Whether it is whole heads that turn, in one dtype, by angles that take no gradient."""
    widths, dtypes = {each.shape[-1] for each in (q, k, cos, sin)}, {each.dtype for each in (q, k, cos, sin)}
    is_shaped = q.ndim == k.ndim == 4 and cos.ndim == sin.ndim == 3
    return is_shaped and len(widths) == len(dtypes) == 1 and not (cos.requires_grad or sin.requires_grad)


@cache
def _rotates(rotate: Callable[..., Any]) -> bool:
    """Whether a family turns halves of heads by angles of every position, and rounds as our function does."""
    with _disable_current_modes(), torch.no_grad():
        q, k = _numbers(2, 3, 5, 8), _numbers(2, 1, 5, 8, seed=1)
        cos, sin = _numbers(2, 5, 8, seed=2), _numbers(2, 5, 8, seed=3)
        wanted = [_turned(x, cos, sin, rotary_plain) for x in (q, k)]
        try:
            found = rotate(q, k, cos, sin)
            pairs = list(zip(found, wanted, strict=True))
            return all(each.dtype == other.dtype and torch.equal(each, other) for each, other in pairs)
        except _FOREIGN:
            return False


def _turned(x_BNTD: Tensor, cos: Tensor, sin: Tensor, turn: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Tensor:
    return turn(x_BNTD.transpose(1, 2), cos, sin).transpose(1, 2)


def _gives(module: nn.Module, x: Tensor, wanted: Tensor, **inner: dict[str, Any]) -> bool:
    """Whether the module's own code makes `wanted` of x, bit for bit, in training as in evaluation."""
    if len(inspect.signature(type(module).forward).parameters) != 2:  # it may be given more than x
        return False
    twin: Any = copy.copy(module)
    twin._parameters, twin._modules = inner.get("parameters", {}), inner.get("modules", {})
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        for twin.training in (False, True):
            try:
                found = type(module).forward(twin, x)
            except _FOREIGN:
                return False
            if not isinstance(found, Tensor) or not torch.equal(found, wanted):
                return False
    return True


def _linear(width: int, seed: int) -> nn.Linear:
    linear = nn.Linear(width, width, bias=False, device="meta")
    linear.weight = nn.Parameter(_numbers(width, width, seed=seed))
    return linear


def _at_scales(width: int, small: float) -> Tensor:
    """Rows as they come, far larger, where a clamp shows, and so small that it shows what epsilon does."""
    return _numbers(1, 9, width) * torch.tensor([1.0, 1e3, small]).repeat(3)[:, None].bfloat16()


def _numbers(*shape: int, seed: int = 0) -> Tensor:
    """Normal numbers in bf16 that take nothing from torch's global random state."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()
