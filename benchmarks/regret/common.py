"""What the experiments share: arms as sweeps of one recipe, and rows of results that say how each was made.

An experiment is a script. It writes NAME.jsonl beside this file, a row an arm, from which `draw.py` makes the drawings
and the tables of docs/without-regret.md.

    python benchmarks/regret/common.py       make the rows of text and the larger base, which experiments else make
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from qlora_kit.recipe import has_axes, read_grid, read_recipe
from qlora_kit.run import sweep, train
from qlora_kit.watch import Watch

HERE = Path(__file__).parent
RECIPES = HERE.parent.parent / "recipes" / "without-regret"
SEEDS = "train.seed=0,1"
LARGER = "--hidden 384 --mlp 1056 --layers 5 --heads 6 --batch 8 --steps 1800 --lr 2e-3"


class _Lines(Watch):
    """A line a run on standard error."""

    def run_ended(self, outcome: Any) -> None:
        print(f"  {outcome.name}: {outcome.failed or f'{outcome.seconds:.0f} s'}", file=sys.stderr, flush=True)


def rows_ready() -> None:
    """Make the experiments' text where it is missing."""
    if not (RECIPES / "far.jsonl").exists():
        subprocess.run([sys.executable, RECIPES / "make_rows.py", "--out", RECIPES], check=True)


def larger_base() -> str:
    """The setting that takes the larger base: 9.8 M parameters, made where it is missing (20 minutes on two cores)."""
    folder, part = RECIPES / "larger", RECIPES / "larger.part"
    if not folder.exists():
        script = RECIPES.parent / "quickstart" / "pretrain.py"
        with tempfile.TemporaryDirectory() as work:
            subprocess.run([sys.executable, script, "--out", part, "--work", work, *LARGER.split()], check=True)
        part.rename(folder)
    return f"base.model={folder}"


def arms(label: Mapping[str, Any], *settings: str, recipe: Path = RECIPES / "text.yaml") -> list[dict[str, Any]]:
    """Train a grid and tell of each run what it came to.

    Args:
        label: what the rows have in common that is no axis.
        settings: of the recipe, as `qlora-kit sweep` takes them; with no axis among them it is one run.
        recipe: to run.

    Returns:
        a row an arm: `label`, the axes by their last names, and the held-out loss after the last step, the curve of
        held-out losses, sizes, memory and time.
    """
    rows_ready()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name, "arms")
        if not has_axes(settings):
            train(read_recipe(recipe, [*settings, f"output={folder}"]))
            return [{**label, **_told(folder, None)}]
        outcomes = sweep(read_grid(recipe, [*settings, f"output={folder}"]), watch=_Lines())
        return [
            {**label, **_axes(outcome.settings), **_told(folder / outcome.name, outcome.failed)} for outcome in outcomes
        ]


def arms_with_seeds(label: Mapping[str, Any], rates: Sequence[float], *settings: str) -> list[dict[str, Any]]:
    """Each rate with one seed, and the best of them with two more."""
    rows = arms({**label, "seed": 0}, f"train.lr={','.join(map(str, rates))}", *settings)
    best = min((row for row in rows if row["held_out_loss"] is not None), key=lambda row: row["held_out_loss"])["lr"]
    return rows + arms({**label, "lr": best}, f"train.lr={best}", "train.seed=1,2", *settings)


def record(name: str, rows: Iterable[dict[str, Any]]) -> None:
    """Write an experiment's rows."""
    machine = f"{os.cpu_count()} cores, torch {torch.__version__}, CPU, {torch.get_num_threads()} thread"
    lines = (json.dumps({"experiment": name, **row, "machine": machine}) + "\n" for row in rows)
    (HERE / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")


def read(name: str) -> list[dict[str, Any]]:
    """An experiment's rows."""
    return [json.loads(line) for line in (HERE / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


def _axes(settings: Mapping[str, str]) -> dict[str, Any]:
    return {key.rpartition(".")[2]: _value(value) for key, value in settings.items()}


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _told(run: Path, failed: str | None) -> dict[str, Any]:
    """What a run came to; None for the loss of one that failed."""
    if failed is not None:
        return {"held_out_loss": None, "failed": failed}
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    plan, memory, scores = (json.loads((run / f"{name}.json").read_text()) for name in ("plan", "memory", "scores"))
    evaluated = [[row["step"], round(row["eval_loss"], 5)] for row in metrics if "eval_loss" in row]
    steps = [row for row in metrics if "loss" in row]
    return {
        "held_out_loss": evaluated[-1][1],
        "base_loss": round(scores["base"]["loss"], 5),
        **{name: scores["adapter"][name] for name in ("exact_match", "accuracy", "f1") if name in scores["adapter"]},
        "curve": evaluated,
        "train_loss": round(sum(row["loss"] for row in steps[-20:]) / len(steps[-20:]), 5),
        "steps": len(steps),
        "trainable": plan["parameters"]["trainable"],
        "parameters": plan["parameters"]["total"],
        "peak_bytes": memory["measured"]["peak_bytes"],
        "trained_bytes": _bytes_of_trained(run),
    }


def _bytes_of_trained(run: Path) -> int:
    folder = run / "model" if (run / "model").is_dir() else run / "adapter"
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


if __name__ == "__main__":
    rows_ready()
    larger_base()
