"""Merging an adapter and writing a plain checkpoint beside PEFT: time, memory, and whether the weights are right.

    python benchmarks/merge.py [SHAPE ...]      shapes: 1.1b 134m; rows of benchmarks/results/merge.jsonl

One thread, a Llama with random weights in bf16, an adapter of rank 16 on all linears whose B is not zero, the base in
NF4 with double quantisation. PEFT comes in two ways: `merge_and_unload` on the 4-bit model, `dequantize` and
`save_pretrained`, which is how a plain checkpoint is had from what was trained; and merged into the 16-bit base, read
again, and saved.

Each way has processes of its own. CPU seconds are the process's from the loaded model to the written folder, medians
and ranges of three; the kit's hold checksums and flushing to the disk, PEFT's neither. Loading is stated beside, and
what the checksums take. Memory is what one more process holds at most above what it held before the merge, sampled
every 2 ms: anonymous pages, and pages of mapped files apart. `off_by` is how far the written weights of three layers
are from decode(Wq) + scale B A, computed in fp64 from the stored codes: the norm of the difference over the norm, and
the most that one weight is off by over its size, which rounding once to bf16 makes up to 2^-8.
"""

import ctypes
import gc
import json
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb
import torch
from peft import LoraConfig, PeftModel
from safetensors import safe_open
from safetensors.torch import save_file
from step import MACHINE, SHAPES, VOCAB, make_checkpoint
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from transformers.utils.logging import disable_progress_bar

from qlora_kit.base import load_base
from qlora_kit.base.dense import QuantizedLinear
from qlora_kit.base.files import weight_files
from qlora_kit.base.formats import Quantization
from qlora_kit.data import Encoded, collate
from qlora_kit.export import export_merged
from qlora_kit.lora import load_adapter
from qlora_kit.memory.counter import PeakCounter
from qlora_kit.storage import sha256_file
from qlora_kit.units import MIB

RESULTS = Path(__file__).parent / "results" / "merge.jsonl"
ROUNDS = 3
ONE = "--one"
RANK, ALPHA = 16, 32
AUDIT_ROWS, AUDIT_TOKENS = 4, 256
WAYS = ("peft, 4-bit", "peft, 16-bit base", "kit", "kit, audited")
Merge = Callable[[], object]


def linears(shape: dict[str, int]) -> dict[str, tuple[int, int]]:
    """(out, in) of all linear layers of a body, by name."""
    width, inner = shape["hidden_size"], shape["intermediate_size"]
    kinds = {f"self_attn.{leaf}_proj": (width, width) for leaf in "qkvo"}
    kinds |= {"mlp.gate_proj": (inner, width), "mlp.up_proj": (inner, width), "mlp.down_proj": (width, inner)}
    return {
        f"model.layers.{layer}.{name}": size
        for layer in range(shape["num_hidden_layers"])
        for name, size in kinds.items()
    }


def make_adapter(shape: dict[str, int], folder: Path) -> None:
    """PEFT's two files; the update is about a tenth as large as the weights, which are 0.02."""
    torch.manual_seed(1)
    tensors = {}
    for name, (out, width) in linears(shape).items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = torch.randn(RANK, width) / width**0.5
        tensors[f"base_model.model.{name}.lora_B.weight"] = torch.randn(out, RANK) * 0.01
    save_file(tensors, folder / "adapter_model.safetensors")
    targets = sorted({name.rpartition(".")[2] for name in linears(shape)})
    LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=targets, task_type="CAUSAL_LM").save_pretrained(folder)


def kit(base: Path, adapter: Path, out: Path, *, is_audited: bool) -> Merge:
    """As `qlora-kit export` merges."""
    model = load_base(base, quantization="nf4", compute_dtype="bfloat16", device="cpu")
    load_adapter(model, adapter)
    torch.manual_seed(2)
    rows = [
        Encoded(torch.randint(3, VOCAB, (AUDIT_TOKENS,)).tolist(), [True] * AUDIT_TOKENS) for _ in range(AUDIT_ROWS)
    ]
    batches = [collate([row], pad_id=0) for row in rows] if is_audited else None
    return lambda: export_merged(model, None, out, audit_batches=batches)


def peer(base: Path, adapter: Path, out: Path, *, is_4bit: bool) -> Merge:
    """PEFT on what was trained, or on the base as it was before it was quantised."""
    four = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    loaded = AutoModelForCausalLM.from_pretrained(
        base, dtype=torch.bfloat16, quantization_config=four if is_4bit else None
    )
    model = PeftModel.from_pretrained(loaded, adapter)

    def merge() -> None:
        merged = model.merge_and_unload()
        (merged.dequantize() if is_4bit else merged).save_pretrained(out)

    return merge


def load(way: str, base: Path, adapter: Path, out: Path) -> Merge:
    """A way with its model loaded."""
    if way.startswith("kit"):
        return kit(base, adapter, out, is_audited=way == "kit, audited")
    return peer(base, adapter, out, is_4bit=way == "peft, 4-bit")


def measure(way: str, what: str, base: Path, adapter: Path, out: Path) -> dict[str, float]:
    """What one process says of one way: how long it takes, or what memory."""
    begun = time.process_time()
    merge = load(way, base, adapter, out)
    load_s = time.process_time() - begun
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    if what == "memory":
        with PeakCounter(torch.device("cpu"), interval_s=0.002) as counter:
            counter.sample()
            files = counter.file_backed_bytes
            merge()
        return {"extra_bytes": counter.taken_bytes, "file_bytes": counter.file_backed_bytes - files}
    begun = time.process_time()
    merge()
    merged_s = time.process_time() - begun
    begun = time.process_time()
    for path in out.iterdir():
        sha256_file(path)
    return {"cpu_s": merged_s, "load_s": load_s, "checksums_s": time.process_time() - begun}


