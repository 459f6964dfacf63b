"""The op under every layer: it equals its plain twin and float64, and keeps nothing dense until backward."""

import weakref
from dataclasses import dataclass
from functools import partial

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from qlora_kit.base.dense import QuantizedLinear
from qlora_kit.base.formats import Quantization
from qlora_kit.lora import add_lora, lora_layers
from qlora_kit.ops import (
    KeptProducts,
    Update,
    dora_linear,
    lora_linear,
    lora_linear_plain,
    row_norms,
    share_input,
    sliced_linear,
)
from qlora_kit.ops.products import product

# Share of ||x|| ||W|| + s ||x|| ||A|| ||B|| that rounding may cost: about 10 ulp of fp32, and of bf16 about 1.3 (the
# base's product and the sum, for dA and dB a factor too); fp16 has three bits more. Norms of the factors, so that a
# draw that cancels does not decide.
BOUND = {torch.float32: 2e-6, torch.bfloat16: 5e-3, torch.float16: 7e-4}


@dataclass
class Case:
    """A quantised layer, an adapter and an input, with the float64 truth about them."""

    layer: QuantizedLinear
    x: Tensor
    bias: Tensor | None
    a_RI: Tensor
    b_OR: Tensor
    scale: float
    g: Tensor

    @property
    def parts(self) -> tuple:
        return self.layer.dense, self.bias, self.a_RI, self.b_OR, self.scale

    def run(self, op=lora_linear) -> dict[str, Tensor]:
        """Output and gradients of `op` at this case."""
        x, a, b = (t.detach().requires_grad_() for t in (self.x, self.a_RI, self.b_OR))
        y = op(x, self.layer.dense, self.bias, a, b, self.scale)
        y.backward(self.g)
        return {"y": y.detach(), "dx": x.grad, "dA": a.grad, "dB": b.grad}

    def truth(self) -> dict[str, Tensor]:
        """The formulas of the docstring in float64, written out."""
        x = self.x.double().reshape(-1, self.x.shape[-1])
        g = self.g.double().reshape(-1, self.g.shape[-1])
        w, a, b = self.layer.dense(self.x.dtype).double(), self.a_RI.double(), self.b_OR.double()
        y = x @ w.T + self.scale * x @ a.T @ b.T + (0 if self.bias is None else self.bias.double())
        dx = g @ w + self.scale * g @ b @ a
        truth = {"y": y.view(self.g.shape), "dx": dx.view(self.x.shape)}
        return truth | {"dA": self.scale * (g @ b).T @ x, "dB": self.scale * g.T @ (x @ a.T)}

    def bounds(self) -> dict[str, float]:
        """Norms of the products' factors, by result."""
        factors = {"x": self.x, "g": self.g, "a": self.a_RI, "b": self.b_OR}
        norm = {key: factor.double().norm().item() for key, factor in factors.items()}
        w, s = self.layer.dense(torch.float32).double().norm().item(), self.scale
        bias = 0 if self.bias is None else self.bias.double().norm().item() * self.x[..., 0].numel() ** 0.5
        update = s * norm["a"] * norm["b"]
        return {
            "y": norm["x"] * (w + update) + bias,
            "dx": norm["g"] * (w + update),
            "dA": s * norm["x"] * norm["g"] * norm["b"],
            "dB": s * norm["x"] * norm["g"] * norm["a"],
        }


def make(
    shape=(33, 127), rank=7, scale=1.5, dtype=torch.float32, kind="nf4", leading=(3, 5), seed=0, with_bias=True,
    size=1.0,
) -> Case:  # fmt: skip
    out, width = shape
    gen = torch.Generator().manual_seed(seed)
    draw = partial(torch.randn, generator=gen)
    layer = QuantizedLinear(draw(out, width) * size, None, Quantization(kind))
    x, g = draw(*leading, width).to(dtype), draw(*leading, out).to(dtype)
    bias = draw(out).to(dtype) if with_bias else None
    a, b = (draw(rank, width) / width**0.5).to(dtype), (draw(out, rank) * 0.3).to(dtype)
    return Case(layer, x, bias, a, b, scale, g)


