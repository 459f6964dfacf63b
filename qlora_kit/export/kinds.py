"""The kinds of export, each a folder that is complete or absent and says how it differs from what was trained.

    merged     a plain transformers checkpoint: W' = decode(Wq) + scale B A, or W' as full fine-tuning left it
    adapter    PEFT's two files, and what they were trained against

`export.json` is written last: the kind, the comparisons, and a checksum of every other file.
"""

import json
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from qlora_kit.base.formats import Kind
from qlora_kit.base.hub import locate_model
from qlora_kit.base.load import DTYPES, brings_code, head_of, load_base
from qlora_kit.data.collate import Batch
from qlora_kit.errors import AdapterError, RunError
from qlora_kit.export.audit import compare
from qlora_kit.export.folder import library_versions, model_card, write_model_files, write_tokenizer
from qlora_kit.export.merge import merged_tensors, parts_in_use
from qlora_kit.export.stream import SHARD_BYTES, StreamedTensor, streamed, write_safetensors, write_weights
from qlora_kit.export.trained_against import PREFIX, read_added_tokens, read_trained_against, trained_against
from qlora_kit.lora.adapters import CONFIG, WEIGHTS, load_adapter, save_adapter
from qlora_kit.lora.layer import Adapter, carriers
from qlora_kit.storage import read_json, sha256_file, staged_folder, write_json, write_text
from qlora_kit.units import MIB, format_bytes

MANIFEST, CARD = "export.json", "README.md"

AUDIT_SHARE = 0.8
"""Of the free memory of a card, what the weights of an export may take for its audit; logits want the rest."""
TEXT_BYTES = 64 * MIB
"""Room kept free on the disk for config, card and tokenizer (the largest tokenizer files are about 35 MB)."""


def merge(
    adapter: str | Path,
    base: str | Path,
    out: str | Path,
    *,
    onto: str = "dequantized",
    dtype: str = "bfloat16",
    quantization: Kind = "nf4",
    double_quant: bool = True,
    block_size: int = 64,
    revision: str | None = None,
    device: str = "auto",
    force: bool = False,
    audit_batches: Iterable[Batch] | None = None,
) -> Path:
    """Merge an adapter into the base that it was trained against and write a plain transformers checkpoint.

    Args:
        adapter: folder with adapter_config.json and adapter_model.safetensors.
        base: folder or hub id of the base.
        out: folder to make; it must not be there, or be empty.
        onto: dequantized.
        dtype: of the exported weights: bfloat16, float16 or float32.
        quantization: how the base was stored in training; used only where the adapter's file does not say it.
        double_quant: likewise.
        block_size: likewise.
        revision: of the base's hub repository.
        device: where the weights are formed: cpu, cuda, cuda:N, or auto.
        force: merge although the adapter was trained on another base.
        audit_batches: held-out rows on which the export is compared with the model as trained.

    Returns:
        `out`.

    Raises:
        RunError: `onto` or `dtype` is none that is built, `out` is not empty, or the disk has no room.
        AdapterError: the adapter is damaged, does not fit the base, or is not finite.
        ModelError: the base cannot be loaded.
    """
    out, adapter = Path(out), Path(adapter)
    if onto != "dequantized":
        raise RunError(f"onto={onto!r} is not built yet in this version; use onto='dequantized'")
    check_request(out, dtype)
    given = {"quantization": quantization, "double_quant": double_quant, "block_size": block_size}
    settings = read_trained_against(adapter, {**given, "compute_dtype": dtype})
    model = load_base(base, revision=revision, device=device, **settings)
    load_adapter(model, adapter, force=force)
    provenance = {"base": str(base), "adapter": str(adapter)} | ({"revision": revision} if revision else {})
    tokenizer = _tokenizer(locate_model(str(base), revision))
    if tokenizer is not None:
        tokenizer.add_tokens(read_added_tokens(adapter))
    export_merged(model, tokenizer, out, dtype=dtype, audit_batches=audit_batches, provenance=provenance)
    return out


