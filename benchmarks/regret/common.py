"""What the experiments share: arms as sweeps of one recipe, and rows of results that say how each was made.

An experiment is a script. It writes NAME.jsonl beside this file, a row an arm, from which `draw.py` makes the drawings
and the tables of docs/without-regret.md, and how long it took into minutes.jsonl. Models are too small to keep two
cores busy: runs go two at a time, each in a process with one thread.

    python benchmarks/regret/common.py       make the rows of text and the larger base, which experiments else make
"""

import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import torch

from qlora_kit.errors import QloraKitError
from qlora_kit.recipe import Cell, has_axes, read_grid, read_recipe
from qlora_kit.run import train
from qlora_kit.run.common import Common

T, R = TypeVar("T"), TypeVar("R")

HERE = Path(__file__).parent
RECIPES = HERE.parent.parent / "recipes" / "without-regret"
SEEDS = "train.seed=0,1"
AT_ONCE = 2
"""Runs that go side by side."""
ON_TWO_CORES = f"{AT_ONCE} runs at a time, 1 thread each"
LARGER = "--hidden 384 --mlp 1056 --layers 5 --heads 6 --batch 8 --steps 1800 --lr 2e-3"


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


def arms(label: Mapping[str, Any], *settings: str) -> list[dict[str, Any]]:
    """Train a grid and tell of each run what it came to.

    Args:
        label: what the rows have in common that is no axis.
        settings: of the recipe, as `qlora-kit sweep` takes them; with no axis among them it is one run.

    Returns:
        a row an arm: `label`, the axes by their last names, and the held-out loss after the last step, the curve of
        held-out losses, sizes, memory and time.
    """
    return together([(label, settings)])


def together(grids: Iterable[tuple[Mapping[str, Any], Sequence[str]]]) -> list[dict[str, Any]]:
    """The runs of several grids side by side: labels and settings as `arms` takes them."""
    rows_ready()
    with tempfile.TemporaryDirectory() as name:
        labelled = [(label, cell) for number, (label, settings) in enumerate(grids)
                    for cell in _cells([*settings, f"output={Path(name, str(number))}"])]  # fmt: skip
        found = each(_trained, [cell for _, cell in labelled])
    if all("failed" in told for told in found):
        raise SystemExit(f"every run failed, the first: {found[0]['failed']}")
    return [{**label, **told} for (label, _), told in zip(labelled, found, strict=True)]


def _cells(settings: Sequence[str]) -> Sequence[Cell]:
    recipe = RECIPES / "text.yaml"
    return read_grid(recipe, settings).cells if has_axes(settings) else [Cell("run", {}, read_recipe(recipe, settings))]


def each(function: Callable[[T], R], items: Iterable[T]) -> list[R]:
    """What a function of a script makes of each item, in their order, two at a time on one thread each."""
    return list(_processes().map(function, items))


@cache
def _processes() -> ProcessPoolExecutor:
    return ProcessPoolExecutor(
        AT_ONCE, multiprocessing.get_context("spawn"), initializer=torch.set_num_threads, initargs=(1,)
    )


@cache
def _shared() -> Common:
    """What the runs of one process share: the rows as tokens, and the scores of the base."""
    return Common()


def _trained(cell: Cell) -> dict[str, Any]:
    """A run's axes and what it came to."""
    folder, started = Path(cell.recipe.output), time.process_time()
    _shared().clear("base")  # loaded by every run, so that their times compare
    try:
        train(cell.recipe, common=_shared())
        told = _told(folder)
    except QloraKitError as error:
        told = {"held_out_loss": None, "failed": str(error).splitlines()[0]}
    told["cpu_s"] = round(time.process_time() - started, 2)
    print(f"  {cell.name}: {told.get('failed') or told['held_out_loss']}, {told['cpu_s']:.0f} s of processor time",
          file=sys.stderr, flush=True)  # fmt: skip
    return {**{key.rpartition(".")[2]: _value(value) for key, value in cell.settings.items()}, **told}


def arms_with_seeds(label: Mapping[str, Any], rates: Sequence[float], *settings: str) -> list[dict[str, Any]]:
    """Each rate with one seed, and the best of them with two more."""
    rows = arms({**label, "seed": 0}, f"train.lr={','.join(map(str, rates))}", *settings)
    best = min((row for row in rows if row["held_out_loss"] is not None), key=lambda row: row["held_out_loss"])["lr"]
    return rows + arms({**label, "lr": best}, f"train.lr={best}", "train.seed=1,2", *settings)


def record(name: str, rows: Iterable[dict[str, Any]], how: str = ON_TWO_CORES) -> None:
    """Write an experiment's rows.

    Args:
        name: of the experiment.
        rows: all that there are.
        how: they were run.
    """
    _write(name, ({"experiment": name, **row, "machine": _machine(how)} for row in rows))


def experiment(name: str, main: Callable[[], None]) -> None:
    """Run an experiment, and write the minutes that it took to minutes.jsonl."""
    started = time.perf_counter()
    main()
    minutes = {row["experiment"]: row for row in (read("minutes") if (HERE / "minutes.jsonl").exists() else ())}
    took = round((time.perf_counter() - started) / 60, 2)
    minutes[name] = {"experiment": name, "minutes": took, "machine": _machine(ON_TWO_CORES)}
    _write("minutes", (minutes[key] for key in sorted(minutes)))


def read(name: str) -> list[dict[str, Any]]:
    """An experiment's rows."""
    return [json.loads(line) for line in (HERE / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


def _machine(how: str) -> str:
    return f"{os.cpu_count()} cores, torch {torch.__version__}, CPU, {how}"


def _write(name: str, rows: Iterable[Mapping[str, Any]]) -> None:
    (HERE / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _told(run: Path) -> dict[str, Any]:
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
