"""What the shipped 7B and 8B recipes plan to take: a row a recipe, from its model's shape alone.

    python benchmarks/plans.py            plan every recipe and write benchmarks/results/plans.jsonl

The figures in the recipes' headers and in the README are these rows. benchmarks/models/ holds the shapes: what the
models' own config.json say of sizes, so that no download is needed.
"""

import json
from pathlib import Path
from typing import Any

from qlora_kit.recipe import find, read_recipe
from qlora_kit.run import plan_memory

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "plans.jsonl"
SHAPES = {
    "qlora-7b-8gb": "qwen2.5-7b",
    "qlora-7b-12gb": "qwen2.5-7b",
    "qlora-7b-24gb": "qwen2.5-7b",
    "qlora-8b-8gb": "qwen3-8b",
    "qlora-8b-12gb": "qwen3-8b",
    "qlora-8b-24gb": "qwen3-8b",
}
CARDS = {"8gb": "RTX 4060", "12gb": "RTX 3060", "24gb": "RTX 4090"}
"""That each is planned for, by the end of its name: a plan for a CPU has that processor's own ways to multiply."""


def plan_row(name: str) -> dict[str, Any]:
    """Plan the shipped recipe `name` on the shape of its model."""
    recipe = read_recipe(
        find(name), [f"base.model={HERE / 'models' / SHAPES[name]}", "data.train=/rows/not/needed.jsonl"]
    )
    plan = plan_memory(recipe, gpu=CARDS[name.rpartition("-")[2]])
    methods = plan["methods"]
    return {
        "recipe": name,
        "model_shape": SHAPES[name],
        "tokens": plan["tokens"],
        "micro_batch": plan["micro_batch"],
        "peak_bytes": methods["qlora"]["peak_bytes"],
        "lora_16bit_peak_bytes": methods["lora_16bit"]["peak_bytes"],
        "full_finetune_peak_bytes": methods["full_finetune"]["peak_bytes"],
        "savings_vs_full": round(plan["savings_vs_full"], 4),
        "by_category": methods["qlora"]["by_category"],
        "planned_on": plan["planned_on"],
    }


def main() -> None:
    """Plan all of them."""
    rows = []
    for name in SHAPES:
        rows.append(plan_row(name))
        print(f"{name:15} {rows[-1]['peak_bytes'] / 2**30:6.2f} GiB", flush=True)
    RESULTS.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    main()