def assert_accurate(case: Case) -> None:
    found, truth, bounds = case.run(), case.truth(), case.bounds()
    for key, bound in bounds.items():
        error = (found[key].double() - truth[key]).norm().item()
        assert error <= BOUND[case.x.dtype] * bound, f"{key}: {error:.3g} of {bound:.3g}"


# --- equal to the twin and to float64 ---


@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8"])
@pytest.mark.parametrize("dtype", BOUND)
def test_output_and_gradients_are_within_rounding_of_float64(kind, dtype):
    case = make(kind=kind, dtype=dtype)
    base = case.x.double() @ case.layer.dense(dtype).double().T + case.bias.double()
    assert (case.truth()["y"] - base).norm() > 0.05 * base.norm(), "the adapter must matter"
    assert_accurate(case)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    shape=st.tuples(st.integers(1, 300), st.integers(1, 300)),
    rank=st.integers(1, 64),
    scale=st.sampled_from([0.25, 1.0, 2.0, 16.0]),
    size=st.sampled_from([1e-6, 1e-2, 1.0, 1e4]),
    x_size=st.sampled_from([1e-6, 1.0, 1e4]),
    trouble=st.sampled_from(["none", "x is zero", "W is zero", "an outlier in x", "an outlier in W"]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),  # in fp16 such products overflow
    kind=st.sampled_from(["nf4", "fp4", "int8"]),
    seed=st.integers(0, 99),
)
def test_accuracy_holds_for_any_shape_rank_and_size(shape, rank, scale, size, x_size, trouble, dtype, kind, seed):
    size = max(size, 1e-2) if kind == "int8" else size  # int8 goes through fp16, as in bitsandbytes
    case = make(shape, rank, scale, dtype, kind, leading=(4,), seed=seed, with_bias=seed % 2 == 0, size=size)
    case.x = case.x * (0 if trouble == "x is zero" else x_size)
    if trouble == "an outlier in x":
        case.x.view(-1)[case.x.numel() // 2] = 1000 * x_size
    elif trouble in ("W is zero", "an outlier in W"):
        w_OI = case.layer.dense(torch.float32)
        if trouble == "W is zero":
            w_OI.zero_()
        else:
            w_OI.view(-1)[w_OI.numel() // 2] = min(1000 * size, 6e4)  # int8 goes through fp16
        case.layer = QuantizedLinear(w_OI, None, Quantization(kind))
    assert_accurate(case)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_it_equals_its_plain_twin(dtype):
    case = make(dtype=dtype)
    dense = case.layer.dense(torch.float32).to(dtype)
    case.layer.dense = lambda asked: dense.to(asked)
    found, wanted = case.run(), case.run(lora_linear_plain)
    # Both add the same terms in another order: a few ulp of the largest, not of each sum.
    tolerance = {torch.float64: 1e-14, torch.float32: 2e-6}[dtype]
    for key, bound in case.bounds().items():
        assert (found[key] - wanted[key]).norm().item() <= tolerance * bound, key


@pytest.mark.parametrize("with_bias", [True, False])
def test_gradcheck_in_float64(with_bias):
    gen = torch.Generator().manual_seed(0)
    shapes = [(2, 3, 5), (7, 5), (2, 5), (7, 2), (7,)]
    x, w, a, b, bias = (torch.randn(shape, generator=gen, dtype=torch.float64) for shape in shapes)
    x, a, b = (t.requires_grad_() for t in (x, a, b))
    bias = bias if with_bias else None
    assert torch.autograd.gradcheck(lambda x, a, b: lora_linear(x, lambda _: w, bias, a, b, 0.7), (x, a, b))
    assert torch.autograd.gradcheck(lambda x: lora_linear(x, lambda _: w, bias), (x,))


def test_output_is_linear_in_the_scale():
    case = make(scale=1.0)
    base, one = lora_linear(case.x, case.layer.dense, case.bias), case.run()["y"]
    case.scale = 1024.0  # a power of two: multiplying by it rounds nothing
    many = case.run()["y"]
    assert torch.allclose((many - base) / 1024, one - base, rtol=1e-4, atol=1e-5)  # differences of rounded sums


def test_b_of_zero_gives_the_base_bit_for_bit():
    case = make()
    base = lora_linear(case.x, case.layer.dense, case.bias)
    assert not torch.equal(case.run()["y"], base)
    case.b_OR = torch.zeros_like(case.b_OR)
    assert torch.equal(case.run()["y"], base)


# --- what is kept ---


def saved_by(fn) -> list[Tensor]:
    saved: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        fn()
    return saved


def test_nothing_dense_is_saved_for_backward():
    case = make((96, 128), leading=(2, 3))
    a, b, x = (t.detach().requires_grad_() for t in (case.a_RI, case.b_OR, case.x))
    arguments = (x, case.layer.dense, case.bias, a, b, case.scale)
    dense = case.layer.out_features * case.layer.in_features
    assert any(t.numel() == dense for t in saved_by(lambda: lora_linear_plain(*arguments))), "the twin does keep it"
    saved = saved_by(lambda: lora_linear(*arguments))
    assert saved
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in saved}
    allowed = sum(t.numel() * t.element_size() for t in (x, a, b)) + x[..., 0].numel() * a.shape[0] * 4
    assert sum(storages.values()) <= allowed


def test_no_decoded_weight_outlives_its_multiplication():
    case = make()
    decode, alive = case.layer.dense, []

    def watched(dtype):
        weight = decode(dtype)
        alive.append(weakref.ref(weight))
        return weight

    x = case.x.requires_grad_()
    y = lora_linear(x, watched, case.bias, case.a_RI.requires_grad_(), case.b_OR, 1.0)
    assert [ref() for ref in alive] == [None]
    y.backward(case.g)
    assert [ref() for ref in alive] == [None, None]


@pytest.mark.parametrize("is_autocast", [False, True])
@pytest.mark.parametrize("dtype", BOUND)
def test_query_key_and_value_keep_one_input_between_them_and_so_do_gate_and_up(dtype, is_autocast):
    model = tiny.quantized(tiny.llama(num_hidden_layers=1), dtype=dtype)
    add_lora(model, rank=4, dtype=dtype)
    tiny.wake(model)
    inside: list[str] = []
    kept: dict[str, set[int]] = {}
    for name, layer in lora_layers(model):
        leaf = name.rpartition(".")[2]
        layer.register_forward_pre_hook(lambda *_, leaf=leaf: inside.append(leaf))
        layer.register_forward_hook(lambda *_: inside.pop() and None)
    ids = tiny.tokens()

    def keep(tensor: Tensor) -> Tensor:
        if inside and tensor.shape[:-1].numel() == ids.numel() and tensor.shape[-1] >= 48:
            kept.setdefault(inside[-1], set()).add(tensor.untyped_storage().data_ptr())
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=is_autocast),
    ):
        loss = model.train()(ids, use_cache=False).logits.float().sum()  # its graph holds what was kept until the end
    # The first of each group keeps it for all.
    assert kept.keys() == {"q_proj", "o_proj", "gate_proj", "down_proj"}
    assert all(len(storages) == 1 for storages in kept.values())
    assert len(set.union(*kept.values())) == 4
    assert loss.requires_grad


