"""bitsandbytes checkpoints that plain transformers loads: merged, and quantised again.

    Wq' = quantize(decode(Wq) + scale B A)     nf4, fp4 or int8

What was trained is no number of the format any more, so it is rounded a second time, which costs more than a merge in
16 bits; how much is in the audit. With calibration rows codes and constants are chosen so that the layers' outputs
stay (`compensate.py`); without, each weight is rounded for itself.

Quantised is what transformers quantises: the linear layers of the body that were quantised in training, or all of them
where the base was dense. Embeddings, heads and layers of `base.skip` are dense, in `dtype`. Files are written as layers
are done: in memory stands one layer in fp32; the packed tensors of one file wait on a shelf.

The audit reads the folder with the kit's own decoder. bitsandbytes' layers compute otherwise: int8 ones round their
inputs, too, and some 4-bit ones decode wrongly on some processors (see `base/kernels.py`).
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from qlora_kit.base.architecture import build_model, head_of
from qlora_kit.base.dense import QuantizedLinear
from qlora_kit.base.experts import expert_stacks
from qlora_kit.base.formats import Quantization
from qlora_kit.base.freeze import body_linears
from qlora_kit.base.load import load_base
from qlora_kit.base.prequantized import packed
from qlora_kit.base.record import base_record
from qlora_kit.base.vocabulary import QuantizedTable
from qlora_kit.data.collate import Batch
from qlora_kit.errors import RunError
from qlora_kit.export.audit import check_audit, compare
from qlora_kit.export.calibrate import Compensation, Piece, calibration_pieces
from qlora_kit.export.compensate import Stored, quantized_onto
from qlora_kit.export.folder import write_model_files
from qlora_kit.export.merge import empty_workspaces, merged_tensors
from qlora_kit.export.plain import check_own_code, made_of, original_of
from qlora_kit.export.published import published
from qlora_kit.export.sealed import Made, check_disk, check_request, finish, torch_dtype
from qlora_kit.export.shelf import Shelf
from qlora_kit.export.stream import StreamedTensor, streamed, write_weights
from qlora_kit.lora.targets import adaptable_linears
from qlora_kit.memory.allocator import set_allocation_policy
from qlora_kit.storage import staged_folder
from qlora_kit.train.activations import activation_blocks
from qlora_kit.units import MIB

SHARD_BYTES = 256 * MIB
"""Bytes of tensors in one file: packed ones wait on the shelf until their file is written."""

STATE_BYTES = 4096
"""Room for what a quantised layer has beside its codes and constants: two tables, and its state in words."""


def export_quantized(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    out: Path,
    *,
    quantization: Quantization | None = None,
    calibration: Sequence[Batch] = (),
    onto: str = "dequantized",
    dtype: str = "bfloat16",
    audit_batches: Iterable[Batch] | None = None,
    provenance: Mapping[str, str] | None = None,
    shard_bytes: int = SHARD_BYTES,
    is_whole: bool = False,
    max_kl: float | None = None,
    scored_loss: float | None = None,
    force: bool = False,
) -> dict[str, Any]:
    """Write the model as trained as a bitsandbytes checkpoint; the model itself is not changed.

    Args:
        model: as for `export_merged`.
        tokenizer: as there.
        out: as there.
        quantization: nf4, fp4 or int8; None takes the base's format, or nf4 for a dense one, in blocks of 64.
        calibration: training rows on which codes and constants are chosen; none rounds each weight to its nearest code.
        onto: as for `export_merged`, like all below.
        dtype: of what stays dense.
        audit_batches: held-out rows, other ones than those of `calibration`.
        provenance: as there.
        shard_bytes: of weights in one file.
        is_whole: as there.
        max_kl: as there, but None lets any pass.
        scored_loss: as there.
        force: as there.

    Returns:
        what export.json holds.

    Raises:
        AdapterError: no adapter is in use, or a merged weight is NaN or infinite.
        ModelError: a weight that no adapter is on is NaN or infinite, or the original is asked for and not at hand.
        RunError: as for `export_merged`; or the model has experts, which transformers' bitsandbytes layers cannot hold,
            or its blocks cannot be calibrated one by one.
    """
    check_request(out, dtype, onto)
    check_own_code(model)
    made, how = made_of(model, dtype, onto, is_whole=is_whole), quantization or default_format(model)
    names, dense = _layers(model)
    original = original_of(model, is_whole=is_whole) if onto == "original" else None
    tensors = published(model, merged_tensors(model, torch_dtype(dtype), original))
    exact = {tensor.name.removesuffix(".weight"): tensor for tensor in merged_tensors(model, torch.float32, original)}
    pieces = calibration_pieces(calibration)
    packed_bytes = sum(_bytes(tensor, names, how) for tensor in tensors)
    check_disk(out, packed_bytes + min(packed_bytes, shard_bytes) + _waiting_bytes(model, tensors, names, pieces))
    set_allocation_policy()  # or the heap keeps what whole weights and calibration take, layer upon layer
    with staged_folder(out, replaces=False) as staged:
        shelf = Shelf(staged)
        choose = _chooser(model, partial(_weight, model, exact, names, shelf), names, how, pieces, shelf)
        with empty_workspaces(model):
            sums = write_weights(_packed(tensors, names, choose, how), staged, shard_bytes=shard_bytes)
        written = {tensor.name for tensor in tensors}
        config = _config(how, dtype, dense)
        write_model_files(model, tokenizer, staged, dtype=torch_dtype(dtype), tensor_names=written, quantization=config)
        found = None if audit_batches is None else _audit(model, staged, how, dtype, audit_batches)
        check_audit("quantized", found, onto, max_kl, scored_loss, force=force)
        widths = {width for tensor in tensors if (width := _width(tensor, names)) is not None}
        made = _requantized(made, how, widths, sum(batch.rows for batch in calibration), pieces)
        return finish(model, staged, "quantized", made, provenance or {}, found, sums)


def _requantized(made: Made, how: Quantization, widths: Collection[int], rows: int, pieces: Sequence[Piece]) -> Made:
    """How the weights came about, with what was made of them here, and what to know of who reads them."""
    facts: dict[str, Any] = {"format": how.kind}
    if how.is_4bit:
        facts |= {"double_quant": how.double_quant, "block_size": how.block_size}
    facts["codes"] = (
        "chosen with constants for the layers' outputs on calibration rows" if pieces else "nearest of each weight"
    )
    facts["calibration_rows"] = rows
    facts["calibration_tokens"] = sum(sum(piece.lengths) for piece in pieces)
    odd = [width for width in sorted(widths) if how.is_4bit and width % 64]
    if odd:
        facts["caution"] = (
            f"layers with {odd[0]} inputs, no multiple of 64, are decoded wrongly by bitsandbytes on CPUs with AVX-512"
        )
    words = {key.replace("_", " "): value for key, value in facts.items()}
    return replace(
        made,
        title=f"{made.title}, in {how.kind}",
        sections={**made.sections, "Quantisation": words},
        facts={**made.facts, "quantization": facts},
    )


def default_format(model: PreTrainedModel) -> Quantization:
    """The format of a re-quantised model: the base's own, in the blocks that transformers makes."""
    base = base_record(model).quantization
    return Quantization("nf4") if base.kind == "none" else replace(base, block_size=64)


