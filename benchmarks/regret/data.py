"""How many rows, and how near to what the base knows: ranks and full fine-tuning, dropout and weight decay.

    python benchmarks/regret/data.py       write benchmarks/regret/data.jsonl

100 rows are seen 16 times and 1,000 rows twice, in steps of 32. The lowest held-out loss on the way and the last tell
what was learnt, and what came of going on. rows.py has 10,000 rows.
"""

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from common import RECIPES, SEEDS, arms, record, rows_ready

RATES = {"lora": "train.lr=2e-3,8e-3", "full": "train.lr=5e-4,2e-3"}
"""A low one, since near text asks for small changes, and the best one for 32 rows of far text (batch.py)."""
SHRINK = ("lora.dropout=0.1,0.3", "train.weight_decay=0.1,1.0")


def on_rows(kind: str, count: int, passes: int, rates: dict[str, str], *seeds: str) -> list[dict[str, Any]]:
    """Ranks 4 and 64 and full fine-tuning on the first `count` rows of a kind."""
    rows_ready()
    with tempfile.TemporaryDirectory() as folder:
        lines = (RECIPES / f"{kind}.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
        few = Path(folder, "few.jsonl")
        few.write_text("".join(lines[:count]), encoding="utf-8")
        steps = passes * count // 32
        settings = (f"data.train={json.dumps(str(few))}", f"data.eval={RECIPES / f'{kind}-held-out.jsonl'}",
                    "train.accumulation=4", f"train.steps={steps}", f"train.eval_every={max(1, steps // 10)}",
                    *seeds)  # fmt: skip
        label = {"kind": kind, "rows": count}
        rows = arms({**label, "method": "lora"}, *settings, "lora.rank=4,64", rates["lora"])
        rows += arms({**label, "method": "full"}, *settings, "train.full_finetune=true", rates["full"])
        if count == 100:
            own = {**label, "method": "lora", "rank": 64, "lr": 8e-3}
            for axis in SHRINK:
                rows += arms(own, *settings, "lora.rank=64", "train.lr=8e-3", axis)
        return rows


def main() -> None:
    """Two kinds of text, two sizes, two seeds."""
    torch.set_num_threads(2)
    rows = []
    for kind in ("near", "far"):
        for count, passes in ((100, 16), (1000, 2)):
            rows += on_rows(kind, count, passes, RATES, SEEDS)
            record("data", rows)


if __name__ == "__main__":
    main()
