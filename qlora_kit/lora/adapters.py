"""An adapter's files, in PEFT's format both ways: adapter_config.json and adapter_model.safetensors.

What PEFT does not know (the base's fingerprint, what it was trained against) travels in the metadata of the safetensors
file, which PEFT ignores.
"""

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeAlias

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel

from qlora_kit.base.dense import decode
from qlora_kit.base.experts import expert_stacks, stack_experts
from qlora_kit.base.files import file_inside, read_header
from qlora_kit.base.record import BaseRecord, base_record
from qlora_kit.base.vocabulary import row_width
from qlora_kit.errors import AdapterError, ModelError, listed
from qlora_kit.lora.inject import LoraReport, lora_report, wrap
from qlora_kit.lora.layer import Adapter, LoraLayer, bare, carriers, weight_shape
from qlora_kit.lora.peft_config import (
    ignored_fields,
    is_target,
    patterned,
    peft_config,
    read_config,
    saved_modules,
    saved_tokens,
    targeted_experts,
)
from qlora_kit.lora.several import adapter_names, check_new_name, use_adapter, whole_or_nothing
from qlora_kit.lora.targets import adaptable_weights
from qlora_kit.lora.vocabulary import (
    TokenRows,
    check_rows,
    end_names,
    head_is_tied,
    head_name,
    rows_of_embedding,
    rows_of_head,
)
from qlora_kit.lora.whole import WholeModule, check_module, train_module
from qlora_kit.storage import staged_folder, write_tensors

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_NAMES = {"a_RI": "lora_A.weight", "b_OR": "lora_B.weight", "magnitude_O": "lora_magnitude_vector"}
_ROWS = "token_adapter.trainable_tokens_delta"
"""What PEFT calls the tensors of an adapter, in its files."""
_FINGERPRINT, _WEIGHTS_MARK = "qlora_kit.base_fingerprint", "qlora_kit.base_weights_mark"
"""Under which the metadata keeps what `BaseRecord` knows of the base."""

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

Parts: TypeAlias = dict[str, Tensor]
"""The tensors of one layer or module by their names here."""


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
    if name not in adapter_names(model):
        raise AdapterError(
            f"there is no adapter {name!r} to save; there are: {', '.join(adapter_names(model)) or 'none'}"
        )
    tensors = {key: tensor.detach().to("cpu", copy=True) for key, tensor in _tensors(model, name)}
    broken = [key for key, value in tensors.items() if value.is_floating_point() and not torch.isfinite(value).all()]
    if broken:
        raise AdapterError(f"adapter {name!r} holds NaN or infinity in {listed(broken)}; it is not saved")
    record = base_record(model)
    metadata = {"format": "pt", _FINGERPRINT: record.fingerprint, _WEIGHTS_MARK: record.weights_mark}
    metadata = {key: value for key, value in metadata.items() if value} | dict(provenance or {})
    final = Path(folder)
    _check_replaceable(final)
    with staged_folder(final) as staged:
        write_tensors(staged / WEIGHTS, tensors, metadata)
        (staged / WEIGHTS).chmod(0o644)
        (staged / CONFIG).write_text(json.dumps(peft_config(model, name), indent=2, sort_keys=True) + "\n")
    return final


def load_adapter(
    model: PreTrainedModel,
    folder: str | Path,
    *,
    name: str = "default",
    force: bool = False,
    dtype: torch.dtype | None = None,
    way_on: str = "force loads it all the same",
) -> LoraReport:
    """Read an adapter that the kit or PEFT saved, attach it under `name`, and switch to it.

    Args:
        model: the frozen base, with or without other adapters.
        folder: holds the two files.
        name: to give the adapter here.
        force: attach it although it was trained on another base.
        dtype: of A and B; None takes the file's.
        way_on: what the caller's user can do about another base.

    Returns:
        What it covers, and a note of the fields that were read over.

    Raises:
        AdapterError: one message with every fault: damaged files, links out of the folder, fields that would change the
            mathematics and are not known here, layers missing or too many, wrong shapes, numbers that are not finite,
            another base.
    """
    folder = Path(folder)
    check_new_name(model, name)
    _check_files(folder)
    config = read_config(folder / CONFIG)
    tensors, metadata = _read_tensors(folder / WEIGHTS)
    record = base_record(model)
    if config.get("target_parameters"):
        stack_experts(model)
    weights = adaptable_weights(model)
    contents = _sorted(model, tensors, weights, config)
    faults = contents.faults + _fit_faults(model, weights, contents.layers, config)
    faults += _whole_faults(model, contents)
    if not force:
        faults += _stranger_faults(metadata, record, way_on)
    if faults:
        raise AdapterError(f"the adapter in {folder} does not fit this model: {'; '.join(faults)}")
    with whole_or_nothing(model, name):
        _attach(model, contents, config, name, dtype)
        use_adapter(model, name)
    ignored = ignored_fields(config)
    notes = (f"{CONFIG} says {', '.join(ignored)}, which changes nothing here",) if ignored else ()
    return replace(lora_report(model, name), notes=notes)


