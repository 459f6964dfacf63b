"""Tensors that are made while they are written: safetensors files whose contents never stand in memory together.

    8 bytes      n, the length of the header, little-endian
    n bytes      the header: JSON from name to dtype, shape and byte range; spaces at its end bring the data to 8 bytes
    the rest     the tensors' bytes, one after another, without holes

The header needs shapes and dtypes only, so it is written first, and each tensor then goes to the file in slices of
rows. The bytes depend on the tensors' names, values and order alone: the same export gives the same files. Their
checksum is taken as they are made: a file larger than the free memory is not read back, and what a disk does to it is
found.

Source: the format's description, github.com/huggingface/safetensors, README, section "Format".
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from qlora_kit.storage import write_text
from qlora_kit.units import GIB

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"

SHARD_BYTES = 4 * GIB
"""Bytes of tensors in one file, unless a single tensor is larger."""

SLICE_ELEMENTS = 2**20
"""Elements in one slice of rows: 2 MiB in 16 bits. From half to four times as many take the same time to form (a
processor's cache holds about one in fp32)."""

_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


Piece = tuple[str, tuple[int, ...]]
"""Name and shape of some rows of a tensor that stand under a name of their own."""


@dataclass(frozen=True, slots=True)
class StreamedTensor:
    """A tensor of which the name, shape and dtype are known, and the values are made when they are asked for."""

    name: str
    """Under which another program finds it."""
    shape: tuple[int, ...]
    dtype: torch.dtype
    slices: Callable[[], Iterator[Tensor]]
    """Its values in order, in slices along the first axis, in `dtype`."""
    pieces: tuple[Piece, ...] = ()
    """What a file holds in its place, in the order of its bytes; itself where there is nothing."""

    @property
    def parts(self) -> tuple[Piece, ...]:
        """What a file says that there is."""
        return self.pieces or ((self.name, self.shape),)

    @property
    def stored_bytes(self) -> int:
        """Bytes that it takes in a file."""
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self) -> Tensor:
        """All of it at once."""
        return torch.cat([part.reshape(-1) for part in self.slices()]).view(self.shape)


def row_slices(shape: Sequence[int], elements: int = SLICE_ELEMENTS) -> Iterator[slice]:
    """Cut the first axis so that no slice has more than `elements` elements, unless a single row has.

    >>> list(row_slices((5, 4), elements=9))
    [slice(0, 2, None), slice(2, 4, None), slice(4, 5, None)]
    """
    step = max(1, elements // max(1, math.prod(shape[1:])))
    for begin in range(0, shape[0], step):
        yield slice(begin, min(begin + step, shape[0]))


def streamed(name: str, values: Tensor, dtype: torch.dtype | None = None) -> StreamedTensor:
    """A tensor that is there already, each slice brought to `dtype` (by default its own) when it is asked for."""
    dtype = dtype or values.dtype
    return StreamedTensor(name, tuple(values.shape), dtype, partial(tensor_slices, values.detach(), dtype))


def in_dtype(tensor: StreamedTensor, dtype: torch.dtype) -> StreamedTensor:
    """The same tensor, each slice brought to another dtype."""
    return StreamedTensor(tensor.name, tensor.shape, dtype, lambda: (part.to(dtype) for part in tensor.slices()))


def tensor_slices(values: Tensor, dtype: torch.dtype) -> Iterator[Tensor]:
    """Slices of a tensor along its first axis, each in `dtype`."""
    values = values if values.ndim else values.view(1)
    for rows in row_slices(values.shape):
        yield values[rows].to(dtype)


def write_weights(
    tensors: Iterable[StreamedTensor], folder: Path, *, shard_bytes: int = SHARD_BYTES
) -> dict[Path, str]:
    """Write a model's tensors as one safetensors file, or as several with an index.

    Args:
        tensors: in the order of the model's state dict; those of a file are held until it is written, and no others.
        folder: gets `model.safetensors`, or `model-00001-of-0000N.safetensors` and `model.safetensors.index.json`.
        shard_bytes: of tensors in one file.

    Returns:
        the files of weights, each with its sha256.
    """
    sums: list[str] = []
    held: list[dict[str, int]] = []
    for shard in _shards(tensors, shard_bytes):
        sums.append(write_safetensors(_part(folder, len(sums)), shard, {"format": "pt"}))
        held.append({name: math.prod(shape) * each.dtype.itemsize for each in shard for name, shape in each.parts})
    count = len(sums)  # which only now is known, and is part of the files' names
    names = [WEIGHTS] if count == 1 else [f"model-{n:05}-of-{count:05}.safetensors" for n in range(1, count + 1)]
    for number, name in enumerate(names):
        _part(folder, number).rename(folder / name)
    if count > 1:
        index = {
            "metadata": {"total_size": sum(sum(sizes.values()) for sizes in held)},
            "weight_map": {tensor: name for sizes, name in zip(held, names, strict=True) for tensor in sizes},
        }
        write_text(folder / INDEX, json.dumps(index, indent=2) + "\n")
    return {folder / name: digest for name, digest in zip(names, sums, strict=True)}


def _part(folder: Path, number: int) -> Path:
    return folder / f"model.{number}.part"


def write_safetensors(path: Path, tensors: Sequence[StreamedTensor], metadata: Mapping[str, str]) -> str:
    """Write one safetensors file, a slice of one tensor at a time.

    Args:
        path: of the file, which is not there yet.
        tensors: what goes into it; where dtypes differ, the widest come first.
        metadata: of the file, written in this order.

    Returns:
        sha256 of the file, in hexadecimal.
    """
    # Widest first, so that every tensor begins at a multiple of its own width; a stable sort keeps the order otherwise.
    ordered = sorted(tensors, key=lambda tensor: -tensor.dtype.itemsize)
    digest = hashlib.sha256()
    with open(path, "xb") as file:
        for part in _contents(ordered, metadata):
            digest.update(part)
            file.write(part)
    return digest.hexdigest()


def _shards(tensors: Iterable[StreamedTensor], shard_bytes: int) -> Iterator[list[StreamedTensor]]:
    shard: list[StreamedTensor] = []
    filled = 0
    for tensor in tensors:
        if shard and filled + tensor.stored_bytes > shard_bytes:
            yield shard
            shard, filled = [], 0
        shard.append(tensor)
        filled += tensor.stored_bytes
    yield shard


def _header(tensors: Sequence[StreamedTensor], metadata: Mapping[str, str]) -> bytes:
    entries: dict[str, object] = {"__metadata__": dict(metadata)}
    begin = 0
    for dtype, (name, shape) in ((tensor.dtype, part) for tensor in tensors for part in tensor.parts):
        end = begin + math.prod(shape) * dtype.itemsize
        entries[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _contents(tensors: Sequence[StreamedTensor], metadata: Mapping[str, str]) -> Iterator[bytes | memoryview]:
    """The bytes of a file, in order."""
    yield _header(tensors, metadata)
    for tensor in tensors:
        made_bytes = 0
        for part in tensor.slices():
            assert part.dtype == tensor.dtype, f"{tensor.name}: {part.dtype} came, {tensor.dtype} was announced"
            yield part.to("cpu").contiguous().reshape(-1).view(torch.uint8).numpy().data
            made_bytes += part.nbytes
        assert made_bytes == tensor.stored_bytes, f"{tensor.name}: {made_bytes} bytes for {tensor.stored_bytes}"
