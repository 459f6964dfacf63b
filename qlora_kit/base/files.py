"""Reading a model folder that nobody has vouched for.

A model is a folder with `config.json`, safetensors weights (see `header.py`) and a tokenizer.

Nothing here runs the model's code, reads a pickle, follows a path out of the folder or touches a tensor. What is wrong
with a folder is told at once, in one `ModelError`, and before a byte of the weights is read.
"""

import fnmatch
import os
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from qlora_kit.base.header import NARROW, read_header, read_object
from qlora_kit.errors import ModelError

_CONFIG, _GENERATION = "config.json", "generation_config.json"
WEIGHTS = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_TEMPLATES = "additional_chat_templates"
TEXTS = ("*.json", "*.model", "*.txt", "*.jinja", "*.tiktoken", "*.codes", "*.tokenizer")
_PICKLES = ("*model*.bin", "*.pt", "*.pth", "*.ckpt")
_DENSE = ("F64", "F32", "F16", "BF16")


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
        raise ModelError(
            f"{folder} does not exist; set base.model to a model folder, or to a hub id such as Qwen/Qwen3-8B"
        )
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
            if entry.dtype in NARROW or (name.endswith(".weight") and entry.dtype not in _DENSE):
                raise ModelError(
                    f"{path}: tensor {name!r} is in {entry.dtype}, which is not a dtype of dense weights, and "
                    "config.json says nothing about quantization: give the 16-bit model"
                )


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
        raise ModelError(f"{path} has no model_type, so the architecture it describes is unknown")
    if config.get("transformers_weights") is not None:  # transformers would read those, which nobody has looked at
        raise ModelError(f"{path} names weights of its own (transformers_weights), wanted {WEIGHTS}: remove it")


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
            yield f"{path} lacks {len(absent)} tensors that {_INDEX} lists, first {absent[0]!r}: download it again"


def _shards(folder: Path) -> dict[str, list[str]]:
    """Weight files by name, each with the tensors that the index promises in it (none without an index)."""
    if os.path.lexists(folder / WEIGHTS):  # it goes before the index, as in transformers
        return {WEIGHTS: []}
    if not os.path.lexists(folder / _INDEX):
        return {}
    index = file_inside(folder, _INDEX)
    weight_map = read_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(v, str) for v in weight_map.values()):
        raise ModelError(f"{index} is malformed: it needs a weight_map from tensor names to file names")
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
        raise ModelError(f"{name!r} leads out of the model folder {folder}, or is not a printable name: refused")
    if not is_inside(folder, path):
        target = os.path.realpath(path)
        raise ModelError(f"{path} links to {target}, outside its folder: refused; put the file itself there")
    if not os.path.lexists(path):
        raise ModelError(f"{path} is missing: download it again")
    if not os.path.isfile(path):
        raise ModelError(f"{path} is not a file, or links to one that is missing: download it again")
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
