"""The names under which a family's checkpoints are published, where transformers holds their tensors otherwise.

    experts.gate_up_proj (E, 2 I, D)  ->  experts.0.gate_proj (I, D), experts.0.up_proj (I, D), experts.1.gate_proj ...
    lm_head                           ->  embed_out, of GPT-NeoX

transformers renames and joins tensors as it reads them, and its `save_pretrained` undoes that. Other programs (vLLM,
llama.cpp's converter, older releases of transformers) know the published names alone, so an export bears them. What was
joined lies one piece behind the other: a file has the same bytes under either names, and only its header differs.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from math import prod
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import WeightTransform, revert_weight_conversion

from qlora_kit.base.header import read_header
from qlora_kit.export.stream import Piece, StreamedTensor


def published(model: PreTrainedModel, tensors: Iterable[StreamedTensor]) -> list[StreamedTensor]:
    """The same tensors with the pieces that they are in published checkpoints.

    Where a family's pieces are more than rows of one tensor in their order, all of its tensors keep the names by which
    transformers holds them, and reads them, too.
    """
    tensors, reading = list(tensors), _reading(model)
    found = [replace(tensor, pieces=_pieces(reading, tensor)) for tensor in tensors]
    names = [name for tensor in found for name, _ in tensor.pieces]
    return found if all(tensor.pieces for tensor in found) and len(set(names)) == len(names) else tensors


def _reading(model: PreTrainedModel) -> Any:
    """What transformers looks at of a model to undo how it was read; where it was not read, the family's own way."""
    conversions = vars(model).get("_weight_conversions")
    if conversions is None:
        return model
    return SimpleNamespace(_weight_conversions=list(filter(_can_be_undone, conversions)), config=model.config)


def _can_be_undone(conversion: WeightTransform) -> bool:
    """Not what makes stored codes into quantised layers; these are other layers here."""
    try:
        conversion.reverse_transform()
    except NotImplementedError:
        return False
    return True


def _pieces(reading: Any, tensor: StreamedTensor) -> tuple[Piece, ...]:
    """What transformers cuts a tensor into as it saves it; nothing where it does more than cut rows.

    It is asked with the numbers of the rows in the place of the weights, in two columns, which a transpose would mix.
    """
    columns = (2,) if len(tensor.shape) > 1 else tensor.shape
    shape = (*tensor.shape[:-1], *columns)
    numbers = torch.arange(prod(shape), dtype=torch.int32)
    parts = revert_weight_conversion(reading, {tensor.name: numbers.view(shape)})
    ordered = sorted(parts.items(), key=lambda item: item[1].flatten()[:1].tolist())
    is_whole = torch.equal(torch.cat([part.flatten() for _, part in ordered]), numbers)
    if not is_whole or any(part.ndim > 1 and part.shape[-1:] != columns for _, part in ordered):
        return ()
    return tuple((name, (*part.shape[:-1], *tensor.shape[-1:])) for name, part in ordered)


def mapped(tensors: Iterable[StreamedTensor], files: Iterable[Path]) -> dict[str, Tensor]:
    """The tensors of files by the names of the model's own state dict: mapped pages, and no memory until they are read.

    From files under published names transformers would join experts in memory of its own: all of a model's.

    Args:
        tensors: of the files.
        files: as `write_weights` made them of these.
    """
    first = {tensor.parts[0][0]: tensor for tensor in tensors}
    found: dict[str, Tensor] = {}
    for path in files:
        raw = torch.from_file(str(path), shared=False, size=path.stat().st_size, dtype=torch.uint8)
        for name, entry in read_header(path).items():
            if name in first:
                tensor = first[name]
                held = raw[entry.begin : entry.begin + tensor.stored_bytes]
                found[tensor.name] = held.view(tensor.dtype).view(tensor.shape)
    return found


def is_joined(tensors: Sequence[StreamedTensor]) -> bool:
    """Whether a tensor of the model is several of its published checkpoints."""
    return any(len(tensor.parts) > 1 for tensor in tensors)
