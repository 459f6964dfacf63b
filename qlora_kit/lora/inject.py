"""Where adapters go: targets to layers, every pattern of which must match something."""

import difflib
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, get_args

import torch
from torch import nn
from transformers import PreTrainedModel

from qlora_kit.base.dense import is_linear, parameter_count
from qlora_kit.base.experts import ExpertStack, expert_stacks, stack_experts
from qlora_kit.base.load import body_linears
from qlora_kit.errors import AdapterError
from qlora_kit.lora.init import Init, init_adapter
from qlora_kit.lora.layer import (
    Adapter,
    LoraExperts,
    LoraLayer,
    LoraLinear,
    Scaling,
    adapter_parameters,
    lora_layers,
    row_squares,
)
from qlora_kit.lora.several import adapter_names, check_new_name, use_adapter
from qlora_kit.recipe import Lora

GROUPS = ("all-linear", "attention", "mlp", "experts", "head")


@dataclass(frozen=True, slots=True)
class LoraReport:
    """What an injection did.

    Attributes:
        matched: dotted names of the layers that carry the adapter.
        unmatched: linear layers of the body that do not.
        trainable: parameters of the adapter.
        total: parameters of the base, quantised ones counted by their true shape.
        notes: what a person should know, a line each.
    """

    matched: tuple[str, ...]
    unmatched: tuple[str, ...]
    trainable: int
    total: int
    notes: tuple[str, ...] = ()


def add_lora(
    model: PreTrainedModel,
    *,
    rank: int = 16,
    alpha: float = 32,
    targets: str | Sequence[str] = "all-linear",
    dropout: float = 0.0,
    scaling: Scaling = "standard",
    init: Init = "default",
    dora: bool = False,
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
    name: str = "default",
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
) -> LoraReport:
    """Attach a trainable adapter to the linear layers that `targets` names, and switch to it.

    Args:
        model: frozen, as `load_base` returns it; its layers are replaced in place.
        rank: R, at least 1. Experts get max(1, ceil(R / experts that a token takes)) each, which is as much for a
            token as R on one layer is (LoRA Without Regret).
        alpha: numerator of the scale, not 0.
        targets: all-linear, attention, mlp, experts, head, `re:PATTERN` (matched against whole dotted names), a leaf
            name, or a list of these. The head is never part of all-linear.
        dropout: on the adapter's input while training, in [0, 1).
        scaling: standard (alpha / rank) or rslora (alpha / sqrt(rank)).
        init: default or gaussian.
        dora: train the norms of the merged weight's rows too (arXiv 2402.09353).
        rank_pattern: leaf name or `re:PATTERN` -> another rank, of each expert where they are experts.
        alpha_pattern: leaf name or `re:PATTERN` -> another alpha.
        name: of the adapter.
        dtype: of A and B.
        seed: of A's random start.

    Returns:
        What matched, what did not, and how many parameters train.

    Raises:
        AdapterError: a number is impossible, a pattern matches nothing, or the name is taken.
    """
    _check_settings(rank, alpha, dropout, scaling, init)
    check_new_name(model, name)
    weights = adaptable_weights(model)
    chosen = match_targets(model, weights, targets)
    ranks = _pattern_values(weights, rank_pattern or {}, "rank_pattern")
    alphas = _pattern_values(weights, alpha_pattern or {}, "alpha_pattern")
    experts = chosen & expert_stacks(model).keys()
    if dora and experts:
        raise AdapterError(f"dora is not possible on experts ({min(experts)}); name other targets, or use dora=False")
    if experts:
        stack_experts(model)
    for layer_name in (each for each in weights if each in chosen):
        layer = wrap(model, layer_name)
        own_rank = rank_of_experts(model, rank) if layer_name in experts else rank
        adapter = Adapter(
            layer.shape,
            int(ranks.get(layer_name, own_rank)),
            alphas.get(layer_name, alpha),
            scaling=scaling,
            dropout=dropout,
            square_O=row_squares(layer.base) if dora else None,
            dtype=dtype,
            device=_device(layer.base),
        )
        init_adapter(adapter, layer_name, init, seed)
        layer.adapters[name] = adapter.train(layer.training)
    use_adapter(model, name)
    return replace(lora_report(model, name), notes=tuple(_notes(model, name)))


