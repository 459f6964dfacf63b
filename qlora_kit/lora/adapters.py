"""An adapter's files, in PEFT's format both ways: adapter_config.json and adapter_model.safetensors.

What PEFT does not know (the base's fingerprint, what it was trained against) travels in the metadata of the safetensors
file, which PEFT ignores.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel

from qlora_kit.base.dense import decode, is_transposed
from qlora_kit.base.experts import expert_stacks, stack_experts
from qlora_kit.errors import AdapterError
from qlora_kit.lora.fingerprint import fingerprint
from qlora_kit.lora.inject import (
    LoraReport,
    adaptable_linears,
    adaptable_weights,
    head_is_tied,
    head_name,
    lora_report,
    wrap,
)
from qlora_kit.lora.layer import (
    Adapter,
    LoraLayer,
    LoraLinear,
    lora_layers,
    row_squares,
    weight_shape,
)
from qlora_kit.lora.several import adapter_names, check_new_name, use_adapter
from qlora_kit.storage import staged_folder, write_tensors

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_NAMES = {"a_RI": "lora_A.weight", "b_OR": "lora_B.weight", "magnitude_O": "lora_magnitude_vector"}
"""What PEFT calls the tensors of an adapter, in its files."""

Parts: TypeAlias = dict[str, Tensor]
"""The tensors of one layer's adapter by their names here."""

# Fields of PEFT's configuration with the value under which they change nothing here; any other value changes the model.
_NEUTRAL: dict[str, Any] = {
    "bias": "none",
    "use_qalora": False,
    "alora_invocation_tokens": None,
    "arrow_config": None,
    "corda_config": None,
    "eva_config": None,
    "kasa_config": None,
    "layer_replication": None,
    "lora_bias": False,
    "lora_ga_config": None,
    "megatron_config": None,
    "modules_to_save": None,
    "monteclora_config": None,
    "trainable_token_indices": None,
    "use_bdlora": None,
    "velora_config": None,
}
# Fields that describe the adapter or steer only its start and its training.
_READ_OR_INERT = frozenset(
    (
        "peft_type",
        "task_type",
        "base_model_name_or_path",
        "revision",
        "r",
        "lora_alpha",
        "target_modules",
        "target_parameters",
        "lora_dropout",
        "use_rslora",
        "use_dora",
        "rank_pattern",
        "alpha_pattern",
        "fan_in_fan_out",
        "init_lora_weights",
        "inference_mode",
        "auto_mapping",
        "peft_version",
        "exclude_modules",
        "layers_to_transform",
        "layers_pattern",
        "loftq_config",
        "runtime_config",
        "qalora_group_size",
        "ensure_weight_tying",
        "megatron_core",
    )
)


def save_adapter(
    model: PreTrainedModel, folder: str | Path, *, name: str = "default", provenance: Mapping[str, str] | None = None
) -> Path:
    """Write one adapter as PEFT reads it; a folder that stands there is replaced when the new one is complete.

    Args:
        model: carries the adapter.
        folder: gets the two files.
        name: of the adapter.
        provenance: what to keep beside the base's fingerprint in the file's metadata.

    Raises:
        AdapterError: there is no adapter of that name, it holds a number that is not finite, or in `folder` there is
            something else than an adapter, which would be lost.
    """
    layers = {key: layer for key, layer in lora_layers(model) if name in layer.adapters}
    if not layers:
        raise AdapterError(
            f"there is no adapter {name!r} to save; there are: {', '.join(adapter_names(model)) or 'none'}"
        )
    stems = _stems(model, layers)
    tensors = {
        f"{_PREFIX}{stems[layer_name]}.{_NAMES[leaf]}": _to_file(parameter.detach(), leaf).to("cpu", copy=True)
        for layer_name, layer in layers.items()
        for leaf, parameter in layer.adapter(name).named_parameters()
    }
    broken = [key for key, value in tensors.items() if not torch.isfinite(value).all()]
    if broken:
        raise AdapterError(f"adapter {name!r} holds NaN or infinity in {_listed(broken)}; it is not saved")
    metadata = {"format": "pt", "qlora_kit.base_fingerprint": fingerprint(model), **(provenance or {})}
    final = Path(folder)
    _check_replaceable(final)
    with staged_folder(final) as staged:
        write_tensors(staged / WEIGHTS, tensors, metadata)
        (staged / WEIGHTS).chmod(0o644)
        (staged / CONFIG).write_text(json.dumps(_peft_config(model, layers, name), indent=2, sort_keys=True) + "\n")
    return final


