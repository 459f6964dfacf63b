"""What a run's folder says of how the run was begun: taken if it is well formed, refused in one line if not."""

from collections.abc import Mapping
from datetime import date as Date
from pathlib import Path
from typing import Any, get_args

from qlora_kit.data import Classes
from qlora_kit.data.thinking import Thinking
from qlora_kit.errors import RunError
from qlora_kit.export.sealed import MANIFEST
from qlora_kit.recipe import Recipe
from qlora_kit.report.folder import FLAG, NUMBER, TEXT, Leaf, document
from qlora_kit.run.folder import ADAPTER, DATA, PLAN, RECIPE, RESULT
from qlora_kit.storage import changed_files, read_checksums, read_json
from qlora_kit.train.pace import Rate

_RECORDED = {
    "chats?": FLAG,
    "fingerprints?": {"*": TEXT},
    "reference?": {"*": TEXT},
    "date?": Leaf("a date such as 2026-01-31, or null", lambda value: value is None or _is_date(value)),
    "classes?": [TEXT],
    "is_multi?": FLAG,
}
"""What of data.json a run is gone on with, and used by."""

_WHOLE = Leaf("a whole number of at least 1", lambda value: type(value) is int and 0 < value < 2**63)

_MAYBE_WHOLE = Leaf("a whole number of at least 1, or null", lambda value: value is None or _WHOLE.accepts(value))

_PLANNED = {
    "rank": _WHOLE,
    "quantize_head": FLAG,
    "micro_batch": _WHOLE,
    "accumulation": _WHOLE,
    "loss_chunk?": _MAYBE_WHOLE,
    "eval_tokens?": _MAYBE_WHOLE,
    "added_tokens?": [TEXT],
    "pace": {"lr": NUMBER, "lr_reason": TEXT},
}
"""What of plan.json a run is gone on with."""

PLAIN, _CHATS = "plain text", "chats"
"""What training asked by: texts as they are, or the chat template."""

_EXPORTED = {
    "provenance?": {
        "prompts?": Leaf("chats or plain text", lambda value: value in (_CHATS, PLAIN)),
        "thinking?": Leaf("keep, strip or empty", lambda value: value in get_args(Thinking)),
    }
}
"""What of export.json an export is asked by."""

_MADE_FROM = {"train": "training rows", "eval": "held-out rows", "base": "weights of the base"}


def check_unchanged(folder: Path, found: Mapping[str, str]) -> None:
    """See that a run goes on with what it began with.

    Args:
        folder: of the run.
        found: fingerprints of what there is now, by train, eval and base.

    Raises:
        RunError: one is another.
    """
    recorded = recorded_data(folder).get("fingerprints", {})
    changed = [_MADE_FROM[key] for key, mark in found.items() if recorded.get(key, mark) != mark]
    if changed:
        raise RunError(
            f"{folder} was started with different {' and '.join(changed)} than are there now; put the files back as "
            "they were, continue anyway with --force, or start again with --overwrite"
        )


def check_adapter(run: Path) -> None:
    """See that a run's adapter has the bytes that were written, as far as the run has told which.

    Raises:
        RunError: it has others.
    """
    result = run / RESULT
    told = read_json(result) if result.is_file() else {}
    if told.get("folder") != ADAPTER or "files" not in told:
        return
    faults = changed_files(run / ADAPTER, read_checksums(result))
    if faults:
        raise RunError(
            f"{faults[0]}; qlora-kit train {run / RECIPE} --resume writes it again from its checkpoint (generate, "
            "chat, eval and export take it as it is with --force)"
        )


def recorded_plan(folder: Path) -> dict[str, Any]:
    """What plan.json says.

    Raises:
        RunError: it is missing, or says something else than a plan does.
    """
    return document(folder / PLAN, _PLANNED)


def recorded_data(folder: Path) -> dict[str, Any]:
    """What data.json says.

    Raises:
        RunError: it is missing, or says something else than a run does.
    """
    return document(folder / DATA, _RECORDED)


def recorded_rate(folder: Path) -> Rate:
    """The peak learning rate that a run was planned with."""
    pace = recorded_plan(folder)["pace"]
    return Rate(pace["lr"], pace["lr_reason"])


def recorded_reference(folder: Path) -> dict[str, str]:
    """Checksums of the frozen adapter that a run holds to; none where it holds to the base."""
    recorded: dict[str, str] = recorded_data(folder).get("reference", {})
    return recorded


def recorded_date(folder: Path) -> Date | None:
    """The date that a run's chat template writes; None where it writes none."""
    recorded = recorded_data(folder).get("date")
    return None if recorded is None else Date.fromisoformat(recorded)


def recorded_classes(folder: Path) -> Classes | None:
    """The classes that a run tells apart; None where it learns to say something."""
    recorded = recorded_data(folder)
    return Classes(tuple(recorded["classes"]), bool(recorded.get("is_multi"))) if "classes" in recorded else None


def way_to_ask(folder: Path, recipe: Recipe) -> dict[str, str]:
    """How a run was asked in training, for the export.json of its weights."""
    prompts = _CHATS if recorded_data(folder).get("chats") else PLAIN
    return {"prompts": prompts, "thinking": recipe.data.thinking}


def exported_way_to_ask(folder: Path) -> tuple[bool, Thinking]:
    """Whether a folder with weights is asked by its chat template, and what is made of thoughts.

    Raises:
        RunError: export.json says something else than an export does.
    """
    if not (folder / MANIFEST).is_file():
        return True, "keep"
    said = document(folder / MANIFEST, _EXPORTED).get("provenance", {})
    return said.get("prompts") != PLAIN, said.get("thinking", "keep")


def _is_date(value: Any) -> bool:
    try:
        Date.fromisoformat(value)
    except (TypeError, ValueError):
        return False
    return True
