"""A LoRA adapter as GGUF, which runtimes put on a GGUF of its base: two tensors a layer.

    y = W x + (alpha / rank) B A x        rank is read off B, alpha off the file

A and B leave in fp32. Where layers have other scales than the first, B takes the difference.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from gguf import GGMLQuantizationType as Type
from torch import Tensor
from transformers import PreTrainedModel

from qlora_kit.errors import AdapterError, RunError
from qlora_kit.export.gguf.families import Family, Value, family_of
from qlora_kit.export.gguf.mixture import encode, stored_bytes
from qlora_kit.export.gguf.tensors import gguf_name, paired_rows, text_name
from qlora_kit.export.gguf.writer import StoredTensor, write_gguf
from qlora_kit.export.merge import parts_in_use
from qlora_kit.export.sealed import check_disk, check_vacant, seal, settings_of, without_prefix, write_card
from qlora_kit.export.stream import StreamedTensor, streamed
from qlora_kit.export.trained_against import trained_against
from qlora_kit.lora.layer import Adapter
from qlora_kit.lora.vocabulary import head_is_tied, head_name
from qlora_kit.storage import staged_folder

WEIGHTS = "adapter.gguf"


def export_gguf_adapter(
    model: PreTrainedModel, out: Path, *, provenance: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Write the adapter in use as GGUF.

    Args:
        model: carries the adapter.
        out: folder to make; it must not be there, or be empty.
        provenance: facts for the card and export.json.

    Returns:
        what export.json holds.

    Raises:
        AdapterError: none is in use, or it is not finite.
        RunError: the family has no place in GGUF, the adapter is more than pairs of matrices or on a tied head, `out`
            is not empty, or the disk has no room.
    """
    check_vacant(out)
    family, adapters = family_of(model), parts_in_use(model)
    if not adapters:
        raise AdapterError("no adapter is in use on this model; load or switch to one")
    odd = [name for name, part in adapters.items() if not isinstance(part, Adapter) or part.is_dora]
    if odd:
        raise RunError(
            f"the adapter does not train {odd[0]} as a plain LoRA pair, and a GGUF adapter holds nothing else; export "
            "--to gguf, which merges it"
        )
    if head_name(model) in adapters and head_is_tied(model):
        raise RunError(
            "the adapter is on a head that is tied to the embedding, and a GGUF of the base has no tensor of the head "
            "alone; export --to gguf, which merges it"
        )
    alpha, tensors = _matrices(model, family, adapters)
    facts, against = {"base": model.config._name_or_path, **(provenance or {})}, trained_against(model)
    keys: dict[str, Value] = {
        "general.type": "adapter",
        "general.name": Path(facts["base"]).name or "adapter",
        "adapter.type": "lora",
        "adapter.lora.alpha": alpha,
    }
    stored = [_stored(tensor) for tensor in tensors]
    check_disk(out, sum(tensor.stored_bytes for tensor in stored))
    with staged_folder(out, replaces=False) as staged:
        sums = {staged / WEIGHTS: write_gguf(staged / WEIGHTS, family.whole or family.architecture, keys, stored)}
        sections: dict[str, Mapping[str, object]] = {
            "Provenance": facts,
            "Adapter": settings_of(adapters),
            "Trained against": without_prefix(against),
        }
        write_card(staged, "LoRA adapter as GGUF", facts["base"], "gguf", ["qlora-kit", "lora", "gguf"], sections)
        content = {"kind": "gguf-adapter", "comparisons": {}, "provenance": facts, "trained_against": against}
        return seal(staged, content, sums)


def _matrices(
    model: PreTrainedModel, family: Family, adapters: Mapping[str, Any]
) -> tuple[float, list[StreamedTensor]]:
    """The alpha of the file, and A and B of every layer as it holds them."""
    first = next(iter(adapters.values()))
    alpha = float(first.scale * len(first.matrices[0]))
    tensors, config = [], model.config.get_text_config()
    for source, adapter in adapters.items():
        name = gguf_name(text_name(model, f"{source}.weight"), config.num_hidden_layers, family)
        a_RI, b_OR = (matrix.detach().float().cpu() for matrix in adapter.matrices)
        b_OR = b_OR * (adapter.scale * len(a_RI) / alpha) if alpha else b_OR
        if family.turns_in_pairs and name.split(".")[-2] in ("attn_q", "attn_k"):
            b_OR = paired_rows(b_OR, config)
        for suffix, matrix in (("lora_a", a_RI), ("lora_b", b_OR)):
            if not torch.isfinite(matrix).all():
                raise AdapterError(f"{source} holds NaN or infinity; it is not exported")
            tensors.append(streamed(f"{name}.{suffix}", matrix))
    return alpha, tensors


def _stored(tensor: StreamedTensor) -> StoredTensor:
    def parts() -> Iterator[Tensor]:
        return (encode(part, Type.F32, tensor.name) for part in tensor.slices())

    return StoredTensor(tensor.name, tensor.shape, Type.F32, stored_bytes(tensor.shape, Type.F32), parts)
