"""Reading a model folder that nobody has vouched for.

A model is a folder with `config.json`, safetensors weights and a tokenizer. A safetensors file is

    8 bytes: N, little-endian | N bytes of JSON: {name: {dtype, shape, data_offsets}} | the tensors, without a gap

Nothing here runs the model's code, reads a pickle, follows a path out of the folder or touches a tensor. What is wrong
with a folder is told at once, in one `ModelError`, and before a byte of the weights is read.

Source of the format and of its limits: the README of safetensors, which says what its own reader checks.
"""

import fnmatch
import json
import math
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from qlora_kit.errors import ModelError

MAX_HEADER_BYTES = 100_000_000
"""The longest header that the safetensors format allows; the same bound holds here for config and index."""

_CONFIG, _GENERATION = "config.json", "generation_config.json"
WEIGHTS = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_TEMPLATES = "additional_chat_templates"
TEXTS = ("*.json", "*.model", "*.txt", "*.jinja", "*.tiktoken", "*.codes", "*.tokenizer")
_PICKLES = ("*model*.bin", "*.pt", "*.pth", "*.ckpt")
_LFS_POINTER = b"version https://git-lfs"

_DTYPE_BITS = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}
_DENSE = ("F64", "F32", "F16", "BF16")
_NARROW = tuple(dtype for dtype in _DTYPE_BITS if dtype.startswith(("F8", "F6", "F4")))


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


def has_tokenizer(folder: Path) -> bool:
    """Whether a model folder holds a tokenizer: transformers makes an empty one where there is none."""
    names = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt", "spiece.model")
    return any((folder / name).is_file() for name in names)


def check_model_folder(folder: Path, *, weights: bool = True) -> None:
    """Refuse a model folder that is incomplete, damaged or unsafe.

    Args:
        folder: the folder with `config.json`.
        weights: whether the weights are wanted, and so checked, too. Their headers are read, the tensors are not.

    Raises:
        ModelError: with every fault, a line each.
    """
    if not folder.exists():
        raise ModelError(f"{folder} does not exist: give a model folder, or a hub id such as Qwen/Qwen3-8B")
    if not folder.is_dir():
        raise ModelError(f"{folder} is a file: give the folder that holds {_CONFIG} and the weights")
    try:
        names = os.listdir(folder)
    except OSError as error:
        raise ModelError(f"{folder} cannot be read: {error.strerror}") from error
    faults = [*listing_faults(names, str(folder), weights), *text_faults(folder)]
    if weights:
        faults += [fault for fault in _weight_faults(folder) if fault not in faults]
    if len(faults) == 1:
        raise ModelError(faults[0])
    if faults:
        raise ModelError(f"{folder} has {len(faults)} faults:\n  " + "\n  ".join(faults))


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checked model folder, in the order of their names.

    Raises:
        ModelError: if the index is malformed, or a file is missing or lies outside the folder.
    """
    return [file_inside(folder, name) for name in _shards(folder)]


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
                raise ModelError(f"{path} has {file_bytes} bytes, a safetensors file has at least 8: get it again")
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


def tensor_names(folder: Path) -> set[str]:
    """What the weights of a checked model folder are called; nothing where none lie there.

    Raises:
        ModelError: as `weight_files` and `read_header`.
    """
    shards = _shards(folder)
    return {name for file, promised in shards.items() for name in promised or read_header(file_inside(folder, file))}


def check_weights_are_dense(folder: Path) -> None:
    """Refuse weights that say nothing by themselves, where config.json names no quantization that they belong to.

    Whole numbers, truth values and complex numbers a reader would round off. Fractions of 8 bits and less mean
    something times the scales that lie beside them, and a reader would leave the scales out.

    Raises:
        ModelError: names the file, the first such tensor and its dtype; or as `read_header`.
    """
    for path in weight_files(folder):
        for name, entry in read_header(path).items():
            if entry.dtype in _NARROW or (name.endswith(".weight") and entry.dtype not in _DENSE):
                raise ModelError(
                    f"{path}: tensor {name!r} is in {entry.dtype}, which is no dtype of dense weights, and config.json "
                    "says nothing of a quantization: give the 16-bit model"
                )


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
    raise ModelError(f"{path}: the header describes tensor {name!r} in a way that the format does not know")


def _check_cover(path: Path, entries: list[tuple[str, TensorEntry]], data_begin: int, file_bytes: int) -> None:
    """Refuse a file unless its tensors, sorted, fill it from the header to the last byte."""
    expected_bytes = max((entry.end for _, entry in entries), default=data_begin)
    if file_bytes != expected_bytes:
        what = "is cut short" if file_bytes < expected_bytes else "goes on after its last tensor"
        raise ModelError(f"{path} {what}: expected {expected_bytes} bytes, found {file_bytes}; get it again")
    position = data_begin
    for name, entry in entries:
        if entry.begin != position:
            what = "overlaps the one before it" if entry.begin < position else "leaves a gap before it"
            raise ModelError(f"{path}: tensor {name!r} {what}: expected at byte {position}, found at {entry.begin}")
        position = entry.end


# --- a folder ---------------------------------------------------------------------------------------------------------


def listing_faults(names: Iterable[str], where: str, weights: bool) -> Iterator[str]:
    """What the names of its files alone say against a model; the same for a folder and for a repository."""
    names = set(names)
    if _CONFIG not in names and "adapter_config.json" in names:
        yield f"{where} is an adapter, not a base model: give it as lora.from, and its base as base.model"
        return
    if "adapter_config.json" in names:
        # transformers would load the base that the adapter names, from wherever that is, in place of these weights
        yield f"{where} holds an adapter (adapter_config.json) beside a base model: put each in a folder of its own"
    if _CONFIG not in names:
        yield f"{where} has no {_CONFIG}: wanted a model as transformers' save_pretrained writes it"
    if weights and not names & {WEIGHTS, _INDEX}:
        others = sorted(name for name in names if fnmatch.fnmatch(name, "*.safetensors"))
        pickles = sorted(name for pattern in _PICKLES for name in fnmatch.filter(names, pattern))
        if pickles and not others:
            yield (
                f"{where} has its weights only as a pickle ({pickles[0]}), which can run code when it is read. Convert "
                "it in an environment that you trust: load it there with transformers and save it with "
                "model.save_pretrained(FOLDER, safe_serialization=True)"
            )
        else:
            instead = f"; found {', '.join(others[:3])}" if others else ""
            yield f"{where} has no weights: wanted {WEIGHTS}, or {_INDEX} and the files that it names{instead}"


def text_faults(folder: Path) -> Iterator[str]:
    """What is wrong with the config of a model or adapter, and which of the small files link out of the folder."""
    paths = [*folder.iterdir(), *(folder / _TEMPLATES).glob("*")]
    for name in sorted(path.relative_to(folder).as_posix() for path in paths if is_text(path.name)):
        try:
            path = file_inside(folder, name)
            content = read_object(path) if name in (_CONFIG, _GENERATION) else {}
            if name == _CONFIG:
                _check_config(path, content)
        except ModelError as fault:
            yield str(fault)


def _check_config(path: Path, config: dict[str, Any]) -> None:
    if not isinstance(config.get("model_type"), str):
        raise ModelError(f"{path} has no model_type, so nobody can tell which architecture it describes")
    if config.get("transformers_weights") is not None:  # transformers would read those, which nobody has looked at
        raise ModelError(f"{path} names weights of its own (transformers_weights), wanted {WEIGHTS}: take it out")


def _weight_faults(folder: Path) -> Iterator[str]:
    """What is wrong with the weights, by the index and the header of each file."""
    try:
        shards = _shards(folder)
    except ModelError as fault:
        yield str(fault)
        return
    for name, promised in shards.items():
        origin = f" ({_INDEX} gives it for {promised[0]!r})" if promised else ""
        try:
            path = file_inside(folder, name)
        except ModelError as fault:
            yield f"{fault}{origin}"
            continue
        try:
            header = read_header(path)
        except ModelError as fault:
            yield str(fault)
            continue
        absent = [tensor for tensor in promised if tensor not in header]
        if absent:
            yield f"{path} lacks {len(absent)} tensors that {_INDEX} promises, first {absent[0]!r}: get it again"


def _shards(folder: Path) -> dict[str, list[str]]:
    """Weight files by name, each with the tensors that the index promises in it (none without an index)."""
    if os.path.lexists(folder / WEIGHTS):  # it goes before the index, as in transformers
        return {WEIGHTS: []}
    if not os.path.lexists(folder / _INDEX):
        return {}
    index = file_inside(folder, _INDEX)
    weight_map = read_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(v, str) for v in weight_map.values()):
        raise ModelError(f"{index} is malformed: it needs a weight_map from the names of tensors to names of files")
    shards: dict[str, list[str]] = {}
    for tensor, file in weight_map.items():
        shards.setdefault(file, []).append(tensor)
    return dict(sorted(shards.items()))


def is_text(name: str) -> bool:
    """Whether a file of the top folder belongs to the config or the tokenizer."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in TEXTS)


