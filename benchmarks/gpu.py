"""What the kit takes and does on a CUDA device, within eight minutes; each row is written as soon as it is measured.

    python benchmarks/gpu.py [PHASE ...] [--minutes 8] [--folder DIR]    rows of benchmarks/results/gpu.jsonl
    python benchmarks/gpu.py --dry                                       every phase at a tiny shape on the CPU; no file

The shape is Llama-3.1-8B's, NF4 with double quantisation, rank 16 on all linears, 8-bit Adam without masters, random
weights, which are quantised one by one on the device into a checkpoint that all programs load (5.6 GiB in --folder,
which is kept where it is given, for another call). Phases, in this order:

    memory     most bytes allocated in a step of 1 x 2,048, blocks recomputed, beside the plan and its floor
    speed      tokens a second at 4 x 2,048, blocks recomputed, their inputs on the device or offloaded, and as
               `memory.activations: auto` has it, beside what products, decoding and elementwise passes need at the
               rates measured here (`speed_floor`)
    kernels    each Triton kernel beside its twin in plain torch
    gradients  in bf16, against fp32 on the same codes: with kernels and without, and with sums of split products in
               fp32, where cuBLAS may take them in bf16
    peers      PEFT on bitsandbytes in two forms, and Unsloth where it is installed, each in a process of its own
    packing    tokens a second on rows of mixed lengths, a sequence each and packed, by attention
    lengths    the longest row that fits 8, 12, 16 and 24 GiB less the driver's context, by the allocator's own limit
    paged      paged optimizer state with the device filled up: the same losses as with room
    runs       `qlora-kit` under budgets of 8 and 12 GiB: train, kill, resume, generate, merge

Medians and ranges. A phase that fails leaves a row that says why; one that would not end in time is not begun, and can
be asked for in another call on the same --folder. Until a device is had, gpu.jsonl says of every phase that it is not
measured; its first row takes the place of that.
"""

import argparse
import contextlib
import importlib.metadata
import importlib.util
import json
import math
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import bitsandbytes
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig
from transformers.utils.logging import disable_progress_bar

from qlora_kit.base import load_base
from qlora_kit.base.architecture import read_config
from qlora_kit.base.attention import implementation
from qlora_kit.base.dense import QuantizedLinear, reader
from qlora_kit.base.formats import Quantization
from qlora_kit.base.freeze import freeze_and_quantize
from qlora_kit.data import Encoded, Room, arrange, collate_rows, side_by_side
from qlora_kit.errors import QloraKitError
from qlora_kit.lora import adapter_parameters, add_lora
from qlora_kit.memory import PeakCounter
from qlora_kit.ops import softmax_gradient, triton
from qlora_kit.ops.frozen import times
from qlora_kit.plan import plan_methods
from qlora_kit.plan.devices import matmul_rate
from qlora_kit.recipe import read_recipe
from qlora_kit.train.activations import Blocks, Policy, set_activation_policy
from qlora_kit.train.head import automatic_chunk
from qlora_kit.train.optim import AdapterOptimizer
from qlora_kit.train.pace import OVERHEAD_TOKENS, set_pace
from qlora_kit.train.step import accumulate_gradients
from qlora_kit.units import GIB

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "gpu.jsonl"
TOKENIZER = HERE.parent / "recipes" / "quickstart" / "base"
KIT = [sys.executable, "-c", "from qlora_kit.cli import main; main()"]
PEERS = ("peft, documented", "peft, bf16", "unsloth")
FAULTS = (RuntimeError, OSError, ValueError, TypeError, AttributeError, LookupError, ArithmeticError, AssertionError,
          ImportError, subprocess.SubprocessError, QloraKitError)  # fmt: skip
"""What a phase may fail with, so that the others still run."""
LLAMA_8B = json.loads((HERE / "models" / "llama-3.1-8b" / "config.json").read_text())
TINY = LLAMA_8B | {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
                   "num_key_value_heads": 2, "vocab_size": 512}  # fmt: skip
