"""The LoRA layer: y = x W^T + scale (x A^T) B^T around a frozen linear layer, with named adapters and a switch.

    scale = alpha / rank (standard)        alpha / sqrt(rank) (rsLoRA, arXiv 2312.03732)

Axes: I in, O out, R rank.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qlora_kit.base.dense import Linear, decode, linear_shape
from qlora_kit.errors import AdapterError
from qlora_kit.ops import lora_linear

Scaling = Literal["standard", "rslora"]


class Adapter(nn.Module):
    """One low-rank update of one layer.

    Args:
        shape: (out, in) of the layer.
        rank: R.
        alpha: numerator of the scale.
        scaling: what alpha is divided by.
        dropout: share of x's entries zeroed on the adapter's path while training.
        dtype: of A and B.
        device: of A and B.
    """

    def __init__(
        self,
        shape: tuple[int, int],
        rank: int,
        alpha: float,
        *,
        scaling: Scaling = "standard",
        dropout: float = 0.0,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        self.rank, self.alpha, self.scaling, self.dropout = rank, alpha, scaling, dropout
        self.scale = alpha / (math.sqrt(rank) if scaling == "rslora" else rank)
        self.a_RI = nn.Parameter(torch.empty(rank, shape[1], dtype=dtype, device=device))
        self.b_OR = nn.Parameter(torch.zeros(shape[0], rank, dtype=dtype, device=device))

    @torch.no_grad()
    def delta(self) -> Tensor:
        """The update of the weight, scale B A, (out, in), formed in fp32."""
        return self.scale * (self.b_OR.float() @ self.a_RI.float())


class LoraLinear(nn.Module):
    """A frozen linear layer that carries adapters, of which at most one is in use.

    Args:
        base: the frozen layer.
    """

    base: Linear

    def __init__(self, base: Linear) -> None:
        super().__init__()
        self.base = base
        self.adapters = nn.ModuleDict()
        self.active: str | None = None

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out), in the dtype of x; with no adapter in use it is the base, bit for bit."""
        read = partial(decode, self.base)
        bias: Tensor | None = self.base.bias
        if self.active is None:
            return lora_linear(x, read, bias)
        adapter = self.adapter(self.active)
        if self.training and adapter.dropout > 0:
            y = lora_linear(x, read, bias)
            h = F.linear(F.dropout(x, adapter.dropout), adapter.a_RI.to(x.dtype))
            return y + adapter.scale * F.linear(h, adapter.b_OR.to(x.dtype))
        return lora_linear(x, read, bias, adapter.a_RI, adapter.b_OR, adapter.scale)

    @torch.no_grad()
    def merged(self) -> Tensor:
        """The weight with the adapter in use added, (out, in), fp32: decode(Wq) + scale B A, rounded nowhere."""
        weight = decode(self.base, torch.float32)
        return weight if self.active is None else weight + self.adapter(self.active).delta()

    def adapter(self, name: str) -> Adapter:
        """The adapter of that name; a `KeyError` if this layer has none."""
        return cast(Adapter, self.adapters[name])

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return linear_shape(self.base)


def lora_layers(model: nn.Module) -> Iterator[tuple[str, LoraLinear]]:
    """Every layer of the model that can carry an adapter, with its dotted name."""
    for name, module in model.named_modules():
        if isinstance(module, LoraLinear):
            yield name, module


def adapter_parameters(model: nn.Module, name: str = "default") -> Iterator[tuple[str, nn.Parameter]]:
    """The matrices of one adapter with their dotted names, in the order of the model's layers."""
    for layer_name, layer in lora_layers(model):
        if name in layer.adapters:
            for leaf, parameter in layer.adapters[name].named_parameters():
                yield f"{layer_name}.{leaf}", parameter


def adapter_names(model: nn.Module) -> list[str]:
    """Names of the adapters on a model, in the order in which they came."""
    return list(dict.fromkeys(name for _, layer in lora_layers(model) for name in layer.adapters))


def check_new_name(model: nn.Module, name: str) -> None:
    """Refuse a name that an adapter to come cannot have.

    Raises:
        AdapterError: the name is taken, or torch cannot store a module under it.
    """
    if name in adapter_names(model):
        raise AdapterError(f"there is an adapter {name!r} on this model already; choose another name")
    if not name or "." in name or hasattr(nn.ModuleDict(), name):
        raise AdapterError(
            f"an adapter cannot have the name {name!r} (empty, with a dot, or torch's own): choose another"
        )


def use_adapter(model: nn.Module, name: str) -> None:
    """Switch every layer to the adapter `name`; layers that it does not cover run as the bare base.

    Raises:
        AdapterError: there is no adapter of that name.
    """
    known = adapter_names(model)
    if name not in known:
        raise AdapterError(f"there is no adapter {name!r} on this model; there are: {', '.join(known) or 'none'}")
    for _, layer in lora_layers(model):
        layer.active = name if name in layer.adapters else None


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Inside the block the model is its base, bit for bit."""
    before = [(layer, layer.active) for _, layer in lora_layers(model)]
    for layer, _ in before:
        layer.active = None
    try:
        yield
    finally:
        for layer, active in before:
            layer.active = active
