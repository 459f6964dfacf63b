"""What an adapter's file holds, by the names of this model, and what of it does not fit."""

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from qlora_kit.base.dense import decode
from qlora_kit.base.experts import expert_stacks
from qlora_kit.base.vocabulary import row_width
from qlora_kit.errors import AdapterError, listed
from qlora_kit.lora.layer import LoraLayer, bare, carriers, weight_shape
from qlora_kit.lora.peft_config import is_target, patterned, saved_modules, saved_tokens, targeted_experts
from qlora_kit.lora.targets import adaptable_weights
from qlora_kit.lora.vocabulary import check_rows, end_names, head_is_tied, head_name
from qlora_kit.lora.whole import check_module

PREFIX = "base_model.model."
LEAVES = {"a_RI": "lora_A.weight", "b_OR": "lora_B.weight", "magnitude_O": "lora_magnitude_vector"}
ROWS = "token_adapter.trainable_tokens_delta"
"""What PEFT calls the tensors of an adapter, in its files."""

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

Parts: TypeAlias = dict[str, Tensor]
"""The tensors of one layer or module by their names here."""


@dataclass(slots=True)
class Contents:
    """What a file holds, by the names of this model: layers, whole modules, rows with their ids, and its faults."""

    layers: dict[str, Parts] = field(default_factory=dict)
    modules: dict[str, Parts] = field(default_factory=dict)
    rows: dict[str, tuple[list[int], Tensor]] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)


