"""Codes and constants that the kit makes itself, compiled and in plain torch, are bitsandbytes' bit for bit."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from qlora_kit.base import quantizer
from qlora_kit.base.formats import BLOCK_SIZES

KINDS = ["nf4", "fp4"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
WAYS = ["compiled", "plain"]


@pytest.fixture(params=WAYS)
def way(request, monkeypatch):
    """Both ways in which the operators work on a CPU."""
    if request.param == "plain":
        monkeypatch.setattr(quantizer, "c_functions", lambda: None)
    elif quantizer.c_functions() is None:
        pytest.skip("there is no C compiler here, or its code does not agree")
    return request.param


def normal(count, dtype=torch.float32, seed=0):
    return torch.randn(count, generator=torch.Generator().manual_seed(seed)).to(dtype)


def bits(dtype):
    """All 65,536 numbers of a 16-bit type, or random patterns of fp32: infinities, NaN and subnormals among them."""
    draw = torch.Generator().manual_seed(0)
    if dtype == torch.float32:
        drawn = torch.randint(-(2**31), 2**31, (2**20,), dtype=torch.int64, generator=draw).int().view(dtype)
        drawn[::1000], drawn[500::1000] = torch.inf, -torch.inf
        return drawn
    return torch.randperm(2**16, generator=draw).sub_(2**15).short().view(dtype)


def theirs_4bit(w_N, block_size, kind):
    codes, absmax = torch.ops.bitsandbytes.quantize_4bit.default(w_N, block_size, kind, torch.uint8)
    return codes.view(-1), absmax


def assert_same_bits(ours, theirs):
    """Codes alike, constants alike; of a NaN only that it is one, since torch gives the bits of any of a block's."""
    assert torch.equal(ours[0], theirs[0])
    finite = ~theirs[1].isnan()
    assert torch.equal(ours[1][finite].view(torch.int32), theirs[1][finite].view(torch.int32))
    assert torch.equal(ours[1].isnan(), theirs[1].isnan())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_millions_of_weights_have_the_codes_of_bitsandbytes(kind, dtype, way):
    w_N = normal(3_000_001, dtype)
    assert len(theirs_4bit(w_N, 64, kind)[0].unique()) == 256
    assert_same_bits(quantizer.quantize_4bit(w_N, 64, kind), theirs_4bit(w_N, 64, kind))


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_every_block_and_every_end_of_one_has_the_codes_of_bitsandbytes(kind, block_size, way):
    for count in (0, 1, 2, 31, block_size - 1, block_size, block_size + 1, 3 * block_size + 7, 2**17 + block_size + 5):
        w_N = normal(count)
        wanted = theirs_4bit(w_N, block_size, kind) if count else (w_N.byte(), w_N)
        assert_same_bits(quantizer.quantize_4bit(w_N, block_size, kind), wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_weights_on_a_bound_between_two_codes_and_beside_it_go_where_bitsandbytes_puts_them(kind, way):
    bounds = quantizer.intervals(kind, torch.device("cpu"))[0]
    beside = [bounds, *(torch.nextafter(bounds, torch.tensor(end)) for end in (-2.0, 2.0))]
    block = torch.cat([torch.ones(1), *beside, torch.zeros(64 - 1 - 3 * 15)])
    for largest in (1.0, 3.0, 1e-30):  # with 1 the scaled numbers are the bounds themselves
        w_N = torch.cat([block, -block, block[:50]]) * largest  # the last block is divided by its constant
        assert_same_bits(quantizer.quantize_4bit(w_N, 64, kind), theirs_4bit(w_N, 64, kind))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_whatever_bits_a_checkpoint_holds_the_codes_are_those_of_bitsandbytes(kind, dtype, way):
    w_N = bits(dtype)
    assert w_N.isnan().any()
    assert w_N.isinf().any()
    tame = w_N[w_N.isfinite()]
    small = w_N[w_N.abs() < torch.finfo(dtype).tiny]
    for each in (w_N, tame, small, torch.zeros_like(w_N[:200]), -torch.zeros_like(w_N[:200])):
        assert len(each) > 100
        assert_same_bits(quantizer.quantize_4bit(each, 64, kind), theirs_4bit(each, 64, kind))


@pytest.mark.parametrize("shape", [(1, 1), (3, 65), (33, 4096), (300, 700), (2, 200_001)])
def test_int8_rows_have_the_codes_of_bitsandbytes(shape, way):
    w_OI = normal(shape[0] * shape[1], torch.float16).view(shape)
    ours, theirs = quantizer.quantize_int8(w_OI), torch.ops.bitsandbytes.int8_vectorwise_quant.default(w_OI, 0.0)
    assert_same_bits(ours, theirs)


def test_int8_rows_of_any_bits_have_the_codes_of_bitsandbytes(way):
    w_N = bits(torch.float16)
    tame = w_N[w_N.isfinite()]
    for each in (w_N, tame[: len(tame) // 64 * 64], torch.zeros_like(w_N), w_N[w_N.abs() < 6e-5][:1024]):
        w_OI = each.view(-1, 64)  # of all bits there is no row without a NaN; and a half of tame rows is very large
        ours, theirs = quantizer.quantize_int8(w_OI), torch.ops.bitsandbytes.int8_vectorwise_quant.default(w_OI, 0.0)
        assert_same_bits(ours, theirs)


def test_numbers_halfway_between_two_int8_codes_are_rounded_to_even(way):
    row = torch.arange(-127, 127.5, 0.5, dtype=torch.float16)
    codes, absmax = quantizer.quantize_int8(row[None])
    assert absmax.item() == 127
    assert codes[0].tolist() == [round(number) for number in row.tolist()]  # Python rounds halves to even


def test_an_operator_takes_no_memory_that_is_not_as_it_must_be():
    w = normal(256)
    for wrong in (w.double(), w[::2], w.view(16, 16), w.int()):
        with pytest.raises(RuntimeError):
            quantizer.quantize_4bit(wrong, 64, "nf4")
    for block_size in (0, 63, 8192):
        with pytest.raises(RuntimeError, match="blocks of"):
            quantizer.quantize_4bit(w, block_size, "nf4")
    for wrong in (w.view(16, 16), w.half(), w.half().view(16, 16).t()):
        with pytest.raises(RuntimeError):
            quantizer.quantize_int8(wrong)


@pytest.mark.parametrize("kind", KINDS)
def test_several_threads_make_the_bytes_of_one(kind, monkeypatch):
    functions = quantizer.c_functions()
    if functions is None:
        pytest.skip("there is no C compiler here")
    w_N, taken = normal(64 * 1001 + 13), []
    w_OI = normal(7 * 999, torch.float16).view(7, 999)
    for count in (1, 2, 3, 16):
        monkeypatch.setattr(quantizer, "threads", lambda count=count: taken.append(count) or count)
        made = *functions.quantize_4bit(w_N, 64, kind), *functions.quantize_int8(w_OI)
        wanted = *quantizer.quantize_4bit_plain(w_N, 64, kind), *quantizer.quantize_int8_plain(w_OI)
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(made, wanted, strict=True))
    assert taken == [1, 1, 2, 2, 3, 3, 16, 16]


def test_the_compiled_code_writes_nowhere_but_where_it_should(monkeypatch):
    functions = quantizer.c_functions()
    if functions is None:
        pytest.skip("there is no C compiler here")
    guard, marked = 64, []

    def with_guards(tensors):
        """The same outputs in the middle of memory that is watched."""
        for tensor in tensors:
            memory = torch.full((tensor.nbytes + 2 * guard,), 0xA5, dtype=torch.uint8)
            marked.append(memory)
            yield memory[guard : guard + tensor.nbytes].view(tensor.dtype).view(tensor.shape)

    for empty in (quantizer._empty_4bit, quantizer._empty_int8):
        monkeypatch.setattr(quantizer, empty.__name__, lambda *args, empty=empty: tuple(with_guards(empty(*args))))
    functions.quantize_4bit(normal(64 * 9 + 13), 64, "fp4")
    functions.quantize_int8(normal(5 * 77, torch.float16).view(5, 77))
    assert len(marked) == 4
    for memory in marked:
        assert (memory[:guard] == 0xA5).all()
        assert (memory[-guard:] == 0xA5).all()


@pytest.mark.parametrize("count", [128, 131])
def test_fake_tensors_come_out_as_real_ones_do_and_no_flop_is_counted(count):
    w = normal(count, torch.float16)
    calls = [lambda w: quantizer.quantize_4bit(w, 32, "nf4"), lambda w: quantizer.quantize_int8(w[None])]
    for call in calls:
        with FakeTensorMode() as mode:
            fakes = call(mode.from_tensor(w))
        with FlopCounterMode(display=False) as counter:
            reals = call(w)
        assert counter.get_total_flops() == 0
        assert [(t.shape, t.dtype, t.stride()) for t in fakes] == [(t.shape, t.dtype, t.stride()) for t in reals]


# --- compiling --------------------------------------------------------------------------------------------------------
