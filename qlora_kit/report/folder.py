"""Reading a run folder: every file is checked once, here, so that what draws can trust what it is given.

The shapes below are the input format of this room. A key that ends in `?` may be missing; `*` stands for any key.
Infinities and NaN are not JSON, but some programs write them: they are read as null.
"""

import json
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from qlora_kit.errors import RunError
from qlora_kit.report.markup import clipped
from qlora_kit.storage import check_folder

SCHEMA = 1


class Leaf(NamedTuple):
    """A value that is no container: what is wanted, in words, and the test of it."""

    wanted: str
    accepts: Callable[[Any], bool]


def _is_number(value: Any) -> bool:
    # The bound keeps every product and quotient of ours finite; no byte, token or loss comes near it.
    return isinstance(value, int | float) and abs(value) < 1e100


class Maybe(NamedTuple):
    """A container that may be null."""

    shape: Any


TEXT = Leaf("text", lambda value: isinstance(value, str))
NUMBER = Leaf("a number", _is_number)
COUNT = Leaf("a number of 0 or more", lambda value: _is_number(value) and value >= 0)
MAYBE_TEXT = Leaf("text or null", lambda value: value is None or isinstance(value, str))
MAYBE_NUMBER = Leaf("a number or null", lambda value: value is None or _is_number(value))
MAYBE_COUNT = Leaf("a number of 0 or more, or null", lambda value: value is None or COUNT.accepts(value))
FLAG = Leaf("true, false or null", lambda value: value is None or isinstance(value, bool))
SCALAR = Leaf("text, a number, true, false or null", lambda value: not isinstance(value, dict | list))

METHOD = {
    "peak_bytes": COUNT,
    "by_category": {"*": COUNT},
    "peak_by_phase?": {"*": COUNT},
    "host_peak_bytes?": MAYBE_COUNT,
    "paged_bytes?": MAYBE_COUNT,
    "assumes?": {"*": SCALAR},
}
CARD = {"name": TEXT, "usable_bytes": COUNT, "qlora?": FLAG, "lora_16bit?": FLAG, "full_finetune?": FLAG}
PLAN = {
    "method?": SCALAR,
    "methods": {"qlora": METHOD, "lora_16bit?": METHOD, "full_finetune?": METHOD},
    "parameters?": {"total": COUNT, "trainable": COUNT, "quantized": COUNT},
    "bits_per_quantized_parameter?": MAYBE_COUNT,
    "capacity?": Maybe({"reason": TEXT, "warning?": MAYBE_TEXT}),
    "savings_vs_full?": MAYBE_NUMBER,
    "budget?": MAYBE_COUNT,
    "activations?": SCALAR,
    "blocks?": Maybe({"*": MAYBE_COUNT}),
    "loss_chunk?": MAYBE_COUNT,
    "micro_batch?": MAYBE_COUNT,
    "accumulation?": MAYBE_COUNT,
    "allocator?": Maybe({"*": MAYBE_COUNT}),
    "floor?": Maybe({"bytes": COUNT, "ratio": COUNT, "logits_tokens?": COUNT}),
    "next?": Maybe({"settings": SCALAR, "peak_bytes": COUNT, "times_as_fast": COUNT}),
    "cards?": Maybe([CARD]),
    "planned_on?": SCALAR,
    "device_profile?": SCALAR,
    "pace?": Maybe({"lr?": COUNT, "lr_reason?": TEXT}),
    "steps?": MAYBE_COUNT,
    "tokens_per_s?": MAYBE_COUNT,
    "hours?": MAYBE_COUNT,
}
ALLOCATION = {
    "bytes": COUNT,
    "category?": SCALAR,
    "phase?": SCALAR,
    "module?": SCALAR,
    "operator?": SCALAR,
    "shape?": [COUNT],
    "dtype?": SCALAR,
}
MEMORY = {
    "planned": METHOD,
    "measured": METHOD,
    "error?": {"*": MAYBE_NUMBER},
    "timeline?": Maybe([{"phase?": SCALAR, "bytes": {"*": COUNT}}]),
    "largest?": Maybe([ALLOCATION]),
    "device_counter?": {"name": SCALAR, "peak_bytes": COUNT, "start_bytes?": MAYBE_COUNT},
    "file_backed_bytes?": MAYBE_COUNT,
    "paged_bytes?": MAYBE_COUNT,
}
REWARDS = {
    "reward_margin": "reward margin, nats",
    "reward_accuracy": "reward accuracy, share of the rows",
    "kl": "KL from the reference, nats",
}
"""What preferences tell of a step, and with `eval_` before it of an evaluation: its name and unit."""
METRICS_ROW = {
    "step": COUNT,
    "loss?": MAYBE_NUMBER,
    "eval_loss?": MAYBE_NUMBER,
    "tokens?": MAYBE_COUNT,
    "tokens_per_s?": MAYBE_COUNT,
    **{f"{before}{name}?": MAYBE_NUMBER for name in REWARDS for before in ("", "eval_")},
}
SAMPLE = {"step": COUNT, "prompt": TEXT, "reference?": TEXT, "answer": TEXT}
RESULT = {"step": COUNT}
SCORES = {
    "rows?": MAYBE_COUNT,
    "base": {"*": MAYBE_NUMBER},
    "adapter": {"*": MAYBE_NUMBER},
    "samples?": [{"prompt": TEXT, "reference?": TEXT, "base?": TEXT, "adapter?": TEXT}],
}
DATA = {"train?": {"*": SCALAR}, "eval?": {"*": SCALAR}}
ENV = {"*": SCALAR}


