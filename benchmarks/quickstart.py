"""The quickstart as a user runs it, training and export, three seeds: scores, time, memory and audit, a row a seed.

    python benchmarks/quickstart.py       write benchmarks/results/quickstart.jsonl

Times are of whole processes on the machine that the row names; scores and planned bytes do not depend on it.
"""

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "quickstart.jsonl"
COMMAND = Path(sys.executable).with_name("qlora-kit")
SEEDS = (0, 1, 2)


def measure(seed: int, folder: Path) -> dict[str, Any]:
    """One run of the shipped recipe in a process of its own."""
    run = folder / f"seed-{seed}"
    started = time.perf_counter()
    subprocess.run([COMMAND, "train", "quickstart", f"train.seed={seed}", f"output={run}"], check=True)
    trained = time.perf_counter()
    subprocess.run([COMMAND, "export", run, "--to", "merged", "--out", run / "merged"], check=True)
    return row_of(run, seed, trained - started, time.perf_counter() - trained)


def row_of(run: Path, seed: int, train_s: float, export_s: float) -> dict[str, Any]:
    """The row of a finished and exported run folder."""
    scores, plan, memory, env, export = (
        json.loads((run / name).read_text())
        for name in ("scores.json", "plan.json", "memory.json", "env.json", "merged/export.json")
    )
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {
        "benchmark": "quickstart",
        "seed": seed,
        "held_out_rows": scores["rows"],
        "exact_match_base": scores["base"]["exact_match"],
        "exact_match_adapter": scores["adapter"]["exact_match"],
        "loss_base": round(scores["base"]["loss"], 4),
        "loss_adapter": round(scores["adapter"]["loss"], 4),
        "train_wall_s": round(train_s, 1),
        "export_wall_s": round(export_s, 1),
        "wall_s": round(train_s + export_s, 1),
        "median_tokens_per_s": round(statistics.median(row["tokens_per_s"] for row in metrics if "loss" in row)),
        "last_step": metrics[-2],
        "perplexity": {name: round(scores[name]["perplexity"], 2) for name in ("base", "adapter")},
        "audit": export["comparisons"]["merged"],
        "planned": {name: method["by_category"] for name, method in plan["methods"].items()},
        "steps": plan["steps"],
        "planned_peak_bytes": memory["planned"]["peak_bytes"],
        "measured_peak_bytes": memory["measured"]["peak_bytes"],
        "planned_full_finetune_peak_bytes": plan["methods"]["full_finetune"]["peak_bytes"],
        "savings_vs_full": round(plan["savings_vs_full"], 4),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, torch {env['torch']}, {env['device']}",
    }


def main() -> None:
    """Run all seeds, one after the other."""
    with tempfile.TemporaryDirectory() as folder:
        rows = [measure(seed, Path(folder)) for seed in SEEDS]
    RESULTS.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    for row in rows:
        print(json.dumps(row))


if __name__ == "__main__":
    main()
