"""GGUF files whose tensors are made while they are written.

    header       magic, version 3, counts; keys and values; of every tensor name, shape, type, place (`gguf` writes it)
    the rest     the tensors' bytes, each from a multiple of 32 on

The checksum is taken as the bytes are made, as that of safetensors files is.

Source: github.com/ggml-org/ggml, docs/gguf.md.
"""

import hashlib
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
from torch import Tensor

from qlora_kit.errors import RunError
from qlora_kit.export.gguf.families import Value

ALIGNMENT = gguf.GGUF_DEFAULT_ALIGNMENT


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor of a file, whose bytes are made when they are asked for."""

    name: str
    shape: tuple[int, ...]
    kind: gguf.GGMLQuantizationType
    stored_bytes: int
    parts: Callable[[], Iterator[Tensor]]
    """Its bytes in order, in pieces of uint8."""


def write_gguf(path: Path, architecture: str, keys: Mapping[str, Value], tensors: Sequence[StoredTensor]) -> str:
    """Write one file, a piece of one tensor at a time.

    Args:
        path: of the file, which is not there yet.
        architecture: of the model.
        keys: what the file says beside its tensors, in this order.
        tensors: in this order.

    Returns:
        sha256 of the file, in hexadecimal.

    Raises:
        RunError: a key has a value that such files cannot hold, such as half a character.
    """
    _write_header(path, architecture, keys, tensors)
    digest = hashlib.sha256(path.read_bytes())
    with open(path, "ab") as file:
        for piece in _contents(file.tell(), tensors):
            digest.update(piece)
            file.write(piece)
    return digest.hexdigest()


def _write_header(path: Path, architecture: str, keys: Mapping[str, Value], tensors: Sequence[StoredTensor]) -> None:
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in keys.items():
        _add(writer, key, value)
    for tensor in tensors:
        # Shape and dtype are not looked at where the type is given, but for bytes, whose shape is that of the bytes.
        writer.add_tensor_info(
            tensor.name, tensor.shape, np.dtype(np.float32), tensor.stored_bytes, raw_dtype=tensor.kind
        )
    writer.write_header_to_file()
    try:
        writer.write_kv_data_to_file()
    except (struct.error, UnicodeEncodeError) as error:
        raise RunError(
            f"no GGUF file can hold what the tokenizer or the config says: {error}; correct it there"
        ) from error
    writer.write_ti_data_to_file()
    writer.close()


def _add(writer: gguf.GGUFWriter, key: str, value: Value) -> None:
    match value:
        case bool():
            writer.add_bool(key, value)
        case int():
            writer.add_uint32(key, value)
        case float():
            writer.add_float32(key, value)
        case str():
            writer.add_string(key, value)
        case _:
            writer.add_array(key, value)


def _contents(begin: int, tensors: Sequence[StoredTensor]) -> Iterator[bytes | memoryview]:
    """What follows the header, in order."""
    yield bytes(-begin % ALIGNMENT)
    for tensor in tensors:
        made_bytes = 0
        for part in tensor.parts():
            yield part.numpy().data
            made_bytes += part.nbytes
        assert made_bytes == tensor.stored_bytes, f"{tensor.name}: {made_bytes} bytes for {tensor.stored_bytes}"
        yield bytes(-made_bytes % ALIGNMENT)