@dataclass(frozen=True, slots=True)
class RunFolder:
    """What a run folder says, checked. What is None has no file."""

    path: Path
    plan: dict[str, Any]
    rows: list[dict[str, Any]]
    """One row a step, in order: training and evaluation of the same step are one row."""
    memory: dict[str, Any] | None
    scores: dict[str, Any] | None
    data: dict[str, Any] | None
    env: dict[str, Any] | None
    recipe: str | None
    kept_steps: frozenset[float]
    """Steps whose parameters are in the folder: of complete checkpoints, and of adapter/ or model/."""
    left_step: float | None
    """Of which adapter/ or model/ is, if there is one."""
    samples: list[dict[str, Any]]
    """Answers to a few held-out prompts on the way, in order of steps."""

    @property
    def name(self) -> str:
        """The run's own name: that of its folder."""
        return self.path.resolve().name

    @property
    def model(self) -> str:
        """The base model's name as the recipe gives it, without the folders above it."""
        name = _recipe_value(self.recipe or "", "base", "model")
        if name.startswith(("/", ".", "~")):
            name = Path(name).name
        return name or "an unknown model"

    @property
    def task(self) -> str:
        """What the run minimises, as the recipe gives it; without a word it is sft."""
        return clipped(_recipe_value(self.recipe or "", "train", "task"), 24) or "sft"

    @property
    def loss_words(self) -> str:
        """The loss with its unit; that of ipo is a square and has none."""
        return "loss" if self.task == "ipo" else "loss, nats"


def read_run(folder: str | Path) -> RunFolder:
    """Read the run folder `folder`.

    Raises:
        RunError: if plan.json or metrics.jsonl is missing, or a file is not what it should be; one line names the file.
    """
    folder = Path(folder)
    check_folder(folder)
    optional = {
        name: document(folder / f"{name}.json", shape) if (folder / f"{name}.json").exists() else None
        for name, shape in (("memory", MEMORY), ("result", RESULT), ("scores", SCORES), ("data", DATA), ("env", ENV))
    }
    recipe, rows = folder / "recipe.yaml", _metrics_rows(folder / "metrics.jsonl")
    left = _left_step(folder, rows, optional.pop("result"))
    return RunFolder(
        path=folder,
        plan=document(folder / "plan.json", PLAN),
        rows=rows,
        recipe=_text(recipe) if recipe.exists() else None,
        kept_steps=_checkpoint_steps(folder) | ({left} if left is not None else set()),
        left_step=left,
        samples=_samples(folder / "samples.jsonl"),
        **optional,
    )


def _checkpoint_steps(folder: Path) -> frozenset[float]:
    names = (path.parent.name.removeprefix("step-") for path in folder.glob("checkpoints/step-*/manifest.json"))
    return frozenset(float(name) for name in names if re.fullmatch("[0-9]{1,12}", name))


