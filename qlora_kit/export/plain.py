"""Plain transformers checkpoints, each complete or absent, that say how they differ from what was trained.

merged     W' = decode(Wq) + scale B A, or onto the original: W' = W + scale B A
trained    W' as full fine-tuning left it
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qlora_kit.base.architecture import auto_class, brings_code, head_of, read_config
from qlora_kit.base.experts import stack_experts
from qlora_kit.base.formats import Kind
from qlora_kit.base.hub import locate_model
from qlora_kit.base.load import load_base, original_weights
from qlora_kit.base.tokenizer import read_tokenizer
from qlora_kit.data.chat_template import add_tokens
from qlora_kit.data.collate import Batch
from qlora_kit.errors import AdapterError, ModelError, RunError
from qlora_kit.export.audit import check_audit, compare
from qlora_kit.export.folder import write_model_files
from qlora_kit.export.merge import empty_workspaces, merged_tensors, parts_in_use
from qlora_kit.export.published import is_joined, mapped, published
from qlora_kit.export.sealed import (
    Made,
    check_disk,
    check_request,
    finish,
    settings_of,
    torch_dtype,
    without_prefix,
)
from qlora_kit.export.stream import SHARD_BYTES, StreamedTensor, write_weights
from qlora_kit.export.trained_against import (
    name_trained_classes,
    read_added_tokens,
    read_trained_against,
    trained_against,
)
from qlora_kit.lora.adapters import load_adapter
from qlora_kit.storage import checksums, staged_folder

FORMULAS = {
    "dequantized": "W' = decode(Wq) + scale B A, in fp32",
    "original": "W' = W + scale B A, in fp32; W is what Wq was quantised from",
}

AUDIT_SHARE = 0.8
"""Of the free memory of a card, what the weights of an export may take for its audit; logits want the rest."""


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
        onto: dequantized, the weights that training saw; or original, the dense weights that those were made from.
        dtype: of the exported weights: bfloat16, float16 or float32.
        quantization: how the base was stored in training; used only where the adapter's file does not say it.
        double_quant: likewise.
        block_size: likewise.
        revision: of the base's hub repository.
        device: where the weights are formed: cpu, cuda, cuda:N, or auto.
        force: merge although the adapter was trained on another base, or the audit finds the export too far off.
        audit_batches: held-out rows on which the export is compared with the model as trained.

    Returns:
        `out`.

    Raises:
        RunError: `onto` or `dtype` is none that there is, `out` is not empty, the disk has no room, or the audit finds
            the export too far off.
        AdapterError: the adapter is damaged, does not fit the base, or is not finite.
        ModelError: the base cannot be loaded, or the original is asked for and not at hand.
    """
    out, adapter = Path(out), Path(adapter)
    check_request(out, dtype, onto)
    given = {"quantization": quantization, "double_quant": double_quant, "block_size": block_size}
    settings = read_trained_against(adapter, {**given, "compute_dtype": dtype})
    model = load_base(base, revision=revision, device=device, **settings)
    name_trained_classes(model.config, adapter)
    load_adapter(model, adapter, force=force)
    provenance = {"base": str(base), "adapter": str(adapter)} | ({"revision": revision} if revision else {})
    # An exported adapter brings its tokenizer along, whose chat template the base need not have.
    tokenizer = read_tokenizer(adapter) or read_tokenizer(locate_model(str(base), revision))
    if tokenizer is not None:
        add_tokens(tokenizer, read_added_tokens(adapter))
    export_merged(
        model, tokenizer, out, onto=onto, dtype=dtype, audit_batches=audit_batches, provenance=provenance, force=force
    )
    return out


def export_merged(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    out: Path,
    *,
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
    """Write the model as trained as a plain transformers checkpoint; the model itself is not changed.

    Args:
        model: the quantised base with adapters in use; or dense and without, where every weight was trained.
        tokenizer: saved with its chat template; None where there is none.
        out: folder to make; it must not be there, or be empty.
        onto: dequantized, the weights that training saw; or original, the dense weights that those were made from.
        dtype: bfloat16, float16 or float32.
        audit_batches: held-out rows; None leaves the export unaudited, and its card says so.
        provenance: facts for the card and export.json, such as `base` (a hub id) and `revision`.
        shard_bytes: of weights in one file.
        is_whole: whether every weight was trained, so that there is no adapter to merge.
        max_kl: largest mean KL that the audit lets pass, in nats a token; None takes that of `audit.LIMITS`.
        scored_loss: what the model lost on the same rows when it was scored, in nats; None if it was not.
        force: write the export although the audit finds it farther off.

    Returns:
        what export.json holds.

    Raises:
        AdapterError: no adapter is in use, or a merged weight is NaN or infinite.
        ModelError: a weight that no adapter is on is NaN or infinite, or the original is asked for and not at hand.
        RunError: `dtype` is not known, `out` is not empty, the disk has no room, the model runs code of its own, or the
            audit finds the export too far off, or the model another than was scored.
    """
    check_request(out, dtype, onto)
    made = made_of(model, dtype, onto, is_whole=is_whole)
    original = original_of(model, is_whole=is_whole) if onto == "original" else None
    tensors = _checked_tensors(model, out, torch_dtype(dtype), original)
    with staged_folder(out, replaces=False) as staged:
        sums = _write_checkpoint(model, tokenizer, staged, tensors, torch_dtype(dtype), shard_bytes)
        own = mapped(tensors, sums) if is_joined(tensors) else None
        found = None if audit_batches is None else audit_checkpoint(model, staged, audit_batches, own)
        check_audit("merged", found, onto, max_kl, scored_loss, force=force)
        return finish(model, staged, "merged", made, provenance or {}, found, sums)


def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, folder: Path) -> dict[str, str]:
    """Write a dense model as it stands, in its own dtype, as a plain transformers checkpoint and nothing else.

    Args:
        model: dense, without adapters.
        tokenizer: saved with its chat template; None where there is none.
        folder: complete or absent; one that stands there is replaced.

    Returns:
        checksums of its files by their names.

    Raises:
        ModelError: a weight is NaN or infinite.
        RunError: the disk has no room, or the model runs code of its own.
    """
    tensors = _checked_tensors(model, folder, model.dtype)
    with staged_folder(folder) as staged:
        sums = _write_checkpoint(model, tokenizer, staged, tensors, model.dtype, SHARD_BYTES)
        return checksums(staged, sums)