def test_a_frozen_layer_keeps_nothing_at_all():
    case = make()
    x = case.x.requires_grad_()
    assert saved_by(lambda: lora_linear(x, case.layer.dense, case.bias)) == []


def test_under_autocast_what_the_update_sees_in_place_of_x_is_kept_in_16_bits():
    case = make()
    a = case.a_RI.requires_grad_()
    own = torch.randn(case.x.shape, generator=torch.Generator().manual_seed(5))
    with torch.autocast("cpu", torch.bfloat16):
        kept = saved_by(lambda: lora_linear(case.x, case.layer.dense, case.bias, a, case.b_OR, 1.0, own))
    assert [each.dtype for each in kept if each.shape == own.shape] == [torch.bfloat16]


def test_x_is_kept_only_if_a_is_trained():
    case = make()
    x, b = case.x.requires_grad_(), case.b_OR.requires_grad_()
    for a, is_kept in ((case.a_RI, False), (case.a_RI.clone().requires_grad_(), True)):
        sizes = [t.numel() for t in saved_by(partial(lora_linear, x, case.layer.dense, case.bias, a, b, 1.0))]
        assert (x.numel() in sizes) == is_kept


def test_a_block_keeps_every_product_but_its_last_which_nothing_waits_for():
    taken = []
    for context in KeptProducts().contexts():
        with context:
            results = [
                product(lambda number=number: taken.append(number) or torch.tensor(number)) for number in range(3)
            ]
        assert [each.item() for each in results] == [0, 1, 2]
    assert taken == [0, 1, 2, 2]