def add_recipe_lora(model: PreTrainedModel, lora: Lora, *, seed: int = 0) -> LoraReport:
    """`add_lora` with the settings of a recipe's section."""
    return add_lora(
        model,
        rank=int(lora.rank),
        alpha=lora.alpha,
        targets=lora.targets,
        dropout=lora.dropout,
        scaling=lora.scaling,
        init=lora.init,  # type: ignore[arg-type]
        dora=lora.dora,
        rank_pattern=lora.rank_pattern,
        alpha_pattern=lora.alpha_pattern,
        seed=seed,
    )


def adaptable_linears(model: PreTrainedModel) -> dict[str, nn.Module]:
    """Linear layers by dotted name, adapted or not: those of the body in order, then the head."""
    linears = {name.removesuffix(".base"): module for name, module in body_linears(model)}
    head = head_name(model)
    if head is not None:
        module = model.get_submodule(head)
        linears[head] = module.base if isinstance(module, LoraLinear) else module
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


def rank_of_experts(model: PreTrainedModel, rank: int) -> int:
    """The rank of each expert whose adapters together are worth one of rank `rank` to a token."""
    active = getattr(model.config.get_text_config(), "num_experts_per_tok", None) or 1
    return max(1, math.ceil(rank / active))


def wrap(model: PreTrainedModel, layer_name: str) -> LoraLayer:
    """The layer of that name as one that can carry adapters; with none in use it runs as before, bit for bit."""
    module: Any = model.get_submodule(layer_name)
    if not isinstance(module, LoraLayer):
        kind = LoraExperts if isinstance(module, ExpertStack) else LoraLinear
        module = kind(module).train(module.training)
        model.set_submodule(layer_name, module)
    return module


def lora_report(model: PreTrainedModel, name: str) -> LoraReport:
    """What the adapter `name` covers on this model."""
    matched = tuple(layer_name for layer_name, layer in lora_layers(model) if name in layer.adapters)
    unmatched = tuple(layer_name for layer_name in adaptable_weights(model) if layer_name not in set(matched))
    trainable = sum(parameter.numel() for _, parameter in adapter_parameters(model, name))
    adapters = sum(p.numel() for other in adapter_names(model) for _, p in adapter_parameters(model, other))
    return LoraReport(matched, unmatched, trainable, parameter_count(model) - adapters)


def head_name(model: PreTrainedModel) -> str | None:
    """Dotted name of the output head, if the model has one that is a linear layer."""
    head = model.get_output_embeddings()
    is_fit = isinstance(head, LoraLinear) or (head is not None and is_linear(head))
    return next((name for name, module in model.named_modules() if module is head), None) if is_fit else None


def head_is_tied(model: PreTrainedModel) -> bool:
    """Whether the output head shares its weight with the input embedding, so that both change together."""
    head = model.get_output_embeddings()
    dense = head.base if isinstance(head, LoraLinear) else head
    return dense is not None and getattr(dense, "weight", None) is model.get_input_embeddings().weight


def match_targets(model: PreTrainedModel, linears: Mapping[str, nn.Module], targets: str | Sequence[str]) -> set[str]:
    """Dotted names of the layers that `targets` asks for.

    Raises:
        AdapterError: an entry matches no linear layer; all such entries are named, each with the nearest name.
    """
    entries = [targets] if isinstance(targets, str) else list(targets)
    chosen: set[str] = set()
    faults: list[str] = []
    for entry in entries:
        found = _match_one(model, linears, entry)
        chosen |= found
        if not found:
            faults.append(_no_match(linears, entry))
    if faults or not entries:
        raise AdapterError("; ".join(faults) or "targets is empty; use all-linear, or name layers")
    return chosen


