"""Which layers and modules a name means; a name that means nothing is an error that names the nearest."""

import difflib
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from qlora_kit.base.experts import expert_stacks
from qlora_kit.base.freeze import body_linears
from qlora_kit.errors import AdapterError
from qlora_kit.lora.layer import LARGEST_ALPHA, LoraExperts, LoraLayer, bare, carriers
from qlora_kit.lora.vocabulary import end_names, head_is_tied, head_name
from qlora_kit.lora.whole import check_module, module_names, modules_named
from qlora_kit.recipe.patterns import compile_pattern
from qlora_kit.units import is_number

GROUPS = ("all-linear", "attention", "mlp", "experts", "head")


def adaptable_linears(model: PreTrainedModel) -> dict[str, nn.Module]:
    """Linear layers by dotted name, adapted or not: those of the body in order, then the head.

    Those inside a module that adapters train whole are not among them: a copy takes their place.
    """
    linears = {name.removesuffix(".base"): module for name, module in body_linears(model)}
    linears = {name: module for name, module in linears.items() if "base" not in name.split(".")}
    head = head_name(model)
    if head is not None:
        linears[head] = bare(model.get_submodule(head))
    return linears


def adaptable_weights(model: PreTrainedModel) -> dict[str, Any]:
    """All that an adapter can go on, by dotted name: linear layers and experts of the body, then the head."""
    stacks = {name: each.base if isinstance(each, LoraExperts) else each for name, each in expert_stacks(model).items()}
    linears = adaptable_linears(model)
    head = head_name(model)
    return (
        {name: linears[name] for name in linears if name != head}
        | stacks
        | {name: linears[name] for name in linears if name == head}
    )


def match_targets(
    model: PreTrainedModel, linears: Mapping[str, nn.Module], targets: str | Sequence[str], *, untie_head: bool = False
) -> set[str]:
    """Dotted names of the layers that `targets` asks for.

    Args:
        model: with its head.
        linears: all that an adapter can go on, by dotted name.
        targets: as in `add_lora`.
        untie_head: whether a head that is tied to the embedding may be among them.

    Raises:
        AdapterError: an entry matches no linear layer; all such entries are named, each with the nearest name.
    """
    entries = [targets] if isinstance(targets, str) else targets
    if not isinstance(entries, Sequence) or not all(isinstance(entry, str) for entry in entries):
        raise AdapterError(f"lora.targets must be a name or a list of names, found {targets!r}")
    chosen: set[str] = set()
    faults: list[str] = []
    for entry in entries:
        found = _match_one(model, linears, entry)
        chosen |= found
        if not found:
            faults.append(_no_match(linears, entry, "targets"))
    if faults or not entries:
        raise AdapterError("; ".join(faults) or "targets is empty; use all-linear, or name layers")
    _check_tie(model, chosen, "lora.targets", untie_head)
    taken = chosen & {name for name, carrier in carriers(model) if not isinstance(carrier, LoraLayer)}
    if taken:
        raise AdapterError(
            f"{min(taken)} is trained whole, or by rows, in another adapter; a LoRA update cannot be added"
        )
    return chosen


def match_modules(
    model: PreTrainedModel, entries: Sequence[str], targets: Collection[str], *, untie_head: bool
) -> list[str]:
    """Dotted names of the modules that are to be trained whole.

    Args:
        model: with its head.
        entries: names, or ends of names.
        targets: layers that get low-rank updates.
        untie_head: whether one that is tied to another may be among them.

    Raises:
        AdapterError: an entry names nothing, or what cannot be trained so.
    """
    chosen: dict[str, None] = {}
    for entry in entries:
        found = modules_named(model, entry)
        if not found:
            names = module_names(model)
            nearest = difflib.get_close_matches(entry, [*names, *(name.rpartition(".")[2] for name in names)], n=1)
            hint = f"; did you mean {nearest[0]}?" if nearest else ""
            raise AdapterError(f"lora.also_train names {entry!r}, which is not a module of this model{hint}")
        chosen |= dict.fromkeys(found)
    for name in chosen:
        check_module(model, name)
        inner = [other for other in chosen if other.startswith(f"{name}.")]
        if inner:
            raise AdapterError(f"lora.also_train names {name} and {inner[0]}, which is a part of it; leave one out")
        both = [target for target in targets if target == name or target.startswith(f"{name}.")]
        if both:
            raise AdapterError(f"{both[0]} is in lora.targets and in lora.also_train; leave it out of one of them")
    _check_tie(model, chosen, "lora.also_train", untie_head)
    return list(chosen)


