"""The quickstart with every weight trained, beside its QLoRA: what both take, planned and measured, and score.

    python benchmarks/full_finetune.py    write benchmarks/results/full_finetune.jsonl

Both train in fp32 with the recipe's rows, batch and optimizer; full fine-tuning at a tenth of the recipe's rate, as
`train.lr: auto` has it (LoRA Without Regret). Two runs, one after the other, of a minute or two each.
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

RESULTS = Path(__file__).parent / "results" / "full_finetune.jsonl"
COMMAND = [sys.executable, "-c", "from qlora_kit.cli import main; main()"]
METHODS = {"qlora": [], "full_finetune": ["train.full_finetune=true", "train.lr=3e-4"]}


def measure(method: str, folder: Path) -> dict[str, Any]:
    """One run of the shipped recipe in a process of its own, and its row."""
    run = folder / method
    started = time.perf_counter()
    subprocess.run([*COMMAND, "train", "quickstart", f"output={run}", *METHODS[method]], check=True)
    wall_s = time.perf_counter() - started
    scores, plan, memory, env = (
        json.loads((run / name).read_text()) for name in ("scores.json", "plan.json", "memory.json", "env.json")
    )
    assert plan["method"] == method
    return {
        "benchmark": "full_finetune",
        "method": method,
        "overrides": METHODS[method],
        "assumes": plan["methods"][method].get("assumes"),
        "planned_peak_bytes": memory["planned"]["peak_bytes"],
        "measured_peak_bytes": memory["measured"]["peak_bytes"],
        "measured": memory["measured"]["by_category"],
        "device_counter": memory["device_counter"],
        "exact_match": {name: scores[name]["exact_match"] for name in ("base", "adapter")},
        "loss": {name: round(scores[name]["loss"], 4) for name in ("base", "adapter")},
        "trained_file_bytes": sum(file.stat().st_size for file in (run / _KEPT[method]).iterdir()),
        "steps": plan["steps"],
        "wall_s": round(wall_s, 1),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, torch {env['torch']}, {env['device']}",
    }


_KEPT = {"qlora": "adapter", "full_finetune": "model"}


def main() -> None:
    """Run both; the saving that was measured goes into QLoRA's row."""
    with tempfile.TemporaryDirectory() as folder:
        rows = {method: measure(method, Path(folder)) for method in METHODS}
    for kind in ("planned", "measured"):
        key = f"{kind}_peak_bytes"
        rows["qlora"][f"{kind}_saving_vs_full"] = round(1 - rows["qlora"][key] / rows["full_finetune"][key], 4)
    RESULTS.write_text("".join(json.dumps(row) + "\n" for row in rows.values()), encoding="utf-8")
    for row in rows.values():
        print(json.dumps(row))


if __name__ == "__main__":
    main()
