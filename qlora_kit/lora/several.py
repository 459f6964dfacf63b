"""Several adapters on one base: their names, switching to one or to none, deleting one, and combining several.

    combined:  sum over i of w_i scale_i B_i A_i  =  [w_1 scale_1 B_1, w_2 scale_2 B_2, ...] [A_1; A_2; ...]

so a weighted sum of adapters is an adapter again, exactly, whose rank is the sum of theirs.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import nn

from qlora_kit.errors import AdapterError
from qlora_kit.lora.layer import Adapter, Carrier, LoraLayer, carriers, join_siblings, lora_layers


def adapter_names(model: nn.Module) -> list[str]:
    """Names of the adapters on a model, in the order in which they came."""
    return list(dict.fromkeys(name for _, carrier in carriers(model) for name in carrier.adapters))


def check_new_name(model: nn.Module, name: str) -> None:
    """Refuse a name that an adapter to come cannot have.

    Raises:
        AdapterError: the name is taken, or torch cannot store a module under it.
    """
    if name in adapter_names(model):
        raise AdapterError(f"there is already an adapter {name!r} on this model; choose another name")
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
    for _, carrier in carriers(model):
        carrier.active = name if name in carrier.adapters else None
    join_siblings(model)


@contextmanager
def adapter_used(model: nn.Module, name: str | None) -> Iterator[None]:
    """Inside the block the adapter `name` is in use, or with None the model is its base, bit for bit."""
    before = [(carrier, carrier.active) for _, carrier in carriers(model)]
    for carrier, _ in before:
        carrier.active = name if name is not None and name in carrier.adapters else None
    try:
        yield
    finally:
        for _, carrier in carriers(model):  # those too that came in the block
            carrier.active = None
        for carrier, active in before:
            carrier.active = active


def adapters_off(model: nn.Module) -> AbstractContextManager[None]:
    """Inside the block the model is its base, bit for bit."""
    return adapter_used(model, None)


def delete_adapter(model: nn.Module, name: str) -> None:
    """Take an adapter off the model; if it was in use, the model is its base from now on.

    Raises:
        AdapterError: there is no adapter of that name.
    """
    _check_known(model, [name])
    _forget(model, name)


@contextmanager
def whole_or_nothing(model: nn.Module, name: str) -> Iterator[None]:
    """If the block ends in an error, whatever of the adapter `name` came onto the model goes again."""
    in_use = [(carrier, carrier.active) for _, carrier in carriers(model)]
    is_whole = False
    try:
        yield
        is_whole = True
    finally:
        if not is_whole:
            _forget(model, name)
            for carrier, active in in_use:
                carrier.active = active


def _forget(model: nn.Module, name: str) -> None:
    """Take all of an adapter away, and what carries nothing any more with it."""
    for carrier_name, carrier in list(carriers(model)):
        if name in carrier.adapters:
            del carrier.adapters[name]
            carrier.active = None if carrier.active == name else carrier.active
        if not carrier.adapters:
            model.set_submodule(carrier_name, carrier.base)


def combine_adapters(model: nn.Module, weights: Mapping[str, float], name: str) -> None:
    """Make the weighted sum of adapters an adapter of its own, frozen like them or not, and switch to it.

    Args:
        model: carries the adapters; they stay as they are.
        weights: adapter name -> its weight in the sum.
        name: of the sum.

    Raises:
        AdapterError: a name is not known or taken, or one of the adapters has parts that do not add up: a DoRA's norms,
            whole modules, rows of tokens.
    """
    if not weights:
        raise AdapterError("there is nothing to combine; give adapter names with their weights")
    _check_known(model, weights)
    check_new_name(model, name)
    odd = [other for other in weights for _, carrier in carriers(model) if _is_no_sum(carrier, other)]
    if odd:
        raise AdapterError(
            f"adapter {odd[0]!r} is a DoRA, or trains whole modules or rows, so a weighted sum with it is not an "
            "adapter: export it merged"
        )
    for _, layer in lora_layers(model):
        parts = {other: layer.adapter(other) for other in weights if other in layer.adapters}
        if parts:
            layer.adapters[name] = _sum(layer, parts, weights).train(layer.training)
    use_adapter(model, name)


@torch.no_grad()
def _sum(layer: LoraLayer, parts: Mapping[str, Adapter], weights: Mapping[str, float]) -> Adapter:
    """In fp32, so that no weight is rounded."""
    pairs = {name: part.matrices for name, part in parts.items()}
    a_RI = torch.cat([a.float() for a, _ in pairs.values()], dim=-2)
    rank = a_RI.shape[-2]
    total = Adapter(layer.shape, rank, rank, dtype=torch.float32, device=a_RI.device)
    total.a_RI.copy_(a_RI)
    total.b_OR.copy_(torch.cat([weights[n] * parts[n].scale * b.float() for n, (_, b) in pairs.items()], dim=-1))
    return total


def _is_no_sum(carrier: Carrier, name: str) -> bool:
    return name in carrier.adapters and not (isinstance(carrier, LoraLayer) and not carrier.adapter(name).is_dora)


def _check_known(model: nn.Module, names: Iterable[str]) -> None:
    known = adapter_names(model)
    for name in names:
        if name not in known:
            raise AdapterError(f"there is no adapter {name!r} on this model; there are: {', '.join(known) or 'none'}")
