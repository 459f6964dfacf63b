"""An adapter's files, in PEFT's format both ways: adapter_config.json and adapter_model.safetensors.

What PEFT does not know (the base's fingerprint, what it was trained against) travels in the metadata of the safetensors
file, which PEFT ignores.
"""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel

from qlora_kit.base.experts import stack_experts
from qlora_kit.base.files import file_inside
from qlora_kit.base.header import read_header
from qlora_kit.base.record import BaseRecord, base_record
from qlora_kit.errors import AdapterError, ModelError, listed
from qlora_kit.lora.contents import LEAVES, PREFIX, ROWS, Contents, Parts, sort_out, stems
from qlora_kit.lora.inject import LoraReport, lora_report, wrap
from qlora_kit.lora.layer import Adapter, LoraLayer, carriers
from qlora_kit.lora.peft_config import (
    ignored_fields,
    patterned,
    peft_config,
    read_config,
)
from qlora_kit.lora.several import adapter_names, check_new_name, use_adapter, whole_or_nothing
from qlora_kit.lora.vocabulary import (
    TokenRows,
    head_name,
    rows_of_embedding,
    rows_of_head,
)
from qlora_kit.lora.whole import WholeModule, train_module
from qlora_kit.storage import staged_folder, write_tensors

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_FINGERPRINT, _WEIGHTS_MARK = "qlora_kit.base_fingerprint", "qlora_kit.base_weights_mark"
_MARK = "qlora_kit.base_mark"
"""Under which the metadata keeps all that marks the base; older versions read and wrote the two above alone."""


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
    older = {_FINGERPRINT: record.fingerprint, _WEIGHTS_MARK: record.marks.get("weights", "")}
    metadata = {"format": "pt", **older, _MARK: record.mark}
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
    way_on: str = "force loads it anyway",
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
    contents = sort_out(model, tensors, config)
    faults = contents.faults
    if not force:
        faults += _stranger_faults(metadata, record, way_on)
    if faults:
        raise AdapterError(f"the adapter in {folder} does not fit this model: {'; '.join(faults)}")
    with whole_or_nothing(model, name):
        _attach(model, contents, config, name, dtype)
        use_adapter(model, name)
    ignored = ignored_fields(config)
    notes = (f"{CONFIG} says {', '.join(ignored)}, which has no effect here",) if ignored else ()
    return replace(lora_report(model, name), notes=notes)


def _tensors(model: PreTrainedModel, name: str) -> Iterator[tuple[str, Tensor]]:
    """All of one adapter under PEFT's names; what two modules share comes once."""
    mine = {key: carrier for key, carrier in carriers(model) if name in carrier.adapters}
    called = stems(model, mine)
    shared: set[nn.Module] = set()
    for key, carrier in mine.items():
        stem, part = f"{PREFIX}{called[key]}", carrier.adapters[name]
        if isinstance(part, Adapter):
            for leaf, tensor in part.stored().items():
                yield f"{stem}.{LEAVES[leaf]}", _to_file(tensor, leaf)
        elif isinstance(carrier, WholeModule):
            for leaf, tensor in part.state_dict().items():
                yield f"{stem}.{leaf}", tensor
        elif isinstance(part, TokenRows) and part not in shared:
            shared.add(part)
            yield f"{stem}.{ROWS}", part.rows_KD


def _stranger_faults(metadata: Mapping[str, str], record: BaseRecord, way_on: str) -> list[str]:
    """Whether the adapter was trained on another base than this; what only one side knows is not compared."""
    older = " ".join(metadata.get(key, "") for key in (_FINGERPRINT, _WEIGHTS_MARK))
    odd = record.differences(metadata.get(_MARK, older))
    return [f"it was trained on another base (other {', '.join(odd)}); {way_on}"] if odd else []


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


def _attach(
    model: PreTrainedModel, contents: Contents, config: Mapping[str, Any], name: str, dtype: torch.dtype | None
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
