"""10,000 rows, seen once: what data.py does on few.

python benchmarks/regret/rows.py       write benchmarks/regret/rows.jsonl
"""

import tempfile

from common import experiment, record, together
from data import RATES, first_rows


def main() -> None:
    """Rank 64 and full fine-tuning on near and far text; one seed, since the runs are long."""
    with tempfile.TemporaryDirectory() as folder:
        grids = []
        for kind, (lora, full) in RATES.items():
            label, settings = {"kind": kind, "rows": 10_000}, first_rows(folder, kind, 10_000, 1)
            grids.append(({**label, "method": "lora", "rank": 64}, ("lora.rank=64", f"train.lr={lora}", *settings)))
            grids.append(({**label, "method": "full"}, ("train.full_finetune=true", f"train.lr={full}", *settings)))
        record("rows", together(grids))


if __name__ == "__main__":
    experiment("rows", main)
