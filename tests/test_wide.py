"""Products in bf16 that are taken in fp32: the same function, one rounding, and only where a processor gains by it."""

import platform

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from qlora_kit.memory import Ledger
from qlora_kit.ops import linear_cross_entropy, lora_linear, sliced_cross_entropy, sliced_linear, wide
from qlora_kit.ops.stand_in import as_on_card
from qlora_kit.ops.wide import linear, linear_back

T, OUT, IN = 70, 48, 40


@pytest.fixture(autouse=True)
def _widened(monkeypatch):
    """As on a processor that is faster at fp32; slices of 20 rows, the last one shorter."""
    monkeypatch.setattr(wide, "multiplies_fp32_faster", lambda: True)
    monkeypatch.setattr(wide, "_ELEMENTS", 20 * IN)


@pytest.fixture
def products(monkeypatch):
    """The dtypes of the products that torch has given."""
    given = []

    def noted(real):
        def product(*args, **named):
            made = real(*args, **named)
            given.append(made.dtype)
            return made

        return product

    monkeypatch.setattr(torch, "mm", noted(torch.mm))
    monkeypatch.setattr(torch.Tensor, "addmm_", noted(torch.Tensor.addmm_))
    return given


def made(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def assert_rounded_once(found, exact):
    """Sums in fp32 are off by far less than half a step of bf16, so few are rounded otherwise than those in fp64."""
    step = torch.finfo(torch.bfloat16).eps * exact.abs()
    assert ((found.double() - exact).abs() <= step / 2 + 1e-5).all()  # 1e-5: 48 products of about 1, in fp32
    assert (found == exact.bfloat16()).float().mean() > 0.99


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("has_place", [False, True])
def test_a_product_is_taken_in_fp32_and_rounded_once(has_bias, has_place, products):
    x, w, bias = made(T, IN), made(OUT, IN, seed=1), made(OUT, seed=2) if has_bias else None
    place = torch.empty(T, OUT + 5, dtype=torch.bfloat16)[:, 2:-3] if has_place else None
    found = linear(x, w, bias, out=place)
    assert products == [torch.float32] * 3
    assert found.dtype == torch.bfloat16
    assert not has_place or found is place
    assert_rounded_once(found, F.linear(x.double(), w.double(), None if bias is None else bias.double()))


def test_a_product_back_is_summed_in_fp32_and_rounded_once(products):
    g, w = made(T, OUT), made(OUT, IN, seed=1)
    found = linear_back(g, w)
    assert products == [torch.float32] * 3
    assert found.dtype == torch.bfloat16
    assert_rounded_once(found, g.double() @ w.double())


def test_autocast_does_not_narrow_what_was_widened(products):
    x, w = made(T, IN), made(OUT, IN, seed=1)
    g = x @ w.t()
    alone = linear(x, w), linear_back(g, w)
    with torch.autocast("cpu", torch.bfloat16):
        under = linear(x, w), linear_back(g, w)
    assert products == [torch.float32] * 12
    assert all(torch.equal(one, other) for one, other in zip(alone, under, strict=True))


def test_layers_and_heads_take_their_products_so(products):
    """Whatever multiplies with a frozen matrix, forth and back, quantised or not."""
    w, labels = made(OUT, IN, seed=1), torch.arange(T) % OUT

    def whole(dtype):
        return w.to(dtype)

    def some(rows, dtype):
        return w[rows].to(dtype)

    for taken in (
        lambda x: lora_linear(x, whole).sum(),
        lambda x: sliced_linear(x, some, (OUT, IN)).sum(),
        lambda x: linear_cross_entropy(x, labels, w, chunk=T),
        lambda x: sliced_cross_entropy(x, labels, some, (OUT, IN)),
    ):
        products.clear()
        taken(made(T, IN).requires_grad_()).backward()
        assert products.count(torch.float32) >= 6, "three slices each way"
        assert set(products) == {torch.float32}


@pytest.mark.parametrize(
    ("rows", "dtype", "is_faster"),
    [(wide._ROWS - 1, torch.bfloat16, True), (T, torch.float32, True), (T, torch.float16, True),
     (T, torch.bfloat16, False)],
)  # fmt: skip
def test_few_rows_other_dtypes_and_other_processors_are_left_to_torch(rows, dtype, is_faster, monkeypatch):
    monkeypatch.setattr(wide, "multiplies_fp32_faster", lambda: is_faster)
    x, w, bias = (each.to(dtype) for each in (made(rows, IN), made(OUT, IN, seed=1), made(OUT, seed=2)))
    g = made(rows, OUT, seed=3).to(dtype)
    for given in (None, bias):
        assert torch.equal(linear(x, w, given), F.linear(x, w, given))
        place = torch.empty(rows, OUT, dtype=dtype)
        linear(x, w, given, out=place)
        wanted = torch.mm(x, w.t()) if given is None else torch.addmm(given, x, w.t())
        assert torch.equal(place, wanted)
    assert torch.equal(linear_back(g, w), g @ w)


def test_a_plan_for_a_card_has_the_cards_products(products):
    with as_on_card(True):
        linear(made(T, IN), made(OUT, IN, seed=1), out=torch.empty(T, OUT, dtype=torch.bfloat16))
    assert products == [torch.bfloat16]


def test_no_rows_and_one_slice_are_no_special_cases():
    x, w = made(T, IN), made(7, IN, seed=1)
    assert_rounded_once(linear(x, w), x.double() @ w.double().t())
    assert linear(made(0, IN), w).shape == (0, 7)


def test_of_a_fake_matrix_three_slices_show_the_peak():
    """As `plan` sees it: the peak of all slices is that of three."""

    def peak(x, w, g):
        ledger = Ledger()
        with ledger, ledger.phase("forward"):
            linear(x, w)
            linear_back(g, w)
        return ledger.peak()

    rows = 200
    real = peak(made(T, IN), made(rows, IN, seed=1), made(T, rows))
    with FakeTensorMode():
        fake = peak(*(torch.empty(shape, dtype=torch.bfloat16) for shape in ((T, IN), (rows, IN), (T, rows))))
    assert fake == real


def test_the_product_counts_as_any_other():
    x, w = made(T, IN), made(OUT, IN, seed=1)
    with FlopCounterMode(display=False) as counter:
        linear(x, w)
    assert counter.get_total_flops() == 2 * T * IN * OUT


@pytest.mark.parametrize(
    ("machine", "vendor", "has_bf16", "has_tiles", "is_faster"),
    [
        ("x86_64", "GenuineIntel", True, True, False),
        ("x86_64", "GenuineIntel", True, False, True),
        ("x86_64", "GenuineIntel", False, False, True),
        ("x86_64", "AuthenticAMD", True, False, False),
        ("x86_64", "AuthenticAMD", False, False, True),
        ("aarch64", "", False, False, False),
    ],
)
def test_a_processor_is_known_by_what_it_multiplies(machine, vendor, has_bf16, has_tiles, is_faster, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(platform, "machine", lambda: machine)
    monkeypatch.setattr(wide, "_vendor", lambda: vendor)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: has_bf16)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: has_tiles)
    assert wide.multiplies_fp32_faster.__wrapped__() is is_faster
