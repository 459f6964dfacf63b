"""One GGUF file of a model as trained, formed tensor by tensor, with a Modelfile for Ollama beside it.

    weights as trained -> merged in fp32 -> in the file's order and shape -> quantised -> written

What stands in memory beside the model is what a merge holds, and a slice and its codes. The audit reads the file
back: its tensors are decoded by the package, brought into transformers' order, written as a plain checkpoint beside it,
run, and deleted again. Runtimes round activations as they like; the audit does not see that.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Any

import gguf
import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from qlora_kit.base.record import base_record
from qlora_kit.data.collate import Batch
from qlora_kit.errors import RunError
from qlora_kit.export.audit import check_audit
from qlora_kit.export.folder import write_model_files
from qlora_kit.export.gguf.families import Family, Value, family_of, head_width, metadata
from qlora_kit.export.gguf.mixture import FILE_TYPES, Mixture, encode, stored_bytes
from qlora_kit.export.gguf.ollama import modelfile
from qlora_kit.export.gguf.rope import rope_tensors
from qlora_kit.export.gguf.tensors import Place, is_of_text, place, placed, text_name
from qlora_kit.export.gguf.vocabulary import name_for, vocabulary_keys
from qlora_kit.export.gguf.writer import StoredTensor, write_gguf
from qlora_kit.export.merge import empty_workspaces, merged_tensors
from qlora_kit.export.plain import audit_checkpoint, made_of, original_of
from qlora_kit.export.sealed import Made, check_disk, check_place, finish
from qlora_kit.export.stream import StreamedTensor, in_dtype, row_slices, streamed, write_weights
from qlora_kit.storage import remove_folder, staged_folder, write_text
from qlora_kit.train.generate import end_tokens

WEIGHTS, MODELFILE = "model.gguf", "Modelfile"


def check_gguf_request(out: Path | None, dtype: str, onto: str = "dequantized") -> None:
    """What can be refused before a model is loaded; as `check_request` otherwise.

    Raises:
        RunError: `dtype` or `onto` is not known, or `out` is a file or a folder that is not empty.
    """
    if dtype not in FILE_TYPES:
        raise RunError(f"--dtype {dtype} is not a GGUF type that is supported; use one of {', '.join(FILE_TYPES)}")
    check_place(out, onto)


def export_gguf(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    out: Path,
    *,
    onto: str = "dequantized",
    dtype: str = "q4_k_m",
    audit_batches: Iterable[Batch] | None = None,
    provenance: Mapping[str, str] | None = None,
    is_chat: bool = True,
    is_whole: bool = False,
    max_kl: float | None = None,
    scored_loss: float | None = None,
    force: bool = False,
) -> dict[str, Any]:
    """Write the model as trained as one GGUF file; the model itself is not changed.

    Args:
        model: the quantised base with adapters in use; or dense and without, where every weight was trained.
        tokenizer: of the model, which the file holds.
        out: folder to make; it must not be there, or be empty.
        onto: as for `export_merged`.
        dtype: f32, f16, bf16, q8_0, q4_0, q4_k_m, q5_k_m or q6_k.
        audit_batches: held-out rows; None leaves the export unaudited, and its card says so.
        provenance: facts for the card and export.json, such as `base` (a hub id) and `revision`.
        is_chat: whether it is asked by its chat template, as the Modelfile then does.
        is_whole: whether every weight was trained, so that there is no adapter to merge.
        max_kl: as for `export_merged`, but None lets any pass.
        scored_loss: as there.
        force: as there.

    Returns:
        what export.json holds.

    Raises:
        AdapterError: no adapter is in use, or a merged weight is NaN or infinite.
        ModelError: a weight that no adapter is on is NaN or infinite, or the original is asked for and not at hand.
        RunError: the family or the tokenizer has no place in GGUF, `dtype` is not known, `out` is not empty, the disk
            has no room, or the audit finds the export too far off.
    """
    check_gguf_request(out, dtype, onto)
    made, family = made_of(model, dtype, onto, is_whole=is_whole), family_of(model)
    original = original_of(model, is_whole=is_whole) if onto == "original" else None
    merged = list(merged_tensors(model, torch.float32, original))
    places = {each.name: _place(model, each, family) for each in merged if is_of_text(model, each.name)}
    read = [placed(tensor, places[tensor.name]) for tensor in merged if tensor.name in places]
    tensors = _stored(model.config.get_text_config(), read, dtype)
    name = Path((provenance or {}).get("base", model.config._name_or_path)).name
    keys = _keys(model, tokenizer, family, tensors, name, dtype)
    audited_in = torch.float32 if dtype == "f32" else base_record(model).dtype
    copy_bytes = 0 if audit_batches is None else sum(t.stored_bytes for t in merged) // 4 * audited_in.itemsize
    check_disk(out, sum(tensor.stored_bytes for tensor in tensors) + copy_bytes)
    ends = end_tokens(model, tokenizer)
    with staged_folder(out, replaces=False) as staged:
        with empty_workspaces(model):
            sums = {staged / WEIGHTS: write_gguf(staged / WEIGHTS, family.architecture, keys, tensors)}
        write_text(staged / MODELFILE, modelfile(WEIGHTS, tokenizer, ends, is_chat=is_chat))
        unread = [tensor for tensor in merged if tensor.name not in places]
        found = None if audit_batches is None else _audit(model, staged, places, unread, audited_in, audit_batches)
        check_audit("gguf", found, onto, max_kl, scored_loss, force=force)
        return finish(model, staged, "gguf", _in_one_file(made, dtype, tensors), provenance or {}, found, sums)


def _place(model: PreTrainedModel, tensor: StreamedTensor, family: Family) -> Place:
    found = place(text_name(model, tensor.name), tensor.shape, model.config.get_text_config(), family)
    return replace(found, source=tensor.name)


def _in_one_file(made: Made, dtype: str, tensors: list[StoredTensor]) -> Made:
    """How the weights came about, with what the file holds of them."""
    file = {"written with": f"gguf {version('gguf')}", "mixture": dtype, **_counts(tensors)}
    return replace(made, title="GGUF model", sections={**made.sections, "File": file}, library="gguf")


def _keys(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    family: Family,
    tensors: list[StoredTensor],
    name: str,
    dtype: str,
) -> dict[str, Value]:
    rows = next(tensor.shape[0] for tensor in tensors if tensor.name == "token_embd.weight")
    words = vocabulary_keys(tokenizer, rows, end_tokens(model, tokenizer))
    assert tokenizer is not None
    return {
        "general.type": "model",
        "general.name": name_for(tokenizer, name or "model"),
        "general.file_type": int(FILE_TYPES[dtype]),
        "general.quantization_version": gguf.GGML_QUANT_VERSION,
        **metadata(model.config.get_text_config(), family),
        **words,
    }


def _stored(config: PretrainedConfig, tensors: list[StreamedTensor], dtype: str) -> list[StoredTensor]:
    """All tensors of the file, each with its type."""
    is_tied = all(tensor.name != "output.weight" for tensor in tensors)
    is_grouped = getattr(config, "num_key_value_heads", config.num_attention_heads) < config.num_attention_heads
    mixture = Mixture(dtype, config.num_hidden_layers, is_tied, is_grouped)
    more = [streamed(name, values) for name, values in rope_tensors(config, head_width(config)).items()]
    stored = []
    for tensor in [*tensors, *more]:
        kind = mixture.type_of(tensor.name, tensor.shape)
        parts = partial(_encoded, tensor, kind)
        stored.append(StoredTensor(tensor.name, tensor.shape, kind, stored_bytes(tensor.shape, kind), parts))
    return stored


def _encoded(tensor: StreamedTensor, kind: gguf.GGMLQuantizationType) -> Iterator[Tensor]:
    for part in tensor.slices():
        yield encode(part.cpu(), kind, tensor.name)


def _counts(tensors: list[StoredTensor]) -> dict[str, int]:
    """How many tensors there are of each type."""
    names = sorted(tensor.kind.name.lower() for tensor in tensors)
    return {name: names.count(name) for name in dict.fromkeys(names)}


def _audit(
    model: PreTrainedModel,
    folder: Path,
    places: Mapping[str, Place],
    unread: Iterable[StreamedTensor],
    dtype: torch.dtype,
    batches: Iterable[Batch],
) -> dict[str, Any]:
    """Compare the model with what the file holds, in a plain checkpoint that is deleted again; that has what text never
    reaches from the model itself."""
    copy = folder / "audit"
    copy.mkdir()
    try:
        read = read_back(folder / WEIGHTS, places.values(), dtype)
        write_weights(chain(read, (in_dtype(tensor, dtype) for tensor in unread)), copy)
        write_model_files(model, None, copy, dtype=dtype, tensor_names=places)
        return audit_checkpoint(model, copy, batches) | {"computed_in": str(dtype).removeprefix("torch.")}
    finally:
        remove_folder(copy)


def read_back(path: Path, places: Iterable[Place], dtype: torch.dtype) -> Iterator[StreamedTensor]:
    """The tensors of a GGUF file as those of the checkpoint that it was made of.

    Args:
        path: of the file.
        places: of its tensors.
        dtype: to which the decoded values are rounded.
    """
    found = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    for each in places:
        slices = partial(_decoded_back, found[each.name], each, dtype)
        shape = each.shape[::-1] if each.is_transposed else each.shape
        yield StreamedTensor(each.source, shape, dtype, slices)


def _decoded_back(stored: gguf.ReaderTensor, place: Place, dtype: torch.dtype) -> Iterator[Tensor]:
    for part in place.back(_decoded(stored, place.shape)):
        yield part.to(dtype)


def _decoded(stored: gguf.ReaderTensor, shape: tuple[int, ...]) -> Iterator[Tensor]:
    for rows in row_slices(shape):
        yield torch.from_numpy(gguf.dequantize(stored.data[rows], stored.tensor_type).copy())
