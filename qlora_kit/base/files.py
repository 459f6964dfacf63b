"""Reading a model that nobody has vouched for: a folder on this disk, or a repository of the hub.

A model is a folder with `config.json`, safetensors weights and a tokenizer. A safetensors file is

    8 bytes: N, little-endian | N bytes of JSON: {name: {dtype, shape, data_offsets}} | the tensors, without a gap

Nothing here runs the model's code, reads a pickle, follows a path out of the folder or touches a tensor. What is wrong
with a folder is told at once, in one `ModelError`, and before a byte of the weights is read.

Source of the format and of its limits: the README of safetensors, which says what its own reader checks.
"""

import difflib
import errno
import fnmatch
import glob
import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from qlora_kit.errors import ModelError
from qlora_kit.units import format_bytes

if TYPE_CHECKING:
    from huggingface_hub.hf_api import RepoSibling

MAX_HEADER_BYTES = 100_000_000
"""The longest header that the safetensors format allows; the same bound holds here for config and index."""

_CONFIG = "config.json"
_WEIGHTS = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_TEXTS = ("*.json", "*.model", "*.txt", "*.jinja", "*.tiktoken")
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


def _say_nothing(line: str) -> None:
    """The `notify` of a caller that wants no news."""


def locate_model(
    model: str, revision: str | None = None, *, weights: bool = True, notify: Callable[[str], None] = _say_nothing
) -> Path:
    """The checked folder of a model, downloaded first if it is on the hub and not yet in the cache.

    Args:
        model: a folder if it begins with `.`, `/` or `~` or exists, otherwise a hub id such as `Qwen/Qwen3-8B`.
        revision: branch, tag or commit on the hub; of no effect for a folder.
        weights: False if config and tokenizer are enough.
        notify: given one line about what a download will take, or that everything is cached.

    Returns:
        the folder; for a hub model, the snapshot in the cache (`HF_HOME` and `HF_HUB_OFFLINE` are honoured).

    Raises:
        ModelError: if the model cannot be had, does not fit the disk, or `check_model_folder` refuses it.
    """
    if model.startswith((".", "/", "~")) or os.path.exists(model):
        folder = Path(os.path.expanduser(model))
    else:
        folder = _from_hub(model, revision, weights, notify)
    check_model_folder(folder, weights=weights)
    return folder


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
    faults = [*_listing_faults(names, str(folder), weights), *_text_faults(folder, names)]
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
    return [_inside(folder, name) for name in _shards(folder)]


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
    header = _parse_json(raw, path)
    header.pop("__metadata__", None)
    entries = [(name, _entry(path, name, spec, 8 + header_bytes)) for name, spec in header.items()]
    entries.sort(key=lambda item: (item[1].begin, item[1].end))
    _check_cover(path, entries, 8 + header_bytes, file_bytes)
    return dict(entries)


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


def _listing_faults(names: Iterable[str], where: str, weights: bool) -> Iterator[str]:
    """What the names of its files alone say against a model; the same for a folder and for a repository."""
    names = set(names)
    if _CONFIG not in names and "adapter_config.json" in names:
        yield f"{where} is an adapter, not a base model: give it as lora.from, and its base as base.model"
        return
    if _CONFIG not in names:
        yield f"{where} has no {_CONFIG}: wanted a model as transformers' save_pretrained writes it"
    if weights and not names & {_WEIGHTS, _INDEX}:
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
            yield f"{where} has no weights: wanted {_WEIGHTS}, or {_INDEX} and the files that it names{instead}"


def _text_faults(folder: Path, names: list[str]) -> Iterator[str]:
    """What is wrong with the config, and which of the small files link out of the folder."""
    for name in sorted(name for name in names if _is_text(name)):
        try:
            path = _inside(folder, name)
            if name == _CONFIG and not isinstance(_read_json(path).get("model_type"), str):
                raise ModelError(f"{path} has no model_type, so nobody can tell which architecture it describes")
        except ModelError as fault:
            yield str(fault)


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
            path = _inside(folder, name)
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
    if os.path.lexists(folder / _WEIGHTS):  # it goes before the index, as in transformers
        return {_WEIGHTS: []}
    if not os.path.lexists(folder / _INDEX):
        return {}
    index = _inside(folder, _INDEX)
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(v, str) for v in weight_map.values()):
        raise ModelError(f"{index} is malformed: it needs a weight_map from the names of tensors to names of files")
    shards: dict[str, list[str]] = {}
    for tensor, file in weight_map.items():
        shards.setdefault(file, []).append(tensor)
    return dict(sorted(shards.items()))


