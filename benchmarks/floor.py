"""How far a planned step is from the least that its mathematics needs (`qlora_kit/plan/floor.py`): a row a setting.

    python benchmarks/floor.py            plan them all and write benchmarks/results/floor.jsonl

NF4 with double quantisation, rank 16 on all linear layers, bf16, one row at a time and two in a step, 8-bit Adam; every
block recomputed from its input, which stays on the card or waits in the host's memory. The floor has it on the card.
Llama-2 has 4,096 positions: its 8,192 tokens are a length to compare at, and no run.
"""

import json
from itertools import product
from pathlib import Path
from typing import Any

from qlora_kit.base.architecture import read_config
from qlora_kit.plan import plan_methods
from qlora_kit.recipe import read_recipe
from qlora_kit.train.pace import set_pace

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "floor.jsonl"
CARD = "RTX 4090"
MODELS = ("llama-2-7b", "llama-3.1-8b")
LENGTHS = (512, 2048, 8192)
MASTERS = ("stochastic", "fp32")
ACTIVATIONS = ("recompute", "offload")
SETTINGS = ("data.train=/rows/not/needed.jsonl", "base.compute_dtype=bfloat16", "lora.rank=16", "train.micro_batch=1",
            "train.accumulation=2", "train.optimizer=paged_adamw_8bit", "data.packing=false")  # fmt: skip


def floor_row(model: str, tokens: int, masters: str, activations: str) -> dict[str, Any]:
    """Plan a step on the shape of `model`."""
    config = read_config(HERE / "models" / model)
    asked = (
        f"base.model={HERE / 'models' / model}",
        f"train.master_weights={masters}",
        f"memory.activations={activations}",
    )
    recipe = read_recipe("default", [*asked, *SETTINGS])
    pace = set_pace(recipe.train, rows=2, longest=tokens, tokens=tokens, trained_tokens=tokens, config=config)
    plan = plan_methods(recipe, config, pace, tokens, card=CARD)
    qlora = plan["methods"]["qlora"]
    return {
        "model_shape": model,
        "tokens": tokens,
        "micro_batch": plan["micro_batch"],
        "activations": plan["activations"],
        "master_weights": masters,
        "peak_bytes": qlora["peak_bytes"],
        "floor_bytes": plan["floor"]["bytes"],
        "ratio": plan["floor"]["ratio"],
        "by_category": qlora["by_category"],
        "peak_by_phase": qlora["peak_by_phase"],
        "planned_on": plan["planned_on"],
    }


def main() -> None:
    """Plan all of them."""
    rows = []
    for model, tokens, masters, activations in product(MODELS, LENGTHS, MASTERS, ACTIVATIONS):
        row = floor_row(model, tokens, masters, activations)
        rows.append(row)
        sizes = [f"{row[key] / 2**30:6.2f} GiB" for key in ("peak_bytes", "floor_bytes")]
        print(
            f"{model:13} {tokens:5} {masters:10} {activations:9} {' over '.join(sizes)} = {row['ratio']:.2f}",
            flush=True,
        )
    RESULTS.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    main()
