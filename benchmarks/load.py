"""Loading a base in 4 bits beside transformers on bitsandbytes: time and memory, on a CPU, from the same checkpoint.

    python benchmarks/load.py [quantiser | MODEL ...]      rows of benchmarks/results/load.jsonl

One thread, process CPU time, medians and ranges. The quantisers take turns in one process; a model is loaded in a
process of its own, after all imports and from files that the system has in its cache. Memory is what a process holds
at most above what it held before it loaded, sampled every 2 ms in a run that is not timed: anonymous pages, those of
mapped files, and both together by the kernel's own high-water mark. It is compared with what the loaded model's
parameters and buffers take, and with the checkpoint's largest tensor. The experts of a mixture stay dense there, and
are quantised here.
"""

import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, MixtralConfig, PretrainedConfig
from transformers.utils.logging import disable_progress_bar

from qlora_kit.base import load_base, quantizer
from qlora_kit.memory.counter import PeakCounter
from qlora_kit.units import MIB

RESULTS = Path(__file__).parent / "results" / "load.jsonl"
ROUNDS, LOADS = 9, 3
ALONE = "--alone"
MATRICES = [(2048, 2048), (5632, 2048), (4096, 4096)]
MODELS: dict[str, PretrainedConfig] = {
    "134m": LlamaConfig(
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=12,
        num_attention_heads=12,
        num_key_value_heads=12,
        vocab_size=32_000,
    ),
    "1.1b": LlamaConfig(
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=22,
        num_attention_heads=32,
        num_key_value_heads=4,
        vocab_size=32_000,
    ),
    "8 experts, 8 layers": MixtralConfig(
        hidden_size=1024,
        intermediate_size=3584,
        num_hidden_layers=8,
        num_attention_heads=16,
        num_key_value_heads=4,
        num_local_experts=8,
        vocab_size=32_000,
    ),
}
MACHINE = f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}, torch {torch.__version__}, 1 thread"


def make_checkpoint(config: PretrainedConfig, folder: Path) -> int:
    """Random weights in bf16, a shard a layer, experts one by one; gives the bytes of the largest tensor."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)
    pool = torch.randn(2**24, generator=torch.Generator().manual_seed(0)).mul_(0.02).bfloat16()
    shards: dict[str, dict[str, torch.Size]] = {}
    for name, parameter in model.named_parameters():
        shard = name.split(".")[2] if ".layers." in name else "ends"
        shards.setdefault(f"model-{shard}.safetensors", {}).update(_as_stored(name, parameter.shape))
    for file, shapes in shards.items():
        tensors = {name: pool.repeat(-(-shape.numel() // len(pool)))[: shape.numel()] for name, shape in shapes.items()}
        save_file(
            {name: tensors[name].view(shape).clone() for name, shape in shapes.items()},
            folder / file,
            {"format": "pt"},
        )
    index = {"metadata": {}, "weight_map": {name: file for file, shapes in shards.items() for name in shapes}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return 2 * max(shape.numel() for shapes in shards.values() for shape in shapes.values())


def _as_stored(name: str, shape: torch.Size) -> Iterator[tuple[str, torch.Size]]:
    """A parameter by its names and shapes in Mixtral's checkpoints, which hold no stacks of experts."""
    prefix, stack, leaf = name.partition(".mlp.experts.")
    if not stack:
        yield name.replace(".mlp.gate.", ".block_sparse_moe.gate."), shape
        return
    for expert in range(shape[0]):
        for part in ("w1", "w3") if leaf == "gate_up_proj" else ("w2",):
            rows = shape[1] // 2 if leaf == "gate_up_proj" else shape[1]
            yield f"{prefix}.block_sparse_moe.experts.{expert}.{part}.weight", torch.Size((rows, shape[2]))


def kit(folder: Path) -> torch.nn.Module:
    """The kit's own loader."""
    return load_base(folder, compute_dtype="bfloat16", device="cpu")


def peer(folder: Path) -> torch.nn.Module:
    """Transformers on bitsandbytes."""
    how = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=how, dtype=torch.bfloat16)


def kit_from_copy(folder: Path) -> torch.nn.Module:
    """The kit's own loader, where an earlier load has kept the codes; they lie beside the checkpoint."""
    os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
    return load_base(folder, compute_dtype="bfloat16", device="cpu", cache=True)


WAYS: dict[str, Callable[[Path], torch.nn.Module]] = {
    "transformers on bitsandbytes": peer,
    "kit": kit,
    "kit, from its copy": kit_from_copy,
}


def seconds(act: Callable[[], object]) -> float:
    """CPU seconds that it takes."""
    begun = time.process_time()
    act()
    return time.process_time() - begun


def high_water_bytes() -> int:
    """The most that this process has had resident since `/proc/self/clear_refs` was written to."""
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]) * 1024


def load_alone(way: str, folder: Path, measured: str) -> dict[str, float]:
    """One load, in this process: its time, or its memory."""
    gc.collect()
    if measured == "time":
        begun = time.perf_counter()
        return {"cpu_s": seconds(lambda: WAYS[way](folder)), "wall_s": time.perf_counter() - begun}
    Path("/proc/self/clear_refs").write_text("5")
    before, counter = high_water_bytes(), PeakCounter(torch.device("cpu"), interval_s=0.002)
    counter.sample()
    files_before = counter.file_backed_bytes
    with counter:
        model = WAYS[way](folder)
    tensors = {t.data_ptr(): t.nbytes for t in [*model.parameters(), *model.buffers()]}
    return {
        "extra_mib": (high_water_bytes() - before) / MIB,
        "extra_anonymous_mib": counter.taken_bytes / MIB,
        "extra_file_mib": (counter.file_backed_bytes - files_before) / MIB,
        "model_mib": sum(tensors.values()) / MIB,
    }