WITHOUT_KERNELS = mock.patch.object(triton, "serves", return_value=False)
Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Size:
    """How large everything is.

    Attributes:
        shape: of the model.
        run: of the model that the command line trains.
        tokens: of a row.
        rows: in a step of the phase `speed`, beside one row.
        steps: that are timed.
        caps_gib: of the phase `lengths`.
        run_steps: of a run, with an evaluation and a checkpoint ten times.
        most_tokens: of a row that is tried.
        elements: of the tensors that kernels are timed with.
    """

    shape: dict[str, Any] = field(default_factory=lambda: LLAMA_8B)
    run: dict[str, Any] = field(default_factory=lambda: LLAMA_8B | {"num_hidden_layers": 4, "vocab_size": 4096})
    tokens: int = 2048
    rows: int = 4
    steps: int = 6
    caps_gib: tuple[int, ...] = (8, 12, 16, 24)
    run_steps: int = 50
    most_tokens: int = 131_072
    elements: int = 2**26


DRY = Size(TINY, TINY | {"vocab_size": 4096}, tokens=16, rows=2, steps=1, caps_gib=(8,), run_steps=10, most_tokens=64,
           elements=2**10)  # fmt: skip


class Bench:
    """A device, the checkpoint, and the model that is loaded from it once for all phases."""

    def __init__(self, size: Size, device: torch.device, folder: Path) -> None:
        self.size, self.device, self.folder = size, device, folder
        self.is_cuda = device.type == "cuda"
        self.context_bytes = self._context_bytes()

    def _context_bytes(self) -> int:
        """What the driver took beside the allocator, and whatever else is on the device."""
        if not self.is_cuda:
            return 0
        torch.zeros(1, device=self.device)
        free, total = torch.cuda.mem_get_info(self.device)
        return total - free - torch.cuda.memory_reserved(self.device)

    @cached_property
    def checkpoint(self) -> Path:
        """The folder of the quantised model, written where it is not there."""
        path = self.folder / "base"
        if not path.exists():
            make_checkpoint(LlamaConfig(**self.size.shape), path, self.device)
        return path

    @cached_property
    def model(self) -> Any:
        """Loaded and adapted."""
        device = "cuda" if self.is_cuda else "cpu"
        model = load_base(self.checkpoint, compute_dtype="bfloat16", device=device)
        add_lora(model, rank=16)
        return model.train()

    def rows(self, count: int, tokens: int) -> SimpleNamespace:
        """A micro-batch of random tokens, all trained."""
        ids = torch.randint(3, self.size.shape["vocab_size"], (count, tokens)).to(self.device)
        return SimpleNamespace(input_ids=ids, labels=ids, position_ids=None, documents=None, attention_mask=None)

    def stepper(self, count: int, tokens: int, how: Policy | Blocks, **optimizer: Any) -> Callable[[], float]:
        """A step on one micro-batch."""
        return self.stepper_on([self.rows(count, tokens)], count * tokens, how, **optimizer)

    def stepper_on(self, rows: list[Any], count: int, how: Policy | Blocks, **optimizer: Any) -> Callable[[], float]:
        """A step as the kit's own loop takes it; it gives the loss, for which it waits."""
        set_activation_policy(self.model, how)
        parameters = list(adapter_parameters(self.model))
        settings = {"kind": "paged_adamw_8bit", "master_weights": "none"} | optimizer
        stepping, chunk = AdapterOptimizer(parameters, **settings), automatic_chunk(self.size.shape["vocab_size"])

        def step() -> float:
            loss = accumulate_gradients(self.model, rows, count, loss_chunk=chunk).value
            torch.nn.utils.clip_grad_norm_([parameter for _, parameter in parameters], 0.3)
            stepping.step(1e-4)
            self.wait()
            return loss.item()

        return step

    def wait(self) -> None:
        """Until all that was queued is done."""
        if self.is_cuda:
            torch.cuda.synchronize(self.device)

    def timed(self, step: Callable[[], object]) -> list[float]:
        """Seconds of the steps, after two that do not count."""
        taken = []
        for turn in range(self.size.steps + 2):
            begun = time.perf_counter()
            step()
            self.wait()
            if turn > 1:
                taken.append(time.perf_counter() - begun)
        return taken

    def peak(self, step: Callable[[], object]) -> int:
        """Most bytes in a step after one: allocated on a card; resident and anonymous on a CPU."""
        step()
        with PeakCounter(self.device) as counter:
            step()
            self.wait()
        return counter.peak_bytes

    def plan(self, count: int, activations: str, budget: int) -> Row:
        """The kit's plan of such a step."""
        settings = [f"base.model={self.checkpoint}", "data.train=/no/rows.jsonl", "base.compute_dtype=bfloat16",
                    "lora.rank=16", f"train.micro_batch={count}", "train.accumulation=1", "train.master_weights=none",
                    f"memory.activations={activations}", f"memory.budget={budget}B"]  # fmt: skip
        recipe, tokens = read_recipe("default", settings), self.size.tokens
        config = read_config(self.checkpoint)
        pace = set_pace(recipe.train, rows=count, longest=tokens, tokens=tokens, trained_tokens=tokens, config=config)
        del config.quantization_config  # it is planned as it is held
        return plan_methods(recipe, config, pace, tokens)

    def free_bytes(self) -> int:
        """What a step may still take beside the model; on a CPU a number that is enough."""
        if not self.is_cuda:
            return 16 * GIB
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(self.device)[0] + torch.cuda.memory_reserved(self.device) - GIB


