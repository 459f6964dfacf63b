"""How long a plan takes: the command itself, from start to end, in the cases that want most dry runs.

    python benchmarks/plan_time.py    write benchmarks/results/plan_time.jsonl

Two threads, seconds by the clock, the mean of two runs and their range; the cases run in turn.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "plan_time.jsonl"
REPEATS = 2
CASES = [
    ("llama-2-7b", "RTX 4090", []),  # the first setting fits
    ("llama-2-7b", "RTX 4060", []),  # a mixture of blocks
    ("llama-2-7b", "RTX 4060", ["train.micro_batch=auto", "data.max_tokens=512"]),  # and of rows at a time
    ("llama-2-7b", "RTX 2060", ["base.quantize_head=auto", "data.max_tokens=1024"]),  # and of ways to hold the head
    ("qwen2.5-7b", "RTX 4060", []),
    ("qwen2.5-7b", "RTX 2060", ["base.quantize_head=auto"]),
    ("qwen2.5-7b", "RTX 3060", []),
    ("llama-3.1-70b", "A100 80GB", []),
    ("llama-3.1-70b", "RTX A6000", []),
]
"""Shapes of models, cards, and settings."""


def run(model: str, card: str, settings: list[str]) -> tuple[float, str]:
    """Seconds that one plan takes, and what it chose."""
    kit, shape = Path(sys.executable).with_name("qlora-kit"), HERE / "models" / model
    recipe = [f"base.model={shape}", "data.train=/rows/not/needed.jsonl", *settings]
    command = [str(kit), "plan", "default", *recipe, "--gpu", card, "--json"]
    begun = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "2"})
    seconds = time.monotonic() - begun
    planned = json.loads(done.stdout)
    fits = "fits" if done.returncode == 0 else "does not fit"
    return seconds, f"{fits}: {planned['activations']}, {planned['micro_batch']} at a time"


def main() -> None:
    """Time every case."""
    seconds: dict[int, list[float]] = {}
    chosen = {}
    for _ in range(REPEATS):
        for number, case in enumerate(CASES):
            took, chosen[number] = run(*case)
            seconds.setdefault(number, []).append(took)
            print(f"{took:5.1f} s  {' '.join([case[0], case[1], *case[2]])}: {chosen[number]}", flush=True)
    rows = [
        {
            "benchmark": "plan_time",
            "model_shape": model,
            "card": card,
            "settings": settings,
            "chose": chosen[number],
            "seconds": round(statistics.fmean(seconds[number]), 1),
            "range": [round(min(seconds[number]), 1), round(max(seconds[number]), 1)],
        }
        for number, (model, card, settings) in enumerate(CASES)
    ]
    RESULTS.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    main()
