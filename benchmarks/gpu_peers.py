"""One step of a peer on the checkpoint of `gpu.py`, in a process of its own: a row of JSON for each number of rows.

    python benchmarks/gpu_peers.py PEER FOLDER DEVICE TOKENS STEPS ROWS [ROWS ...]

Peers: "peft, documented" (`prepare_model_for_kbit_training`, fp32 adapters, autocast), "peft, bf16" (all in bf16) and
"unsloth". Rank 16 on all linears, gradient checkpointing, random tokens that are all trained, 8-bit Adam.
"""

import json
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
Loss = Callable[[Any], Any]


def peft_model(folder: str, device: str, *, is_documented: bool) -> tuple[Any, Loss]:
    """PEFT on transformers and bitsandbytes."""
    import torch
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, device_map={"": device})
    how = {"use_reentrant": False}
    if is_documented:
        model = prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs=how)
    else:
        model.requires_grad_(False)
        model.gradient_checkpointing_enable(how)
    config = LoraConfig(r=16, lora_alpha=32, lora_dropout=0.0, target_modules=TARGETS, task_type="CAUSAL_LM")
    model = get_peft_model(model, config, autocast_adapter_dtype=is_documented).train()
    if not is_documented:
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data = parameter.data.to(torch.bfloat16)
        model.enable_input_require_grads()

    def loss(ids: Any) -> Any:
        with torch.autocast(device.split(":")[0], torch.bfloat16) if is_documented else nullcontext():
            return model(input_ids=ids, labels=ids, use_cache=False).loss

    return model, loss


def unsloth_model(folder: str, tokens: int) -> tuple[Any, Loss]:
    """Unsloth, which must be imported before what it patches."""
    from unsloth import FastLanguageModel

    model, _ = FastLanguageModel.from_pretrained(
        folder, max_seq_length=tokens, load_in_4bit=True, local_files_only=True
    )
    model = FastLanguageModel.get_peft_model(
        model, r=16, lora_alpha=32, lora_dropout=0, bias="none", target_modules=TARGETS,
        use_gradient_checkpointing="unsloth",
    )  # fmt: skip
    FastLanguageModel.for_training(model)
    return model, lambda ids: model(input_ids=ids, labels=ids).loss


def measure(model: Any, loss: Loss, device: str, shape: tuple[int, int], steps: int) -> dict[str, Any]:
    """Time and memory of steps at one number of rows, the first two not counted."""
    import bitsandbytes as bnb
    import torch

    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = bnb.optim.AdamW8bit(trained, lr=1e-4)
    is_cuda, taken = device != "cpu", []
    ids = torch.randint(3, model.config.vocab_size, shape).to(device)
    for turn in range(steps + 2):
        if is_cuda and turn == 2:
            torch.cuda.reset_peak_memory_stats()
        begun = time.perf_counter()
        value = loss(ids)
        value.backward()
        torch.nn.utils.clip_grad_norm_(trained, 0.3)
        optimizer.step()
        optimizer.zero_grad()
        last = value.item()  # which waits for the device
        if is_cuda:
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - begun)
    return {
        "rows": shape[0],
        "tokens": shape[1],
        "tokens_per_s": round(ids.numel() / statistics.median(taken[2:]), 1),
        "range_s": [round(min(taken[2:]), 4), round(max(taken[2:]), 4)],
        "peak_bytes": torch.cuda.max_memory_allocated() if is_cuda else None,
        "loss": round(last, 4),
    }


def main() -> None:
    """Measure the peer that is asked for."""
    name, folder, device, tokens, steps, *rows = sys.argv[1:]
    if name == "unsloth":
        model, loss = unsloth_model(folder, int(tokens))
    else:
        model, loss = peft_model(folder, device, is_documented=name == "peft, documented")
    for count in map(int, rows):
        print(json.dumps(measure(model, loss, device, (count, int(tokens)), int(steps))), flush=True)


if __name__ == "__main__":
    main()