# --- the phases -------------------------------------------------------------------------------------------------------


def memory(bench: Bench) -> Iterator[Row]:
    """A step's most bytes beside the plan's and the floor's."""
    plan = bench.plan(1, "recompute", bench.free_bytes())
    measured = bench.peak(bench.stepper(1, bench.size.tokens, "recompute"))
    planned, floor = plan["methods"]["qlora"]["peak_bytes"], plan["floor"]["bytes"] if plan["floor"] else None
    reserved = torch.cuda.max_memory_reserved(bench.device) if bench.is_cuda else None
    yield {
        "rows": 1,
        "tokens": bench.size.tokens,
        "activations": "recompute",
        "peak_bytes": measured,
        "reserved_bytes": reserved,
        "context_bytes": bench.context_bytes,
        "planned_bytes": planned,
        "floor_bytes": floor,
        "of_plan": round(measured / planned, 4),
        "of_floor": None if floor is None else round(measured / floor, 4),
    }


def speed(bench: Bench) -> Iterator[Row]:
    """Tokens a second, recomputed and as the kit would choose."""
    count, tokens = bench.size.rows, bench.size.tokens
    rates = matmul_rate(bench.device, torch.bfloat16), bytes_a_second(bench)
    plan, layers = bench.plan(count, "auto", bench.free_bytes()), bench.size.shape["num_hidden_layers"]
    settings = {
        "recompute": (count, Blocks(recompute=layers)),
        "offload": (count, Blocks(offload=layers)),
        "auto": (plan["micro_batch"], Blocks(**plan["blocks"])),
    }
    for asked, (rows, blocks) in settings.items():
        taken = bench.timed(bench.stepper(rows, tokens, blocks))
        rate = rows * tokens / statistics.median(taken)
        again = (blocks.recompute + blocks.offload) / max(1, blocks.all)
        floor = speed_floor(bench.size.shape, rows, tokens, again, *rates)
        yield {
            "rows": rows,
            "tokens": tokens,
            "activations": asked,
            "blocks": blocks.words,
            "tokens_per_s": round(rate, 1),
            "range_s": [round(min(taken), 4), round(max(taken), 4)],
            "floor_tokens_per_s": round(floor, 1),
            "of_floor": round(rate / floor, 4),
            "flops_a_second": rates[0],
            "bytes_a_second": rates[1],
        }


