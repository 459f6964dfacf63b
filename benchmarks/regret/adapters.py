"""One base and many adapters: what a switch costs, and what an adapter costs while it is not merged.

    python benchmarks/regret/adapters.py       write benchmarks/regret/adapters.jsonl

LoRA: tasks are switched by exchanging a few megabytes, and merged weights add no latency. Both are timed on a base of
the shape of TinyLlama with random weights, one thread, process time; the median of the repetitions and the middle half.
"""

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import quantiles

import torch
from common import experiment, record
from transformers import LlamaConfig, LlamaForCausalLM

import qlora_kit as qk

ADAPTERS, RANK, REPEATS = 20, 16, 9
SHAPE = {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 4, "num_attention_heads": 32,
         "num_key_value_heads": 4, "vocab_size": 32000, "tie_word_embeddings": False}  # fmt: skip


def timed(action: Callable[[], object]) -> dict[str, float]:
    """Milliseconds of process time."""
    action()
    taken = []
    for _ in range(REPEATS):
        started = time.process_time()
        action()
        taken.append(1000 * (time.process_time() - started))
    low, middle, high = quantiles(taken, n=4)
    return {"ms": round(middle, 3), "ms_from": round(low, 3), "ms_to": round(high, 3)}


def main() -> None:
    """Switches, forward passes of one token and of 64, with the base bare, adapted and merged."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows = []
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        base, merged = Path(folder, "base"), Path(folder, "merged")
        LlamaForCausalLM(LlamaConfig(**SHAPE)).to(torch.bfloat16).save_pretrained(base)
        model = qk.load_base(base, quantization="none", compute_dtype="bfloat16", device="cpu")
        bare = {tokens: timed(lambda n=tokens: model(torch.ones(1, n, dtype=torch.long))) for tokens in (1, 64)}
        for number in range(ADAPTERS):
            qk.add_lora(model, rank=RANK, name=f"task-{number}")
        qk.save_adapter(model, Path(folder, "adapter"), name="task-0")
        names = [f"task-{number}" for number in range(ADAPTERS)] * REPEATS
        rows.append({"what": "switch", "adapters": ADAPTERS, **timed(lambda: qk.use_adapter(model, names.pop()))})
        adapted = {tokens: timed(lambda n=tokens: model(torch.ones(1, n, dtype=torch.long))) for tokens in (1, 64)}
        qk.merge(Path(folder, "adapter"), base=base, out=merged)
        plain = LlamaForCausalLM.from_pretrained(merged, dtype=torch.bfloat16)
        one = {tokens: timed(lambda n=tokens: plain(torch.ones(1, n, dtype=torch.long))) for tokens in (1, 64)}
    for what, each in (("base", bare), ("adapter", adapted), ("merged", one)):
        rows += [{"what": what, "tokens": tokens, **told} for tokens, told in each.items()]
    record("adapters", rows, "1 thread")


if __name__ == "__main__":
    experiment("adapters", main)