def export_merged(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    out: Path,
    *,
    dtype: str = "bfloat16",
    audit_batches: Iterable[Batch] | None = None,
    provenance: Mapping[str, str] | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> dict[str, Any]:
    """Write the model as trained as a plain transformers checkpoint; the model itself is not changed.

    Args:
        model: the quantised base with adapters in use.
        tokenizer: saved with its chat template; None where there is none.
        out: folder to make; it must not be there, or be empty.
        dtype: bfloat16, float16 or float32.
        audit_batches: held-out rows; None leaves the export unaudited, and its card says so.
        provenance: facts for the card and export.json, such as `base` (a hub id) and `revision`.
        shard_bytes: of weights in one file.

    Returns:
        what export.json holds.

    Raises:
        AdapterError: no adapter is in use, or a merged weight is NaN or infinite.
        RunError: `dtype` is not known, `out` is not empty, the disk has no room, or the model runs code of its own.
    """
    adapters = parts_in_use(model)
    _torch_dtype(dtype)
    if not adapters:
        raise AdapterError("no adapter is in use on this model, so there is nothing to merge; load or switch to one")
    against = trained_against(model)
    sections: dict[str, Mapping[str, object]] = {
        "Adapter": _settings(adapters),
        "Trained against": _without_prefix(against),
        "Merge": {"onto": "dequantized", "formula": "W' = decode(Wq) + scale B A, in fp32", "rounded to": dtype},
    }
    made = _Made("Merged model", "qlora", sections, {"onto": "dequantized", "trained_against": against})
    return _export_dense(model, tokenizer, out, dtype, audit_batches, provenance, shard_bytes, made)


def export_trained(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    out: Path,
    *,
    dtype: str = "bfloat16",
    audit_batches: Iterable[Batch] | None = None,
    provenance: Mapping[str, str] | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> dict[str, Any]:
    """Write a model of which every weight was trained, like `export_merged`: there is no adapter to merge.

    Args:
        model: dense, without adapters.
        tokenizer: as in `export_merged`, like the rest.
        out: likewise.
        dtype: likewise.
        audit_batches: likewise.
        provenance: likewise.
        shard_bytes: likewise.

    Returns:
        what export.json holds.

    Raises:
        ModelError: a weight is NaN or infinite.
        RunError: as in `export_merged`.
    """
    trained_in = str(model.dtype).removeprefix("torch.")
    sections: dict[str, Mapping[str, object]] = {"Weights": {"trained in": trained_in, "rounded to": dtype}}
    made = _Made("Fully fine-tuned model", "full-finetuning", sections, {"onto": None, "trained_in": trained_in})
    return _export_dense(model, tokenizer, out, dtype, audit_batches, provenance, shard_bytes, made)


def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, folder: Path) -> None:
    """Write a dense model as it stands, in its own dtype, as a plain transformers checkpoint and nothing else.

    Args:
        model: dense, without adapters.
        tokenizer: saved with its chat template; None where there is none.
        folder: complete or absent; one that stands there is replaced.

    Raises:
        ModelError: a weight is NaN or infinite.
        RunError: the disk has no room, or the model runs code of its own.
    """
    tensors = _checked_tensors(model, folder, model.dtype)
    with staged_folder(folder) as staged:
        _write_checkpoint(model, tokenizer, staged, tensors, model.dtype, SHARD_BYTES)


@dataclass(frozen=True, slots=True)
class _Made:
    """How the weights of an export were made, for its card and its export.json."""

    title: str
    tag: str
    sections: Mapping[str, Mapping[str, object]]
    facts: Mapping[str, object]


def _export_dense(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    out: Path,
    dtype: str,
    audit_batches: Iterable[Batch] | None,
    provenance: Mapping[str, str] | None,
    shard_bytes: int,
    made: _Made,
) -> dict[str, Any]:
    """A checkpoint in a folder of its own, audited, with its card and export.json."""
    is_classifier = head_of(model) == "classification"
    if is_classifier and audit_batches is not None:
        raise RunError("the audit of a classifier is not built yet in this version; leave out its rows")
    _check_vacant(out)
    tensors = _checked_tensors(model, out, _torch_dtype(dtype))
    facts = {"base": model.config._name_or_path, **(provenance or {})}
    with staged_folder(out) as staged:
        _write_checkpoint(model, tokenizer, staged, tensors, _torch_dtype(dtype), shard_bytes)
        comparisons = {} if audit_batches is None else {"merged": _audit(model, staged, audit_batches)}
        sections = {
            "Provenance": facts,
            **made.sections,
            "Audit: as trained against this export": comparisons.get("merged", {"result": "not audited"}),
        }
        tags = ["qlora-kit", made.tag, "text-classification" if is_classifier else "text-generation"]
        _write_card(staged, made.title, facts["base"], "transformers", tags, sections)
        content = {"kind": "merged", "dtype": dtype, "comparisons": comparisons, "provenance": facts}
        return _seal(staged, {**content, **made.facts})


def _checked_tensors(model: PreTrainedModel, out: Path, dtype: torch.dtype) -> list[StreamedTensor]:
    """What a plain checkpoint of the model holds, if it can be one and the disk has room for it."""
    if brings_code(model):
        raise RunError(
            f"{model.config._name_or_path} runs code of its own, which plain weights would have to bring along: "
            "not built yet; export --to adapter"
        )
    tensors = list(merged_tensors(model, dtype))
    _check_room(out, sum(tensor.stored_bytes for tensor in tensors) + TEXT_BYTES)
    return tensors


def _write_checkpoint(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    folder: Path,
    tensors: list[StreamedTensor],
    dtype: torch.dtype,
    shard_bytes: int,
) -> None:
    write_weights(tensors, folder, shard_bytes=shard_bytes)
    names = {tensor.name for tensor in tensors}
    write_model_files(model, tokenizer, folder, dtype=dtype, tensor_names=names)


def export_adapter(
    model: PreTrainedModel,
    out: Path,
    *,
    name: str = "default",
    tokenizer: PreTrainedTokenizerBase | None = None,
    provenance: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Write one adapter as PEFT reads it, with what it was trained against; the same adapter gives the same bytes.

    Args:
        model: carries the adapter.
        out: folder to make; it must not be there, or be empty.
        name: of the adapter.
        tokenizer: with its chat template and added tokens, saved beside the adapter; None leaves it out.
        provenance: facts for the file's metadata, the card and export.json; `base` and `revision` also go into
            adapter_config.json, where PEFT looks for the base.

    Returns:
        what export.json holds.

    Raises:
        AdapterError: there is no adapter of that name, or it is not finite.
        RunError: `out` is not empty, or the disk has no room.
    """
    adapters = {key: carrier.adapters[name] for key, carrier in carriers(model) if name in carrier.adapters}
    _check_vacant(out)
    _check_room(out, sum(p.nbytes for adapter in adapters.values() for p in adapter.parameters()) + TEXT_BYTES)
    facts, against = {"base": model.config._name_or_path, **(provenance or {})}, trained_against(model)
    with staged_folder(out) as staged:
        save_adapter(model, staged, name=name, provenance={**against, **facts})
        _stabilise(staged / WEIGHTS)
        config = read_json(staged / CONFIG) | {"base_model_name_or_path": facts["base"]}
        config |= {"revision": facts["revision"]} if "revision" in facts else {}
        write_text(staged / CONFIG, json.dumps(config, indent=2, sort_keys=True) + "\n")
        if tokenizer is not None:
            write_tokenizer(tokenizer, staged)
        sections: dict[str, Mapping[str, object]] = {
            "Provenance": facts,
            "Adapter": _settings(adapters),
            "Trained against": _without_prefix(against),
        }
        _write_card(staged, "LoRA adapter", facts["base"], "peft", ["qlora-kit", "qlora", "lora"], sections)
        return _seal(staged, {"kind": "adapter", "comparisons": {}, "provenance": facts, "trained_against": against})


def _audit(model: PreTrainedModel, folder: Path, batches: Iterable[Batch]) -> dict[str, float]:
    """Compare the model with the folder as another program loads it: in the dtype of its own weights."""
    attention = model.config._attn_implementation
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        folder, dtype="auto", attn_implementation=attention, local_files_only=True, output_loading_info=True
    )
    export, info = loaded
    odd = sorted([*info["missing_keys"], *info["unexpected_keys"]])
    assert not odd, f"the export and its own config disagree on {odd[:5]}"
    return compare(model, export.to(_audit_device(model, export)), batches)


def _audit_device(model: PreTrainedModel, export: PreTrainedModel) -> torch.device:
    """Where the export is run beside the model as trained: on the CPU if the card has no room for both."""
    if model.device.type != "cuda":
        return model.device
    free, _ = torch.cuda.mem_get_info(model.device)
    return model.device if sum(p.nbytes for p in export.parameters()) < AUDIT_SHARE * free else torch.device("cpu")


def _seal(folder: Path, content: dict[str, Any]) -> dict[str, Any]:
    """Write export.json over all the files that are there; nothing is written after it."""
    files = {str(file.relative_to(folder)): sha256_file(file) for file in sorted(folder.rglob("*")) if file.is_file()}
    write_json(folder / MANIFEST, {**content, "versions": library_versions(), "files": files})
    return read_json(folder / MANIFEST)


def _write_card(
    folder: Path, title: str, base: str, library: str, tags: list[str], sections: Mapping[str, Mapping[str, object]]
) -> None:
    card = model_card(title, base, library, tags, {**sections, "Made with": library_versions()})
    write_text(folder / CARD, card)


def _stabilise(path: Path) -> None:
    """Write an adapter's file again in one fixed order: the library writes metadata in an order of chance."""
    with safe_open(path, framework="pt") as file:
        metadata = dict(sorted(file.metadata().items()))
        tensors = {key: file.get_tensor(key) for key in sorted(file.keys())}
    path.unlink()
    write_safetensors(path, [streamed(key, tensor) for key, tensor in tensors.items()], metadata)


def _settings(adapters: Mapping[str, nn.Module]) -> dict[str, object]:
    """What the card says of the adapters in use; where layers differ, every value that occurs."""
    parts = [adapter for adapter in adapters.values() if isinstance(adapter, Adapter)]
    return {
        "rank": _distinct(adapter.rank for adapter in parts),
        "alpha": _distinct(adapter.alpha for adapter in parts),
        "scale": _distinct(adapter.scale for adapter in parts),
        "scaling": _distinct(adapter.scaling for adapter in parts),
        "dropout": _distinct(adapter.dropout for adapter in parts),
        "targets": _distinct(name.rpartition(".")[2] for name in adapters),
        "layers": len(adapters),
    }


def _distinct(values: Iterable[object]) -> str:
    return ", ".join(str(value) for value in dict.fromkeys(values))


def _without_prefix(metadata: Mapping[str, str]) -> dict[str, str]:
    return {key.removeprefix(PREFIX).replace("_", " "): value for key, value in metadata.items()}


def _torch_dtype(dtype: str) -> torch.dtype:
    if dtype not in DTYPES:
        raise RunError(f"dtype={dtype!r} is not one that weights are exported in; use one of {', '.join(DTYPES)}")
    return DTYPES[dtype]


def check_request(out: Path, dtype: str) -> None:
    """What can be refused before a model is loaded.

    Raises:
        RunError: `dtype` is not known, or `out` is a file or a folder that is not empty.
    """
    _torch_dtype(dtype)
    _check_vacant(out)


def _check_vacant(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise RunError(f"{out} is a file, wanted a folder to make; choose another output")
    if out.is_dir() and any(out.iterdir()):
        raise RunError(f"{out} is not empty, and an export overwrites nothing; choose another folder, or empty it")


def _check_room(out: Path, needed_bytes: int) -> None:
    there = next(folder for folder in out.absolute().parents if folder.exists())
    free_bytes = shutil.disk_usage(there).free
    if free_bytes < needed_bytes:
        needed, free = format_bytes(needed_bytes), format_bytes(free_bytes)
        raise RunError(
            f"the export to {out} needs {needed} on the disk of {there}, which has {free} free; nothing is written"
        )


def _tokenizer(folder: Path) -> PreTrainedTokenizerBase | None:
    """The tokenizer of a base, or None where its folder has none."""
    if not any((folder / name).is_file() for name in ("tokenizer_config.json", "tokenizer.json", "tokenizer.model")):
        return None
    return AutoTokenizer.from_pretrained(folder, local_files_only=True)
