"""LoRA beside other ways to train few parameters, prompt tuning and IA3, all by PEFT or the kit on the same rows.

    python benchmarks/regret/methods.py       write benchmarks/regret/methods.jsonl

150 steps of the same 8 rows each, each method at the best of four rates, AdamW in fp32.
"""

import json
from itertools import islice
from typing import Any

import torch
from common import RECIPES, arms_with_seeds, record, rows_ready
from peft import IA3Config, PeftModel, PromptTuningConfig, TaskType, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

BASE = RECIPES.parent / "quickstart" / "base"
STEPS, ROWS, SPARE = 150, 8, 200


def encoded(name: str) -> list[torch.Tensor]:
    """Rows as the kit trains on them: their tokens and the end token."""
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    lines = (RECIPES / name).read_text(encoding="utf-8").splitlines()[: STEPS * ROWS + SPARE]
    ids = (tokenizer(json.loads(line)["text"]).input_ids for line in lines)
    return [torch.tensor([*each, tokenizer.eos_token_id]) for each in ids if len(each) < 256]


def loss_of(model: PeftModel, rows: list[torch.Tensor]) -> torch.Tensor:
    """Mean over the tokens, in nats."""
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=1)
    seen = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    labels = torch.where(seen == 1, ids, -100)
    return model(input_ids=ids, attention_mask=seen, labels=labels).loss


def tuned(config: IA3Config | PromptTuningConfig, lr: float, seed: int) -> dict[str, Any]:
    """One run."""
    torch.manual_seed(seed)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32), config)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=lr, weight_decay=0.0)
    rows = iter(encoded("far.jsonl"))
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


def with_seeds(method: str, config: IA3Config | PromptTuningConfig) -> list[dict[str, Any]]:
    """Each of four rates, and the best with two more seeds."""
    rows = [tuned(config, lr, 0) for lr in (3e-3, 1e-2, 3e-2, 1e-1)]
    best = min(rows, key=lambda row: row["held_out_loss"])["lr"]
    return [{"method": method, **row} for row in (*rows, tuned(config, best, 1), tuned(config, best, 2))]


def main() -> None:
    """IA3, prompts of 20 and 100 tokens, LoRA of rank 1 and 16."""
    torch.set_num_threads(1)
    rows_ready()
    causal = TaskType.CAUSAL_LM
    ia3 = IA3Config(
        task_type=causal, target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]
    )
    rows = with_seeds("IA3", ia3)
    for tokens in (20, 100):
        prompt = PromptTuningConfig(task_type=causal, num_virtual_tokens=tokens)
        rows += with_seeds(f"prompt of {tokens}", prompt)
        record("methods", rows)
    steps = (f"train.steps={STEPS}", f"train.eval_every={STEPS}")
    for rank in (1, 16):
        rows += arms_with_seeds({"method": f"LoRA, rank {rank}"}, (2e-3, 4e-3, 8e-3), f"lora.rank={rank}", *steps)
    record("methods", rows)


if __name__ == "__main__":
    main()
