"""How many rows, and how near to what the base knows: ranks and full fine-tuning, dropout and weight decay.

    python benchmarks/regret/data.py       write benchmarks/regret/data.jsonl

100 rows are seen ten times and 1,000 rows twice, in steps of 32. The lowest held-out loss on the way and the last tell
what was learnt, and what came of going on. rows.py has 10,000 rows.
"""

import json
import tempfile
from pathlib import Path

from common import RECIPES, SEEDS, experiment, record, rows_ready, together

RATES = {"near": (4e-3, 1e-3), "far": (8e-3, 2e-3)}
"""Of LoRA and of full fine-tuning: on far text the best for 32 rows a step (batch.py), on near text half of that."""
SHRINK = ("lora.dropout=0.1,0.3", "train.weight_decay=0.1,1.0")


def first_rows(folder: str, kind: str, count: int, passes: int) -> tuple[str, ...]:
    """The settings that train on the first rows of a kind, so many times, with four evaluations on the way."""
    rows_ready()
    lines = (RECIPES / f"{kind}.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    few, steps = Path(folder, f"{kind}-{count}.jsonl"), passes * count // 32
    few.write_text("".join(lines[:count]), encoding="utf-8")
    return (f"data.train={json.dumps(str(few))}", f"data.eval={RECIPES / f'{kind}-held-out.jsonl'}",
            "train.accumulation=4", f"train.steps={steps}", f"train.eval_every={max(1, steps // 4)}")  # fmt: skip


def main() -> None:
    """Two kinds of text and two sizes, where rows are fewest with two seeds; dropout and weight decay there, too."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for count, passes, seeds in ((100, 10, SEEDS), (1000, 2, "train.seed=0")):
            grids = []
            for kind, (lora, full) in RATES.items():
                label, settings = {"kind": kind, "rows": count}, (seeds, *first_rows(folder, kind, count, passes))
                grids.append(({**label, "method": "lora"}, ("lora.rank=4,64", f"train.lr={lora}", *settings)))
                grids.append(({**label, "method": "full"}, ("train.full_finetune=true", f"train.lr={full}", *settings)))
            rows += together(grids)
            record("data", rows)
        label, settings = {"kind": "near", "rows": 100, "rank": 64}, first_rows(folder, "near", 100, 10)
        lora = ("lora.rank=64", f"train.lr={RATES['near'][0]}", *settings)
        rows += together([({**label, "method": "lora"}, (shrink, *lora)) for shrink in SHRINK])
        record("data", rows)


if __name__ == "__main__":
    experiment("data", main)