def test_the_weight_is_decoded_once_forward_and_once_backward():
    case = make()
    calls = []
    decode = case.layer.dense
    case.layer.dense = lambda dtype: calls.append(dtype) or decode(dtype)
    case.run()
    assert calls == [torch.float32, torch.float32]


# --- dropout and DoRA ---


def test_the_update_can_see_another_input_than_the_base():
    case = make()
    other = torch.randn(case.x.shape, generator=torch.Generator().manual_seed(5))
    leaves = {}
    for op in (lora_linear, lora_linear_plain):
        x, own, a, b = leaves[op] = [t.detach().clone().requires_grad_() for t in (case.x, other, case.a_RI, case.b_OR)]
        op(x, case.layer.dense, case.bias, a, b, case.scale, own).backward(case.g)
    for found, wanted in zip(leaves[lora_linear], leaves[lora_linear_plain], strict=True):
        assert (found.grad - wanted.grad).norm() < 2e-6 * wanted.grad.norm()
    assert not torch.allclose(leaves[lora_linear][0].grad, case.run()["dx"])


def dora_truth(x, w, bias, a, b, scale, magnitude):
    """DoRA as its paper writes it, with the whole merged weight; the norm is a constant of the backward pass."""
    merged = w + scale * b @ a
    return x @ (magnitude / merged.norm(dim=1).detach())[:, None].mul(merged).T + bias


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 2e-6), (torch.bfloat16, 2e-2)])
def test_dora_is_the_papers_formula_with_its_gradients(dtype, bound):
    """Relative norms; bf16: the product, its factor, the bias and x A^T are each rounded to 8 bits."""
    case = make(dtype=dtype)
    w = case.layer.dense(dtype).double()
    square_O = case.layer.dense(torch.float32).square().sum(1)
    magnitude_O = square_O.sqrt() * torch.linspace(0.5, 1.5, len(square_O))
    leaves = [t.detach().clone().requires_grad_() for t in (case.x, case.a_RI, case.b_OR, magnitude_O)]
    x, a, b, m = leaves
    y = dora_linear(x, case.layer.dense, case.bias, a, b, case.scale, m, square_O)
    y.backward(case.g)
    exact = [t.detach().double().requires_grad_() for t in leaves]
    wanted = dora_truth(exact[0], w, case.bias.double(), exact[1], exact[2], case.scale, exact[3])
    wanted.backward(case.g.double())
    plain = lora_linear(case.x, *case.parts).double()
    assert (wanted - plain).norm() > 0.1 * plain.norm()
    for found, exactly in [(y, wanted), *((leaf.grad, twin.grad) for leaf, twin in zip(leaves, exact, strict=True))]:
        assert (found.double() - exactly).norm() < bound * exactly.norm()


def test_doras_norms_cost_no_decoding():
    case = make()
    calls = []
    square_O = case.layer.dense(torch.float32).square().sum(1)
    x, a, b = (t.detach().requires_grad_() for t in (case.x, case.a_RI, case.b_OR))

    def decode(dtype):
        calls.append(dtype)
        return case.layer.dense(dtype)

    dora_linear(x, decode, None, a, b, case.scale, square_O.sqrt(), square_O).backward(case.g)
    assert calls == [torch.float32, torch.float32]


