"""What all exports have in common: a vacant place with room on its disk, a card, and a manifest that is written last.

`export.json` holds the kind, the comparisons, and a checksum of every other file.
"""

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from qlora_kit.base.architecture import head_of
from qlora_kit.base.device import DTYPES
from qlora_kit.errors import RunError
from qlora_kit.export.folder import library_versions, model_card
from qlora_kit.export.trained_against import PREFIX
from qlora_kit.lora.layer import Adapter
from qlora_kit.storage import check_room, check_writable, checksums, clear_abandoned, read_json, write_json, write_text
from qlora_kit.units import MIB

ONTO = ("dequantized", "original")
"""What an adapter can be merged into."""

MANIFEST, CARD = "export.json", "README.md"

TEXT_BYTES = 64 * MIB
"""Room kept free on the disk for config, card and tokenizer (the largest tokenizer files are about 35 MB)."""


@dataclass(frozen=True, slots=True)
class Made:
    """How the weights of an export came about, for its card and its export.json."""

    title: str
    tag: str
    sections: Mapping[str, Mapping[str, object]]
    facts: Mapping[str, object]
    library: str = "transformers"
    """What reads the files, by the hub's name."""


def check_request(out: Path | None, dtype: str, onto: str = "dequantized") -> None:
    """What can be refused before a model is loaded.

    Args:
        out: the folder to make; None where it is not known yet.
        dtype: by its name.
        onto: what an adapter is merged into.

    Raises:
        RunError: `dtype` or `onto` is not known, or `out` is a file or a folder that is not empty.
    """
    torch_dtype(dtype)
    check_place(out, onto)


def check_place(out: Path | None, onto: str) -> None:
    """Refuse, before a model is loaded, what no kind of export can be merged into or written to (RunError)."""
    if onto not in ONTO:
        raise RunError(f"onto={onto!r} is not a merge target; use one of {', '.join(ONTO)}")
    if out is not None:
        check_vacant(out)


def check_vacant(out: Path) -> None:
    """Refuse a file, a folder that holds something, and one that no other can take the place of (RunError)."""
    if out.exists() and not out.is_dir():
        raise RunError(f"{out} is a file, wanted a folder to make; choose another output")
    if out.is_dir() and any(out.iterdir()):
        raise RunError(f"{out} is not empty, and an export overwrites nothing; choose another folder, or empty it")
    if os.path.ismount(out):
        raise RunError(f"{out} is where a disk is mounted, and an export must be one folder; choose a folder below it")
    check_writable(out, "choose another folder")


def check_disk(out: Path, needed_bytes: int) -> None:
    """Refuse a disk with less free than that, and than the text files beside it take, once what a killed export to
    `out` had left is gone (RunError)."""
    clear_abandoned(out.parent, out.name)
    check_room(out, needed_bytes + TEXT_BYTES, f"the export to {out}")


def torch_dtype(dtype: str) -> torch.dtype:
    """The dtype of that name, or a RunError."""
    if dtype not in DTYPES:
        raise RunError(f"dtype={dtype!r} is not supported for exported weights; use one of {', '.join(DTYPES)}")
    return DTYPES[dtype]


def seal(folder: Path, content: dict[str, Any], sums: Mapping[Path, str] | None = None) -> dict[str, Any]:
    """Write export.json over all the files that are there; nothing is written after it.

    Args:
        folder: of the export.
        content: of export.json, but for the files and versions.
        sums: checksums that are known already.
    """
    files = checksums(folder, sums)
    write_json(folder / MANIFEST, {**content, "versions": library_versions(), "files": files})
    return read_json(folder / MANIFEST)


def finish(
    model: PreTrainedModel,
    folder: Path,
    kind: str,
    made: Made,
    provenance: Mapping[str, str],
    audit: Mapping[str, float] | None,
    sums: Mapping[Path, str],
) -> dict[str, Any]:
    """Write the card and export.json of a model that is there otherwise.

    Args:
        model: as trained.
        folder: where weights, config and tokenizer are.
        kind: of the export.
        made: how its weights came about.
        provenance: facts; the base's name is put to them.
        audit: how it compares with the model as trained; None where that was not asked for.
        sums: of the files of weights.
    """
    facts = {"base": model.config._name_or_path, **provenance}
    sections = {
        "Provenance": facts,
        **made.sections,
        "Audit: as trained against this export": audit or {"result": "not audited"},
    }
    task = "text-classification" if head_of(model) == "classification" else "text-generation"
    write_card(folder, made.title, facts["base"], made.library, ["qlora-kit", made.tag, task], sections)
    comparisons = {} if audit is None else {kind: audit}
    return seal(folder, {"kind": kind, "comparisons": comparisons, "provenance": facts, **made.facts}, sums)


def write_card(
    folder: Path, title: str, base: str, library: str, tags: list[str], sections: Mapping[str, Mapping[str, object]]
) -> None:
    """README.md, with the sections given and the versions of the libraries."""
    card = model_card(title, base, library, tags, {**sections, "Made with": library_versions()})
    write_text(folder / CARD, card)


def settings_of(adapters: Mapping[str, nn.Module]) -> dict[str, object]:
    """What the card says of the adapters in use; where layers differ, every value that occurs."""
    parts = [adapter for adapter in adapters.values() if isinstance(adapter, Adapter)]
    return {
        "rank": _distinct(adapter.rank for adapter in parts),
        "alpha": _distinct(adapter.alpha for adapter in parts),
        "scale": _distinct(adapter.scale for adapter in parts),
        "scaling": _distinct(adapter.scaling for adapter in parts),
        "dropout": _distinct(adapter.dropout for adapter in parts),
        "targets": _distinct(name.rpartition(".")[2] for name in adapters),
        "layers": len(adapters),
    }


def _distinct(values: Iterable[object]) -> str:
    return ", ".join(str(value) for value in dict.fromkeys(values))


def without_prefix(metadata: Mapping[str, str]) -> dict[str, str]:
    """What a base was trained against, as a card has it."""
    return {key.removeprefix(PREFIX).replace("_", " "): value for key, value in metadata.items()}
