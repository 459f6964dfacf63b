"""Exported tensors under the names, and in the pieces, of the files that transformers reads such a model from.

transformers keeps some families otherwise than their files do: the experts of a layer joined in one tensor, or a
language model beside a vision tower under another name. Other programs know the files. So transformers' own rules for
saving are asked, of an expert at a time: of tensors without values what comes of it, and of its values when they are
written.
"""

import re
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from qlora_kit.export.stream import StreamedTensor, tensor_slices


def as_stored(model: PreTrainedModel, tensors: Sequence[StreamedTensor]) -> list[StreamedTensor]:
    """The same weights as the files of the model's family hold them.

    Args:
        model: of which they are; its rules are those by which it was read, or those of its family.
        tensors: as `merged_tensors` gives them.

    Returns:
        tensors in the same order, each in the place of that which it is a piece of; or `tensors` themselves where a
        rule takes several of them for one: transformers reads them so, too.
    """
    empty = {tensor.name: _empty(tensor.shape) for tensor in tensors}
    made = _stored(model, empty)
    if all(made.get(name) is each for name, each in empty.items()):
        return list(tensors)
    found = [piece for tensor in tensors for piece in _pieces(model, tensor)]
    return found if {piece.name: piece.shape for piece in found} == _shapes(made) else list(tensors)


def _pieces(model: PreTrainedModel, tensor: StreamedTensor) -> Iterator[StreamedTensor]:
    """What comes of one tensor by itself."""
    empty = _empty(tensor.shape)
    made = _stored(model, {tensor.name: empty})
    if all(each is empty for each in made.values()):
        yield from (replace(tensor, name=name) for name in made)
        return
    parts = tensor.parts or (tensor,)
    shape = (1, *tensor.shape[1:]) if tensor.parts else tensor.shape
    first = _shapes(_stored(model, {tensor.name: _empty(shape)}))
    last = next(reversed(first))

    @lru_cache(maxsize=1)
    def values(number: int) -> dict[str, Tensor]:
        return _stored(model, {tensor.name: parts[number].read().view(shape)})

    def slices(number: int, name: str) -> Iterator[Tensor]:
        try:
            yield from tensor_slices(values(number)[name], tensor.dtype)
        finally:
            if name == last:  # read in order: none of them is asked for again
                values.cache_clear()

    for number in range(len(parts)):
        for name, piece in first.items():
            yield StreamedTensor(_of_part(name, number, made), piece, tensor.dtype, partial(slices, number, name))


def _of_part(name: str, number: int, names: Container[str]) -> str:
    """The name of the same piece of another part: that of `names` which has its number in the place of a 0."""
    zeros = (zero.span() for zero in re.finditer(r"(?<=\.)0(?=\.)", name))
    others = (f"{name[:begin]}{number}{name[end:]}" for begin, end in zeros)
    return next((other for other in others if other in names), name)


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(each.shape) for name, each in tensors.items()}


def _empty(shape: Sequence[int]) -> Tensor:
    """A tensor without values, a plain one in a rehearsal, too."""
    with _disable_current_modes():
        return torch.empty(shape, device="meta")


def _stored(model: PreTrainedModel, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    asked: Any = _With(model, tensors)
    made: dict[str, Tensor] = revert_weight_conversion(asked, dict(tensors))
    return made


class _With:
    """A model whose parameters are these tensors, as it was before it was quantised: some rules look at a shape."""

    def __init__(self, model: PreTrainedModel, tensors: Mapping[str, Tensor]) -> None:
        self._model, self._tensors = model, tensors

    def get_parameter(self, name: str) -> Tensor:
        return self._tensors[name]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)