def _left_step(folder: Path, rows: list[dict[str, Any]], result: dict[str, Any] | None) -> float | None:
    """As result.json has it; runs of versions without it leave their last step."""
    if not ((folder / "adapter").is_dir() or (folder / "model").is_dir()):
        return None
    last = next((row["step"] for row in reversed(rows) if "loss" in row), None)
    return last if result is None else float(result["step"])


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise RunError(f"{path.parent} has no {path.name}: give the folder of a run that has begun to train") from error
    except UnicodeDecodeError as error:
        raise RunError(f"{path} is not UTF-8 text (byte {error.start})") from error
    except OSError as error:
        raise RunError(f"{path} cannot be read: {error.strerror}") from error


def document(path: Path, shape: dict[str, Any]) -> dict[str, Any]:
    """A JSON object whose values are what `shape` says.

    Raises:
        RunError: it is missing, or something else; one line names the file and the key.
    """
    value = _parsed(_text(path), str(path))
    _check(value, shape, str(path))
    if value.get("schema", SCHEMA) != SCHEMA:
        raise RunError(f"{path} has schema {json.dumps(value['schema'])[:40]}; this version reads schema {SCHEMA}")
    return value


def _rows(path: Path, shape: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(_text(path).split("\n"), start=1):
        if line.strip():
            row = _parsed(line, f"{path}, line {number}")
            _check(row, shape, f"{path}, line {number}")
            yield row


def _samples(path: Path) -> list[dict[str, Any]]:
    return list(_rows(path, SAMPLE)) if path.exists() else []


def _metrics_rows(path: Path) -> list[dict[str, Any]]:
    """One row a step. Where training went back to a checkpoint, what followed that step before is forgotten."""
    by_step: dict[float, dict[str, Any]] = {}
    latest = 0.0
    for row in _rows(path, METRICS_ROW):
        step = row["step"]
        if "loss" in row:
            if step < latest:
                by_step = {earlier: kept for earlier, kept in by_step.items() if earlier < step}
            latest = step
        by_step[step] = by_step.get(step, {}) | row
    return [by_step[step] for step in sorted(by_step)]


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text, parse_float=_finite, parse_constant=lambda _: None)
    except json.JSONDecodeError as error:
        raise RunError(f"{where} is not JSON: {error.msg} (character {error.pos})") from error
    except (ValueError, RecursionError) as error:  # an integer of thousands of digits; thousands of nested lists
        raise RunError(f"{where} is not readable JSON: {error}") from error


def _finite(digits: str) -> float | None:
    value = float(digits)
    return value if math.isfinite(value) else None


def _check(value: Any, shape: Any, where: str, key: str = "") -> None:
    """Raise RunError, naming the file and the key, unless `value` has `shape`."""
    if isinstance(shape, Leaf):
        if not shape.accepts(value):
            raise RunError(f"{where}: {key} is {json.dumps(value)[:40]}, wanted {shape.wanted}")
        return
    if isinstance(shape, Maybe):
        if value is not None:
            _check(value, shape.shape, where, key)
        return
    container = "an object" if isinstance(shape, dict) else "a list"
    if not isinstance(value, type(shape)):
        raise RunError(f"{where}: {key or 'the document'} is {json.dumps(value)[:40]}, wanted {container}")
    if isinstance(shape, list):
        for index, item in enumerate(value):
            _check(item, shape[0], where, f"{key}[{index}]")
        return
    for name, inner in shape.items():
        known = name.rstrip("?")
        if name == "*":
            for each in value.keys() - {"schema"}:
                _check(value[each], inner, where, f"{key}.{clipped(each, 40)}".lstrip("."))
        elif known in value:
            _check(value[known], inner, where, f"{key}.{known}".lstrip("."))
        elif known == name:
            raise RunError(f"{where}: {f'{key}.{known}'.lstrip('.')} is missing")


def _recipe_value(recipe: str, section: str, key: str) -> str:
    """`key` of `section` in the plain two-level YAML that a run folder holds, or "" if it is written otherwise.

    The recipe is shown as text and never interpreted here: this is for the headline, and to tell tasks apart.
    """
    inside = False
    for line in recipe.splitlines():
        if line[:1].strip():
            inside = line.split("#")[0].strip() == f"{section}:"
        name, colon, value = line.partition(":")
        if inside and colon and name.strip() == key:
            return value.split(" #")[0].strip().strip("'\"")
    return ""