def _tensors(model: PreTrainedModel, name: str) -> Iterator[tuple[str, Tensor]]:
    """All of one adapter under PEFT's names; what two modules share comes once."""
    mine = {key: carrier for key, carrier in carriers(model) if name in carrier.adapters}
    stems = _stems(model, mine)
    shared: set[nn.Module] = set()
    for key, carrier in mine.items():
        stem, part = f"{_PREFIX}{stems[key]}", carrier.adapters[name]
        if isinstance(part, Adapter):
            for leaf, tensor in part.stored().items():
                yield f"{stem}.{_NAMES[leaf]}", _to_file(tensor, leaf)
        elif isinstance(carrier, WholeModule):
            for leaf, tensor in part.state_dict().items():
                yield f"{stem}.{leaf}", tensor
        elif isinstance(part, TokenRows) and part not in shared:
            shared.add(part)
            yield f"{stem}.{_ROWS}", part.rows_KD


def _stranger_faults(metadata: Mapping[str, str], record: BaseRecord, way_on: str) -> list[str]:
    """Whether the adapter was trained on another base than this; what only one side knows is not compared."""
    marks = ((metadata.get(_FINGERPRINT), record.fingerprint), (metadata.get(_WEIGHTS_MARK), record.weights_mark))
    if all(theirs == ours for theirs, ours in marks if theirs and ours):
        return []
    return [f"it was trained on another base (the fingerprints differ); {way_on}"]