def _match_one(model: PreTrainedModel, linears: Mapping[str, nn.Module], entry: str) -> set[str]:
    head = head_name(model)
    body = [name for name in linears if name != head]
    if entry == "all-linear":
        return set(body)
    if entry == "head" or (head is not None and entry in (head, head.rpartition(".")[2])):
        return _head_target(model, head)
    if entry in ("attention", "mlp"):
        return {name for name in body if _is_attention(name) == (entry == "attention")}
    if entry == "experts":
        return set(expert_stacks(model))
    if entry.startswith("re:"):
        pattern = _compiled(entry, "targets")
        return {name for name in body if pattern.fullmatch(name)}
    return {name for name in body if name == entry or name.rpartition(".")[2] == entry}


def _head_target(model: PreTrainedModel, head: str | None) -> set[str]:
    if head is None:
        raise AdapterError("lora.targets names the head, but this model has no linear output head")
    if head_is_tied(model):
        raise AdapterError(
            f"lora.targets names the head, but {head} is tied to the input embedding, which would change with it; "
            "choose all-linear, attention or mlp"
        )
    return {head}


def _is_attention(name: str) -> bool:
    return any("attn" in part or "attention" in part for part in name.split(".")[:-1])


def _pattern_values(linears: Mapping[str, nn.Module], pattern: Mapping[str, float], key: str) -> dict[str, float]:
    values: dict[str, float] = {}
    for entry, value in pattern.items():
        if not 0 < value < math.inf or (key == "rank_pattern" and not isinstance(value, int)):
            kind = "whole number" if key == "rank_pattern" else "number"
            raise AdapterError(f"lora.{key} gives {entry!r} the value {value}; it must be a {kind} above 0")
        if entry.startswith("re:"):
            pattern_of_names = _compiled(entry, key)
            found = [name for name in linears if pattern_of_names.fullmatch(name)]
        else:
            found = [name for name in linears if name == entry or name.rpartition(".")[2] == entry]
        if not found:
            raise AdapterError(_no_match(linears, entry).replace("lora.targets", f"lora.{key}"))
        values.update(dict.fromkeys(found, value))
    return values


def _compiled(entry: str, key: str) -> re.Pattern[str]:
    try:
        return re.compile(entry[3:])
    except re.error as error:
        raise AdapterError(f"lora.{key} has {entry!r}, which is no regular expression: {error}") from error


def _no_match(linears: Mapping[str, nn.Module], entry: str) -> str:
    leaves = sorted({name.rpartition(".")[2] for name in linears})
    nearest = difflib.get_close_matches(entry, [*leaves, *GROUPS], n=1)
    hint = f"did you mean {nearest[0]}? " if nearest else ""
    return f"lora.targets names {entry!r}, which is no linear layer of this model; {hint}there are: {', '.join(leaves)}"


def _notes(model: PreTrainedModel, name: str) -> Iterator[str]:
    full = [
        (layer_name, layer.adapter(name).rank)
        for layer_name, layer in lora_layers(model)
        if name in layer.adapters and layer.adapter(name).rank > min(layer.shape[-2:])
    ]
    if full:
        yield (
            f"rank {full[0][1]} is above both widths of {full[0][0]} (and of {len(full) - 1} more layers): a smaller "
            "rank can do as much there"
        )


def _check_settings(rank: int, alpha: float, dropout: float, scaling: str, init: str) -> None:
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise AdapterError(f"rank must be a whole number of at least 1, found {rank!r}")
    if not 0 < alpha < math.inf:
        raise AdapterError(f"alpha must be a number above 0, found {alpha!r}")
    if not 0 <= dropout < 1:
        raise AdapterError(f"dropout must be at least 0 and below 1, found {dropout!r}")
    for what, value, known in (("scaling", scaling, get_args(Scaling)), ("init", init, get_args(Init))):
        if value not in known:
            raise AdapterError(f"{what} must be one of {', '.join(known)}, found {value!r}")


def _device(module: nn.Module) -> torch.device:
    return next(tensor.device for tensor in (*module.buffers(), *module.parameters()))
