"""adapter_config.json, PEFT's description of an adapter: written, read, and every field of it judged."""

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from qlora_kit.base.architecture import head_of
from qlora_kit.base.dense import is_transposed
from qlora_kit.base.experts import expert_stacks
from qlora_kit.base.text import text_body_name, unread_parameters
from qlora_kit.errors import AdapterError, RunError
from qlora_kit.lora.layer import LARGEST_ALPHA, LoraLinear, carriers, lora_layers
from qlora_kit.lora.targets import adaptable_linears
from qlora_kit.lora.vocabulary import RowsEmbedding, RowsHead, end_names
from qlora_kit.lora.whole import WholeModule, module_names, modules_named
from qlora_kit.recipe.patterns import compile_pattern
from qlora_kit.storage import read_json
from qlora_kit.units import is_number

# Fields of PEFT's configuration with the value under which they change nothing here; any other value changes the model.
_NEUTRAL: dict[str, Any] = {
    "bias": "none",
    "use_qalora": False,
    "alora_invocation_tokens": None,
    "arrow_config": None,
    "corda_config": None,
    "ensure_weight_tying": False,
    "eva_config": None,
    "kasa_config": None,
    "layer_replication": None,
    "lora_bias": False,
    "lora_ga_config": None,
    "megatron_config": None,
    "monteclora_config": None,
    "use_bdlora": None,
    "velora_config": None,
}
_READ = frozenset(
    (
        "peft_type",
        "base_model_name_or_path",
        "r",
        "lora_alpha",
        "target_modules",
        "target_parameters",
        "modules_to_save",
        "trainable_token_indices",
        "lora_dropout",
        "use_rslora",
        "use_dora",
        "rank_pattern",
        "alpha_pattern",
        "init_lora_weights",
        "exclude_modules",
        "layers_to_transform",
    )
)
"""Fields that decide what is loaded."""
# Fields that only describe the adapter or steer PEFT, with the values that nobody need be told of.
_INERT: dict[str, tuple[object, ...]] = {
    "task_type": ("CAUSAL_LM", "SEQ_CLS"),
    "revision": (),
    "inference_mode": (True,),
    "auto_mapping": (),
    "peft_version": (),
    "fan_in_fan_out": (True,),
    "layers_pattern": (),
    "loftq_config": (),
    "runtime_config": ({"ephemeral_gpu_offload": False},),
    "qalora_group_size": (16,),
    "megatron_core": ("megatron.core",),
}
_CHANGES_THE_BASE = ("pissa", "olora", "corda", "lora_ga", "loftq")
"""Starts of PEFT that take something out of the base, so that the file is half of what was trained."""


def peft_config(model: PreTrainedModel, name: str) -> dict[str, Any]:
    """adapter_config.json of one adapter, as PEFT reads it."""
    layers = {key: layer for key, layer in lora_layers(model) if name in layer.adapters}
    adapters = {layer_name: layer.adapter(name) for layer_name, layer in layers.items()}
    ranks = {key: adapter.stored_rank for key, adapter in adapters.items()}
    alphas = {key: adapter.stored_alpha for key, adapter in adapters.items()}
    rank = Counter(ranks.values()).most_common(1)[0][0]
    alpha = Counter(alphas.values()).most_common(1)[0][0]
    first = next(iter(adapters.values()))
    experts = [key for key in layers if key in expert_stacks(model)]
    whole = [key for key, carrier in carriers(model) if isinstance(carrier, WholeModule) and name in carrier.adapters]
    return {
        "peft_type": "LORA",
        "task_type": "SEQ_CLS" if head_of(model) == "classification" else "CAUSAL_LM",
        "base_model_name_or_path": model.config._name_or_path,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0 if experts else first.dropout,  # PEFT has none on experts, and it is for training alone
        "use_rslora": first.scaling == "rslora",
        "use_dora": first.is_dora,
        "bias": "none",
        "target_modules": _target_modules(model, [key for key in layers if key not in experts]),
        "target_parameters": experts or None,
        "modules_to_save": whole or None,
        "trainable_token_indices": _token_indices(model, name) or None,
        "rank_pattern": {_exactly(key): value for key, value in ranks.items() if value != rank},
        "alpha_pattern": {_exactly(key): value for key, value in alphas.items() if value != alpha},
        "fan_in_fan_out": all(isinstance(layer, LoraLinear) and is_transposed(layer.base) for layer in layers.values()),
        "init_lora_weights": True,
    }