def file_inside(folder: Path, name: str) -> Path:
    """The file `name` of a folder of a model or an adapter.

    Raises:
        ModelError: if it is absolute, climbs or links out of the folder, holds characters that cannot be shown, does
            not exist, or is not a regular file.
    """
    path = folder / name
    is_relative = bool(name) and not PurePosixPath(name).is_absolute() and ".." not in PurePosixPath(name).parts
    if not is_relative or "\\" in name or not name.isprintable():
        raise ModelError(f"{name!r} leads out of the model folder {folder}, or is no name that can be shown: refused")
    if not is_inside(folder, path):
        target = os.path.realpath(path)
        raise ModelError(f"{path} links to {target}, out of its folder: refused; put the file itself there")
    if not os.path.lexists(path):
        raise ModelError(f"{path} is missing: get it again")
    if not os.path.isfile(path):
        raise ModelError(f"{path} is not a file, or links to one that is missing: get it again")
    return path


def is_inside(folder: Path, path: Path) -> bool:
    """Whether a path ends in the folder of a model or an adapter, links followed."""
    target = Path(os.path.realpath(path))
    return any(target.is_relative_to(root) for root in _roots(folder))


def _roots(folder: Path) -> list[Path]:
    """The folders in which the files of a model may lie, links followed."""
    real = Path(os.path.realpath(folder))
    repository = real.parent.parent
    if real.parent.name == "snapshots" and repository.name.startswith("models--"):
        # The hub's cache keeps files once, by hash: for one repository, or (newer versions) beside all of them.
        return [real, repository / "blobs", repository.parent / "blobs"]
    return [real]


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
        raise ModelError(f"{path} is above {MAX_HEADER_BYTES} bytes: refused")
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
        raise ValueError(f"{twice!r} is there twice")
    return found
