"""What the C library's allocation policy costs and gains: whole runs, each in a process of its own, taken in turn.

    python benchmarks/allocation.py quickstart train.steps=30 [--repeats 3]

For each policy: the process's CPU time from the start of loading to the last step, and the most anonymous resident
bytes over that start beside the plan. A policy is `default`, or MMAP:TRIM, the two thresholds in KiB. `+trim` gives
free pages back before every micro-batch, too.
"""

import argparse
import ctypes
import importlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

POLICIES = ("default", "128:0", "128:1024", "1024:1024", "4096:1024", "16384:1024", "default+trim")


def main() -> None:
    """Run every policy in turn and print a row for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--policies", nargs="*", default=POLICIES)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    asked = parser.parse_intermixed_args()
    if asked.child:
        print(json.dumps(run(asked.child, asked.recipe, asked.overrides)))
        return
    found: dict[str, list[dict[str, float]]] = {policy: [] for policy in asked.policies}
    for _ in range(asked.repeats):
        for policy in asked.policies:
            command = [sys.executable, __file__, asked.recipe, *asked.overrides, "--child", policy]
            done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=True)
            found[policy].append(json.loads(done.stdout.splitlines()[-1]))
            print(policy, found[policy][-1], flush=True)
    for policy, rows in found.items():
        cpu, peak = ([row[key] for row in rows] for key in ("cpu_s", "peak_mib"))
        print(
            f"| {policy} | {statistics.median(cpu):.1f} ({min(cpu):.1f}..{max(cpu):.1f}) | "
            f"{statistics.median(peak):.0f} ({min(peak):.0f}..{max(peak):.0f}) | {rows[0]['plan_mib']:.0f} |"
        )


def run(policy: str, recipe: str, overrides: list[str]) -> dict[str, float]:
    """Train under a policy, in this process."""
    from qlora_kit.recipe import read_recipe

    train: Any = importlib.import_module("qlora_kit.run.train")
    limit: Any = importlib.import_module("qlora_kit.memory.limit")
    loop: Any = importlib.import_module("qlora_kit.train.loop")
    c_library = ctypes.CDLL(None)
    thresholds, _, trims = policy.partition("+")
    started = 0.0

    def begin() -> None:
        nonlocal started
        if thresholds != "default":
            mmap_kib, trim_kib = map(int, thresholds.split(":"))
            assert c_library.mallopt(-3, mmap_kib * 1024)
            assert c_library.mallopt(-1, trim_kib * 1024)
        c_library.malloc_trim(0)
        started = time.process_time()

    def trimmed(job: Any, batches: Any, step: int) -> Any:
        for batch in batches:
            c_library.malloc_trim(0)
            yield batch

    ended, save = [], train.save_adapter
    limit.set_allocation_policy = lambda: None
    limit.give_back_free_memory = begin  # which a run asks for when its start is counted
    train.save_adapter = lambda *args, **kwargs: (ended.append(time.process_time()), save(*args, **kwargs))
    if trims:
        loop._checked = trimmed
    with tempfile.TemporaryDirectory() as folder:
        train.train(read_recipe(recipe, [*overrides, f"output={folder}/run"]))
        plan, memory = (json.loads((Path(folder) / "run" / name).read_text()) for name in ("plan.json", "memory.json"))
    counter = memory["device_counter"]
    return {
        "cpu_s": round(ended[0] - started, 2),
        "peak_mib": round((counter["peak_bytes"] - counter["start_bytes"]) / 2**20, 1),
        "plan_mib": round(plan["methods"]["qlora"]["peak_bytes"] / 2**20, 1),
    }


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
