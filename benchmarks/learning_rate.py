"""`train.lr: auto` beside a grid of rates, on the quickstart's base and rows: the held-out loss at the end of each.

    python benchmarks/learning_rate.py       write benchmarks/results/learning_rate.jsonl (a quarter of an hour)

The rate is constant, as in the runs of LoRA Without Regret; one length is short (fewer than 100 steps) and one is not.
What is told of a rate is the loss on the 200 held-out rows after the last step, and not the best on the way.
"""

import json
import os
import tempfile
from pathlib import Path
from typing import Any

from qlora_kit.recipe import read_recipe
from qlora_kit.run import train

RESULTS = Path(__file__).parent / "results" / "learning_rate.jsonl"
GRID = ("auto", 6e-4, 1.25e-3, 2.5e-3, 5e-3, 1e-2, 2e-2)
STEPS = (60, 240)


def measure(lr: str | float, steps: int, seed: int, folder: Path) -> dict[str, Any]:
    """One run of the shipped recipe at another rate."""
    run = folder / f"{lr}-{steps}-{seed}"
    settings = {"lr": lr, "steps": steps, "seed": seed, "eval_every": steps, "schedule": "constant"}
    overrides = [f"train.{key}={value}" for key, value in settings.items()]
    train(read_recipe("quickstart", [*overrides, f"output={run}"]))
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    scores, env = (json.loads((run / name).read_text()) for name in ("scores.json", "env.json"))
    return {
        "benchmark": "learning_rate",
        "steps": steps,
        "lr": metrics[-2]["lr"],
        "is_auto": lr == "auto",
        "seed": seed,
        "held_out_loss": round(metrics[-1]["eval_loss"], 4),
        "exact_match": scores["adapter"]["exact_match"],
        "machine": f"{os.cpu_count()} cores, torch {env['torch']}, {env['device']}",
    }


def main() -> None:
    """The whole grid, one run after the other."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for steps in STEPS:
            for lr in GRID:
                rows.append(measure(lr, steps, 0, Path(folder)))
                print(json.dumps(rows[-1]), flush=True)
    RESULTS.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    main()
