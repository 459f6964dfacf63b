"""The quickstart as a user runs it, three seeds: scores, time and memory, a row a seed.

    python benchmarks/quickstart.py       write benchmarks/results/quickstart.jsonl

Times are of whole processes on the machine that the row names; scores and planned bytes do not depend on it.
"""

import json
import os
import platform
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
    return row_of(run, seed, time.perf_counter() - started)


def row_of(run: Path, seed: int, wall_s: float) -> dict[str, Any]:
    """The row of a finished run folder."""
    scores, plan, memory, env = (
        json.loads((run / name).read_text()) for name in ("scores.json", "plan.json", "memory.json", "env.json")
    )
    return {
        "benchmark": "quickstart",
        "seed": seed,
        "held_out_rows": scores["rows"],
        "exact_match_base": scores["base"]["exact_match"],
        "exact_match_adapter": scores["adapter"]["exact_match"],
        "loss_base": round(scores["base"]["loss"], 4),
        "loss_adapter": round(scores["adapter"]["loss"], 4),
        "wall_s": round(wall_s, 1),
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