def in_own_process(way: str, what: str, base: Path, adapter: Path, out: Path) -> dict[str, float]:
    """`measure` where no other way has been."""
    command = [sys.executable, __file__, ONE, way, what, str(base), str(adapter), str(out)]
    said = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(said.splitlines()[-1])


def formula(base: Path, adapter: Path, name: str) -> Tensor:
    """decode(Wq) + scale B A of one layer, (out, in), fp64, its codes read without the kit's decoder."""
    layer = QuantizedLinear(tensor_of(base, f"{name}.weight"), None, Quantization())
    blocks = bnb.create_dynamic_map().double()[layer.absmax.int()].view(-1)
    blocks = blocks * layer.absmax_scale.double().repeat_interleave(256)[: len(blocks)] + layer.absmax_offset.double()
    values = bnb.get_4bit_type("nf4", device="cpu").double()
    halves = torch.stack((layer.codes >> 4, layer.codes & 15), dim=1).view(-1).int()
    weight = (values[halves] * blocks.repeat_interleave(64)).view(layer.out_features, layer.in_features)
    with safe_open(adapter / "adapter_model.safetensors", framework="pt") as file:
        a, b = (file.get_tensor(f"base_model.model.{name}.lora_{leaf}.weight").double() for leaf in "AB")
    return weight.addmm_(b, a, alpha=ALPHA / RANK)


def tensor_of(folder: Path, name: str) -> Tensor:
    """One tensor of a checkpoint."""
    for path in weight_files(folder):
        with safe_open(path, framework="pt") as file:
            if name in file.keys():  # noqa: SIM118
                return file.get_tensor(name)
    raise KeyError(name)


def off_by(shape: dict[str, int], base: Path, adapter: Path, out: Path) -> dict[str, float]:
    """How far the written weights of the first, middle and last layer are from the formula."""
    depth = shape["num_hidden_layers"]
    picked = (0, "self_attn.q_proj"), (depth // 2, "mlp.down_proj"), (depth - 1, "mlp.up_proj")
    norms, single = [], []
    for layer, leaf in picked:
        name = f"model.layers.{layer}.{leaf}"
        exact = formula(base, adapter, name)
        difference = tensor_of(out, f"{name}.weight").double() - exact
        norms.append((difference.norm() / exact.norm()).item())
        # Below a thousandth of the weights' size fp32's own noise is larger than the rounding to bf16.
        single.append((difference.abs() / exact.abs().clamp(min=2e-5)).max().item())
    return {"norm": round(max(norms), 6), "single": round(max(single), 6)}


def row(name: str, way: str, base: Path, adapter: Path) -> dict[str, Any]:
    """All measurements of one way."""
    timed = []
    for what in ["time"] * ROUNDS + ["memory"]:
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "merged"
            timed.append(in_own_process(way, what, base, adapter, out))
            written = sum(path.stat().st_size for path in out.iterdir())
            off = off_by(SHAPES[name], base, adapter, out) if what == "memory" else {}
    *timed, held = timed
    taken = [each["cpu_s"] for each in timed]
    return {
        "benchmark": "merge",
        "shape": name,
        "way": way,
        "cpu_s": round(statistics.median(taken), 2),
        "range_s": [round(min(taken), 2), round(max(taken), 2)],
        "checksums_s": round(statistics.median(each["checksums_s"] for each in timed), 2),
        "load_s": round(statistics.median(each["load_s"] for each in timed), 1),
        "extra_mib": round(held["extra_bytes"] / MIB, 1),
        "file_backed_extra_mib": round(held["file_bytes"] / MIB, 1),
        "written_bytes": written,
        "off_by": off,
        "machine": MACHINE,
    }


def compare(name: str) -> list[dict[str, Any]]:
    """All ways at one shape, each beside PEFT's on the 4-bit model."""
    with tempfile.TemporaryDirectory() as folder:
        base, adapter = Path(folder) / "base", Path(folder) / "adapter"
        make_checkpoint(SHAPES[name], base)
        adapter.mkdir()
        make_adapter(SHAPES[name], adapter)
        rows = [row(name, way, base, adapter) for way in WAYS]
    for each in rows:
        each["times_as_fast"] = round(rows[0]["cpu_s"] / each["cpu_s"], 2)
        each["times_less_memory"] = round(rows[0]["extra_mib"] / each["extra_mib"], 1)
    return rows


def replace_rows(name: str, rows: list[dict[str, Any]]) -> None:
    """Put the rows of one shape in the place of those that were there."""
    lines = RESULTS.read_text(encoding="utf-8").splitlines() if RESULTS.exists() else []
    others = [each for each in map(json.loads, lines) if each["shape"] != name]
    RESULTS.write_text("".join(json.dumps(each) + "\n" for each in [*others, *rows]), encoding="utf-8")


def main() -> None:
    """Measure the shapes that are asked for, or all."""
    torch.set_num_threads(1)
    disable_progress_bar()
    warnings.simplefilter("ignore")
    if sys.argv[1:2] == [ONE]:
        way, what, *folders = sys.argv[2:]
        print(json.dumps(measure(way, what, *map(Path, folders))))
        return
    for name in sys.argv[1:] or ["134m", "1.1b"]:
        rows = compare(name)
        replace_rows(name, rows)
        for each in rows:
            memory = f"{each['extra_mib']:8.1f} MiB (x{each['times_less_memory']:.1f} less)"
            print(
                f"{name:5} {each['way']:18} {each['cpu_s']:7.2f} s  x{each['times_as_fast']:.2f}  {memory}", flush=True
            )


if __name__ == "__main__":
    main()