def load_adapter(
    model: PreTrainedModel, folder: str | Path, *, name: str = "default", force: bool = False
) -> LoraReport:
    """Read an adapter that the kit or PEFT saved, attach it under `name`, and switch to it.

    Args:
        model: the frozen base, with or without other adapters.
        folder: holds the two files.
        name: to give the adapter here.
        force: attach it although it was trained on another base.

    Returns:
        What it covers.

    Raises:
        AdapterError: one message with every fault: damaged files, fields that would change the mathematics and are not
            known here, layers missing or too many, wrong shapes, numbers that are not finite, another base.
    """
    folder = Path(folder)
    check_new_name(model, name)
    config = _read_config(folder / CONFIG)
    tensors, metadata = _read_tensors(folder / WEIGHTS)
    if config.get("target_parameters"):
        stack_experts(model)
    weights = adaptable_weights(model)
    own = {key: value for key, value in tensors.items() if not _is_the_bases_own(key, value, weights)}
    named = {stem: name for name, stem in _stems(model, _targeted_experts(model, config)).items()}
    layers, faults = _by_layer(own, named, bool(config.get("use_dora")))
    faults += _fit_faults(model, weights, layers, config)
    trained_on = metadata.get("qlora_kit.base_fingerprint")
    if trained_on is not None and trained_on != fingerprint(model) and not force:
        faults.append("it was trained on another base (the fingerprints differ); force loads it all the same")
    if faults:
        raise AdapterError(f"the adapter in {folder} does not fit this model: {'; '.join(faults)}")
    for layer_name, parts in layers.items():
        layer = wrap(model, layer_name)
        layer.adapters[name] = _adapter(layer, layer_name, config, parts).train(layer.training)
    use_adapter(model, name)
    return lora_report(model, name)


def _check_replaceable(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise AdapterError(f"{folder} is a file; give a folder for the adapter")
    others = sorted({path.name for path in folder.glob("*")} - {CONFIG, WEIGHTS})
    if others:
        raise AdapterError(f"{folder} holds {_listed(others)}, which saving would delete; give a folder of its own")


def _adapter(layer: LoraLayer, layer_name: str, config: Mapping[str, Any], parts: Parts) -> Adapter:
    rank = _patterned(config.get("rank_pattern"), layer_name, config["r"])
    device = next(t.device for t in (*layer.base.buffers(), *layer.base.parameters()))
    adapter = Adapter(
        layer.shape,
        int(rank),
        _patterned(config.get("alpha_pattern"), layer_name, config["lora_alpha"]),
        scaling="rslora" if config.get("use_rslora") else "standard",
        dropout=config.get("lora_dropout") or 0.0,
        square_O=row_squares(layer.base) if "magnitude_O" in parts else None,
        dtype=parts["a_RI"].dtype,
        device=device,
    )
    with torch.no_grad():
        for leaf, parameter in adapter.named_parameters():
            parameter.copy_(_from_file(parts[leaf], leaf, parameter.shape))
    return adapter


def _stems(model: PreTrainedModel, names: Iterable[str]) -> dict[str, str]:
    """What PEFT calls each of these layers: its own name, but for experts.

    There PEFT wraps the module that holds the weights, once for each of them, so that the last stands outermost.
    """
    stacks = [name for name in expert_stacks(model) if name in set(names)]
    stems = {name: name for name in names}
    for name in stacks:
        holder = name.rpartition(".")[0]
        siblings = [other for other in stacks if other.rpartition(".")[0] == holder]
        stems[name] = holder + ".base_layer" * (len(siblings) - 1 - siblings.index(name))
    return stems


def _to_file(tensor: Tensor, leaf: str) -> Tensor:
    """A matrix as PEFT stores it; of experts, A as (experts * rank, in) and B as (out, rank * experts)."""
    if tensor.ndim == 3:
        tensor = tensor.flatten(0, 1) if leaf == "a_RI" else tensor.permute(1, 2, 0).flatten(1)
    return tensor.contiguous()


def _from_file(tensor: Tensor, leaf: str, shape: Sequence[int]) -> Tensor:
    """The reverse, in `shape`."""
    if len(shape) < 3 or leaf == "a_RI":
        return tensor.view(*shape)
    experts, out, rank = shape
    return tensor.view(out, rank, experts).permute(2, 0, 1)


def _peft_config(model: PreTrainedModel, layers: Mapping[str, LoraLayer], name: str) -> dict[str, Any]:
    adapters = {layer_name: layer.adapter(name) for layer_name, layer in layers.items()}
    rank = Counter(adapter.rank for adapter in adapters.values()).most_common(1)[0][0]
    alpha = Counter(adapter.alpha for adapter in adapters.values()).most_common(1)[0][0]
    first = next(iter(adapters.values()))
    experts = [key for key in layers if key in expert_stacks(model)]
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
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
        "rank_pattern": {_exactly(key): a.rank for key, a in adapters.items() if a.rank != rank},
        "alpha_pattern": {_exactly(key): a.alpha for key, a in adapters.items() if a.alpha != alpha},
        "fan_in_fan_out": all(isinstance(layer, LoraLinear) and is_transposed(layer.base) for layer in layers.values()),
        "init_lora_weights": True,
    }


