"""Where a model comes from: a folder on this disk, or a repository of the hub, fetched into its cache.

What the hub lists is judged before a byte of it is fetched: files that are missing, weights that are pickles, a disk
that is too small. What lies here in the end is a folder like any other, and is checked as one (`files`).
"""

import difflib
import errno
import fnmatch
import glob
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from qlora_kit.base.files import TEXTS, WEIGHTS, check_model_folder, is_text, listing_faults
from qlora_kit.errors import ModelError
from qlora_kit.units import format_bytes

if TYPE_CHECKING:
    from huggingface_hub.hf_api import RepoSibling


def say_nothing(line: str) -> None:
    """The `notify` of a caller that wants no news."""


def locate_model(
    model: str,
    revision: str | None = None,
    *,
    weights: bool = True,
    code: bool = False,
    notify: Callable[[str], None] = say_nothing,
) -> Path:
    """The checked folder of a model, downloaded first if it is on the hub and not yet in the cache.

    Args:
        model: a folder (see `is_folder`), otherwise a hub id such as `Qwen/Qwen3-8B`.
        revision: branch, tag or commit on the hub; of no effect for a folder.
        weights: False if config and tokenizer are enough.
        code: whether Python files are fetched too; nothing here runs them.
        notify: given one line about what a download will take, or that everything is cached.

    Returns:
        the folder; for a hub model, the snapshot in the cache (`HF_HOME` and `HF_HUB_OFFLINE` are honoured).

    Raises:
        ModelError: if the model cannot be had, does not fit the disk, or `check_model_folder` refuses it.
    """
    folder = Path(os.path.expanduser(model)) if is_folder(model) else _from_hub(model, revision, weights, code, notify)
    check_model_folder(folder, weights=weights)
    return folder


def is_folder(model: str) -> bool:
    """Whether a model's name means a folder: it begins with `.`, `/` or `~`, or exists. Otherwise it is a hub id."""
    return model.startswith((".", "/", "~")) or os.path.exists(model)


def _from_hub(model: str, revision: str | None, weights: bool, code: bool, notify: Callable[[str], None]) -> Path:
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
        files = _wanted(model, info.siblings or [], weights, code)
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
            raise ModelError(f"{model} is not completely cached and cannot be fetched: {found}. {advice}") from error
        notify(f"{model}: {found}; continuing with the copy in the cache, {snapshot}")
        return snapshot


def _wanted(model: str, files: list["RepoSibling"], weights: bool, code: bool) -> list["RepoSibling"]:
    """The files of a repository to fetch: of its top folder, config and tokenizer, one set of safetensors, its code."""
    names = [file.rfilename for file in files if "/" not in file.rfilename]
    if faults := list(listing_faults(names, model, weights)):
        raise ModelError("; ".join(faults))
    chosen = {name for name in names if is_text(name) or (code and name.endswith(".py"))}
    if weights and WEIGHTS in names:
        chosen.add(WEIGHTS)
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
            model, revision=revision, local_files_only=True, allow_patterns=list(TEXTS), ignore_patterns=["*/*"]
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
            return (
                f"{constants.ENDPOINT} does not answer like a hub",
                "Check HF_ENDPOINT, your proxy and its login page",
            )
        case OSError(errno=errno.ENOSPC | errno.EDQUOT | errno.EACCES | errno.EROFS | errno.EPERM):
            room = "Make room there, or set HF_HOME to a folder that you can write to"
            return f"the cache {constants.HF_HUB_CACHE} cannot be written ({error.strerror})", room
    reason = f"{type(error).__name__}: {error}".splitlines()[0]
    return f"{constants.ENDPOINT} cannot be reached ({reason})", f"Check the network and the proxy, or {elsewhere}"


def _diagnose_status(status: int) -> tuple[str, str]:
    """The same for an answer of the hub that says no more than its status."""
    if status == 429:
        return (
            "the hub limits the rate of requests (HTTP 429)",
            "Wait a few minutes, or `hf auth login` for a higher limit",
        )
    if status >= 500:
        return f"the hub has an error of its own (HTTP {status})", "Try again later; see https://status.huggingface.co"
    return f"the hub refuses (HTTP {status})", "Log in with a valid token that may read it: `hf auth login`"


def _spelling(model: str) -> str:
    """How to mend an id that the hub does not know, with the nearest ids of the cache."""
    from huggingface_hub import constants

    folders = glob.glob("models--*", root_dir=constants.HF_HUB_CACHE)
    cached = [folder.removeprefix("models--").replace("--", "/") for folder in folders]
    near = ", ".join(difflib.get_close_matches(model, cached))
    hint = f" (in the cache: {near})" if near else ""
    return f"Check the spelling{hint}; `hf auth login` if it is private; begin with ./ if you mean a folder"