def _layers(model: PreTrainedModel) -> tuple[dict[str, bool], list[str]]:
    """The linear layers to be quantised, each with whether checkpoints store it as (in, out); and the dense ones.

    Raises:
        RunError: there is none, or the model has experts.
    """
    if expert_stacks(model):
        raise RunError(
            "this model has experts, which bitsandbytes' layers in transformers cannot hold; export --to merged"
        )
    with torch.device("meta"):  # what transformers will find: it quantises these two classes and no other
        plain = build_model(model.config, torch.bfloat16, "eager", head_of(model))
    linears = {name: each for name, each in plain.named_modules() if type(each) in (nn.Linear, Conv1D)}
    ours = {
        name
        for name, layer in adaptable_linears(model).items()
        if isinstance(layer, QuantizedLinear) and not isinstance(layer, QuantizedTable)
    }
    if base_record(model).quantization.kind == "none":
        ours = {name for name, _ in body_linears(plain)}
    names = {name: isinstance(layer, Conv1D) for name, layer in linears.items() if name in ours}
    if not names:
        raise RunError("this model has no linear layer that transformers quantises; export --to merged")
    return names, [name for name in linears if name not in names]


def _weight(
    model: PreTrainedModel, exact: Mapping[str, StreamedTensor], names: Mapping[str, bool], shelf: Shelf, name: str
) -> Tensor:
    """What is to be stored of a layer, (out, in), fp32, on the shelf."""
    tensor = exact[name]
    made = shelf.empty(tensor.shape, torch.float32)
    with empty_workspaces(model):
        begin = 0
        for part in tensor.slices():
            made[begin : begin + len(part)] = part
            begin += len(part)
    return shelf.empty(tensor.shape[::-1], torch.float32).copy_(made.t()) if names[name] else made


