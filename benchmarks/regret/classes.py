"""Kinds of files told apart by the quickstart's base, which has learnt its language: LoRA beside full fine-tuning.

    python benchmarks/regret/classes.py       write benchmarks/regret/classes.jsonl

The rows are those of kinds.py, whose BERT has learnt little before it sees them.
"""

import tempfile
from pathlib import Path

from common import arms_with_seeds, experiment, record
from kinds import labelled

RATES = {"lora": (1e-3, 2e-3, 4e-3), "full": (2.5e-4, 5e-4, 1e-3)}


def main() -> None:
    """Rank 16 and full fine-tuning at three rates each, the best with three seeds."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        trained, held_out = labelled(Path(folder))
        settings = ("train.task=classify", f"data.train={trained}", f"data.eval={held_out}", "train.steps=240",
                    "train.eval_every=60", "train.warmup=0.1", "train.max_grad_norm=1.0")  # fmt: skip
        for method, setting in (("lora", "lora.rank=16"), ("full", "train.full_finetune=true")):
            rows += arms_with_seeds(
                {"kind": "Llama, kinds of files", "method": method}, RATES[method], setting, *settings
            )
            record("classes", rows)


if __name__ == "__main__":
    experiment("classes", main)
