"""What adapters in 16 bits learn with and without copies in fp32, by rate, beside adapters that are fp32 themselves.

    python benchmarks/regret/masters.py       write benchmarks/regret/masters.jsonl

Without a copy an update that is small beside its parameter is rounded away, the more of them the lower the rate.
"""

import json
from itertools import islice
from typing import Any

import torch
from common import RECIPES, each, experiment, record, rows_ready
from transformers import AutoTokenizer

import qlora_kit as qk
from qlora_kit.data import Encoded, collate_rows
from qlora_kit.lora import adapter_parameters
from qlora_kit.train.evaluate import evaluate_loss
from qlora_kit.train.optim import AdapterOptimizer, MasterWeights
from qlora_kit.train.step import accumulate_gradients

BASE = RECIPES.parent / "quickstart" / "base"
STEPS, ROWS, SPARE = 60, 8, 200
KINDS: dict[str, tuple[torch.dtype, MasterWeights]] = {
    "fp32 adapter": (torch.float32, "none"),
    "bf16, fp32 copies": (torch.bfloat16, "fp32"),
    "bf16, rounded at random": (torch.bfloat16, "stochastic"),
    "bf16 alone": (torch.bfloat16, "none"),
}


def encoded(name: str) -> list[Encoded]:
    """Rows as the kit trains on them: their tokens and the end token."""
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    lines = (RECIPES / name).read_text(encoding="utf-8").splitlines()[: STEPS * ROWS + SPARE]
    ids = ([*tokenizer(json.loads(line)["text"]).input_ids, tokenizer.eos_token_id] for line in lines)
    return [Encoded(row, [True] * len(row)) for row in ids if len(row) <= 256]


def learnt(arm: tuple[float, str]) -> dict[str, Any]:
    """One run."""
    lr, kind = arm
    dtype, masters = KINDS[kind]
    model = qk.load_base(BASE, quantization="none", compute_dtype="float32", device="cpu")
    qk.add_lora(model, rank=16, dtype=dtype)
    trained = list(adapter_parameters(model))
    before = [parameter.detach().clone() for _, parameter in trained]
    optimizer = AdapterOptimizer(trained, "adamw", master_weights=masters)
    rows = iter(encoded("far.jsonl"))
    for _ in range(STEPS):
        batch = collate_rows([[row] for row in islice(rows, ROWS)], 1)
        accumulate_gradients(model.train(), [batch], batch.count)
        optimizer.step(lr)
    moved = sum((parameter != old).sum().item() for (_, parameter), old in zip(trained, before, strict=True))
    loss = evaluate_loss(model, [collate_rows([[row]], 1) for row in encoded("far-held-out.jsonl")]).loss
    share = moved / sum(old.numel() for old in before)
    return {"kind": kind, "lr": lr, "held_out_loss": round(loss, 5), "moved": round(share, 4)}


def main() -> None:
    """Rank 16, four rates."""
    rows_ready()
    record("masters", each(learnt, [(lr, kind) for lr in (1e-5, 1e-4, 1e-3, 4e-3) for kind in KINDS]))


if __name__ == "__main__":
    experiment("masters", main)