def _is_text(name: str) -> bool:
    """Whether a file of the top folder belongs to the config or the tokenizer."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in _TEXTS)


def _inside(folder: Path, name: str) -> Path:
    """The file `name` of a model folder.

    Raises:
        ModelError: if it is absolute, climbs or links out of the folder, does not exist, or is not a regular file.
    """
    path = folder / name
    is_relative = bool(name) and not PurePosixPath(name).is_absolute() and ".." not in PurePosixPath(name).parts
    if not is_relative or "\\" in name or "\0" in name:
        raise ModelError(f"{name!r} leads out of the model folder {folder}: refused")
    target = Path(os.path.realpath(path))
    if not any(target.is_relative_to(root) for root in _roots(folder)):
        raise ModelError(f"{path} links to {target}, out of its folder: refused; put the file itself there")
    if not os.path.lexists(path):
        raise ModelError(f"{path} is missing: get it again")
    if not os.path.isfile(path):
        raise ModelError(f"{path} is not a file, or links to one that is missing: get it again")
    return path


def _roots(folder: Path) -> list[Path]:
    """The folders in which the files of a model may lie, links followed."""
    real = Path(os.path.realpath(folder))
    repository = real.parent.parent
    if real.parent.name == "snapshots" and repository.name.startswith("models--"):
        # The hub's cache keeps files once, by hash: for one repository, or (newer versions) beside all of them.
        return [real, repository / "blobs", repository.parent / "blobs"]
    return [real]


def _read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file, which may be as long as a safetensors header."""
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_HEADER_BYTES + 1)
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror}") from error
    if len(raw) > MAX_HEADER_BYTES:
        raise ModelError(f"{path} is above {MAX_HEADER_BYTES} bytes: refused")
    return _parse_json(raw, path)


def _parse_json(raw: bytes, path: Path) -> dict[str, Any]:
    """The JSON object in `raw`, which comes from `path`."""
    try:
        value = json.loads(raw)
    except (ValueError, RecursionError) as error:  # ValueError: not JSON, not UTF-8, or a number of too many digits
        raise ModelError(f"{path} is damaged: its JSON cannot be read ({error})") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path} is damaged: expected a JSON object, found a {type(value).__name__}")
    return value


# --- the hub ----------------------------------------------------------------------------------------------------------


def _from_hub(model: str, revision: str | None, weights: bool, notify: Callable[[str], None]) -> Path:
    """The snapshot of a hub model in the cache, completed by a download where needed.

    The hub is asked first, so that a model is not older than the revision says; whatever it answers, a complete copy
    in the cache is used if there is one.
    """
    from huggingface_hub import HfApi, constants, snapshot_download
    from huggingface_hub.errors import HFValidationError, HTTPError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(model)
        info = HfApi().model_info(model, revision=revision, files_metadata=True, timeout=constants.HF_HUB_ETAG_TIMEOUT)
        files = _wanted(model, info.siblings or [], weights)
        _announce(model, info.sha or "", files, notify)
        patterns = [glob.escape(file.rfilename) for file in files]
        return Path(snapshot_download(model, revision=revision, allow_patterns=patterns))
    except HFValidationError as error:
        raise ModelError(
            f"{model!r} is neither a folder here nor a hub id: NAME or OWNER/NAME, of letters, digits, '-', '_' and '.'"
        ) from error
    except (HTTPError, OSError, RuntimeError, json.JSONDecodeError) as error:
        # OSError includes what the hub refuses; a RuntimeError comes from hf_xet when a download breaks off.
        found, advice = _diagnose(model, revision, error)
        snapshot = _cached_snapshot(model, revision, weights)
        if snapshot is None:
            raise ModelError(f"{model} is not wholly cached and cannot be fetched: {found}. {advice}") from error
        notify(f"{model}: {found}; going on with the copy in the cache, {snapshot}")
        return snapshot


def _wanted(model: str, files: list["RepoSibling"], weights: bool) -> list["RepoSibling"]:
    """The files of a repository to fetch: of its top folder, config and tokenizer, and one set of safetensors."""
    names = [file.rfilename for file in files if "/" not in file.rfilename]
    if faults := list(_listing_faults(names, model, weights)):
        raise ModelError("; ".join(faults))
    chosen = {name for name in names if _is_text(name)}
    if weights and _WEIGHTS in names:
        chosen.add(_WEIGHTS)
    elif weights:
        # What the index names is known only once it is here; some repositories have a second set, consolidated*.
        chosen.update(fnmatch.filter(names, "model*.safetensors") or fnmatch.filter(names, "*.safetensors"))
    return [file for file in files if file.rfilename in chosen]