def packing(bench: Bench) -> Iterator[Row]:
    """Tokens of rows, padding aside, a second: mixes of which half are below an eighth, and below a thirty-second."""
    room, tokens = Room(bench.size.rows, bench.size.tokens, overhead=OVERHEAD_TOKENS["cuda"]), bench.size.tokens
    for share in (8, 32):
        draw = random.Random(share)
        lengths = [min(tokens, max(2, round(draw.lognormvariate(math.log(tokens / share), 0.9)))) for _ in range(16)]
        rows = [Encoded([draw.randrange(3, bench.size.shape["vocab_size"]) for _ in range(n)], [True] * n)
                for n in lengths]  # fmt: skip
        layouts = {"apart": side_by_side(lengths, room), "joined": arrange(lengths, 1, bench.size.rows * tokens)}
        joined = ((each, "joined") for each in ("sdpa", "eager", "flex", "flash"))
        for attention, layout in (("sdpa", "apart"), *joined):
            asked = implementation(attention, bench.device, torch.bfloat16)
            if asked is None and attention != "sdpa":
                print(f"packing    {attention} cannot be had", flush=True)
                continue
            bench.model.set_attn_implementation(asked or "sdpa")
            batches = [collate_rows([[rows[row] for row in pack] for pack in packs], 0).to(bench.device)
                       for packs in layouts[layout]]  # fmt: skip
            count = sum(batch.count for batch in batches)
            taken = bench.timed(bench.stepper_on(batches, count, "recompute"))
            yield {
                "attention": attention,
                "layout": layout,
                "half_below": tokens // share,
                "rows": len(rows),
                "passes": len(batches),
                "places": sum(batch.input_ids.numel() for batch in batches),
                "tokens_per_s": round(sum(lengths) / statistics.median(taken), 1),
                "range_s": [round(min(taken), 4), round(max(taken), 4)],
            }
    bench.model.set_attn_implementation("sdpa")


