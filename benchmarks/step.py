"""A training step beside PEFT on bitsandbytes: time and memory, on a CPU, on the same weights and rows.

    python benchmarks/step.py [SHAPE ...]      shapes: 134m 1.1b 7b-layers; rows of benchmarks/results/step.jsonl

Rank 16 on all linears, one row, one thread; the ways take turns in one process; process CPU time, medians and ranges of
five rounds after one that does not count. The peer comes in two forms: as its documentation says
(`prepare_model_for_kbit_training`, fp32 adapters), and all in bf16; "times as fast" is beside the faster of them.
Memory is what a process of its own holds at most above what it held before the step, in anonymous pages, the second
step's.

The floor is the products with frozen weights alone, at the rate at which torch multiplies here, median of all rounds:
forward, backward, and forward once more where a block is recomputed from its input. The kit takes less: the last
product of a block is not taken again, and nothing goes back to the embedding.
"""

import ctypes
import gc
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig
from transformers.utils.logging import disable_progress_bar

from qlora_kit.base import load_base
from qlora_kit.lora import adapter_parameters, add_lora
from qlora_kit.memory.counter import resident_bytes
from qlora_kit.train.activations import set_activation_policy
from qlora_kit.train.head import automatic_chunk
from qlora_kit.train.optim import AdapterOptimizer
from qlora_kit.train.step import accumulate_gradients
from qlora_kit.units import MIB

RESULTS = Path(__file__).parent / "results" / "step.jsonl"
ROUNDS = 5
EXTRA = "--extra"
SHAPES = {
    "134m": {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 12},
    "1.1b": {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32},
    "7b-layers": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 2, "num_attention_heads": 32},
}
VOCAB, TOKENS = 32_000, 256
BF16 = " and ".join(
    name
    for name, is_there in (
        ("AVX512-BF16", torch.cpu._is_avx512_bf16_supported()),
        ("AMX", torch.cpu._is_amx_tile_supported()),
    )
    if is_there
)
MACHINE = f"{platform.machine()}, {BF16 or 'no bf16 instructions'}, torch {torch.__version__}, 1 thread"
Step = Callable[[], object]


def make_checkpoint(shape: dict[str, int], folder: Path) -> None:
    """Random weights in bf16."""
    heads = shape["num_attention_heads"]
    config = LlamaConfig(**shape, num_key_value_heads=heads, vocab_size=VOCAB, tie_word_embeddings=False)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)


def kit(folder: Path, ids: torch.Tensor, kind: str, policy: str, loss_chunk: int | None = None) -> Step:
    """A step as the kit's own loop takes it, the loss in as many tokens at a time as a plan begins with, or given."""
    model = load_base(folder, quantization=kind, compute_dtype="bfloat16", device="cpu")
    add_lora(model, rank=16)
    set_activation_policy(model, policy)
    model.train()
    parameters = list(adapter_parameters(model))
    optimizer = AdapterOptimizer(parameters, "adamw")
    rows = SimpleNamespace(input_ids=ids, labels=ids, position_ids=None, documents=None, attention_mask=None)
    chunk = loss_chunk or automatic_chunk(VOCAB)

    def step() -> None:
        accumulate_gradients(model, [rows], ids.numel(), loss_chunk=chunk)
        torch.nn.utils.clip_grad_norm_([parameter for _, parameter in parameters], 0.3)
        optimizer.step(1e-4)

    return step


def peer(folder: Path, ids: torch.Tensor, kind: str, *, is_documented: bool) -> Step:
    """A step of PEFT on bitsandbytes, with gradient checkpointing."""
    four = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    how = BitsAndBytesConfig(load_in_8bit=True) if kind == "int8" else four
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=how, dtype=torch.bfloat16)
    if is_documented:
        model = prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs={"use_reentrant": False})
    else:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    config = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(model, config, autocast_adapter_dtype=is_documented)
    if not is_documented:
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data = parameter.data.to(torch.bfloat16)
        model.enable_input_require_grads()
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.0)

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=is_documented):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 0.3)
        optimizer.step()
        optimizer.zero_grad()

    return step


def seconds(step: Step) -> float:
    """CPU seconds of one step."""
    begun = time.process_time()
    step()
    return time.process_time() - begun


def extra_bytes(step: Step) -> int:
    """The most that the process held in anonymous pages above what it held before."""
    step()
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    before, most, done = resident_bytes()[0], 0, threading.Event()

    def watch() -> None:
        nonlocal most
        while not done.wait(0.002):
            most = max(most, resident_bytes()[0])

    watching = threading.Thread(target=watch)
    watching.start()
    step()
    done.set()
    watching.join()
    return most - before


