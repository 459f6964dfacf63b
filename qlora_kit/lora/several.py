"""Several adapters on one base: their names, which one is in use, none of them, one less, and one made of many.

    combined:  sum over i of w_i scale_i B_i A_i  =  [w_1 scale_1 B_1, w_2 scale_2 B_2, ...] [A_1; A_2; ...]

so a weighted sum of adapters is an adapter again, exactly, whose rank is the sum of theirs.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn

from qlora_kit.errors import AdapterError
from qlora_kit.lora.layer import Adapter, LoraLayer, lora_layers


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
    _check_known(model, [name])
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


def delete_adapter(model: nn.Module, name: str) -> None:
    """Take an adapter off the model; if it was in use, the model is its base from now on.

    Raises:
        AdapterError: there is no adapter of that name.
    """
    _check_known(model, [name])
    for _, layer in lora_layers(model):
        if name in layer.adapters:
            del layer.adapters[name]
            layer.active = None if layer.active == name else layer.active


def combine_adapters(model: nn.Module, weights: Mapping[str, float], name: str) -> None:
    """Make the weighted sum of adapters an adapter of its own, frozen like them or not, and switch to it.

    Args:
        model: carries the adapters; they stay as they are.
        weights: adapter name -> its weight in the sum.
        name: of the sum.

    Raises:
        AdapterError: a name is not known or taken, or one of the adapters is a DoRA, whose norms do not add up.
    """
    if not weights:
        raise AdapterError("there is nothing to combine; give adapter names with their weights")
    _check_known(model, weights)
    check_new_name(model, name)
    doras = [other for other in weights for _, layer in lora_layers(model) if _has_norms(layer, other)]
    if doras:
        raise AdapterError(f"adapter {doras[0]!r} is a DoRA, and a sum of those is no adapter; export it merged")
    for _, layer in lora_layers(model):
        parts = {other: layer.adapter(other) for other in weights if other in layer.adapters}
        if parts:
            layer.adapters[name] = _sum(layer, parts, weights).train(layer.training)
    use_adapter(model, name)


@torch.no_grad()
def _sum(layer: LoraLayer, parts: Mapping[str, Adapter], weights: Mapping[str, float]) -> Adapter:
    """In fp32, so that no weight is rounded."""
    rank = sum(part.rank for part in parts.values())
    device = next(iter(parts.values())).a_RI.device
    total = Adapter(layer.shape, rank, rank, dtype=torch.float32, device=device)
    total.a_RI.copy_(torch.cat([part.a_RI.float() for part in parts.values()], dim=-2))
    total.b_OR.copy_(torch.cat([weights[n] * part.scale * part.b_OR.float() for n, part in parts.items()], dim=-1))
    return total


def _has_norms(layer: LoraLayer, name: str) -> bool:
    return name in layer.adapters and layer.adapter(name).is_dora


def _check_known(model: nn.Module, names: Iterable[str]) -> None:
    known = adapter_names(model)
    for name in names:
        if name not in known:
            raise AdapterError(f"there is no adapter {name!r} on this model; there are: {', '.join(known) or 'none'}")
