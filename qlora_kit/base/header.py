"""What stands at the beginning of a safetensors file, and JSON that nobody has vouched for.

    8 bytes: N, little-endian | N bytes of JSON: {name: {dtype, shape, data_offsets}} | the tensors, without a gap

Source of the format and of its limits: the README of safetensors, which says what its own reader checks.
"""

import json
import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_kit.errors import ModelError

MAX_HEADER_BYTES = 100_000_000
"""The longest header that the safetensors format allows; the same bound holds here for config and index."""

_LFS_POINTER = b"version https://git-lfs"

_DTYPE_BITS = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}
NARROW = tuple(dtype for dtype in _DTYPE_BITS if dtype.startswith(("F8", "F6", "F4")))
"""Fractions of 8 bits and less, which mean something times a scale."""


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """What the header of a safetensors file says of one tensor."""

    dtype: str
    """The format's own name, such as `BF16`."""
    shape: tuple[int, ...]
    begin: int
    """Offset of its first byte from the start of the file."""
    end: int
    """Offset one past its last byte."""


def read_header(path: Path) -> dict[str, TensorEntry]:
    """The tensors of a safetensors file by name, in the order in which they lie in it.

    Raises:
        ModelError: if the file is not exactly what its header says: cut short, too long, with tensors that overlap,
            leave a gap or do not have the size of their shape, or with a header that is damaged or above 100 MB.
    """
    try:
        file_bytes = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(max(8, len(_LFS_POINTER)))
            header_bytes = int.from_bytes(start[:8], "little")
            if start == _LFS_POINTER:
                raise ModelError(f"{path} is a Git LFS pointer, not the weights: run `git lfs pull` in its folder")
            if len(start) < 8:
                raise ModelError(f"{path} has {file_bytes} bytes, a safetensors file has at least 8: download it again")
            if header_bytes > MAX_HEADER_BYTES:
                raise ModelError(
                    f"{path} announces a header of {header_bytes} bytes, the format allows {MAX_HEADER_BYTES}: "
                    "it is damaged, or not a safetensors file"
                )
            file.seek(8)
            raw = file.read(header_bytes)
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror}") from error
    if len(raw) < header_bytes:
        raise ModelError(f"{path} is cut short: expected more than {8 + header_bytes} bytes, found {file_bytes}")
    header = _parse_json(raw, path, one_of_each=True)
    header.pop("__metadata__", None)
    entries = [(name, _entry(path, name, spec, 8 + header_bytes)) for name, spec in header.items()]
    entries.sort(key=lambda item: (item[1].begin, item[1].end))
    _check_cover(path, entries, 8 + header_bytes, file_bytes)
    return dict(entries)


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file, which may be as long as a safetensors header.

    Raises:
        ModelError: it cannot be read, is longer, or holds something else.
    """
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_HEADER_BYTES + 1)
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror}") from error
    if len(raw) > MAX_HEADER_BYTES:
        raise ModelError(f"{path} is larger than {MAX_HEADER_BYTES} bytes: refused")
    return _parse_json(raw, path)


def _parse_json(raw: bytes, path: Path, *, one_of_each: bool = False) -> dict[str, Any]:
    """The JSON object in `raw`, which comes from `path`; with `one_of_each` no name in it may be there twice."""
    try:
        value = json.loads(raw, object_pairs_hook=_without_doubles if one_of_each else None)
    except (ValueError, RecursionError) as error:  # ValueError: not JSON, not UTF-8, or a number of too many digits
        raise ModelError(f"{path} is damaged: its JSON cannot be read ({error})") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path} is damaged: expected a JSON object, found a {type(value).__name__}")
    return value


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Of two tensors of one name every reader would take another."""
    found = dict(pairs)
    if len(found) < len(pairs):
        (twice, _), *_ = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"{twice!r} appears twice")
    return found


def _entry(path: Path, name: str, spec: object, data_begin: int) -> TensorEntry:
    """One tensor of a header, with offsets from the start of the file."""
    match spec:
        case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [int(begin), int(end)]}:
            # 64 axes are the most that a tensor library takes; more would only make the product slow.
            is_shape = len(shape) <= 64 and all(isinstance(length, int) and length >= 0 for length in shape)
            if is_shape and dtype in _DTYPE_BITS and 0 <= begin <= end:
                expected_bytes = math.prod(shape) * _DTYPE_BITS[dtype] / 8
                if end - begin != expected_bytes:
                    raise ModelError(
                        f"{path}: tensor {name!r}, {dtype} of shape {shape}, takes {expected_bytes:.0f} bytes, "
                        f"the header gives it {end - begin}"
                    )
                return TensorEntry(dtype, tuple(shape), data_begin + begin, data_begin + end)
    raise ModelError(f"{path}: the header describes tensor {name!r} in a way that the format does not allow")


def _check_cover(path: Path, entries: list[tuple[str, TensorEntry]], data_begin: int, file_bytes: int) -> None:
    """Refuse a file unless its tensors, sorted, fill it from the header to the last byte."""
    expected_bytes = max((entry.end for _, entry in entries), default=data_begin)
    if file_bytes != expected_bytes:
        what = "is cut short" if file_bytes < expected_bytes else "continues after its last tensor"
        raise ModelError(f"{path} {what}: expected {expected_bytes} bytes, found {file_bytes}; download it again")
    position = data_begin
    for name, entry in entries:
        if entry.begin != position:
            what = "overlaps the one before it" if entry.begin < position else "leaves a gap before it"
            raise ModelError(f"{path}: tensor {name!r} {what}: expected at byte {position}, found at {entry.begin}")
        position = entry.end