def _target_modules(model: PreTrainedModel, matched: Sequence[str]) -> list[str]:
    """Leaf names where they say exactly what was matched, whole names otherwise (PEFT matches by suffix)."""
    leaves = {layer_name.rpartition(".")[2] for layer_name in matched}
    reached = {key for key in adaptable_linears(model) if key.rpartition(".")[2] in leaves}
    return sorted(leaves if reached == set(matched) else matched)


def _exactly(layer_name: str) -> str:
    """A key that PEFT matches against this one layer: it reads the key as a pattern for the name's end."""
    return layer_name.replace(".", r"\.")


def _patterned(pattern: Mapping[str, Any] | None, layer_name: str, default: float) -> float:
    """The value of the first pattern that fits the end of the name, as PEFT looks it up."""
    for key, value in (pattern or {}).items():
        if re.fullmatch(rf"(.*\.)?({key})", layer_name):
            return value
    return default


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise AdapterError(f"{path} is missing: {path.parent} is no adapter") from error
    except (OSError, ValueError) as error:
        raise AdapterError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        raise AdapterError(f"{path} describes no LoRA adapter (wanted peft_type LORA)")
    unknown = [
        f"{key}={value!r}"
        for key, value in config.items()
        if (key in _NEUTRAL and value not in (_NEUTRAL[key], None, [], {}))
        or (key not in _NEUTRAL and key not in _READ_OR_INERT and value not in (None, False, [], {}))
    ]
    if unknown:
        raise AdapterError(f"{path} asks for what this version cannot do: {', '.join(sorted(unknown))}")
    wrong = [key for key, is_fit in _FIELDS.items() if not is_fit(config.get(key))]
    if wrong:
        raise AdapterError(
            f"{path} has an impossible value: {', '.join(f'{key}={config.get(key)!r}' for key in wrong)}"
        )
    return config


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_rank(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_layer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_pattern(value: Any) -> bool:
    try:
        re.compile(value)
    except (re.error, TypeError):
        return False
    return True


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
    "lora_alpha": _is_number,
    "lora_dropout": lambda value: value is None or (_is_number(value) and 0 <= value < 1),
    "use_rslora": lambda value: value in (None, True, False),
    "use_dora": lambda value: value in (None, True, False),
    "rank_pattern": _maps_patterns(_is_rank),
    "alpha_pattern": _maps_patterns(_is_number),
    "target_modules": lambda value: value is None or _is_choice(value),
    "target_parameters": lambda value: value is None or (isinstance(value, list) and _is_choice(value)),
    "exclude_modules": lambda value: value is None or _is_choice(value),
    "layers_to_transform": lambda value: (
        value is None or _is_layer(value) or (isinstance(value, list) and all(map(_is_layer, value)))
    ),
}
"""What each field that is read must be."""


