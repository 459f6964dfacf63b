"""Fake tensors that a plan can afford: what an operator makes of such arguments is worked out once, then recalled.

Layers are alike, and so are runs: a plan calls some hundred thousand operators, of which some thousand differ. What
comes out follows from what the arguments look like, since fake tensors have no values. torch keeps such a memory, too,
but to ask it takes longer than most operators (it is made for symbolic shapes, and leaves out operators of others), and
asking is most of a plan's time.
"""

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import NoneType
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

PLAIN = {NoneType, bool, int, float, str, torch.dtype, torch.device, torch.layout, torch.memory_format}
"""Arguments that are what they say. Any other, such as a generator or a symbolic size, leaves the operator to torch."""


_Looks = tuple[Any, ...]


class RecallingMode(FakeTensorMode):
    """A fake mode without symbolic shapes, in which an operator that was seen with such arguments is recalled."""

    def __init__(self) -> None:
        super().__init__(allow_non_fake_inputs=True)
        self.cache_enabled = False  # torch's

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """As torch's, or from memory."""
        kwargs = kwargs or {}
        tensors: list[FakeTensor] = []
        key: list[Any] = [func, torch.get_default_dtype(), torch.is_inference_mode_enabled(), *kwargs]
        if not (self._describe(args, key, tensors) and self._describe(kwargs.values(), key, tensors)):
            return super().__torch_dispatch__(func, types, args, kwargs)
        known = tuple(key)
        recipe = _RECALLED.get(known)
        if recipe is not None:
            return recipe.make(self, tensors)
        before = [_looks(tensor) for tensor in tensors]
        result = super().__torch_dispatch__(func, types, args, kwargs)
        if before == [_looks(tensor) for tensor in tensors]:
            recipe = _recipe_of(result, tensors)
            if recipe is not None and recipe.is_faithful(self, tensors, result):
                _RECALLED[known] = recipe
        return result

    def _describe(self, args: Iterable[Any], key: list[Any], tensors: list[FakeTensor]) -> bool:
        """Add to `key` what the arguments look like, and to `tensors` those that are; False where looks are not all."""
        for arg in args:
            kind = type(arg)
            if kind in PLAIN:
                key += (kind, arg)  # 1, 1.0 and True are equal, and make different things
            elif kind is list or kind is tuple:
                key += (list, len(arg))
                if not self._describe(arg, key, tensors):
                    return False
            elif isinstance(arg, FakeTensor) and arg.fake_mode is self and _is_plain(arg):
                key.append(_looks(arg))
                tensors.append(arg)
            else:
                return False
        return True


def _is_plain(tensor: FakeTensor) -> bool:
    """Whether a tensor is what it looks like: a small constant has values, and a sparse one no strides."""
    return tensor.constant is None and tensor.layout is torch.strided


def _looks(tensor: FakeTensor) -> _Looks:
    """All that a fake tensor is, but for whose storage it shares."""
    return (
        tensor.shape,
        tensor.stride(),
        tensor.storage_offset(),
        tensor.dtype,
        tensor.fake_device,
        tensor.requires_grad,
        tensor.is_conj(),
        tensor.is_neg(),
        tensor.is_inference(),
    )


@dataclass(frozen=True, slots=True)
class _Made:
    """How one result comes about: it is one of the tensors that came in, or shares its storage, or is new."""

    looks: _Looks
    source: int | None
    is_source: bool

    def make(self, mode: FakeTensorMode, tensors: Sequence[FakeTensor]) -> FakeTensor:
        if self.source is not None and self.is_source:
            return tensors[self.source]
        shape, stride, offset, dtype, device, *_ = self.looks
        bare = torch.empty_strided(shape, stride, dtype=dtype, device="meta")
        if self.source is not None:
            bare.set_(tensors[self.source].untyped_storage(), offset, shape, stride)
        return FakeTensor(mode, bare, device)


@dataclass(frozen=True, slots=True)
class _Recipe:
    """How all results come about: a tensor or None, or a tuple or list of such."""

    parts: tuple[_Made | None, ...]
    kind: type[list[Any]] | type[tuple[Any, ...]] | None

    def make(self, mode: FakeTensorMode, tensors: Sequence[FakeTensor]) -> Any:
        if self.kind is None:
            (only,) = self.parts
            return None if only is None else only.make(mode, tensors)
        return self.kind(None if part is None else part.make(mode, tensors) for part in self.parts)

    def is_faithful(self, mode: FakeTensorMode, tensors: Sequence[FakeTensor], result: Any) -> bool:
        """Whether it makes what it was read off."""
        wanted, made = (_listed(each) for each in (result, self.make(mode, tensors)))
        return all((a is None and b is None) or _are_alike(a, b) for a, b in zip(wanted, made, strict=True))


def _are_alike(a: FakeTensor, b: FakeTensor) -> bool:
    return _looks(a) == _looks(b) and a.untyped_storage().nbytes() == b.untyped_storage().nbytes()


def _listed(result: Any) -> Sequence[Any]:
    return result if isinstance(result, (tuple, list)) else [result]


def _recipe_of(result: Any, tensors: Sequence[FakeTensor]) -> _Recipe | None:
    """How a result came about; None where that cannot be told, or not from looks."""
    listed = _listed(result)
    made = [each for each in listed if each is not None]
    if not all(isinstance(each, FakeTensor) and _is_plain(each) for each in made):
        return None
    storages = [tensor.untyped_storage()._cdata for tensor in tensors]
    new = [storage for storage in (each.untyped_storage()._cdata for each in made) if storage not in storages]
    parts = [None if each is None else _part_of(each, tensors, storages) for each in listed]
    if len(set(new)) < len(new) or len(made) > sum(part is not None for part in parts):
        return None  # several results lie in one new storage, or one in a storage of several arguments
    kind = next((each for each in (list, tuple) if isinstance(result, each)), None)  # torch names some tuples' parts
    return _Recipe(tuple(parts), kind)


def _part_of(made: FakeTensor, tensors: Sequence[FakeTensor], storages: Sequence[int]) -> _Made | None:
    same = [index for index, tensor in enumerate(tensors) if tensor is made]
    sharing = [index for index, storage in enumerate(storages) if storage == made.untyped_storage()._cdata]
    if len(same or sharing) > 1:
        return None
    return _Made(_looks(made), next(iter(same or sharing), None), bool(same))


_RECALLED: dict[tuple[Hashable, ...], _Recipe] = {}
"""By operator and what its arguments look like; as torch's own, it lasts as long as the process."""
