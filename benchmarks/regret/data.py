"""How many rows, and how near to what the base knows: rank, dropout and weight decay where rows are few.

    python benchmarks/regret/data.py       write benchmarks/regret/data.jsonl

200 steps of 8 rows see 100 rows 16 times, 1,000 rows 1.6 times, and 1,600 of 10,000 once. The best held-out loss on
the way and the last tell what was learnt, and what came of going on.
"""

import json
import tempfile
from pathlib import Path

import torch
from common import RECIPES, arms, record, rows_ready

STEPS = ("train.steps=200", "train.eval_every=20", "train.lr=4e-3")


def main() -> None:
    """Two kinds of text, three sizes, two ranks; where rows are fewest dropout and weight decay, too."""
    torch.set_num_threads(1)
    rows_ready()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for kind in ("near", "far"):
            lines = (RECIPES / f"{kind}.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
            for count in (100, 1000, 10_000):
                few = Path(folder, f"{kind}-{count}.jsonl")
                few.write_text("".join(lines[:count]), encoding="utf-8")
                data = (f"data.train={json.dumps(str(few))}", f"data.eval={RECIPES / f'{kind}-held-out.jsonl'}")
                label = {"kind": kind, "rows": count}
                rows += arms(label, *data, *STEPS, "lora.rank=4,64")
                if count == 100:
                    rows += arms({**label, "rank": 64}, *data, *STEPS, "lora.rank=64", "lora.dropout=0.1,0.3")
                    rows += arms({**label, "rank": 64}, *data, *STEPS, "lora.rank=64", "train.weight_decay=0.1,1.0")
                record("data", rows)


if __name__ == "__main__":
    main()