def _token_indices(model: PreTrainedModel, name: str) -> dict[str, list[int]]:
    """Module -> the token ids whose rows it trains; a head that shares the embedding's rows follows by itself."""
    indices: dict[str, list[int]] = {}
    seen: set[nn.Module] = set()
    for key, carrier in carriers(model):
        if isinstance(carrier, RowsEmbedding | RowsHead) and name in carrier.adapters:
            rows: Any = carrier.adapters[name]
            if rows not in seen:
                indices[key.rpartition(".")[2]] = rows.ids_K.tolist()
                seen.add(rows)
    return indices


def _target_modules(model: PreTrainedModel, matched: Sequence[str]) -> list[str] | str:
    """Leaf names where they say exactly what was matched, whole names otherwise (PEFT matches by suffix).

    A model that sees, too, has layers of the same leaf names that text never reaches: there a pattern says in which
    part of the model the leaf names are meant.
    """
    leaves = sorted({layer_name.rpartition(".")[2] for layer_name in matched})
    reached = {key for key in adaptable_linears(model) if key.rpartition(".")[2] in leaves}
    body = f"{text_body_name(model)}."
    if reached == set(matched) and not (leaves and unread_parameters(model)):
        return leaves
    if reached == set(matched) and all(key.startswith(body) for key in matched):
        return rf"{_exactly(body)}.*\.({'|'.join(leaves)})"
    return sorted(matched)


def _exactly(layer_name: str) -> str:
    """A key that PEFT matches against this one layer: it reads the key as a pattern for the name's end."""
    return layer_name.replace(".", r"\.")


def read_config(path: Path) -> dict[str, Any]:
    """adapter_config.json, of which every field is known and possible.

    Raises:
        AdapterError: the file is missing or damaged, a field would change the mathematics and is not known, or has a
            value that it cannot have.
    """
    try:
        config = read_json(path)
    except RunError as error:
        raise AdapterError(f"{error}: {path.parent} is not a LoRA adapter") from error
    if config.get("peft_type") != "LORA":
        raise AdapterError(f"{path} does not describe a LoRA adapter (wanted peft_type LORA)")
    unknown = [
        f"{key}={value!r}"
        for key, value in config.items()
        if (key in _NEUTRAL and value not in (_NEUTRAL[key], None, [], {}))
        or (key not in _NEUTRAL and key not in _READ and key not in _INERT and value not in (None, False, [], {}))
    ]
    if unknown:
        raise AdapterError(f"{path} asks for things that this version cannot do: {', '.join(sorted(unknown))}")
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.startswith(_CHANGES_THE_BASE):
        raise AdapterError(
            f"{path} says init_lora_weights={start!r}, a start that changes the base, so the file does not hold all "
            "that was trained: let PEFT convert it first (path_initial_model_for_weight_conversion)"
        )
    wrong = [key for key, is_fit in _FIELDS.items() if not is_fit(config.get(key))]
    if wrong:
        raise AdapterError(
            f"{path} has an impossible value: {', '.join(f'{key}={config.get(key)!r}' for key in wrong)}"
        )
    return config


def ignored_fields(config: Mapping[str, Any]) -> list[str]:
    """Fields with something in them that changes nothing here, as `key=value`."""
    silent = ("revision", "peft_version", "auto_mapping")
    return [
        f"{key}={config[key]!r}"
        for key, usual in _INERT.items()
        if key not in silent and config.get(key) not in (None, False, [], {}, *usual)
    ]


def _is_alpha(value: Any) -> bool:
    return is_number(value) and abs(value) < LARGEST_ALPHA


