"""Triton's kernels: the loss by its interpreter, all of them compiled for cards without a card, and on a real one.

Norms and gates by the interpreter stand beside their twins in test_fused.py.
"""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch

from qlora_kit.base.formats import Quantization, dequantize, quantize
from qlora_kit.base.freeze import freeze_and_quantize
from qlora_kit.base.multiply import can_multiply, multiply_stored
from qlora_kit.lora import adapter_parameters, add_lora
from qlora_kit.ops import (
    IGNORED,
    LogitRule,
    gated,
    gated_plain,
    linear_cross_entropy,
    linear_cross_entropy_plain,
    rms_norm,
    rms_norm_plain,
    rotary,
    rotary_plain,
    softmax_gradient,
    triton,
)
from qlora_kit.ops.rows import row_parts
from qlora_kit.train.step import accumulate_gradients

pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")  # by numpy, for Triton
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
RULES = [LogitRule(), LogitRule(0.25), LogitRule(cap=5.0), LogitRule(2.0, 5.0)]
CUDA = torch.device("cuda")


@pytest.fixture
def by_triton(monkeypatch):
    """What a CUDA device does, on the CPU; yields the names of the kernels that were asked for."""
    tiny.by_triton(monkeypatch)
    asked, launcher = [], triton._launcher
    monkeypatch.setattr(triton, "_launcher", lambda name: asked.append(name) or launcher(name))
    return asked