def kernels(bench: Bench) -> Iterator[Row]:
    """Each kernel beside its twin, on tensors of one shape."""
    width, vocabulary = bench.size.shape["hidden_size"], bench.size.shape["vocab_size"]
    draw = partial(torch.randn, device=bench.device, dtype=torch.bfloat16)
    x, grad = (draw(bench.size.elements // width, width) for _ in range(2))
    weight, inverse = draw(width), torch.ones(len(x), device=bench.device)
    logits = draw(max(8, bench.size.elements // vocabulary), vocabulary)
    labels = torch.randint(0, vocabulary, (len(logits),), device=bench.device)
    ops = torch.ops.qlora_kit
    layers = {
        "row_times_4bit": QuantizedLinear(draw(width, width), None, Quantization("nf4")),
        "row_times_int8": QuantizedLinear(draw(width, width), None, Quantization("int8")),
    }
    calls = {
        "rms_norm": lambda: ops.rms_norm(x, weight, 1e-6, "twice"),
        "rms_norm_backward": lambda: ops.rms_norm_backward(grad, x, weight, inverse, "twice"),
        "gated": lambda: ops.gated(x, grad, "silu"),
        "gated_backward": lambda: ops.gated_backward(grad, x, grad, "silu"),
        **{name: partial(times, x[:1], reader(layer), None, x.dtype) for name, layer in layers.items()},
        "softmax_gradient": lambda: softmax_gradient.loss_and_gradient(logits, labels, softmax_gradient.PLAIN, 1.0),
    }
    for name, call in calls.items():
        with WITHOUT_KERNELS:
            twin = milliseconds(bench, call)
        own = milliseconds(bench, call) if triton.serves(x.device) else None
        shape = list(logits.shape if name == "softmax_gradient" else (width, width) if name in layers else x.shape)
        row = {"kernel": name, "shape": shape, "twin_ms": told(twin), "kernel_ms": own and told(own)}
        yield row | {"times_as_fast": own and round(statistics.median(twin) / statistics.median(own), 2)}


def gradients(bench: Bench) -> Iterator[Row]:
    """Of adapters on the same codes: how far from fp32 they are, by their norms."""
    small = {"num_hidden_layers": 2, "hidden_size": min(1024, bench.size.shape["hidden_size"])}
    shape = bench.size.shape | small | {"intermediate_size": 2 * small["hidden_size"], "vocab_size": 512}
    ids = torch.randint(3, 512, (2, min(256, bench.size.tokens)), generator=torch.Generator().manual_seed(0))

    def gradient(dtype: torch.dtype, *, serves: bool, sums_in_16_bits: bool = True) -> Tensor:
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = sums_in_16_bits
        torch.manual_seed(0)
        dense = AutoModelForCausalLM.from_config(LlamaConfig(**shape), dtype=torch.bfloat16)
        model = freeze_and_quantize(dense, Quantization(), dtype, bench.device)
        add_lora(model, rank=16, dtype=torch.float32)
        for name, parameter in adapter_parameters(model):
            if name.endswith("b_OR"):
                parameter.data.normal_(std=0.02, generator=torch.Generator(bench.device).manual_seed(1))
        rows = SimpleNamespace(input_ids=ids.to(bench.device), labels=ids.to(bench.device), position_ids=None,
                               documents=None, attention_mask=None)  # fmt: skip
        with contextlib.nullcontext() if serves else WITHOUT_KERNELS:
            accumulate_gradients(model.train(), [rows], ids.numel(), loss_chunk=128)
        return torch.cat([parameter.grad.double().flatten() for _, parameter in adapter_parameters(model)])

    truth = gradient(torch.float32, serves=False)
    for serves, sums_in_16_bits in ((False, True), (True, True), (True, False)):
        if serves and not triton.serves(truth.device):
            continue
        found = gradient(torch.bfloat16, serves=serves, sums_in_16_bits=sums_in_16_bits)
        off = round(((found - truth).norm() / truth.norm()).item(), 6)
        yield {"computed_in": "bfloat16", "kernels": serves, "sums_in_16_bits": sums_in_16_bits, "off_by": off}
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = True


def peers(bench: Bench) -> Iterator[Row]:
    """Each in a process of its own, on the same checkpoint."""
    counts = [str(count) for count in (1, bench.size.rows)]
    how = [str(bench.checkpoint), str(bench.device), str(bench.size.tokens), str(bench.size.steps), *counts]
    for peer in PEERS:
        if importlib.util.find_spec(peer.split(",")[0]) is None:
            print(f"peers      {peer} is not installed", flush=True)
            continue
        command = [sys.executable, str(HERE / "gpu_peers.py"), peer, *how]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
            said, why = done.stdout, (done.stderr.strip().splitlines() or ["no word of it"])[-1]
        except subprocess.TimeoutExpired as error:
            said, why = (error.stdout or b"").decode(), "it took more than 120 s"
        rows = [json.loads(line) for line in said.splitlines() if line.startswith('{"rows"')]
        yield from ({"peer": peer, **row} for row in rows)
        if len(rows) < len(counts):
            yield {"peer": peer, "error": why}


def lengths(bench: Bench) -> Iterator[Row]:
    """The longest row under a limit of the allocator, from the line through two lengths and tries around it."""
    for how, caps in (("recompute", bench.size.caps_gib), ("offload", bench.size.caps_gib[:2])):
        few = bench.size.tokens
        low, high = (bench.peak(bench.stepper(1, tokens, how)) for tokens in (few, 2 * few))
        per_token = max(1.0, (high - low) / few)
        for cap in caps:
            allowed = cap * GIB - bench.context_bytes
            guess = min(bench.size.most_tokens, few + (allowed - low) / per_token)
            tried = {tokens: fits(bench, how, tokens, allowed) for tokens in around(int(guess))}
            fitting, failing = ([tokens for tokens, ok in tried.items() if ok is wanted] for wanted in (True, False))
            yield {
                "activations": how,
                "cap_gib": cap,
                "longest_that_fits": max(fitting, default=None),
                "shortest_that_does_not": min(failing, default=None),
                "on_the_line": int(guess),
                "bytes_a_token": round(per_token),
            }


def paged(bench: Bench) -> Iterator[Row]:
    """The same steps with room, and with the device filled up around what a step wants."""
    losses, rooms, seconds = [], [], []
    for is_full in (False, True):
        torch.manual_seed(0)
        for _, parameter in adapter_parameters(bench.model):
            parameter.data.normal_(std=0.01)
        step = bench.stepper(1, bench.size.tokens, "recompute", kind="paged_adamw_32bit")
        found = [step()]  # now the allocator holds all that a step wants
        ballast = fill(bench) if is_full else None
        begun = time.perf_counter()
        found += [step() for _ in range(bench.size.steps)]
        seconds.append(round((time.perf_counter() - begun) / bench.size.steps, 4))
        rooms.append(torch.cuda.mem_get_info(bench.device)[0] if bench.is_cuda else None)
        losses.append(found)
        del ballast, step
        if bench.is_cuda:
            torch.cuda.empty_cache()
    trained = sum(parameter.numel() for _, parameter in adapter_parameters(bench.model))
    yield {
        "optimizer": "paged_adamw_32bit",
        "state_bytes": 8 * trained,
        "free_bytes": rooms,
        "step_s": seconds,
        "same_losses": losses[0] == losses[1],
        "losses": losses[1],
    }


def runs(bench: Bench) -> Iterator[Row]:
    """The command line from end to end under a budget."""
    folder = bench.folder / "runs"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    base, data = folder / "base", folder / "rows.jsonl"
    with bench.device:
        dense = AutoModelForCausalLM.from_config(LlamaConfig(**bench.size.run), dtype=torch.bfloat16)
    dense.cpu().save_pretrained(base)
    del dense
    copy_tokenizer(base)
    text = "return value " * bench.size.tokens
    data.write_text("".join(json.dumps({"text": f"{number} {text}"}) + "\n" for number in range(100)))
    for cap in bench.size.caps_gib[:2]:
        yield run_row(bench, folder, base, data, cap)


def run_row(bench: Bench, folder: Path, base: Path, data: Path, cap: int) -> Row:
    """Train, kill after the second checkpoint, resume, generate, merge; every command must end well."""
    run, every = folder / f"{cap}gib", max(1, bench.size.run_steps // 10)
    settings = ["default", f"base.model={base}", f"data.train={data}", f"output={run}", f"memory.budget={cap}GiB",
                f"data.max_tokens={bench.size.tokens}", "data.over_length=truncate", "train.task=pretrain",
                f"train.steps={bench.size.run_steps}", f"train.eval_every={every}", f"train.save_every={every}",
                "train.micro_batch=1", "train.accumulation=2", f"base.device={bench.device.type}"]  # fmt: skip
    begun, process = time.perf_counter(), subprocess.Popen([*KIT, "train", *settings], stdout=subprocess.DEVNULL)
    second = run / "checkpoints" / f"step-{2 * every:06}"
    while process.poll() is None and not second.exists():
        time.sleep(0.01)
    assert process.poll() is None, f"train ended with {process.poll()} before its second checkpoint"
    process.send_signal(signal.SIGKILL)
    process.wait()
    killed = metrics_of(run)[-1]["step"]
    commands = {
        "resume": ["train", *settings, "--resume"],
        "generate": ["generate", str(run), "--prompt", "return", "--raw", "--max-new-tokens", "8"],
        "merge": ["export", str(run), "--to", "merged", "--out", str(run / "merged")],
    }
    seconds = {"train": round(time.perf_counter() - begun, 1)}
    for name, command in commands.items():
        begun = time.perf_counter()
        done = subprocess.run([*KIT, *command], capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, f"{name} ended with {done.returncode}: {done.stderr.strip()[-300:]}"
        seconds[name] = round(time.perf_counter() - begun, 1)
    steps = [row for row in metrics_of(run) if "loss" in row]
    assert [row["step"] for row in steps] == [*range(1, bench.size.run_steps + 1)]
    plan = json.loads((run / "plan.json").read_text())
    return {
        "budget_gib": cap,
        "activations": plan["activations"],
        "planned_bytes": plan["methods"]["qlora"]["peak_bytes"],
        "peak_bytes": max(row["peak_bytes"] for row in steps),
        "killed_at": killed,
        "steps": len(steps),
        "loss": [steps[0]["loss"], steps[-1]["loss"]],
        "seconds": seconds,
        "merged": json.loads((run / "merged" / "export.json").read_text())["comparisons"]["merged"],
    }


PHASES: dict[str, tuple[Callable[[Bench], Iterator[Row]], int]] = {
    "memory": (memory, 45), "speed": (speed, 45), "kernels": (kernels, 15), "gradients": (gradients, 15),
    "peers": (peers, 120), "packing": (packing, 40), "lengths": (lengths, 60), "paged": (paged, 20),
    "runs": (runs, 150),
}  # fmt: skip
"""Each with the seconds that must be left to begin it."""


# --- what they use ----------------------------------------------------------------------------------------------------


def make_checkpoint(config: LlamaConfig, path: Path, device: torch.device) -> None:
    """Random weights, each quantised on the device as soon as it is drawn, as bitsandbytes stores them."""
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in AutoModelForCausalLM.from_config(config).state_dict().items()}
    tensors, draw = {}, torch.Generator(device).manual_seed(0)
    for name, shape in shapes.items():
        w = torch.randn(shape, device=device, dtype=torch.bfloat16, generator=draw) * 0.02
        if name.endswith("_proj.weight"):
            codes, state = bitsandbytes.functional.quantize_4bit(w, compress_statistics=True, quant_type="nf4")
            tensors |= {f"{name}.{key}": value.cpu() for key, value in state.as_dict(packed=True).items()}
            tensors[name] = codes.cpu()
        else:
            tensors[name] = (w + 1 if w.ndim == 1 else w).cpu()
    path.mkdir(parents=True)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    config.quantization_config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    ).to_dict()  # fmt: skip
    config.save_pretrained(path)
    copy_tokenizer(path)


def copy_tokenizer(path: Path) -> None:
    """That of the quickstart: its tokens are few, and the model's rows more."""
    for file in TOKENIZER.glob("tokenizer*"):
        shutil.copy(file, path)


def speed_floor(
    shape: Row, rows: int, tokens: int, again: float, flops_a_second: float, bytes_a_second: float
) -> float:
    """Tokens a second if products, decoding and elementwise passes ran at full rate, one after the other.

    A token takes 4 FLOPs a weight, forward and back, and 2 more for the blocks that run again; causal attention
    2 S D a layer forward and 2.5 times that back. A pass reads every weight's 4.127 bits and writes 16, and moves 25
    hidden vectors of 16 bits a layer and token.
    """
    hidden, layers = shape["hidden_size"], shape["num_hidden_layers"]
    key = hidden // shape["num_attention_heads"] * shape["num_key_value_heads"]
    linears = layers * hidden * (2 * hidden + 2 * key + 3 * shape["intermediate_size"])
    passes, attention = 2 + again, 2 * tokens * hidden * layers
    flops = 2 * passes * linears + 4 * shape["vocab_size"] * hidden + attention * (3.5 + again)
    moved = passes * (linears * (4.127 / 8 + 2) + 25 * 2 * hidden * layers * rows * tokens)
    return rows * tokens / (rows * tokens * flops / flops_a_second + moved / bytes_a_second)


def bytes_a_second(bench: Bench) -> float:
    """Of a copy on the device, read and written."""
    x = torch.zeros(4 * bench.size.elements, dtype=torch.bfloat16, device=bench.device)
    y = torch.empty_like(x)
    return 2 * x.nbytes / (statistics.median(milliseconds(bench, lambda: y.copy_(x))) / 1e3)


def milliseconds(bench: Bench, call: Callable[[], object], rounds: int = 20) -> list[float]:
    """Of each of some calls, by the device's own events; the first five do not count."""
    taken = []
    for turn in range(rounds + 5):
        if bench.is_cuda:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            call()
            end.record()
            end.synchronize()
            took = begin.elapsed_time(end)
        else:
            begun = time.perf_counter()
            call()
            took = 1e3 * (time.perf_counter() - begun)
        if turn >= 5:
            taken.append(took)
    return taken


def told(taken: list[float]) -> Row:
    """Median and range."""
    return {"median": round(statistics.median(taken), 4), "range": [round(min(taken), 4), round(max(taken), 4)]}


def around(guess: int) -> list[int]:
    """Lengths to try, multiples of 16."""
    return sorted({max(16, int(guess * share) // 16 * 16) for share in (0.95, 1.03)})


def fits(bench: Bench, how: Policy, tokens: int, allowed: int) -> bool:
    """Whether a step gets by with so many bytes; on a CPU, where nothing is held to them, it does."""
    if not bench.is_cuda:
        bench.stepper(1, tokens, how)()
        return True
    total = torch.cuda.mem_get_info(bench.device)[1]
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(allowed / total, bench.device)
    try:
        bench.stepper(1, tokens, how)()
        return True
    except torch.OutOfMemoryError:
        return False
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, bench.device)
        for _, parameter in adapter_parameters(bench.model):
            parameter.grad = None


def fill(bench: Bench) -> Tensor | None:
    """Take all that is free, and what the driver makes free by moving paged memory to the host."""
    if not bench.is_cuda:
        return None
    state = 8 * sum(parameter.numel() for _, parameter in adapter_parameters(bench.model))
    free = torch.cuda.mem_get_info(bench.device)[0]
    for wanted in (free + state // 2, free - 2**26):
        with contextlib.suppress(torch.OutOfMemoryError):
            return torch.empty(wanted, dtype=torch.uint8, device=bench.device)
    raise RuntimeError("the device could not be filled")


def metrics_of(run: Path) -> list[Row]:
    """The whole lines of a run's metrics."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines() if line.endswith("}")]


def environment(device: torch.device) -> Row:
    """What the rows were measured with."""
    packages = ("torch", "triton", "bitsandbytes", "transformers")
    versions = {name: importlib.metadata.version(name) for name in packages if importlib.util.find_spec(name)}
    is_cuda = device.type == "cuda"
    card = {"name": torch.cuda.get_device_name(device), "cuda": torch.version.cuda} if is_cuda else {"name": "cpu"}
    return {**card, "day": time.strftime("%Y-%m-%d"), **versions}


def keep(phase: str, line: str) -> None:
    """Write a row behind the others, in place of that which says of its phase that it is not measured."""
    lines = RESULTS.read_text(encoding="utf-8").splitlines() if RESULTS.exists() else []
    kept = [each for each in lines if each != not_measured(phase)]
    RESULTS.write_text("".join(f"{each}\n" for each in [*kept, line]), encoding="utf-8")


def not_measured(phase: str) -> str:
    """What stands for a phase until a device is had."""
    return json.dumps({"benchmark": "gpu", "phase": phase, "says": "not measured"})


def measure(bench: Bench, asked: list[str], minutes: float, write: Callable[[Row], None]) -> None:
    """The phases that are asked for, as far as the time goes."""
    begun = time.monotonic()
    for name in asked:
        phase, least_s = PHASES[name]
        left_s = 60 * minutes - (time.monotonic() - begun)
        if left_s < least_s:
            print(f"{name:10} not begun: {left_s:.0f} s are left, and it may take {least_s}", flush=True)
            continue
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # what the phase before left would be missing to other processes
        try:
            for row in phase(bench):
                write({"phase": name, **row})
        except FAULTS as error:
            write({"phase": name, "error": f"{type(error).__name__}: {str(error).strip()[:300]}"})
        print(f"{name:10} done at {time.monotonic() - begun:.0f} s", flush=True)


def main() -> None:
    """Measure, and write each row at once."""
    parser = argparse.ArgumentParser()
    parser.add_argument("phases", nargs="*", default=[*PHASES], metavar="PHASE", help=", ".join(PHASES))
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--folder", type=Path, help="for the checkpoint and the runs; kept")
    parser.add_argument("--dry", action="store_true")
    asked = parser.parse_args()
    if not {*asked.phases} <= PHASES.keys():
        parser.error(f"found {' '.join(asked.phases)}, wanted some of {' '.join(PHASES)}")
    if not asked.dry and not torch.cuda.is_available():
        sys.exit("there is no CUDA device here: nothing is measured; --dry goes through every phase on the CPU")
    os.environ["HF_HUB_OFFLINE"] = "1"
    disable_progress_bar()
    device = torch.device("cpu" if asked.dry else "cuda:0")
    about = {"benchmark": "gpu", "environment": environment(device)}

    def write(row: Row) -> None:
        line = json.dumps({**about, **row, **({"dry": True} if asked.dry else {})})
        print(line, flush=True)
        if not asked.dry:
            keep(row["phase"], line)

    with contextlib.ExitStack() as stack:
        folder = asked.folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        bench = Bench(DRY if asked.dry else Size(), device, folder)
        measure(bench, asked.phases, asked.minutes, write)


if __name__ == "__main__":
    main()
