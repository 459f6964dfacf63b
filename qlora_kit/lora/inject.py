"""How an adapter comes onto a model: layers wrapped, matrices made, and a report of what was covered."""

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, get_args

import torch
from transformers import PreTrainedModel

from qlora_kit.base.dense import parameter_count
from qlora_kit.base.experts import ExpertStack, expert_stacks, stack_experts
from qlora_kit.base.freeze import left_dense
from qlora_kit.base.record import base_record
from qlora_kit.base.text import text_body
from qlora_kit.errors import AdapterError, listed
from qlora_kit.lora.init import Init, Start
from qlora_kit.lora.layer import (
    LARGEST_ALPHA,
    Carrier,
    LoraExperts,
    LoraLayer,
    LoraLinear,
    Scaling,
    adapter_parameters,
    lora_layers,
)
from qlora_kit.lora.several import adapter_names, check_new_name, use_adapter, whole_or_nothing
from qlora_kit.lora.targets import adaptable_weights, match_modules, match_targets, pattern_values
from qlora_kit.lora.vocabulary import check_rows, train_rows
from qlora_kit.lora.whole import train_module
from qlora_kit.recipe import Lora
from qlora_kit.units import counted, is_number

WORTH_SAYING = 0.01
"""Share of the weights from which on it is said that they stay as they are."""