def sort_out(model: PreTrainedModel, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> Contents:
    """Each tensor of a file where it belongs, and every fault: of the file itself, and of what does not fit the model.

    Args:
        model: that the adapter shall go on.
        tensors: by their names in the file.
        config: what adapter_config.json says.
    """
    weights = adaptable_weights(model)
    announced = _Announced.by(config, model)
    contents = Contents()
    for key, value in tensors.items():
        if not _is_the_bases_own(key, value, weights):
            contents.faults += _unsound(key, value)
            contents.faults += announced.put(key, value, contents)
    contents.faults += announced.missing(contents, head_name(model) if head_is_tied(model) else None)
    announced.drop_halves(contents)
    contents.faults += _fit_faults(model, weights, contents, config)
    contents.faults += _whole_faults(model, contents)
    return contents


@dataclass(frozen=True, slots=True)
class _Announced:
    """What a config says that the file holds.

    Attributes:
        layers: names of layers by what PEFT calls them, where that differs.
        leaves: the parts that each layer has.
        modules: that were trained whole.
        tokens: ids of trained rows, by the name of embedding or head.
        ends: names of embedding and head here.
    """

    layers: Mapping[str, str]
    leaves: Mapping[str, str]
    modules: list[str]
    tokens: Mapping[str, list[int]]
    ends: Collection[str]

    @classmethod
    def by(cls, config: Mapping[str, Any], model: PreTrainedModel) -> "_Announced":
        return cls(
            layers={stem: key for key, stem in stems(model, targeted_experts(model, config)).items()},
            leaves={leaf: end for leaf, end in LEAVES.items() if config.get("use_dora") or leaf != "magnitude_O"},
            modules=saved_modules(model, config),
            tokens=saved_tokens(model, config),
            ends=end_names(model),
        )

    def put(self, key: str, value: Tensor, contents: Contents) -> Iterator[str]:
        """Put a tensor where it belongs, or say that it belongs nowhere."""
        short = key.removeprefix(PREFIX)
        leaf = next((leaf for leaf, end in self.leaves.items() if key.endswith(f".{end}")), None)
        module = next((module for module in self.modules if short.startswith(f"{module}.")), None)
        rows = short.removesuffix(f".{ROWS}")
        if module is not None and key.startswith(PREFIX):
            contents.modules.setdefault(module, {})[short.removeprefix(f"{module}.")] = value
        elif rows != short and rows in self.tokens and rows in self.ends:
            contents.rows[rows] = (self.tokens[rows], value)
        elif leaf is None and short.removesuffix(".weight").removesuffix(".base_layer") in self.ends:
            yield (
                f"{key} is all of a matrix of its base (PEFT saves it where the vocabulary was resized or the head "
                "adapted), and this base has another"
            )
        elif leaf is None or not key.startswith(PREFIX):
            yield f"{key} is not a LoRA matrix"
        else:
            stem = short.removesuffix(f".{self.leaves[leaf]}")
            contents.layers.setdefault(self.layers.get(stem, stem), {})[leaf] = value

    def missing(self, contents: Contents, tied_head: str | None) -> Iterator[str]:
        """What the file was said to hold and does not; of a tied head it need not hold the embedding's rows again."""
        strange = [key for key in self.tokens if key not in self.ends]
        if strange:
            yield f"trainable_token_indices names {listed(strange)}, neither embedding nor head here"
        lonely = [key for key, parts in contents.layers.items() if len(parts) < len(self.leaves)]
        if lonely:
            yield f"one of {', '.join(self.leaves.values())} is missing for {listed(lonely)}"
        there = {*contents.modules, *contents.rows, *strange, *([tied_head] if contents.rows else [])}
        lost = [key for key in (*self.modules, *self.tokens) if key not in there]
        if lost:
            yield f"the file has no tensors for {listed(lost)} (modules_to_save or trained rows)"

    def drop_halves(self, contents: Contents) -> None:
        """Forget the layers of which parts are missing: whether their shapes fit is of no more interest."""
        contents.layers = {key: parts for key, parts in contents.layers.items() if len(parts) == len(self.leaves)}


def _unsound(key: str, value: Tensor) -> Iterator[str]:
    if value.dtype not in _DTYPES:
        yield f"{key} is in {value.dtype}, which is not a dtype of weights"
    elif not torch.isfinite(value).all():
        yield f"{key} holds NaN or infinity"


def stems(model: PreTrainedModel, names: Iterable[str]) -> dict[str, str]:
    """What PEFT calls each of these layers: its own name, but for experts.

    There PEFT wraps the module that holds the weights, once for each of them, so that the last stands outermost.
    """
    stacks = [name for name in expert_stacks(model) if name in set(names)]
    called = {name: name for name in names}
    for name in stacks:
        holder = name.rpartition(".")[0]
        siblings = [other for other in stacks if other.rpartition(".")[0] == holder]
        called[name] = holder + ".base_layer" * (len(siblings) - 1 - siblings.index(name))
    return called


def _whole_faults(model: PreTrainedModel, contents: Contents) -> list[str]:
    """What is wrong with whole modules and rows."""
    faults = []
    for key, parts in contents.modules.items():
        try:
            check_module(model, key)
        except AdapterError as error:
            faults.append(str(error))
            continue
        own = {leaf: tuple(tensor.shape) for leaf, tensor in bare(model.get_submodule(key)).state_dict().items()}
        found = {leaf: tuple(tensor.shape) for leaf, tensor in parts.items()}
        if own != found:
            faults.append(f"{key} has tensors {found}, wanted {own}")
    for key, (ids, values) in contents.rows.items():
        try:
            check_rows(model, sorted(ids), contents.layers.keys() | contents.modules.keys())
        except AdapterError as error:
            faults.append(str(error))
            continue
        wanted = (len(set(ids)), row_width(bare(model.get_submodule(key))))
        if tuple(values.shape) != wanted:
            faults.append(f"{key} has rows of shape {tuple(values.shape)}, wanted {wanted}")
    return faults


def _fit_faults(
    model: PreTrainedModel,
    weights: Mapping[str, Any],
    contents: Contents,
    config: Mapping[str, Any],
) -> list[str]:
    faults, layers = [], contents.layers
    absent = [key for key in layers if key not in weights]
    if absent:
        faults.append(f"the model has no linear layer {listed(absent)}")
    taken = sorted({key for key, carrier in carriers(model) if not isinstance(carrier, LoraLayer)} & layers.keys())
    if taken:
        faults.append(f"{listed(taken)} is trained whole, or by rows, in another adapter")
    for key, parts in layers.items():
        if key in weights:
            experts, out, width = (1, *weight_shape(weights[key]))[-3:]
            ranks = experts * int(patterned(config.get("rank_pattern"), key, config["r"]))
            wanted = {"a_RI": (ranks, width), "b_OR": (out, ranks), "magnitude_O": (out,)}
            faults += [
                f"{key} has {LEAVES[leaf]} of shape {tuple(tensor.shape)}, wanted {wanted[leaf]}"
                for leaf, tensor in parts.items()
                if tensor.shape != wanted[leaf]
            ]
    targeted = {key for key in weights if is_target(key, config)} - expert_stacks(model).keys()
    targeted |= set(targeted_experts(model, config))
    whole = tuple(f"{module}." for module in contents.modules)  # what is trained whole has no matrices, as in PEFT
    lacking = [key for key in weights if key in targeted and key not in layers and not f"{key}.".startswith(whole)]
    if lacking:
        faults.append(f"the file has no matrices for {listed(lacking)}")
    return faults or ([] if layers else ["the file holds no LoRA matrices"])


def _is_the_bases_own(key: str, value: Tensor, weights: Mapping[str, Any]) -> bool:
    """Whether this is the head's frozen weight, which PEFT saves beside an adapter on the head, as it is here too."""
    layer = weights.get(key.removeprefix(PREFIX).removesuffix(".base_layer.weight"))
    if not key.endswith(".base_layer.weight") or layer is None or tuple(value.shape) != weight_shape(layer):
        return False
    weight = decode(layer, layer.weight.dtype if isinstance(layer, nn.Linear) else torch.float32)
    return torch.equal(value.to(weight.device, weight.dtype), weight)