def _announce(model: str, commit: str, files: list["RepoSibling"], notify: Callable[[str], None]) -> None:
    """Tell what is about to be downloaded; refuse if the disk of the cache has no room for it."""
    from huggingface_hub import constants

    cache = Path(constants.HF_HUB_CACHE)
    repository = cache / f"models--{model.replace('/', '--')}"
    missing = [file for file in files if not _is_cached(repository, commit, file)]
    if not missing:
        notify(f"{model}: all {len(files)} files are in the cache, {cache}")
        return
    needed_bytes = sum(file.size or 0 for file in missing)
    free_bytes = shutil.disk_usage(next(folder for folder in (cache, *cache.parents) if folder.exists())).free
    if needed_bytes > free_bytes:
        raise ModelError(
            f"{model} needs {format_bytes(needed_bytes)} more, {cache} has {format_bytes(free_bytes)} free: "
            "make room, or set HF_HOME to a folder on a larger disk"
        )
    notify(
        f"{model}: {len(missing)} of {len(files)} files to download, {format_bytes(needed_bytes)}, "
        f"into {cache} ({format_bytes(free_bytes)} free)"
    )


def _is_cached(repository: Path, commit: str, file: "RepoSibling") -> bool:
    """Whether the cache of a repository has a file, by name at this commit or by content from another one."""
    content = file.lfs.sha256 if file.lfs else file.blob_id
    has_content = content is not None and (repository / "blobs" / content).exists()
    return has_content or (repository / "snapshots" / commit / file.rfilename).exists()


def _cached_snapshot(model: str, revision: str | None, weights: bool) -> Path | None:
    """The folder of the model in the cache, if all that is wanted is there; asks nobody."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = snapshot_download(
            model, revision=revision, local_files_only=True, allow_patterns=list(_TEXTS), ignore_patterns=["*/*"]
        )
        check_model_folder(Path(folder), weights=weights)
    except (LocalEntryNotFoundError, ModelError):
        return None
    return Path(folder)


def _diagnose(model: str, revision: str | None, error: Exception) -> tuple[str, str]:
    """What went wrong between here and the hub, and the command that helps."""
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    elsewhere = f"run `hf download {model}` on a machine with a network and copy its cache to {constants.HF_HUB_CACHE}"
    if isinstance(error, LocalEntryNotFoundError) and isinstance(error.__cause__, Exception):
        error = error.__cause__  # "not in the cache either": the cause is why the hub did not give it
    match error:
        case OfflineModeIsEnabled():
            return "HF_HUB_OFFLINE is set", f"`unset HF_HUB_OFFLINE TRANSFORMERS_OFFLINE`, or {elsewhere}"
        case GatedRepoError():
            page = f"{constants.ENDPOINT}/{model}"
            return "it is gated", f"Accept its licence at {page}, then `hf auth login` with that account's token"
        case RepositoryNotFoundError():
            return "the hub has no such model, or it is private", _spelling(model)
        case RevisionNotFoundError():
            page = f"{constants.ENDPOINT}/{model}/commits"
            return f"it has no revision {revision!r}", f"Choose one at {page} and set base.revision"
        case HfHubHTTPError():
            return _diagnose_status(error.response.status_code)
        case json.JSONDecodeError():
            return f"{constants.ENDPOINT} does not answer as a hub", "Check HF_ENDPOINT, your proxy and its login page"
        case OSError(errno=errno.ENOSPC | errno.EDQUOT | errno.EACCES | errno.EROFS | errno.EPERM):
            room = "Make room there, or set HF_HOME to a folder that you can write"
            return f"the cache {constants.HF_HUB_CACHE} cannot be written ({error.strerror})", room
    reason = f"{type(error).__name__}: {error}".splitlines()[0]
    return f"{constants.ENDPOINT} cannot be reached ({reason})", f"Check the network and the proxy, or {elsewhere}"


def _diagnose_status(status: int) -> tuple[str, str]:
    """The same for an answer of the hub that says no more than its status."""
    if status == 429:
        return "the hub asks to slow down (HTTP 429)", "Wait some minutes, or `hf auth login` for a higher limit"
    if status >= 500:
        return f"the hub has a fault of its own (HTTP {status})", "Try again later; see https://status.huggingface.co"
    return f"the hub refuses (HTTP {status})", "Log in with a token that is valid and may read it: `hf auth login`"


def _spelling(model: str) -> str:
    """How to mend an id that the hub does not know, with the nearest ids of the cache."""
    from huggingface_hub import constants

    folders = glob.glob("models--*", root_dir=constants.HF_HUB_CACHE)
    cached = [folder.removeprefix("models--").replace("--", "/") for folder in folders]
    near = ", ".join(difflib.get_close_matches(model, cached))
    hint = f" (in the cache: {near})" if near else ""
    return f"Check the spelling{hint}; `hf auth login` if it is private; begin with ./ if you mean a folder"