@settings(max_examples=50, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 60), st.integers(1, 60)),
    rank=st.integers(1, 16),
    scale=st.floats(1e-3, 1e2),
    seed=st.integers(0, 9999),
)
def test_row_norms_are_those_of_the_dense_sum(shape, rank, scale, seed):
    """Against float64, to 1e-5 of ||W_o|| + scale |B_o| ||A||: where these terms cancel, what is left is rounding."""
    draw = partial(torch.randn, generator=torch.Generator().manual_seed(seed))
    w, a, b = draw(*shape), draw(rank, shape[1]), draw(shape[0], rank)
    found = row_norms(w.square().sum(1), a @ w.T, a, b, scale)
    update = scale * b.double() @ a.double()
    size = w.double().norm(dim=1) + scale * b.double().abs() @ a.double().norm(dim=1)
    squares = (found.double().square() - (w.double() + update).square().sum(1)).abs()
    assert (squares <= 1e-5 * size.square()).all()


def test_a_row_of_zeros_stays_zero_and_is_not_nan():
    zeros, a, b = torch.zeros(3), torch.randn(2, 5), torch.zeros(3, 2)
    y = dora_linear(torch.randn(4, 5), lambda dtype: torch.zeros(3, 5, dtype=dtype), None, a, b, 1.0, zeros, zeros)
    assert torch.equal(y, torch.zeros(4, 3))


# --- the ways in which a model calls it ---


def test_under_no_grad_the_output_is_the_same_and_no_graph_is_made():
    case = make()
    case.a_RI.requires_grad_()
    with torch.no_grad():
        y = lora_linear(case.x, *case.parts)
    assert not y.requires_grad
    with torch.inference_mode():
        z = lora_linear(case.x, *case.parts)
    assert torch.equal(y, z)
    assert torch.equal(y, case.run()["y"])


@pytest.mark.parametrize("trained", ["x", "a", "b", "xa", "xb", "ab"])
def test_each_gradient_is_the_same_whatever_else_needs_one(trained):
    case = make()
    all_of_them = dict(zip("xab", list(case.run().values())[1:], strict=True))
    leaves = {"x": case.x.clone(), "a": case.a_RI.clone(), "b": case.b_OR.clone()}
    for key in trained:
        leaves[key].requires_grad_()
    y = lora_linear(leaves["x"], case.layer.dense, case.bias, leaves["a"], leaves["b"], case.scale)
    y.backward(case.g)
    for key, leaf in leaves.items():
        assert (leaf.grad is not None) == (key in trained)
        assert leaf.grad is None or torch.equal(leaf.grad, all_of_them[key])


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_changes_no_bit(reentrant):
    case = make()
    plain = case.run()
    again = case.run(lambda *arguments: checkpoint(lora_linear, *arguments, use_reentrant=reentrant))
    assert plain["dA"].norm() > 0
    for key, value in plain.items():
        assert torch.equal(value, again[key]), key


def test_two_forwards_before_the_backwards_do_not_disturb_each_other():
    one, two = make(seed=1), make(seed=2)
    wanted = [one.run()["dx"], two.run()["dx"]]
    assert not torch.equal(*wanted)
    xs = [case.x.requires_grad_() for case in (one, two)]
    ys = [lora_linear(case.x, *case.parts) for case in (one, two)]
    for case, y, x, dx in reversed(list(zip((one, two), ys, xs, wanted, strict=True))):
        assert torch.equal(torch.autograd.grad(y, x, case.g)[0], dx)


def test_the_same_layer_called_twice_adds_its_gradients():
    case = make()
    a = case.a_RI.requires_grad_()
    xs = [case.x, case.x.flip(0)]
    apart = [torch.autograd.grad(lora_linear(x, *case.parts), a, case.g)[0] for x in xs]
    together = torch.autograd.grad(sum(lora_linear(x, *case.parts) for x in xs), a, case.g)[0]
    assert torch.equal(together, apart[0] + apart[1])