def original_of(model: PreTrainedModel, *, is_whole: bool) -> PreTrainedModel:
    """The dense weights that a base was quantised from, for `merged_tensors`.

    Raises:
        RunError: every weight was trained, so that nothing is put onto another.
        ModelError: they are not at hand.
    """
    if is_whole:
        raise RunError("every weight was trained, so there is no adapter to merge into the original; leave out --onto")
    try:
        original = original_weights(model)
    except ModelError as error:
        raise ModelError(f"{error}; export --onto dequantized") from error
    stack_experts(original)
    return original


def made_of(model: PreTrainedModel, dtype: str, onto: str, *, is_whole: bool) -> Made:
    """How the weights of an export come about, which is the same for all kinds of files.

    Raises:
        AdapterError: no adapter is in use.
    """
    return _of_weights(model, dtype) if is_whole else _of_adapters(model, dtype, onto)


def _of_adapters(model: PreTrainedModel, dtype: str, onto: str) -> Made:
    adapters = parts_in_use(model)
    if not adapters:
        raise AdapterError("no adapter is in use on this model, so there is nothing to merge; load or switch to one")
    against = trained_against(model)
    sections: dict[str, Mapping[str, object]] = {
        "Adapter": settings_of(adapters),
        "Trained against": without_prefix(against),
        "Merge": {"onto": onto, "formula": FORMULAS[onto], "rounded to": dtype},
    }
    return Made("Merged model", "qlora", sections, {"dtype": dtype, "onto": onto, "trained_against": against})


def _of_weights(model: PreTrainedModel, dtype: str) -> Made:
    trained_in = str(model.dtype).removeprefix("torch.")
    sections: dict[str, Mapping[str, object]] = {"Weights": {"trained in": trained_in, "rounded to": dtype}}
    facts = {"dtype": dtype, "onto": None, "trained_in": trained_in}
    return Made("Fully fine-tuned model", "full-finetuning", sections, facts)


def _checked_tensors(
    model: PreTrainedModel, out: Path, dtype: torch.dtype, original: PreTrainedModel | None = None
) -> list[StreamedTensor]:
    """What a plain checkpoint of the model holds, if it can be one and the disk has room for it."""
    check_own_code(model)
    tensors = published(model, merged_tensors(model, dtype, original))
    check_disk(out, sum(tensor.stored_bytes for tensor in tensors))
    return tensors


def check_own_code(model: PreTrainedModel) -> None:
    """Refuse a model whose weights alone would not run (RunError)."""
    if brings_code(model):
        raise RunError(
            f"{model.config._name_or_path} runs code of its own, which plain weights would have to include: not "
            "supported yet; export --to adapter"
        )


def _write_checkpoint(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    folder: Path,
    tensors: list[StreamedTensor],
    dtype: torch.dtype,
    shard_bytes: int,
) -> dict[Path, str]:
    """Write weights, config and tokenizer; gives the checksums of the files of weights."""
    with empty_workspaces(model):
        sums = write_weights(tensors, folder, shard_bytes=shard_bytes)
    names = {tensor.name for tensor in tensors}
    write_model_files(model, tokenizer, folder, dtype=dtype, tensor_names=names)
    return sums


def audit_checkpoint(
    model: PreTrainedModel, folder: Path, batches: Iterable[Batch], own: Mapping[str, Tensor] | None = None
) -> dict[str, float]:
    """Compare the model with the folder as another program loads it: in the dtype of its own weights.

    Args:
        model: as trained.
        folder: of the export.
        batches: of held-out rows.
        own: its tensors by the names of the model's state dict; None lets transformers find them in the folder.
    """
    kind: Any = auto_class(model.config, head_of(model)) if own is None else type(model)
    source: dict[str, Any] = {} if own is None else {"config": read_config(folder, head=head_of(model))}
    export, info = kind.from_pretrained(
        folder if own is None else None,
        **source,
        state_dict=own,
        dtype="auto",
        attn_implementation=model.config._attn_implementation,
        local_files_only=True,
        output_loading_info=True,
    )
    odd = sorted([*info["missing_keys"], *info["unexpected_keys"]])
    assert not odd, f"the export and its own config disagree on {odd[:5]}"
    return compare(model, export.to(audit_device(model, export)), batches)


def audit_device(model: PreTrainedModel, export: PreTrainedModel) -> torch.device:
    """Where the export is run beside the model as trained: on the CPU if the card has no room for both."""
    if model.device.type != "cuda":
        return model.device
    free, _ = torch.cuda.mem_get_info(model.device)
    return model.device if sum(p.nbytes for p in export.parameters()) < AUDIT_SHARE * free else torch.device("cpu")