def _check_replaceable(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise AdapterError(f"{folder} is a file; give a folder for the adapter")
    others = sorted({path.name for path in folder.glob("*")} - {CONFIG, WEIGHTS})
    if others:
        raise AdapterError(f"{folder} holds {listed(others)}, which saving would delete; give a folder of its own")


def _adapter(
    layer: LoraLayer, layer_name: str, config: Mapping[str, Any], parts: Parts, dtype: torch.dtype | None
) -> Adapter:
    rank = patterned(config.get("rank_pattern"), layer_name, config["r"])
    adapter = layer.new_adapter(
        int(rank),
        patterned(config.get("alpha_pattern"), layer_name, config["lora_alpha"]),
        scaling="rslora" if config.get("use_rslora") else "standard",
        dropout=config.get("lora_dropout") or 0.0,
        is_dora="magnitude_O" in parts,
        dtype=dtype or torch.promote_types(parts["a_RI"].dtype, parts["b_OR"].dtype),
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


def _check_files(folder: Path) -> None:
    """Refuse a link that leads out of the folder, and a pipe, which would be waited for."""
    for name in (CONFIG, WEIGHTS):
        if os.path.lexists(folder / name):  # those that are missing are told of where they are read
            try:
                file_inside(folder, name)
            except ModelError as error:
                raise AdapterError(str(error)) from error


def _read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    if not path.is_file():
        raise AdapterError(f"{path} is missing; pickled adapters (.bin) are not read: save it as safetensors")
    try:
        read_header(path)  # it names the tensor that is wrong, and nothing is allocated for one that is not there
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (ModelError, SafetensorError, OSError) as error:
        raise AdapterError(f"the adapter in {path.parent} is damaged: {error}") from error


@dataclass(slots=True)
class _Contents:
    """What a file holds, by the names of this model: layers, whole modules, rows with their ids, and its faults."""

    layers: dict[str, Parts] = field(default_factory=dict)
    modules: dict[str, Parts] = field(default_factory=dict)
    rows: dict[str, tuple[list[int], Tensor]] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)


def _sorted(
    model: PreTrainedModel, tensors: Mapping[str, Tensor], weights: Mapping[str, Any], config: Mapping[str, Any]
) -> _Contents:
    """Each tensor where it belongs, and what is wrong with the file itself."""
    contents = _Contents()
    stems = {stem: key for key, stem in _stems(model, targeted_experts(model, config)).items()}
    wanted = {leaf: end for leaf, end in _NAMES.items() if config.get("use_dora") or leaf != "magnitude_O"}
    whole, ends = saved_modules(model, config), end_names(model)
    tokens = saved_tokens(model, config)
    strange = [key for key in tokens if key not in ends]
    if strange:
        contents.faults.append(f"trainable_token_indices names {listed(strange)}, neither embedding nor head here")
    for key, value in tensors.items():
        if _is_the_bases_own(key, value, weights):
            continue
        short = key.removeprefix(_PREFIX)
        leaf = next((leaf for leaf, end in wanted.items() if key.endswith(f".{end}")), None)
        module = next((module for module in whole if short.startswith(f"{module}.")), None)
        rows = short.removesuffix(f".{_ROWS}")
        if value.dtype not in _DTYPES:
            contents.faults.append(f"{key} is in {value.dtype}, which is no dtype of weights")
        elif not torch.isfinite(value).all():
            contents.faults.append(f"{key} holds NaN or infinity")
        if module is not None and key.startswith(_PREFIX):
            contents.modules.setdefault(module, {})[short.removeprefix(f"{module}.")] = value
        elif rows != short and rows in tokens and rows in ends:
            contents.rows[rows] = (tokens[rows], value)
        elif leaf is None and short.removesuffix(".weight").removesuffix(".base_layer") in ends:
            contents.faults.append(
                f"{key} is all of a matrix of its base (PEFT saves it where the vocabulary was resized or the head "
                "adapted), and this base has another"
            )
        elif leaf is None or not key.startswith(_PREFIX):
            contents.faults.append(f"{key} is no LoRA matrix")
        else:
            stem = short.removesuffix(f".{wanted[leaf]}")
            contents.layers.setdefault(stems.get(stem, stem), {})[leaf] = value
    lonely = [key for key, parts in contents.layers.items() if len(parts) < len(wanted)]
    if lonely:
        contents.faults.append(f"one of {', '.join(wanted.values())} is missing for {listed(lonely)}")
    contents.layers = {key: parts for key, parts in contents.layers.items() if len(parts) == len(wanted)}
    lost = [key for key in whole if key not in contents.modules]
    lost += [key for key in tokens if key in ends and key not in contents.rows
             and not (contents.rows and _is_tied_head(model, key))]  # fmt: skip
    if lost:
        contents.faults.append(f"the file has no tensors for {listed(lost)} (modules_to_save or trained rows)")
    return contents


def _is_tied_head(model: PreTrainedModel, key: str) -> bool:
    """Whether this is the head, and uses the embedding's rows, which the file then holds once."""
    return head_is_tied(model) and key == head_name(model)


def _attach(
    model: PreTrainedModel, contents: _Contents, config: Mapping[str, Any], name: str, dtype: torch.dtype | None
) -> None:
    """Put everything on the model; `contents` has no faults."""
    for layer_name, parts in contents.layers.items():
        layer = wrap(model, layer_name)
        layer.adapters[name] = _adapter(layer, layer_name, config, parts, dtype).train(layer.training)
    for module_name, parts in contents.modules.items():
        train_module(model, module_name, name).load_state_dict(parts)
    for key, (ids, values) in contents.rows.items():
        order = sorted(range(len(ids)), key=ids.__getitem__)
        if key == head_name(model):
            rows = rows_of_head(model, sorted(ids), name)
        else:
            # Of a tied head the file has rows of its own only if they are those of other tokens.
            rows = rows_of_embedding(model, sorted(ids), name, for_tied_head=head_name(model) not in contents.rows)
        with torch.no_grad():
            rows.rows_KD.copy_(values[order])


def _whole_faults(model: PreTrainedModel, contents: _Contents) -> list[str]:
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
    layers: Mapping[str, Parts],
    config: Mapping[str, Any],
) -> list[str]:
    faults = []
    absent = [key for key in layers if key not in weights]
    if absent:
        faults.append(f"the model has no linear layer {listed(absent)}")
    taken = sorted({key for key, carrier in carriers(model) if not isinstance(carrier, LoraLayer)} & layers.keys())
    if taken:
        faults.append(f"{listed(taken)} carries a whole module or rows of another adapter")
    for key, parts in layers.items():
        if key in weights:
            experts, out, width = (1, *weight_shape(weights[key]))[-3:]
            ranks = experts * int(patterned(config.get("rank_pattern"), key, config["r"]))
            wanted = {"a_RI": (ranks, width), "b_OR": (out, ranks), "magnitude_O": (out,)}
            faults += [
                f"{key} has {_NAMES[leaf]} of shape {tuple(tensor.shape)}, wanted {wanted[leaf]}"
                for leaf, tensor in parts.items()
                if tensor.shape != wanted[leaf]
            ]
    targeted = {key for key in weights if is_target(key, config)} - expert_stacks(model).keys()
    targeted |= set(targeted_experts(model, config))
    lacking = [key for key in weights if key in targeted and key not in layers]
    if lacking:
        faults.append(f"the file has no matrices for {listed(lacking)}")
    return faults or ([] if layers else ["the file holds no LoRA matrices"])


def _is_the_bases_own(key: str, value: Tensor, weights: Mapping[str, Any]) -> bool:
    """Whether this is the head's frozen weight, which PEFT saves beside an adapter on the head, as it is here too."""
    layer = weights.get(key.removeprefix(_PREFIX).removesuffix(".base_layer.weight"))
    if not key.endswith(".base_layer.weight") or layer is None or tuple(value.shape) != weight_shape(layer):
        return False
    weight = decode(layer, layer.weight.dtype if isinstance(layer, nn.Linear) else torch.float32)
    return torch.equal(value.to(weight.device, weight.dtype), weight)