def _is_rank(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_layer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _are_ids(value: object) -> bool:
    return isinstance(value, list) and all(_is_layer(entry) and entry >= 0 for entry in value) and bool(value)


def _is_pattern(value: object) -> bool:
    """Whether this is a pattern that is matched in little time."""
    try:
        return isinstance(value, str) and bool(compile_pattern(value))
    except ValueError:
        return False


def _is_choice(value: object) -> bool:
    """A pattern for whole names, or a list of names' ends."""
    return _is_pattern(value) or (isinstance(value, list) and all(isinstance(entry, str) for entry in value))


def _maps_patterns(is_fit: Callable[[object], bool]) -> Callable[[object], bool]:
    def check(value: object) -> bool:
        return value is None or (
            isinstance(value, dict) and all(_is_pattern(key) and is_fit(entry) for key, entry in value.items())
        )

    return check


_FIELDS: dict[str, Callable[[Any], bool]] = {
    "r": _is_rank,
    "lora_alpha": _is_alpha,
    "lora_dropout": lambda value: value is None or (is_number(value) and 0 <= value < 1),
    "use_rslora": lambda value: value in (None, True, False),
    "use_dora": lambda value: value in (None, True, False),
    "rank_pattern": _maps_patterns(_is_rank),
    "alpha_pattern": _maps_patterns(_is_alpha),
    "target_modules": lambda value: value is None or _is_choice(value),
    "target_parameters": lambda value: value is None or (isinstance(value, list) and _is_choice(value)),
    "modules_to_save": lambda value: value is None or (isinstance(value, list) and _is_choice(value)),
    "trainable_token_indices": lambda value: (
        value is None or all(_are_ids(ids) for ids in (value.values() if isinstance(value, dict) else [value]))
    ),
    "exclude_modules": lambda value: value is None or _is_choice(value),
    "layers_to_transform": lambda value: (
        value is None or _is_layer(value) or (isinstance(value, list) and all(map(_is_layer, value)))
    ),
}
"""What each field that is read must be."""


def patterned(pattern: Mapping[str, Any] | None, layer_name: str, default: float) -> float:
    """The value of the first pattern that fits the end of the name, as PEFT looks it up."""
    for key, value in (pattern or {}).items():
        if re.fullmatch(rf"(.*\.)?({key})", layer_name):
            return value
    return default


def targeted_experts(model: PreTrainedModel, config: Mapping[str, Any]) -> list[str]:
    """The expert weights that PEFT's `target_parameters` asks for."""
    return [name for name in expert_stacks(model) if _names(config.get("target_parameters"), name)]


def is_target(layer_name: str, config: Mapping[str, Any]) -> bool:
    """Whether PEFT's fields ask for an adapter on this layer."""
    only = config.get("layers_to_transform")
    if only is not None:
        numbers = re.findall(r"\.(\d+)(?=\.)", layer_name)
        if not numbers or int(numbers[-1]) not in ([only] if isinstance(only, int) else only):
            return False
    return _names(config.get("target_modules"), layer_name) and not _names(config.get("exclude_modules"), layer_name)


def _names(entries: str | Sequence[str] | None, layer_name: str) -> bool:
    """A string is a pattern for the whole name; of a list, an entry is the end of it."""
    if isinstance(entries, str):
        return re.fullmatch(entries, layer_name) is not None
    return any(layer_name == entry or layer_name.endswith(f".{entry}") for entry in entries or ())


def saved_modules(model: PreTrainedModel, config: Mapping[str, Any]) -> list[str]:
    """Dotted names of the modules that PEFT's `modules_to_save` asks for: an entry is the end of a name, even inside a
    word, and may name none.
    """
    return [name for name in module_names(model) if name.endswith(tuple(config.get("modules_to_save") or ()))]


def saved_tokens(model: PreTrainedModel, config: Mapping[str, Any]) -> dict[str, list[int]]:
    """Dotted name of the embedding or the head -> token ids whose rows the file holds, in the file's order.

    A name that is neither comes as it is.
    """
    asked = config.get("trainable_token_indices") or {}
    ends = end_names(model)
    if isinstance(asked, list):
        return {ends[0]: asked}
    found: dict[str, list[int]] = {}
    for entry, ids in asked.items():
        found |= dict.fromkeys([key for key in modules_named(model, entry) if key in ends] or [entry], ids)
    return found