def draw(*shape, seed=0, dtype=torch.float32, device="cpu"):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def labels_of(count, vocabulary, device="cpu"):
    labels = torch.randint(0, vocabulary, (count,), generator=torch.Generator().manual_seed(1))
    labels[[0, count // 2]] = IGNORED
    labels[1] = vocabulary - 1
    return labels.to(device)


def loss_and_gradient(logits, labels, rule=RULES[0], weight=0.7):
    """Of the operator, in place on a copy."""
    logits = logits.clone()
    return softmax_gradient.loss_and_gradient(logits, labels, rule, weight), logits


def truth_of(logits, labels, rule=RULES[0], weight=0.7):
    """By autograd, in float64."""
    l64 = logits.double().requires_grad_()
    loss = weight * torch.nn.functional.cross_entropy(rule(l64), labels, ignore_index=IGNORED, reduction="sum")
    loss.backward()
    return loss.detach(), l64.grad


# --- the loss ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("shape", [(5, 33), (3, 9001)])
def test_logits_become_their_gradient_within_rounding_of_float64(shape, rule, dtype, by_triton):
    logits, labels = 3 * draw(*shape, dtype=dtype), labels_of(*shape)
    loss, gradient = loss_and_gradient(logits, labels, rule)
    wanted, exact = truth_of(logits, labels, rule)
    assert by_triton == ["softmax_gradient"] * 2  # looked for, and launched
    assert gradient.dtype == dtype
    assert not gradient[labels == IGNORED].any()
    # fp32 throughout; what is kept is rounded once, and in fp16 gradients below 6e-8 vanish, one unit of its last place
    assert tiny.relative(loss, wanted) < 1e-6
    assert tiny.relative(gradient, exact) < max(torch.finfo(dtype).eps, 1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rule", RULES)
def test_it_is_the_twin_in_plain_torch(rule, dtype, by_triton, monkeypatch):
    logits, labels = 3 * draw(6, 5000, dtype=dtype), labels_of(6, 5000)
    found = loss_and_gradient(logits, labels, rule)
    monkeypatch.setattr(triton, "serves", lambda device: False)
    twin = loss_and_gradient(logits, labels, rule)
    assert len(by_triton) == 2
    assert twin[1].any()
    for each, other in zip(found, twin, strict=True):
        # Sums in another order: an fp32 result may differ in its last places, a 16-bit one by one rounding, seldom.
        assert tiny.relative(each, other) < (1e-6 if dtype == torch.float32 or each.ndim == 0 else 1e-4)


@pytest.mark.parametrize("chunk", [1, 7, 100])
def test_the_loss_behind_a_head_has_the_gradients_of_whole_logits(chunk, by_triton):
    h, w, b = draw(20, 24), draw(61, 24, seed=2), draw(61, seed=3)
    labels, found = labels_of(20, 61), []
    for loss in (
        lambda h, w, b: linear_cross_entropy(h, labels, w, b, chunk=chunk, rule=RULES[3], divisor=17),
        lambda h, w, b: linear_cross_entropy_plain(h, labels, w, b, RULES[3], 17),
    ):
        leaves = [each.clone().requires_grad_() for each in (h, w, b)]
        value = loss(*leaves)
        value.backward()
        found.append([value.detach(), *(leaf.grad for leaf in leaves)])
    assert len(by_triton) == 2 * math.ceil(20 / chunk)
    assert max(map(tiny.relative, *found)) < 2e-6  # fp32, sums in other orders


def test_overflowing_and_infinite_logits_are_as_in_plain_torch(by_triton, monkeypatch):
    logits, labels = draw(5, 40), torch.tensor([3, 3, 3, 3, 3])
    logits[0] *= 1e4
    logits[1, 5] = -math.inf
    logits[2, 5] = math.inf
    logits[3, 5] = math.nan
    logits[4] = -3e38
    rows = [loss_and_gradient(logits[i : i + 1], labels[i : i + 1]) for i in range(5)]
    monkeypatch.setattr(triton, "serves", lambda device: False)
    for row, (loss, gradient) in enumerate(rows):
        wanted = loss_and_gradient(logits[row : row + 1], labels[row : row + 1])
        assert bool(wanted[0].isfinite()) == (row not in (2, 3))
        torch.testing.assert_close(loss, wanted[0], equal_nan=True, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(gradient, wanted[1], equal_nan=True, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("label", [61, -1, 10**12])
def test_a_label_that_is_no_token_makes_the_loss_no_number(label, by_triton):
    logits, labels = draw(2, 61), torch.tensor([3, label])
    assert loss_and_gradient(logits[:1], labels[:1])[0].isfinite()
    assert loss_and_gradient(logits, labels)[0].isnan()


def test_what_an_ignored_token_says_does_no_harm(by_triton):
    logits, labels = draw(2, 61), torch.tensor([3, IGNORED])
    alone = loss_and_gradient(logits[:1], labels[:1])
    logits[1, 7] = math.nan
    loss, gradient = loss_and_gradient(logits, labels)
    assert torch.equal(loss, alone[0])
    assert torch.equal(gradient[:1], alone[1])
    assert not gradient[1].any()


# --- roundings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_16_bits_norms_and_gates_round_where_plain_torch_does(dtype, by_triton):
    """Bits may differ where fp32 does in its last place and a tie is near: less than one in a thousand."""
    x, w, u = draw(40, 100, dtype=dtype), draw(100, seed=1, dtype=dtype), draw(40, 100, seed=2, dtype=dtype)
    made = {form: rms_norm(x, w, 1e-6, form) for form in ("twice", "once", "offset")}
    assert (made["twice"] != made["once"]).float().mean() > 0.1, "a rounding more or less shows"
    for form, y in made.items():
        assert (y != rms_norm_plain(x, w, 1e-6, form)).float().mean() < 1e-3
    out, plain = gated(x, u, "silu"), gated_plain(x, u, "silu")
    unrounded = (torch.nn.functional.silu(x.float()) * u.float()).to(dtype)
    assert (out != unrounded).float().mean() > 0.1
    assert (out != plain).float().mean() < 1e-3
    assert {*by_triton} == {"rms_norm", "gated"}


# --- where they run ---------------------------------------------------------------------------------------------------


def test_a_step_of_a_model_by_triton_is_the_step_without(request):
    """Through norms, gates, rotary embeddings and the loss of a small model at once."""
    without = step_of(tiny.quantized(tiny.llama(num_hidden_layers=1)))
    asked = request.getfixturevalue("by_triton")
    found = step_of(tiny.quantized(tiny.llama(num_hidden_layers=1)))
    assert {*asked} == {"rms_norm", "rms_norm_backward", "gated", "gated_backward", "rotary", "softmax_gradient"}
    assert without.norm() > 0
    assert tiny.relative(found, without) < 1e-5  # fp32, sums in other orders


def step_of(model):
    """Loss and gradients, one after the other."""
    add_lora(model, rank=4, dtype=torch.float32)
    tiny.wake(model.train())
    ids = tiny.tokens(2, 7).to(model.device)
    rows = SimpleNamespace(input_ids=ids, labels=ids, position_ids=None, documents=None, attention_mask=None)
    loss = accumulate_gradients(model, [rows], ids.numel(), loss_chunk=5).value
    return torch.cat([loss[None].cpu(), *(p.grad.float().flatten().cpu() for _, p in adapter_parameters(model))])


FORMATS = [
    Quantization("nf4", double_quant=True, block_size=64),
    Quantization("nf4", double_quant=False, block_size=128),
    Quantization("fp4", double_quant=True, block_size=1024),
    Quantization("int8"),
]


def stored_matrix(shape, quantization, dtype, device="cpu"):
    """Codes and constants, and what they are decoded to."""
    stored = quantize(draw(*shape) / 50, quantization)
    decoded = dequantize(stored, quantization, torch.empty(shape, dtype=dtype))
    return {name: each.to(device) for name, each in stored.items()}, decoded.to(device)


def kernel_of(quantization):
    return "row_times_int8" if quantization.kind == "int8" else "row_times_4bit"


def one_rounding(dtype):
    """Half a unit in the last place, to the nearest; in fp32 two units, of which sums of a thousand terms take most."""
    return torch.finfo(dtype).eps * (2 if dtype == torch.float32 else 0.5)


def row_times(x, stored, shape, quantization, bias=None):
    space = torch.empty(shape, dtype=x.dtype, device=x.device)
    return multiply_stored(x, stored, quantization, space, bias=bias)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("quantization", FORMATS, ids=str)
def test_a_row_multiplies_each_stored_weight_as_the_decoders_give_it_bit_for_bit(quantization, dtype, by_triton):
    shape = 9, 3072  # a last program of one output, and six steps along a row
    stored, w_OI = stored_matrix(shape, quantization, dtype)
    assert w_OI.unique().numel() > 100
    for column in (0, 1, 510, 513, 3071):
        x = torch.zeros(1, shape[1], dtype=dtype)
        x[0, column] = 1
        assert torch.equal(row_times(x, stored, shape, quantization)[0], w_OI[:, column])
    assert set(by_triton) == {kernel_of(quantization)}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("quantization", FORMATS, ids=str)
@pytest.mark.parametrize("has_bias", [False, True])
def test_a_row_times_a_stored_matrix_errs_by_one_rounding(has_bias, quantization, dtype, by_triton):
    shape = 70, 1024
    stored, w_OI = stored_matrix(shape, quantization, dtype)
    x, bias = draw(1, shape[1], seed=1, dtype=dtype), draw(shape[0], seed=2, dtype=dtype) if has_bias else None
    exact = torch.nn.functional.linear(x.double(), w_OI.double(), None if bias is None else bias.double())
    y = row_times(x, stored, shape, quantization, bias)
    assert y.dtype == dtype
    assert tiny.relative(y.double(), exact) < one_rounding(dtype)
    assert set(by_triton) == {kernel_of(quantization)}


def test_only_one_row_forward_with_whole_blocks_is_multiplied_as_stored(by_triton):
    x, nf4 = draw(2, 640, dtype=torch.float16), Quantization("nf4", block_size=128)
    assert can_multiply(x[:1], (96, 640), nf4)
    assert not can_multiply(x, (96, 640), nf4)
    assert not can_multiply(x[:1], (640, 96), nf4, is_back=True)
    assert not can_multiply(x[:1, :576], (96, 576), nf4)  # a row ends within a block
    assert can_multiply(x[:1, :577], (96, 577), Quantization("int8"))
    assert not can_multiply(x[:1].double(), (96, 640), nf4)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_the_next_token_by_triton_is_the_one_without(kind, request):
    dense = tiny.llama(hidden_size=128, intermediate_size=256)
    model = freeze_and_quantize(dense, Quantization(kind), torch.float32, torch.device("cpu"))
    add_lora(model, rank=4)
    tiny.wake(model)
    ids = tiny.tokens(1, 6)
    with torch.no_grad():
        wanted = model(ids).logits[:, -1]
        asked = request.getfixturevalue("by_triton")
        cache = model(ids[:, :-1], use_cache=True).past_key_values
        asked.clear()
        found = model(ids[:, -1:], past_key_values=cache).logits[:, -1]
    assert (
        asked.count(kernel_of(Quantization(kind))) == 2 * 14
    )  # of all layers but the head: whether it is there, and to launch it
    assert tiny.relative(found, wanted) < 1e-6  # fp32; only sums are taken in another order


def test_kernels_are_for_cuda_devices_and_for_dtypes_they_know(monkeypatch):
    assert not triton.serves(torch.device("cpu"))
    monkeypatch.setattr(triton, "serves", lambda device: True)
    monkeypatch.setattr(triton, "_launcher", lambda name: name)
    assert triton.device_kernel("gated", draw(3), draw(3)) == "gated"
    assert triton.device_kernel("gated", draw(3).double()) is None
    assert triton.device_kernel("gated", draw(3), draw(3).half()) is None


@pytest.mark.parametrize(("switch", "tries"), [("1", True), ("0", False)])
def test_switched_off_nothing_is_tried(switch, tries, monkeypatch):
    tried = []
    monkeypatch.setattr(triton, "_work", lambda device: tried.append(device) or True)
    monkeypatch.setenv("QLORA_KIT_TRITON", switch)
    assert triton.serves.__wrapped__(CUDA) is tries  # past its cache
    assert tried == [CUDA] * tries


@pytest.mark.parametrize(
    "fault",
    ["no triton", "no compiler", "no headers", "no room", "no such card", "no driver's library", "not loaded", "wrong"],
)
def test_where_a_kernel_does_not_compile_or_gives_other_numbers_there_are_none(fault, by_triton, monkeypatch):
    from triton.runtime.errors import PTXASError

    assert triton._work(torch.device("cpu"))
    faults = {
        "no compiler": RuntimeError("Failed to find C compiler"),
        "no headers": subprocess.CalledProcessError(1, "gcc"),
        "no room": OSError("No space left on device"),
        "no such card": PTXASError("unknown target"),
        "no driver's library": AssertionError("libcuda.so cannot found!"),  # triton/backends/nvidia/driver.py
        "not loaded": ImportError("cuda_utils.so: failed to map segment from shared object"),  # a cache on noexec
    }

    def launch(*_):
        if fault in faults:
            raise faults[fault]

    monkeypatch.setattr(triton, "_launcher", lambda name: launch)
    if fault == "no triton":
        monkeypatch.setitem(sys.modules, "triton.errors", None)
    assert not triton._work(torch.device("cpu"))


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("width", [1, 4096, 2**17 + 1, 2**23 + 1])
def test_parts_of_rows_are_all_rows_however_wide(width, device):
    x = torch.empty(3, width, dtype=torch.int8, device=device)
    assert sum(len(x[part]) for part in row_parts(x)) == 3


def test_a_twin_on_a_card_makes_little_in_fp32_at_a_time():
    x = torch.empty(10_000, 4096, device="meta")
    parts = [len(x[part]) for part in row_parts(x)]
    assert sum(parts) == len(x)
    assert max(parts) * 4096 * 4 <= 32 * 2**20


COMPILE = """
import json, sys
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.runtime import JITFunction, driver
from qlora_kit.ops.triton import gate, loss, norm, stored, turn

class Card:
    def __init__(self, capability): self.target = GPUTarget("cuda", capability, 32)
    def get_current_device(self): return self.target.arch
    def get_current_stream(self, device): return 0
    def get_current_target(self): return self.target

made, run = [], JITFunction.run
def compiled(self, *args, grid, warmup, **how):
    kernel = run(self, *args, grid=grid, warmup=True, **how)
    about, rounded = kernel.metadata, kernel.asm["ptx"].count(".rn." + sys.argv[2])
    made.append((self.__name__, about.target.arch, rounded, about.shared))
JITFunction.run = compiled

dtype = {"bf16": torch.bfloat16, "f16": torch.float16}[sys.argv[2]]
x, labels = torch.ones(3, 4096, dtype=dtype), torch.zeros(3, dtype=torch.int64)
inverse = torch.ones(3)
driver.set_active(Card(int(sys.argv[1])))
norm.rms_norm(x, x[0], 1e-6, "twice", x, inverse)
norm.rms_norm_backward(x, x, x[0], inverse, "offset", x)
for kind in ("silu", "gelu"):
    gate.gated(x, x, kind, x)
    gate.gated_backward(x, x, x, kind, x, x)
for is_back in (False, True):
    turn.rotary(x.view(3, 8, 8, 64), x[:, :512].view(3, 8, 64), x[:, :512].view(3, 8, 64), is_back, x)
for cap in (None, 30.0):
    loss.softmax_gradient(x, labels, inverse, 0.5, 1.0, cap, -100)
codes, absmax, row = torch.ones(8 * 2048, dtype=torch.uint8), torch.ones(512), x[:1]
for block_size in (64, 4096):
    plain, double = (absmax, None, None), (absmax.to(torch.uint8), absmax, absmax)
    for constants, bias in ((plain, None), (double, row)):
        stored.row_times_4bit(row, codes, *constants, (absmax, absmax), block_size, bias, x[1:2])
stored.row_times_int8(row, codes.view(torch.int8).view(4, 4096), absmax, None, x[1:2])
print(json.dumps(made))
"""


ROW_KERNELS = ["_times_4bit"] * 4 + ["_times_int8"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "capability",
    [75, 90, 120] + [pytest.param(other, marks=pytest.mark.long) for other in (80, 86, 89, 100)],
)
def test_every_kernel_compiles_for_a_card_and_rounds_to_nearest_there(capability, tmp_path):
    """Down to the card's own code, without a card, in the 16 bits that `compute_dtype: auto` takes there; in a process
    of its own, where nothing is interpreted."""
    pytest.importorskip("triton", reason="Triton is not installed: it is in the test extra on Linux")
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-c", COMPILE, str(capability), "bf16" if capability >= 80 else "f16"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    made = json.loads(done.stdout)
    assert [name for name, *_ in made] == ["_forward", "_backward"] * 3 + ["_turn"] * 2 + ["_row"] * 2 + ROW_KERNELS
    assert {target for _, target, *_ in made} == {capability}
    assert all(rounded > 0 for _, _, rounded, _ in made)
    assert all(shared < 48 * 1024 for *_, shared in made)  # what any card gives a program
    assert list(Path(tmp_path).rglob("*.cubin"))


# --- on a card --------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", ["twice", "once", "offset"])
@pytest.mark.parametrize("shape", [(3, 33), (70, 128), (5, 4096), (2, 9000)])
def test_a_norm_on_the_gpu_is_within_rounding_of_float64(shape, form, dtype):
    assert triton.serves(torch.empty(0, device=CUDA).device)
    x, w, grad = (draw(*size, seed=seed, dtype=dtype, device=CUDA) for seed, size in
                  enumerate((shape, shape[-1:], shape)))  # fmt: skip
    x64 = x.double().requires_grad_()
    truth = x64 * torch.rsqrt(x64.square().mean(-1, keepdim=True) + 1e-6) * (w.double() + (form == "offset"))
    truth.backward(grad.double())
    x = x.requires_grad_()
    y = rms_norm(x, w, 1e-6, form)
    y.backward(grad)
    eps = torch.finfo(dtype).eps  # as on a CPU (test_fused.py); the device's root and quotient are off by a unit or two
    assert tiny.relative(y.detach(), truth.detach()) < 1.5 * eps
    assert tiny.relative(x.grad, x64.grad) < 2 * eps
    # The same roundings as in plain torch: but for sums whose last bit differs, the same 16-bit values.
    if dtype != torch.float32:
        assert (y != rms_norm_plain(x, w, 1e-6, form)).float().mean() < 0.01


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gate", ["silu", "gelu"])
def test_a_gate_on_the_gpu_is_within_rounding_of_float64(gate, dtype):
    assert triton.serves(torch.empty(0, device=CUDA).device)
    g, u, grad = (4 * draw(7, 3333, seed=seed, dtype=dtype, device=CUDA) for seed in range(3))
    exact = [each.double().requires_grad_() for each in (g, u)]
    truth = gated_plain(*exact, gate)
    truth.backward(grad.double())
    g, u = g.requires_grad_(), u.requires_grad_()
    out = gated(g, u, gate)
    out.backward(grad)
    for found, wanted in zip((out, g.grad, u.grad), (truth, *(each.grad for each in exact)), strict=True):
        # As on a CPU; a device's own exponential is off by up to 1e-6 where it is small against one.
        assert tiny.relative(found.detach(), wanted.detach()) < max(2 * torch.finfo(dtype).eps, 1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 5, 3, 8), (1, 300, 32, 128), (3, 7, 1, 66)])
def test_a_rotary_embedding_on_the_gpu_is_within_rounding_of_float64(shape, dtype):
    assert triton.serves(torch.empty(0, device=CUDA).device)
    _, tokens, _, width = shape
    x, grad = (draw(*shape, seed=seed, dtype=dtype, device=CUDA) for seed in (0, 1))
    cos, sin = (draw(1, tokens, width, seed=seed, dtype=dtype, device=CUDA) for seed in (2, 3))
    x64 = x.double().requires_grad_()
    truth = rotary_plain(x64, cos.double(), sin.double())
    truth.backward(grad.double())
    y = rotary(x.requires_grad_(), cos, sin)
    y.backward(grad)
    for found, wanted in ((y.detach(), truth.detach()), (x.grad, x64.grad)):
        assert tiny.relative(found, wanted) < 1.5 * torch.finfo(dtype).eps


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rule", RULES)
def test_the_loss_on_the_gpu_is_within_rounding_of_float64(rule, dtype):
    logits, labels = 3 * draw(40, 32_003, dtype=dtype, device=CUDA), labels_of(40, 32_003, CUDA)
    assert triton.device_kernel("softmax_gradient", logits) is not None
    loss, gradient = loss_and_gradient(logits, labels, rule)
    wanted, exact = truth_of(logits, labels, rule)
    assert tiny.relative(loss, wanted) < 1e-5
    assert tiny.relative(gradient, exact) < max(torch.finfo(dtype).eps, 1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("quantization", FORMATS, ids=str)
def test_a_row_times_a_stored_matrix_on_the_gpu_errs_by_one_rounding(quantization, dtype):
    shape = 1027, 4096
    stored, w_OI = stored_matrix(shape, quantization, dtype, CUDA)
    x, bias = (draw(*size, seed=1, dtype=dtype, device=CUDA) for size in ((1, 4096), (1027,)))
    assert can_multiply(x, shape, quantization)
    exact = torch.nn.functional.linear(x.double(), w_OI.double(), bias.double())
    found = row_times(x, stored, shape, quantization, bias)
    assert tiny.relative(found.double(), exact) < one_rounding(dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("quantization", FORMATS, ids=str)
def test_a_row_on_the_gpu_multiplies_each_weight_as_it_is_decoded_there_bit_for_bit(quantization, dtype):
    shape = 37, 3072
    stored, _ = stored_matrix(shape, quantization, dtype, CUDA)
    w_OI = dequantize(stored, quantization, torch.empty(shape, dtype=dtype, device=CUDA))
    for column in range(0, 3072, 61):
        x = torch.zeros(1, shape[1], dtype=dtype, device=CUDA)
        x[0, column] = 1
        assert torch.equal(row_times(x, stored, shape, quantization)[0], w_OI[:, column])


@pytest.mark.gpu
def test_a_step_on_the_gpu_with_kernels_is_the_step_without(monkeypatch):
    """In bf16 both are as far from fp32 as their roundings take them."""
    steps = {}
    for name, dtype, serves in (("truth", torch.float32, False), ("twins", torch.bfloat16, False),
                                ("kernels", torch.bfloat16, True)):  # fmt: skip
        monkeypatch.setattr(triton, "serves", lambda device, serves=serves: serves)
        model = freeze_and_quantize(tiny.llama(hidden_size=128, intermediate_size=256), Quantization(), dtype, CUDA)
        steps[name] = step_of(model)
    off = {name: tiny.relative(steps[name], steps["truth"]) for name in ("twins", "kernels")}
    assert 0 < off["kernels"] < 1.2 * off["twins"]