def in_own_process(way: str, folder: Path, measured: str) -> dict[str, float]:
    """`load_alone` where nothing has been loaded before."""
    command = [sys.executable, __file__, ALONE, way, str(folder), measured]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def compare_loads(name: str) -> Iterator[dict[str, Any]]:
    """Rows of one model."""
    with tempfile.TemporaryDirectory() as where:
        largest = make_checkpoint(MODELS[name], Path(where))
        in_own_process("kit, from its copy", Path(where), "time")  # makes it
        taken: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
        for _ in range(LOADS):
            for way in WAYS:
                taken[way].append(in_own_process(way, Path(where), "time"))
        slowest = statistics.median(each["cpu_s"] for each in taken["transformers on bitsandbytes"])
        for way, runs in taken.items():
            times = [each["cpu_s"] for each in runs]
            memory = in_own_process(way, Path(where), "memory")
            median = statistics.median(times)
            yield {
                "benchmark": "load",
                "model": name,
                "kind": "nf4",
                "way": way,
                "cpu_s": round(median, 3),
                "range_s": [round(min(times), 3), round(max(times), 3)],
                "wall_s": round(statistics.median(each["wall_s"] for each in runs), 3),
                "times_as_fast": round(slowest / median, 2),
                **{key: round(value, 1) for key, value in memory.items()},
                "largest_tensor_mib": round(largest / MIB, 1),
                "machine": MACHINE,
            }


def quantisers(w_N: torch.Tensor, kind: str) -> dict[str, Callable[[], object]]:
    """All ways to make 4-bit codes."""
    compiled = quantizer.c_functions()
    ways: dict[str, Callable[[], object]] = {
        "bitsandbytes": partial(torch.ops.bitsandbytes.quantize_4bit.default, w_N, 64, kind, torch.uint8),
        "plain torch": partial(quantizer.quantize_4bit_plain, w_N, 64, kind),
    }
    return ways if compiled is None else ways | {"compiled": partial(compiled.quantize_4bit, w_N, 64, kind)}


def int8_quantisers(w_OI: torch.Tensor) -> dict[str, Callable[[], object]]:
    """All ways to make int8 codes."""
    half, compiled = w_OI.half(), quantizer.c_functions()
    ways: dict[str, Callable[[], object]] = {
        "bitsandbytes": partial(torch.ops.bitsandbytes.int8_vectorwise_quant.default, half, 0.0),
        "plain torch": partial(quantizer.quantize_int8_plain, half),
    }
    return ways if compiled is None else ways | {"compiled": partial(compiled.quantize_int8, half)}


def compare_quantisers() -> Iterator[dict[str, Any]]:
    """Rows of all matrices and formats."""
    for shape in MATRICES:
        w_OI = torch.randn(shape, generator=torch.Generator().manual_seed(0)).bfloat16()
        for kind in ("nf4", "fp4", "int8"):
            ways = int8_quantisers(w_OI) if kind == "int8" else quantisers(w_OI.view(-1), kind)
            taken: dict[str, list[float]] = {way: [] for way in ways}
            for turn in range(ROUNDS + 1):
                for way, act in ways.items():
                    took = seconds(act)
                    if turn:
                        taken[way].append(1000 * took)
            slowest = statistics.median(taken["bitsandbytes"])
            for way, times in taken.items():
                median = statistics.median(times)
                yield {
                    "benchmark": "quantiser",
                    "model": "x".join(map(str, shape)),
                    "kind": kind,
                    "way": way,
                    "cpu_ms": round(median, 2),
                    "range_ms": [round(min(times), 2), round(max(times), 2)],
                    "times_as_fast": round(slowest / median, 2),
                    "machine": MACHINE,
                }


def replace_rows(rows: list[dict[str, Any]]) -> None:
    """Put rows in the place of those of the same models."""
    lines = RESULTS.read_text(encoding="utf-8").splitlines() if RESULTS.exists() else []
    new = {(row["benchmark"], row["model"]) for row in rows}
    others = [row for row in map(json.loads, lines) if (row["benchmark"], row["model"]) not in new]
    RESULTS.write_text("".join(json.dumps(row) + "\n" for row in [*others, *rows]), encoding="utf-8")


def main() -> None:
    """Measure what is asked for, or all."""
    torch.set_num_threads(1)
    disable_progress_bar()
    warnings.simplefilter("ignore")
    if sys.argv[1:2] == [ALONE]:
        way, folder, measured = sys.argv[2:]
        print(json.dumps(load_alone(way, Path(folder), measured)))
        return
    asked = sys.argv[1:] or ["quantiser", *MODELS]
    for name in asked:
        rows = []
        for row in compare_quantisers() if name == "quantiser" else compare_loads(name):
            print(json.dumps(row), flush=True)
            rows.append(row)
        replace_rows(rows)


if __name__ == "__main__":
    main()