def _match_one(model: PreTrainedModel, linears: Mapping[str, nn.Module], entry: str) -> set[str]:
    head = head_name(model)
    body = [name for name in linears if name != head]
    if entry == "all-linear":
        return set(body)
    if entry == "head" and head is None:
        raise AdapterError("lora.targets names the head, but this model has no linear output head")
    if head is not None and entry in ("head", head, head.rpartition(".")[2]):
        return {head}
    if entry in ("attention", "mlp"):
        return {name for name in body if _is_attention(name) == (entry == "attention")}
    if entry == "experts":
        return set(expert_stacks(model))
    if entry.startswith("re:"):
        pattern = _compiled(entry, "targets")
        return {name for name in body if pattern.fullmatch(name)}
    return {name for name in body if name == entry or name.rpartition(".")[2] == entry}


def _check_tie(model: PreTrainedModel, chosen: Collection[str], key: str, untie_head: bool) -> None:
    """Refuse to change one of two matrices that are the same, unless that is said to be meant."""
    tied = sorted(set(end_names(model)) & set(chosen)) if head_is_tied(model) else []
    if tied and not untie_head:
        raise AdapterError(
            f"{key} names {tied[0]}, but embedding and head are tied in this model, and one would change without the "
            "other; set lora.untie_head=true if that is meant"
        )


def _is_attention(name: str) -> bool:
    return any("attn" in part or "attention" in part for part in name.split(".")[:-1])


def pattern_values(linears: Mapping[str, nn.Module], pattern: Mapping[str, float], key: str) -> dict[str, float]:
    """What a pattern of ranks or alphas says of each layer that it names.

    Args:
        linears: all there are, by dotted name.
        pattern: leaf name or `re:PATTERN` -> value.
        key: rank_pattern or alpha_pattern.

    Raises:
        AdapterError: a value is impossible, or an entry names nothing.
    """
    values: dict[str, float] = {}
    for entry, value in pattern.items():
        if (
            not is_number(value)
            or not 0 < value < LARGEST_ALPHA
            or (key == "rank_pattern" and not isinstance(value, int))
        ):
            kind = "whole number" if key == "rank_pattern" else "number"
            raise AdapterError(f"lora.{key} gives {entry!r} the value {value}; it must be a {kind} above 0")
        if entry.startswith("re:"):
            pattern_of_names = _compiled(entry, key)
            found = [name for name in linears if pattern_of_names.fullmatch(name)]
        else:
            found = [name for name in linears if name == entry or name.rpartition(".")[2] == entry]
        if not found:
            raise AdapterError(_no_match(linears, entry, key))
        values.update(dict.fromkeys(found, value))
    return values


def _compiled(entry: str, key: str) -> re.Pattern[str]:
    try:
        return compile_pattern(entry[3:])
    except ValueError as error:
        raise AdapterError(f"lora.{key} has {entry!r}, and this regular expression {error}") from error


def _no_match(linears: Mapping[str, nn.Module], entry: str, key: str) -> str:
    leaves = sorted({name.rpartition(".")[2] for name in linears})
    nearest = difflib.get_close_matches(entry, [*leaves, *GROUPS], n=1)
    hint = f"did you mean {nearest[0]}? " if nearest else ""
    return f"lora.{key} names {entry!r}, which is not a linear layer of this model; {hint}it has: {', '.join(leaves)}"
