"""LoRA beside other ways to train few parameters, prompt tuning and IA3 by PEFT, on rows of the same text.

    python benchmarks/regret/methods.py       write benchmarks/regret/methods.jsonl

150 steps of 8 rows, AdamW in fp32; PEFT's methods at the best of four rates, rank 1 at that of rate.py.
"""

import json
from collections.abc import Sequence
from itertools import islice
from typing import Any

import torch
from common import RECIPES, arms, each, experiment, record, rows_ready
from peft import IA3Config, PeftModel, PromptTuningConfig, PromptTuningInit, TaskType, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

BASE = RECIPES.parent / "quickstart" / "base"
STEPS, ROWS, SPARE = 150, 8, 200


def encoded(name: str, seed: int = 0) -> list[torch.Tensor]:
    """Rows as the kit trains on them, their tokens and the end token; each seed has others."""
    tokenizer, count = AutoTokenizer.from_pretrained(BASE), STEPS * ROWS + SPARE
    lines = (RECIPES / name).read_text(encoding="utf-8").splitlines()[seed * count : (seed + 1) * count]
    ids = (tokenizer(json.loads(line)["text"]).input_ids for line in lines)
    return [torch.tensor([*each, tokenizer.eos_token_id]) for each in ids if len(each) < 256]


def loss_of(model: PeftModel, rows: list[torch.Tensor]) -> torch.Tensor:
    """Mean over the tokens, in nats."""
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=1)
    seen = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    labels = torch.where(seen == 1, ids, -100)
    labels[:, 0] = -100  # only a prompt has something before it
    return model(input_ids=ids, attention_mask=seen, labels=labels).loss


def tuned(arm: tuple[IA3Config | PromptTuningConfig, float, int]) -> dict[str, Any]:
    """One run."""
    config, lr, seed = arm
    torch.manual_seed(seed)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32), config)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=lr, weight_decay=0.0)
    rows = iter(encoded("far.jsonl", seed))
    for _ in range(STEPS):
        loss_of(model, list(islice(rows, ROWS))).backward()
        optimizer.step()
        optimizer.zero_grad()
    held_out = encoded("far-held-out.jsonl")
    with torch.no_grad():
        sixteens = [held_out[first : first + 16] for first in range(0, len(held_out), 16)]
        total = sum(loss_of(model, rows).item() * sum(len(row) - 1 for row in rows) for rows in sixteens)
    loss = total / sum(len(row) - 1 for row in held_out)
    trainable = sum(parameter.numel() for parameter in trained)
    return {"trainable": trainable, "lr": lr, "seed": seed, "held_out_loss": round(loss, 5)}


def with_seeds(method: str, config: IA3Config | PromptTuningConfig, rates: Sequence[float]) -> list[dict[str, Any]]:
    """Each rate with one seed, and the best with two more."""
    rows = each(tuned, [(config, lr, 0) for lr in rates])
    best = min(rows, key=lambda row: row["held_out_loss"])["lr"]
    return [{"method": method, **row} for row in (*rows, *each(tuned, [(config, best, 1), (config, best, 2)]))]


def main() -> None:
    """IA3, a prompt of 20 tokens, LoRA of rank 1 at its best rate; rank 16 is in quantised.py."""
    rows_ready()
    causal = TaskType.CAUSAL_LM
    ia3 = IA3Config(
        task_type=causal, target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]
    )
    prompt = PromptTuningConfig(
        task_type=causal, num_virtual_tokens=20, prompt_tuning_init=PromptTuningInit.SAMPLE_VOCAB
    )
    rows = with_seeds("IA3", ia3, (1e-2, 3e-2, 1e-1, 3e-1))
    rows += with_seeds("prompt of 20 tokens", prompt, (1e-1, 3e-1, 1.0, 3.0))
    steps = (f"train.steps={STEPS}", f"train.eval_every={STEPS}")
    rows += arms({"method": "LoRA, rank 1", "lr": 4e-3}, "lora.rank=1", "train.lr=4e-3", "train.seed=0,1,2", *steps)
    record("methods", rows)


if __name__ == "__main__":
    experiment("methods", main)