def extra_in_own_process(folder: Path, kind: str, way: str) -> int:
    """`extra_bytes` of a way, where no other has been."""
    command = [sys.executable, __file__, EXTRA, str(folder), kind, way]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def flops_a_second(shape: dict[str, int]) -> float:
    """At which this processor multiplies matrices as large as those of the step."""
    x = torch.randn(TOKENS, shape["hidden_size"]).bfloat16()
    w = torch.randn(shape["intermediate_size"], shape["hidden_size"]).bfloat16()
    times = [seconds(lambda: torch.mm(x, w.t()) is None) for _ in range(50)]
    return 2 * x.numel() * len(w) / statistics.median(times)


def ways(folder: Path, kind: str) -> dict[str, Callable[[], Step]]:
    """All ways to take a step, each with its model still to be loaded."""
    ids = torch.randint(0, VOCAB, (1, TOKENS))
    return {
        "peft, documented": partial(peer, folder, ids, kind, is_documented=True),
        "peft, bf16": partial(peer, folder, ids, kind, is_documented=False),
        "kit, recompute": partial(kit, folder, ids, kind, "recompute"),
        "kit, selective": partial(kit, folder, ids, kind, "selective"),
        "kit, keep": partial(kit, folder, ids, kind, "keep"),
    }


def compare(name: str, kind: str, folder: Path) -> list[dict[str, Any]]:
    """All of them at one shape."""
    shape = SHAPES[name]
    steps = {way: load() for way, load in ways(folder, kind).items()}
    taken: dict[str, list[float]] = {way: [] for way in steps}
    rates = []
    for turn in range(ROUNDS + 1):
        rates.append(flops_a_second(shape))
        for way, step in steps.items():
            took = seconds(step)
            if turn:
                taken[way].append(took)
    rate = statistics.median(rates)
    linears = 4 * shape["hidden_size"] ** 2 + 3 * shape["hidden_size"] * shape["intermediate_size"]
    body, head = shape["num_hidden_layers"] * linears, VOCAB * shape["hidden_size"]
    best = min(statistics.median(times) for way, times in taken.items() if way.startswith("peft"))
    rows = []
    for way in steps:
        passes = 2 if way in ("kit, selective", "kit, keep") else 3
        floor = 2 * TOKENS * (passes * body + 2 * head) / rate
        median = statistics.median(taken[way])
        rows.append(
            {
                "benchmark": "step",
                "shape": name,
                "kind": kind,
                "tokens": TOKENS,
                "way": way,
                "cpu_s": round(median, 4),
                "range_s": [round(min(taken[way]), 4), round(max(taken[way]), 4)],
                "times_as_fast": round(best / median, 3),
                "of_floor": round(median / floor, 3),
                "extra_mib": round(extra_in_own_process(folder, kind, way) / MIB, 1),
                "gflops_a_second": round(rate / 1e9, 1),
                "machine": MACHINE,
            }
        )
    return rows


def replace_rows(name: str, kind: str, rows: list[dict[str, Any]]) -> None:
    """Put the rows of one shape in the place of those of the same kind of processor."""
    lines = RESULTS.read_text(encoding="utf-8").splitlines() if RESULTS.exists() else []
    same = (name, kind, MACHINE)
    others = [row for row in map(json.loads, lines) if (row["shape"], row["kind"], row["machine"]) != same]
    RESULTS.write_text("".join(json.dumps(row) + "\n" for row in [*others, *rows]), encoding="utf-8")


def main() -> None:
    """Measure the shapes that are asked for, or all."""
    torch.set_num_threads(1)
    disable_progress_bar()
    warnings.simplefilter("ignore")
    if sys.argv[1:2] == [EXTRA]:
        folder, kind, way = sys.argv[2:]
        print(extra_bytes(ways(Path(folder), kind)[way]()))
        return
    asked = sys.argv[1:] or ["134m", "7b-layers", "1.1b"]
    for name in asked:
        for kind in ("nf4", "int8") if name == "1.1b" else ("nf4",):
            with tempfile.TemporaryDirectory() as folder:
                make_checkpoint(SHAPES[name], Path(folder))
                rows = compare(name, kind, Path(folder))
            replace_rows(name, kind, rows)
            for row in rows:
                time_s = f"{row['cpu_s']:8.3f} s {row['range_s']}  x{row['times_as_fast']:.2f}"
                print(f"{name:9} {kind:4} {row['way']:16} {time_s}  {row['of_floor']:.2f} of the floor", flush=True)


if __name__ == "__main__":
    main()