def _chooser(
    model: PreTrainedModel,
    weight: Callable[[str], Tensor],
    names: Mapping[str, bool],
    how: Quantization,
    pieces: Sequence[Piece],
    shelf: Shelf,
) -> Callable[[str], Stored]:
    """What gives the codes and constants of a layer by name."""
    if pieces:
        return Compensation(model, weight, names, how, pieces, shelf)
    return lambda name: quantized_onto(shelf, weight(name).to(model.device), how)


def _waiting_bytes(
    model: PreTrainedModel, tensors: Sequence[StreamedTensor], names: Mapping[str, bool], pieces: Sequence[Piece]
) -> int:
    """Bytes that wait on the shelf beside what is packed, at most."""
    counts = [prod(tensor.shape) for tensor in tensors if _width(tensor, names) is not None]
    if not pieces:
        return 8 * max(counts)
    tokens = sum(piece.input_ids.numel() for piece in pieces)
    # Of layers with one input, at most all of a block, their weights and codes; of all rows what a block is given.
    block = sum(counts) // max(1, len(activation_blocks(model))) + max(counts)
    return 6 * block + 16 * tokens * model.config.get_text_config().hidden_size


def _packed(
    tensors: Iterable[StreamedTensor], names: Mapping[str, bool], choose: Callable[[str], Stored], how: Quantization
) -> Iterator[StreamedTensor]:
    """The tensors of the checkpoint, each layer quantised when its turn comes."""
    for tensor in tensors:
        name = tensor.name.removesuffix(".weight")
        if name not in names:
            yield tensor
            continue
        shape = tensor.shape[::-1] if names[name] else tensor.shape
        called = tensor.parts[0][0].removesuffix(".weight") if len(tensor.parts) == 1 else name
        for leaf, part in packed(choose(name), (shape[0], shape[1]), how, tensor.dtype).items():
            yield streamed(f"{called}.{leaf}", part)


def _width(tensor: StreamedTensor, names: Mapping[str, bool]) -> int | None:
    """How many inputs a layer has that is quantised; None for other tensors."""
    is_in_out = names.get(tensor.name.removesuffix(".weight"))
    return None if is_in_out is None else tensor.shape[0 if is_in_out else 1]


def _bytes(tensor: StreamedTensor, names: Mapping[str, bool], how: Quantization) -> int:
    """Bytes that a tensor takes on the disk, at most."""
    width = _width(tensor, names)
    if width is None:
        return tensor.stored_bytes
    return int(tensor.shape[0] * tensor.shape[1] * how.bits_per_parameter(width) / 8) + STATE_BYTES


def _config(how: Quantization, dtype: str, dense: list[str]) -> dict[str, Any]:
    """What config.json says of the format."""
    if how.kind == "int8":
        made = BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=dense)
    else:
        made = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=how.kind,
            bnb_4bit_use_double_quant=how.double_quant,
            bnb_4bit_compute_dtype=dtype,
            llm_int8_skip_modules=dense,
        )
    said: dict[str, Any] = made.to_dict()
    return said


def _audit(
    model: PreTrainedModel, folder: Path, how: Quantization, dtype: str, batches: Iterable[Batch]
) -> dict[str, float]:
    """Compare the model with what the folder holds, decoded by the kit, computed in the dtype of the export."""
    export = load_base(
        folder,
        quantization=how.kind,
        double_quant=how.double_quant,
        compute_dtype=dtype,
        head=head_of(model),
        device=str(model.device),
        attention=model.config._attn_implementation,
    )
    return compare(model, export, batches)