def test_a_layer_whose_result_nobody_wants_has_no_part_in_what_goes_back_to_those_with_its_input():
    used, idle = make(seed=0), make(seed=1)
    x, *matrices = (t.clone().requires_grad_() for t in (used.x, used.a_RI, used.b_OR, idle.a_RI, idle.b_OR))
    layers = zip((used, idle), (matrices[:2], matrices[2:]), strict=True)
    first, _ = share_input(x, [Update(case.layer.dense, *pair, used.scale) for case, pair in layers])
    first.product(x, used.bias).backward(used.g)
    alone = used.run()
    for name, grad in (("dx", x.grad), ("dA", matrices[0].grad), ("dB", matrices[1].grad)):
        torch.testing.assert_close(grad, alone[name], rtol=1e-5, atol=1e-5)  # products of another width
    assert not any(each.grad is not None and each.grad.any() for each in matrices[2:])


@pytest.mark.parametrize("leading", [(), (5,), (1, 5), (2, 3), (2, 1, 3), (0,), (2, 0)])
def test_any_number_of_leading_axes(leading):
    case = make(leading=leading)
    found, truth = case.run(), case.truth()
    assert found["y"].shape == (*leading, 33)
    assert found["dx"].shape == case.x.shape
    for key, value in truth.items():
        torch.testing.assert_close(found[key].double(), value, rtol=1e-5, atol=1e-5)


def test_inputs_that_are_not_contiguous():
    case = make(leading=(4, 6))
    wanted = case.run()
    for name in ("x", "g", "a_RI", "b_OR"):
        tensor = getattr(case, name)
        setattr(case, name, tensor.transpose(0, -1).contiguous().transpose(0, -1))
        assert not getattr(case, name).is_contiguous()
    found = case.run()
    for key, value in wanted.items():
        torch.testing.assert_close(found[key], value, rtol=1e-5, atol=1e-5)  # another order of summing


def test_a_gradient_that_was_expanded_is_taken():
    case = make()
    x = case.x.requires_grad_()
    lora_linear(x, *case.parts).sum().backward()
    case.g = torch.ones_like(case.g)
    torch.testing.assert_close(x.grad, case.run()["dx"], rtol=1e-5, atol=1e-5)


def test_autocast_computes_in_its_dtype_and_returns_gradients_in_theirs():
    case = make()
    x, a, b = (t.requires_grad_() for t in (case.x, case.a_RI, case.b_OR))
    with torch.autocast("cpu", torch.bfloat16):
        y = lora_linear(x, *case.parts)
    assert y.dtype == torch.bfloat16
    y.backward(case.g.bfloat16())
    assert {t.grad.dtype for t in (x, a, b)} == {torch.float32}
    truth, bounds = case.truth(), case.bounds()
    for key, value in {"y": y.detach(), "dx": x.grad, "dA": a.grad, "dB": b.grad}.items():
        # Weight and operands are cut to bf16 here as well, the truth holds them in fp32: twice the bound.
        assert (value.double() - truth[key]).norm() <= 2 * BOUND[torch.bfloat16] * bounds[key], key


@pytest.mark.parametrize("has_own", [False, True])
def test_autocast_is_the_same_as_a_cast_before_bit_for_bit(has_own):
    case = make()
    own = torch.randn(case.x.shape, generator=torch.Generator().manual_seed(5)) if has_own else None
    results = []
    for is_autocast in (True, False):
        leaves = [None if t is None else t.clone().requires_grad_() for t in (case.x, own, case.a_RI, case.b_OR)]
        with torch.autocast("cpu", torch.bfloat16, enabled=is_autocast):
            x, seen = (t if t is None or is_autocast else t.bfloat16() for t in leaves[:2])
            y = lora_linear(x, case.layer.dense, case.bias, *leaves[2:], case.scale, seen)
        y.backward(case.g.bfloat16())
        results.append([y.detach(), *(leaf.grad for leaf in leaves if leaf is not None)])
    assert results[0][0].dtype == torch.bfloat16 != results[0][1].dtype
    assert all(g.norm() > 0 for g in results[0])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_adapters_in_bf16_meet_an_fp32_input_in_fp32():
    case = make()
    case.a_RI, case.b_OR = case.a_RI.bfloat16(), case.b_OR.bfloat16()
    found = case.run()
    assert found["y"].dtype == found["dx"].dtype == torch.float32
    assert found["dA"].dtype == found["dB"].dtype == torch.bfloat16
    error = (found["y"].double() - case.truth()["y"]).norm()
    assert error <= BOUND[torch.float32] * case.bounds()["y"]


