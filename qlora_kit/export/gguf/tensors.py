"""The tensors of a checkpoint under the names and in the shapes of GGUF, and back.

    rope in pairs    of each head, rows (half, i) -> (i, half): runtimes turn neighbours, transformers turns halves
    shifted norm     w -> w + 1: runtimes of Gemma multiply by the weight alone
    transposed       (in, out) -> (out, in): GPT-2's `Conv1D`

All of them work on slices of rows, so that no tensor stands in memory as a whole but one that is transposed.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache, partial

import gguf
import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from qlora_kit.base.text import text_body_name
from qlora_kit.errors import RunError
from qlora_kit.export.gguf.families import Family, head_width
from qlora_kit.export.stream import StreamedTensor, row_slices

Slices = Iterable[Tensor]


@dataclass(frozen=True, slots=True)
class Place:
    """Where one tensor of a checkpoint lies in a GGUF file, and how its values come there and back."""

    source: str
    """Its name in the checkpoint."""
    name: str
    """Its name in the file."""
    shape: tuple[int, ...]
    """Its shape in the file; the last axis is the one that runtimes sum over."""
    forth: Callable[[Slices], Iterator[Tensor]]
    """Slices of the checkpoint's tensor as slices of the file's."""
    back: Callable[[Slices], Iterator[Tensor]]
    """The same the other way."""
    is_transposed: bool = False


def place(source: str, shape: tuple[int, ...], config: PretrainedConfig, family: Family) -> Place:
    """Where a tensor of a checkpoint lies.

    Args:
        source: its name in the checkpoint.
        shape: its shape there.
        config: of the model.
        family: of the model.

    Raises:
        RunError: GGUF has no place for a tensor of that name in this family.
    """
    name = gguf_name(source, config.num_hidden_layers, family)
    leaf = name.split(".")[-2]
    if config.model_type == "gpt2" and len(shape) == 2 and name.startswith("blk."):
        whole = (shape[1], shape[0])
        forth, back = partial(_transposed, shape=shape), partial(_transposed, shape=whole)
        return Place(source, name, whole, forth, back, is_transposed=True)
    if family.turns_in_pairs and leaf in ("attn_q", "attn_k"):
        width = head_width(config)
        return Place(source, name, shape, partial(_paired, width=width), partial(_halved, width=width))
    if family.norm_shift and leaf.endswith("_norm"):
        shift = family.norm_shift
        return Place(source, name, shape, partial(_shifted, by=shift), partial(_shifted, by=-shift))
    return Place(source, name, shape, iter, iter)


def is_of_text(model: PreTrainedModel, source: str) -> bool:
    """Whether a tensor has a part in reading text, by its name."""
    return source.startswith(f"{text_body_name(model)}.") or not source.startswith(f"{model.base_model_prefix}.")


def text_name(model: PreTrainedModel, source: str) -> str:
    """What a tensor that has such a part is called where a model reads and does nothing else."""
    body = f"{text_body_name(model)}."
    return f"{model.base_model_prefix}.{source.removeprefix(body)}" if source.startswith(body) else source


def gguf_name(source: str, layers: int, family: Family) -> str:
    """What GGUF calls a tensor of a checkpoint, such as `blk.0.attn_q.weight`.

    Raises:
        RunError: it has no name there.
    """
    found = _names(family.architecture, layers).get_name(source, try_suffixes=(".weight", ".bias"))
    if found is None or (found.endswith(".bias") and found.split(".")[-2] not in family.biases):
        raise RunError(f"{source} has no place in a GGUF of the family {family.architecture}; export --to merged")
    return found


@cache
def _names(architecture: str, layers: int) -> gguf.TensorNameMap:
    numbers = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
    return gguf.get_tensor_name_map(numbers[architecture], layers)


def placed(tensor: StreamedTensor, place: Place) -> StreamedTensor:
    """A tensor of a checkpoint as the one of the file."""
    return StreamedTensor(place.name, place.shape, tensor.dtype, lambda: place.forth(tensor.slices()))


def paired_rows(matrix: Tensor, config: PretrainedConfig) -> Tensor:
    """The rows of a matrix that is there, (heads * width, any), in the order for turning neighbours."""
    return torch.cat(list(_paired([matrix], head_width(config))))


def _paired(slices: Slices, width: int) -> Iterator[Tensor]:
    return _reordered(slices, width, (2, width // 2))


def _halved(slices: Slices, width: int) -> Iterator[Tensor]:
    return _reordered(slices, width, (width // 2, 2))


def _reordered(slices: Slices, width: int, split: tuple[int, int]) -> Iterator[Tensor]:
    """Rows of each head, first seen as a table of `split`, column after column."""
    for part in _whole_heads(slices, width):
        yield part.view(-1, *split, *part.shape[1:]).transpose(1, 2).reshape(part.shape)


def _whole_heads(slices: Slices, width: int) -> Iterator[Tensor]:
    """The same rows, cut where a head ends."""
    kept: list[Tensor] = []
    for part in slices:
        rows = torch.cat([*kept, part])
        whole = len(rows) // width * width
        if whole:
            yield rows[:whole]
        kept = [rows[whole:]]
    assert not any(map(len, kept)), "the last head is short of rows"


def _shifted(slices: Slices, by: float) -> Iterator[Tensor]:
    for part in slices:
        yield part + by


def _transposed(slices: Slices, shape: tuple[int, ...]) -> Iterator[Tensor]:
    """Slices of the transpose of a matrix of that shape; the matrix itself is put together first."""
    whole: Tensor | None = None
    filled = 0
    for part in slices:
        whole = torch.empty(shape, dtype=part.dtype) if whole is None else whole
        whole[filled : filled + len(part)] = part
        filled += len(part)
    assert whole is not None
    for rows in row_slices((shape[1], shape[0])):
        yield whole.t()[rows].contiguous()
