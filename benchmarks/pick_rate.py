"""`qlora-kit sweep quickstart` beside the grid that it stands for: what is picked, and the processor's time of both.

    python benchmarks/pick_rate.py       write benchmarks/results/pick_rate.jsonl (five minutes)

Both train the same seven rates with a constant rate and no warmup, 60 steps, one thread; the grid scores each run, too.
"""

import json
import os
import tempfile
import time
from pathlib import Path

import torch

from qlora_kit.recipe import read_grid, read_recipe
from qlora_kit.run import pick_rate, sweep

RESULTS = Path(__file__).parent / "results" / "pick_rate.jsonl"
STEPS = ("train.steps=60", "train.eval_every=60", "train.schedule=constant", "train.warmup=0.0")


def main() -> None:
    """The search, then the grid over its candidates."""
    torch.set_num_threads(1)
    machine = f"{os.cpu_count()} cores, torch {torch.__version__}, CPU, {torch.get_num_threads()} thread"
    started = time.process_time()
    picked = pick_rate(read_recipe("quickstart", STEPS))
    searched, started = time.process_time() - started, time.process_time()
    rates = sorted(each.rate for each in picked.tried)
    with tempfile.TemporaryDirectory() as folder:
        axis = f"train.lr={','.join(f'{rate:g}' for rate in rates)}"
        grid = read_grid("quickstart", [*STEPS, axis, f"output={folder}/grid"])
        sweep(grid)
        swept = time.process_time() - started
        losses = {
            cell.settings["train.lr"]: json.loads(Path(cell.recipe.output, "scores.json").read_text())["adapter"][
                "loss"
            ]
            for cell in grid.cells
        }
    row = {
        "benchmark": "pick_rate",
        "steps": picked.steps,
        "picked": picked.best,
        "automatic": picked.automatic,
        "best_of_grid": float(min(losses, key=lambda rate: losses[rate])),
        "losses_of_grid": {rate: round(loss, 4) for rate, loss in losses.items()},
        "losses_of_search": {f"{each.rate:g}": each.loss and round(each.loss, 4) for each in picked.tried},
        "steps_of_search": sum(each.steps for each in picked.tried),
        "search_cpu_s": round(searched, 1),
        "grid_cpu_s": round(swept, 1),
        "machine": machine,
    }
    RESULTS.write_text(json.dumps(row) + "\n", encoding="utf-8")
    print(json.dumps(row, indent=2))


if __name__ == "__main__":
    main()