@dataclass(frozen=True, slots=True)
class LoraReport:
    """What an injection did.

    Attributes:
        matched: dotted names of the layers that carry the adapter.
        unmatched: layers that could and do not, the head among them.
        trainable: parameters of the adapter.
        total: parameters of the base, quantised ones counted by their true shape.
        scales: by which updates are multiplied, alpha over rank or over its root; more than one under patterns.
        notes: what a person should know, a line each.
    """

    matched: tuple[str, ...]
    unmatched: tuple[str, ...]
    trainable: int
    total: int
    scales: tuple[float, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def share(self) -> float:
        """Trainable parameters over those of the base."""
        return self.trainable / self.total


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
    also_train: str | Sequence[str] = (),
    added_tokens: Sequence[int] = (),
    untie_head: bool = False,
    name: str = "default",
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
    originals: PreTrainedModel | None = None,
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
        init: default, gaussian, pissa or loftq (see `lora/init`).
        dora: train the norms of the merged weight's rows too (arXiv 2402.09353).
        rank_pattern: leaf name or `re:PATTERN` -> another rank, of each expert where they are experts.
        alpha_pattern: leaf name or `re:PATTERN` -> another alpha.
        also_train: modules to train whole, by name or by its end. Those that the checkpoint had no weights for, such as
            a new classifier, are among them without being named.
        added_tokens: ids of tokens whose rows of the embedding and of the head are trained.
        untie_head: let an adapter change a head that is tied to the embedding, which then stands on its own in every
            merged export.
        name: of the adapter.
        dtype: of A and B.
        seed: of A's random start.
        originals: the dense model that the base was made from, for loftq; None reads it again.

    Returns:
        What matched, what did not, and how many parameters train.

    Raises:
        AdapterError: a number is impossible, a pattern matches nothing, or the name is taken.
    """
    _check_settings(rank, alpha, dropout, scaling, init, dtype)
    check_new_name(model, name)
    record = base_record(model)
    weights = adaptable_weights(model)
    chosen = match_targets(model, weights, targets, untie_head=untie_head)
    chosen = {each for each in chosen if not f"{each}.".startswith(tuple(f"{new}." for new in record.untrained))}
    ranks = _ranks(model, weights, chosen, rank, rank_pattern or {})
    alphas = pattern_values(weights, alpha_pattern or {}, "alpha_pattern")
    named = [also_train] if isinstance(also_train, str) else also_train
    modules = match_modules(model, [*named, *record.untrained], chosen, untie_head=untie_head)
    check_rows(model, added_tokens, chosen | set(modules))
    experts = chosen & expert_stacks(model).keys()
    if dora and experts:
        raise AdapterError(f"dora is not possible on experts ({min(experts)}); name other targets, or use dora=False")
    start = Start(model, init, seed, originals)
    if experts:
        stack_experts(model)
    with whole_or_nothing(model, name):
        for layer_name, own_rank in ranks.items():
            layer = wrap(model, layer_name)
            start.check(layer_name, layer.shape, own_rank)
            own_alpha = alphas.get(layer_name, alpha)
            adapter = layer.new_adapter(
                own_rank, own_alpha, scaling=scaling, dropout=dropout, is_dora=dora, dtype=dtype
            )
            start.fill(adapter, layer_name, layer.base)
            layer.adapters[name] = adapter.train(layer.training)
        for module_name in modules:
            train_module(model, module_name, name)
        if added_tokens:
            train_rows(model, sorted(set(added_tokens)), name)
        use_adapter(model, name)
    report = lora_report(model, name)
    return replace(report, notes=tuple(_notes(model, name, report.total)))


def add_recipe_lora(
    model: PreTrainedModel,
    lora: Lora,
    *,
    seed: int = 0,
    token_ids: Sequence[int] = (),
    name: str = "default",
    originals: PreTrainedModel | None = None,
) -> LoraReport:
    """`add_lora` with the settings of a recipe's section; `token_ids` are those of its added tokens."""
    return add_lora(
        model,
        rank=int(lora.rank),
        alpha=lora.alpha,
        targets=lora.targets,
        dropout=lora.dropout,
        scaling=lora.scaling,
        init=lora.init,
        dora=lora.dora,
        rank_pattern=lora.rank_pattern,
        alpha_pattern=lora.alpha_pattern,
        also_train=lora.also_train,
        added_tokens=token_ids,
        untie_head=lora.untie_head,
        name=name,
        seed=seed,
        originals=originals,
    )


def _ranks(
    model: PreTrainedModel, weights: Mapping[str, Any], chosen: Collection[str], rank: int, pattern: Mapping[str, int]
) -> dict[str, int]:
    """The rank of each layer that gets an update, in the order of the model."""
    own = pattern_values(weights, pattern, "rank_pattern")
    shared = dict.fromkeys(expert_stacks(model), rank_of_experts(model, rank))
    return {name: int(own.get(name, shared.get(name, rank))) for name in weights if name in chosen}


def rank_of_experts(model: PreTrainedModel, rank: int) -> int:
    """The rank of each expert whose adapters together are worth one of rank `rank` to a token."""
    active = getattr(model.config.get_text_config(), "num_experts_per_tok", None) or 1
    return max(1, math.ceil(rank / active))


def wrap(model: PreTrainedModel, layer_name: str) -> LoraLayer:
    """The layer of that name as one that can carry adapters; with none in use it runs as before, bit for bit."""
    module: Any = model.get_submodule(layer_name)
    assert isinstance(module, LoraLayer) or not isinstance(module, Carrier), f"{layer_name} carries something else"
    if not isinstance(module, LoraLayer):
        kind = LoraExperts if isinstance(module, ExpertStack) else LoraLinear
        module = kind(module).train(module.training)
        model.set_submodule(layer_name, module)
    return module


def lora_report(model: PreTrainedModel, name: str) -> LoraReport:
    """What the adapter `name` covers on this model."""
    layers = {layer_name: layer for layer_name, layer in lora_layers(model) if name in layer.adapters}
    matched = tuple(layers)
    unmatched = tuple(layer_name for layer_name in adaptable_weights(model) if layer_name not in layers)
    trainable = sum(parameter.numel() for _, parameter in adapter_parameters(model, name))
    scales = tuple(sorted({layer.adapter(name).scale for layer in layers.values()}))
    return LoraReport(matched, unmatched, trainable, base_parameter_count(model), scales)


def base_parameter_count(model: PreTrainedModel) -> int:
    """Parameters of a model without those of the adapters on it, whatever their names."""
    adapters = sum(p.numel() for name in adapter_names(model) for _, p in adapter_parameters(model, name))
    return parameter_count(model) - adapters


def _notes(model: PreTrainedModel, name: str, total: int) -> Iterator[str]:
    full = [
        (layer_name, layer.adapter(name).rank)
        for layer_name, layer in lora_layers(model)
        if name in layer.adapters and layer.adapter(name).rank > min(layer.shape[-2:])
    ]
    if full:
        yield (
            f"rank {full[0][1]} is above the smaller width of {full[0][0]} "
            f"(and of {counted(len(full) - 1, 'more layer')}): a rank of that width can do as much there"
        )
    if unused := base_record(model).unused:
        yield f"the base's checkpoint holds tensors that the model has no place for, left out: {listed(unused)}"
    dense = left_dense(model)
    share = sum(parameter.numel() for parameter in dense.values()) / total
    if base_record(model).quantization.kind != "none" and share >= WORTH_SAYING:
        first = next(iter(dense))
        kind = type(text_body(model).get_submodule(first.rpartition(".")[0])).__name__
        yield (
            f"{share:.0%} of the weights are not quantised: {first} and {len(dense) - 1} more are parameters of a "
            f"{kind}, for which the kit has no rule"
        )


def _check_settings(rank: int, alpha: float, dropout: float, scaling: str, init: str, dtype: torch.dtype) -> None:
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise AdapterError(f"rank must be a whole number of at least 1, found {rank!r}")
    if not is_number(alpha) or not 0 < alpha < LARGEST_ALPHA:
        raise AdapterError(f"alpha must be a number above 0, found {alpha!r}")
    if not is_number(dropout) or not 0 <= dropout < 1:
        raise AdapterError(f"dropout must be at least 0 and below 1, found {dropout!r}")
    if not dtype.is_floating_point or dtype.itemsize < 2:
        raise AdapterError(f"dtype must be a floating one of 16 bits or more, found {dtype}")
    for what, value, known in (("scaling", scaling, get_args(Scaling)), ("init", init, get_args(Init))):
        if value not in known:
            raise AdapterError(f"{what} must be one of {', '.join(known)}, found {value!r}")
