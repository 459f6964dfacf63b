"""Products with a quantised matrix as it is stored: those of the decoded one, on processors that multiply tiles."""

import threading

import pytest
import tiny
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, MixtralConfig

from qlora_kit.base import dense
from qlora_kit.base import multiply as native
from qlora_kit.base.formats import Quantization, quantize
from qlora_kit.base.multiply import can_multiply
from qlora_kit.errors import ModelError
from qlora_kit.lora import adapter_parameters, add_lora
from qlora_kit.memory import Ledger
from qlora_kit.memory.counter import resident_bytes
from qlora_kit.units import MIB

pytestmark = pytest.mark.skipif(not native.has_tiles(), reason="this processor multiplies no tiles")

FORMATS = [
    Quantization("nf4", double_quant=True, block_size=64),
    Quantization("nf4", double_quant=False, block_size=128),
    Quantization("fp4", double_quant=True, block_size=64),
    Quantization("int8"),
]
SHAPES = [(32, 128), (96, 640), (160, 1152), (1376, 512)]
"""The least; a width that is no multiple of what is decoded at once; half a panel of outputs; many of them."""


def matrix(shape, quantization, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return quantize((torch.randn(shape, generator=generator) / 50).bfloat16(), quantization)


def multiply_stored(x, stored, shape, quantization, **how):
    return native.multiply_stored(x, stored, quantization, torch.empty(shape, dtype=torch.bfloat16), **how)


def decoded(stored, shape, quantization):
    space, one = torch.empty(shape, dtype=torch.bfloat16), torch.eye(shape[0]).bfloat16()
    return native.multiply_stored_plain(one, stored, quantization, space, is_back=True)


def inputs(tokens, width, seed=1):
    return torch.randn(tokens, width, generator=torch.Generator().manual_seed(seed)).bfloat16()


def relative(found, exact):
    return ((found.double() - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("quantization", FORMATS, ids=str)
def test_each_weight_is_multiplied_as_the_decoders_give_it_bit_for_bit(shape, quantization):
    stored, (out, width) = matrix(shape, quantization), shape
    w_OI = decoded(stored, shape, quantization)
    assert w_OI.unique().numel() > 100
    assert torch.equal(multiply_stored(torch.eye(width).bfloat16(), stored, shape, quantization), w_OI.t())
    assert torch.equal(multiply_stored(torch.eye(out).bfloat16(), stored, shape, quantization, is_back=True), w_OI)


@pytest.mark.parametrize("tokens", [1, 15, 16, 17, 33, 600])
@pytest.mark.parametrize("quantization", FORMATS, ids=str)
def test_products_err_by_one_rounding_of_the_exact_ones(tokens, quantization):
    shape = out, width = 96, 1152
    stored = matrix(shape, quantization)
    w = decoded(stored, shape, quantization).double()
    x, g, bias = inputs(tokens, width), inputs(tokens, out), inputs(1, out, seed=2)[0]
    y, dx = (
        multiply_stored(x, stored, shape, quantization, bias=bias),
        multiply_stored(g, stored, shape, quantization, is_back=True),
    )
    for found, exact in ((y, x.double() @ w.t() + bias.double()), (dx, g.double() @ w)):
        # Half a unit of bfloat16's last place, and what sums of 1,152 terms in fp32 err by where they cancel.
        assert torch.all((found.double() - exact).abs() <= 2**-8 * exact.abs() + 1e-5)
        assert 1e-3 < relative(found, exact) < 2**-8.8  # rounded to bfloat16 it is


def test_a_row_depends_neither_on_how_many_there_are_nor_on_threads():
    shape, how = (1376, 512), FORMATS[0]
    stored, x, g = matrix(shape, how), inputs(1200, 512), inputs(1200, 1376)
    together = multiply_stored(x, stored, shape, how), multiply_stored(g, stored, shape, how, is_back=True)
    for rows in (slice(0, 1), slice(700, 740), slice(500, 1200)):
        assert torch.equal(multiply_stored(x[rows], stored, shape, how), together[0][rows])
        assert torch.equal(multiply_stored(g[rows], stored, shape, how, is_back=True), together[1][rows])
    before = torch.get_num_threads()
    try:
        for count in (1, 2, 3, 33):
            torch.set_num_threads(count)
            assert torch.equal(multiply_stored(x, stored, shape, how), together[0])
            assert torch.equal(multiply_stored(g, stored, shape, how, is_back=True), together[1])
    finally:
        torch.set_num_threads(before)


def test_more_threads_than_there_are_columns_are_no_fault():
    stored, x, g = matrix((32, 128), FORMATS[0]), inputs(3, 128), inputs(3, 32)
    alone = multiply_stored(x, stored, (32, 128), FORMATS[0])
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(150)
        assert torch.equal(multiply_stored(x, stored, (32, 128), FORMATS[0]), alone)
        assert multiply_stored(g, stored, (32, 128), FORMATS[0], is_back=True).isfinite().all()
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    "defaults", [{"dtype": torch.bfloat16}, {"dtype": torch.float64}, {"device": "meta"}, {"threads": 33}], ids=str
)
def test_that_a_processor_has_tiles_is_found_whatever_the_defaults_are(defaults):
    with tiny.defaults(**defaults):
        assert native.has_tiles.__wrapped__(), "asked anew"


def test_a_layer_without_constants_says_so():
    layer = tiny.quantized_layers(tiny.quantized(wide_llama(), dtype=torch.bfloat16))["model.layers.0.mlp.up_proj"]
    x = inputs(3, 128)
    assert layer(x).isfinite().all()
    layer.absmax = None
    with pytest.raises(ModelError, match="has lost its codes or constants"):
        layer(x)


def test_scales_that_lie_apart_are_read_as_those_that_do_not():
    stored, x = matrix((1376, 512), FORMATS[0]), inputs(3, 512)
    apart = stored["absmax_scale"].repeat_interleave(2)[::2]
    assert not apart.is_contiguous()
    made = multiply_stored(x, stored | {"absmax_scale": apart}, (1376, 512), FORMATS[0])
    assert torch.equal(made, multiply_stored(x, stored, (1376, 512), FORMATS[0]))


def test_torchs_own_products_and_these_take_turns_with_the_tiles():
    shape, how = (96, 640), FORMATS[0]
    stored, x, left, right = matrix(shape, how), inputs(40, 640), inputs(77, 300), inputs(300, 50)
    alone, torchs = multiply_stored(x, stored, shape, how), left @ right
    for _ in range(3):
        assert torch.equal(left @ right, torchs)
        assert torch.equal(multiply_stored(x, stored, shape, how), alone)


@pytest.mark.parametrize(("shape", "how", "dtype"), [
    ((96, 640), FORMATS[0], torch.float32),
    ((40, 640), FORMATS[0], torch.bfloat16),
    ((96, 608), FORMATS[0], torch.bfloat16),
    ((96, 608), FORMATS[3], torch.bfloat16),
    ((96, 640), Quantization("nf4", block_size=32), torch.bfloat16),
    ((96, 640), Quantization("nf4", block_size=256), torch.bfloat16),
    ((96, 640), Quantization("none"), torch.bfloat16),
], ids=str)  # fmt: skip
def test_what_the_code_does_not_take_is_told_before(shape, how, dtype):
    assert can_multiply(inputs(48, 640), (96, 640), FORMATS[0])
    assert not can_multiply(inputs(49, 640), (96, 640), FORMATS[0]), "decoding first is faster then"
    many = torch.zeros(5000, 2048, dtype=torch.bfloat16)
    assert can_multiply(many, (2048, 2048), FORMATS[0])
    assert not can_multiply(many, (2016, 2048), FORMATS[0])
    assert not can_multiply(torch.zeros(1, shape[1], dtype=dtype), shape, how)
    if how.kind != "none":
        with pytest.raises(RuntimeError, match="can_multiply says no"):
            multiply_stored(torch.zeros(1, shape[1], dtype=dtype), matrix(shape, how), shape, how)


@pytest.mark.parametrize("how", [FORMATS[0], FORMATS[3]], ids=str)
def test_codes_and_constants_that_are_too_few_are_refused_and_not_read(how):
    stored, x = matrix((96, 640), how), inputs(3, 640)
    for name in ("codes", "absmax"):
        with pytest.raises(RuntimeError, match=r"codes|constants"):
            multiply_stored(x, stored | {name: stored[name][:-1]}, (96, 640), how)
    with pytest.raises(RuntimeError, match=r"x \(3, 600\), \(tokens, 640\) wanted"):
        multiply_stored(x[:, :600], stored, (96, 640), how)


def test_a_bias_of_another_kind_and_scales_without_an_offset_are_refused_too():
    stored, x = matrix((96, 640), FORMATS[0]), inputs(3, 640)
    for bias in (torch.zeros(96), torch.zeros(95).bfloat16()):
        with pytest.raises(RuntimeError, match=r"\(96,\) in torch.bfloat16 wanted"):
            multiply_stored(x, stored, (96, 640), FORMATS[0], bias=bias)
    with pytest.raises(RuntimeError, match="scales without an offset"):
        multiply_stored(x, stored | {"absmax_offset": None}, (96, 640), FORMATS[0])


def test_no_rows_make_none():
    stored = matrix((96, 640), FORMATS[0])
    assert multiply_stored(inputs(0, 640), stored, (96, 640), FORMATS[0]).shape == (0, 96)
    assert multiply_stored(inputs(0, 96), stored, (96, 640), FORMATS[0], is_back=True).shape == (0, 640)


def test_a_thread_that_ends_takes_its_sums_with_it():
    stored, x = matrix((96, 640), FORMATS[0]), inputs(512, 640)

    def in_threads(count):
        for _ in range(count):
            thread = threading.Thread(target=multiply_stored, args=(x, stored, (96, 640), FORMATS[0]))
            thread.start()
            thread.join()

    in_threads(20)
    before = resident_bytes()[0]
    in_threads(200)
    assert resident_bytes()[0] - before < 10 * MIB, "0.2 MiB of each thread's sums would be 40"


def test_it_counts_the_flops_of_the_product_that_it_is():
    stored, x = matrix((96, 640), FORMATS[0]), inputs(5, 640)
    with FlopCounterMode(display=False) as counter:
        multiply_stored(x, stored, (96, 640), FORMATS[0])
        multiply_stored(inputs(5, 96), stored, (96, 640), FORMATS[0], is_back=True)
    assert counter.get_total_flops() == 2 * 2 * 5 * 96 * 640


def wide_llama():
    return tiny.llama(hidden_size=128, intermediate_size=192)


def wide_mixtral():
    sizes = {**tiny.EXPERTS, "hidden_size": 128, "head_dim": 32, "intermediate_size": 64, "num_local_experts": 4}
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(MixtralConfig(**sizes), dtype=torch.float32).eval()


def step_of(make, kind, monkeypatch, *, with_tiles):
    """Gradients of a tiny model's adapters in bf16, its peak by the ledger, and the number of products of this kind."""
    taken = []
    with monkeypatch.context() as patch:
        patch.setattr(dense, "can_multiply", lambda *of, **how: with_tiles and can_multiply(*of, **how))
        patch.setattr(
            dense, "multiply_stored", lambda *of, **how: taken.append(1) or native.multiply_stored(*of, **how)
        )
        model = tiny.quantized(make(), kind, dtype=torch.bfloat16)
        add_lora(model, rank=4)
        torch.manual_seed(0)
        for _, parameter in adapter_parameters(model):
            torch.nn.init.normal_(parameter, std=0.05)
        ids = torch.arange(24).view(2, 12) % 50
        model(input_ids=ids, labels=ids).loss.backward()  # what a first pass leaves behind is there in both
        model.zero_grad()
        with Ledger(model) as ledger:
            model(input_ids=ids, labels=ids).loss.backward()
        gradients = [parameter.grad.float() for _, parameter in adapter_parameters(model)]
    return gradients, ledger.peak(), len(taken)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.parametrize("make", [wide_llama, wide_mixtral])
def test_a_models_step_takes_its_products_so_with_the_same_gradients_and_the_same_memory(make, kind, monkeypatch):
    with_tiles, peak, count = step_of(make, kind, monkeypatch, with_tiles=True)
    decoded, other_peak, none = step_of(make, kind, monkeypatch, with_tiles=False)
    assert count > 20
    assert none == 0
    assert peak == other_peak > 0
    for one, other in zip(with_tiles, decoded, strict=True):
        assert relative(one, other.double()) < 0.02  # bf16 throughout: rounded sums of rounded sums
