"""10,000 rows, seen once: what data.py does on few.

python benchmarks/regret/rows.py       write benchmarks/regret/rows.jsonl
"""

import torch
from common import record
from data import on_rows


def main() -> None:
    """Near and far text at the better of data.py's rates for each, one seed: these runs are long."""
    torch.set_num_threads(2)
    rows = []
    for kind, lora, full in (("near", 2e-3, 5e-4), ("far", 8e-3, 2e-3)):
        rows += on_rows(kind, 10_000, 1, {"lora": f"train.lr={lora}", "full": f"train.lr={full}"}, "train.seed=0")
        record("rows", rows)


if __name__ == "__main__":
    main()