def _read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    if not path.is_file():
        raise AdapterError(f"{path} is missing; pickled adapters (.bin) are not read: save it as safetensors")
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise AdapterError(f"{path} ({path.stat().st_size} bytes) is damaged: {error}") from error


def _by_layer(
    tensors: Mapping[str, Tensor], named: Mapping[str, str], is_dora: bool
) -> tuple[dict[str, Parts], list[str]]:
    """The tensors of each layer, and what is wrong with the file itself; `named` turns PEFT's names into ours."""
    wanted = {leaf: name for leaf, name in _NAMES.items() if is_dora or leaf != "magnitude_O"}
    layers: dict[str, Parts] = {}
    faults: list[str] = []
    for key, value in tensors.items():
        leaf = next((leaf for leaf, name in wanted.items() if key.endswith(f".{name}")), None)
        if leaf is None or not key.startswith(_PREFIX) or not value.is_floating_point():
            faults.append(f"{key} is no LoRA matrix")
        elif not torch.isfinite(value).all():
            faults.append(f"{key} holds NaN or infinity")
        else:
            stem = key.removeprefix(_PREFIX).removesuffix(f".{wanted[leaf]}")
            layers.setdefault(named.get(stem, stem), {})[leaf] = value
    lonely = [layer_name for layer_name, parts in layers.items() if len(parts) < len(wanted)]
    if lonely:
        faults.append(f"one of {', '.join(wanted.values())} is missing for {_listed(lonely)}")
    return {key: parts for key, parts in layers.items() if len(parts) == len(wanted)}, faults


def _fit_faults(
    model: PreTrainedModel,
    weights: Mapping[str, Any],
    layers: Mapping[str, Parts],
    config: Mapping[str, Any],
) -> list[str]:
    faults = []
    absent = [key for key in layers if key not in weights]
    if absent:
        faults.append(f"the model has no linear layer {_listed(absent)}")
    for key, parts in layers.items():
        if key in weights:
            experts, out, width = (1, *weight_shape(weights[key]))[-3:]
            ranks = experts * int(_patterned(config.get("rank_pattern"), key, config["r"]))
            wanted = {"a_RI": (ranks, width), "b_OR": (out, ranks), "magnitude_O": (out,)}
            faults += [
                f"{key} has {_NAMES[leaf]} of shape {tuple(tensor.shape)}, wanted {wanted[leaf]}"
                for leaf, tensor in parts.items()
                if tensor.shape != wanted[leaf]
            ]
    targeted = {key for key in weights if _is_target(key, config)} - expert_stacks(model).keys()
    targeted |= set(_targeted_experts(model, config))
    lacking = [key for key in weights if key in targeted and key not in layers]
    if lacking:
        faults.append(f"the file has no matrices for {_listed(lacking)}")
    head = head_name(model)
    if head in layers and head_is_tied(model):
        faults.append(f"it changes {head}, which is tied to the input embedding here")
    return faults or ([] if layers else ["the file holds no LoRA matrices"])


def _is_the_bases_own(key: str, value: Tensor, weights: Mapping[str, Any]) -> bool:
    """Whether this is the head's frozen weight, which PEFT saves beside an adapter on the head, as it is here too."""
    layer = weights.get(key.removeprefix(_PREFIX).removesuffix(".base_layer.weight"))
    if not key.endswith(".base_layer.weight") or layer is None or tuple(value.shape) != weight_shape(layer):
        return False
    weight = decode(layer, layer.weight.dtype if isinstance(layer, nn.Linear) else torch.float32)
    return torch.equal(value.to(weight.device, weight.dtype), weight)


def _targeted_experts(model: PreTrainedModel, config: Mapping[str, Any]) -> list[str]:
    """The expert weights that PEFT's `target_parameters` asks for."""
    return [name for name in expert_stacks(model) if _names(config.get("target_parameters"), name)]


def _is_target(layer_name: str, config: Mapping[str, Any]) -> bool:
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


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