def test_a_second_derivative_is_refused_and_not_wrong():
    case = make()
    x = case.x.requires_grad_()
    (dx,) = torch.autograd.grad(lora_linear(x, *case.parts).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


@pytest.mark.parametrize("leading", [(4,), (2, 3), (2, 1, 3)])
@pytest.mark.parametrize("is_adapted", [True, False])
def test_the_output_may_be_added_to_in_place_as_that_of_any_linear_layer(is_adapted, leading):
    case = make(leading=leading)
    x = case.x.clone().requires_grad_()
    pair = (case.a_RI, case.b_OR) if is_adapted else (None, None)
    y = lora_linear(x, case.layer.dense, case.bias, *pair, case.scale)
    before = y.detach().clone()
    y += 1.0
    y[..., :2] = 0.0
    torch.testing.assert_close(y[..., 2:], before[..., 2:] + 1)
    y.backward(case.g)
    cut = case.g.clone()
    cut[..., :2] = 0
    again = case.x.clone().requires_grad_()
    lora_linear_plain(again, case.layer.dense, case.bias, *pair, case.scale).backward(cut)
    torch.testing.assert_close(x.grad, again.grad, rtol=1e-4, atol=1e-4)


def test_an_input_changed_in_place_after_forward_is_noticed():
    case = make()
    x = case.x.clone()
    y = lora_linear(x, case.layer.dense, None, case.a_RI.requires_grad_(), case.b_OR, 1.0)
    x.zero_()
    with pytest.raises(RuntimeError, match="inplace"):
        y.sum().backward()


def test_it_survives_torch_compile():
    """With the eager backend: what is claimed is that tracing does not break it, not that it is faster."""
    case = make((16, 32), rank=2, leading=(3,))
    wanted = case.run()
    module = nn.ModuleList([case.layer])
    with torch.no_grad():
        compiled = torch.compile(module[0], backend="eager")
        assert torch.equal(compiled(case.x), case.layer(case.x))

    @partial(torch.compile, backend="eager")
    def op(x, dense, bias, a, b, scale):
        return lora_linear(x, dense, bias, a, b, scale)

    found = case.run(op)
    for key, value in wanted.items():
        assert torch.equal(found[key], value), key


@pytest.mark.slow
def test_it_survives_torch_compile_to_machine_code():
    case = make((16, 32), rank=2, leading=(3,))
    wanted, found = case.run(), case.run(torch.compile(lora_linear))
    for key, value in wanted.items():
        torch.testing.assert_close(found[key], value, rtol=1e-5, atol=1e-5)


# --- a tall matrix in slices ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("leading", [(5,), (2, 3), (0,), (2, 0)])
@pytest.mark.parametrize("step", [1, 7, 96, 1000])
def test_a_matrix_in_slices_is_multiplied_as_a_whole(step, leading, dtype, monkeypatch):
    monkeypatch.setattr("qlora_kit.ops.slices.SLICE_ELEMENTS", step * 24)
    gen = torch.Generator().manual_seed(0)
    draw = partial(torch.randn, generator=gen)
    w, x, bias, g = (draw(*shape).to(dtype) for shape in ((97, 24), (*leading, 24), (97,), (*leading, 97)))
    read = []

    def rows(span, asked):
        read.append(span.stop - span.start)
        return w[span].to(asked)

    x.requires_grad_()
    y = sliced_linear(x, rows, (97, 24), bias)
    y.backward(g)
    assert sum(read) == 2 * 97
    assert max(read) == min(step, 97)
    wanted = x.detach().double() @ w.double().T + bias.double()
    # A rounding to the dtype each, as in the product with the whole matrix; fp32 adds 97 terms.
    tolerance = {torch.float32: 1e-6, torch.bfloat16: 5e-3}[dtype]
    assert (y.detach().double() - wanted).norm() <= tolerance * wanted.norm()
    dx = g.double() @ w.double()
    assert (x.grad.double() - dx).norm() <= tolerance * dx.norm()
