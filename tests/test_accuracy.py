"""How far 16 and 32 bits are from float64 with the same decoded weights: beside the plain path and PEFT, and in models.

In models the truth is a float64 twin: every quantised weight read out once, every formula left to plain torch.
"""

import copy

import bitsandbytes as bnb
import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F

from qlora_kit.base.dense import QuantizedLinear, decode
from qlora_kit.base.experts import experts_forward
from qlora_kit.base.formats import Quantization
from qlora_kit.lora import add_lora, lora_layers
from qlora_kit.lora.layer import LoraExperts, LoraLinear
from qlora_kit.ops import lora_linear, lora_linear_plain

TOKENS, WIDTH, OUT, RANK, SCALE = 32, 320, 192, 16, 1.5
RESULTS = ("y", "dx", "dA", "dB")


# --- one layer, beside the plain path and PEFT ---


def draw_layer(seed: int) -> tuple[Tensor, dict[str, Tensor]]:
    """An fp32 weight, and input, adapter and gradient in bf16; base and update weigh about the same."""
    gen = torch.Generator().manual_seed(seed)
    shapes = {"x": (TOKENS, WIDTH), "a": (RANK, WIDTH), "b": (OUT, RANK), "g": (TOKENS, OUT)}
    drawn = {name: torch.randn(shape, generator=gen) for name, shape in shapes.items()}
    drawn["a"] /= WIDTH**0.5
    drawn["b"] *= 0.3
    weight_OI = torch.randn(OUT, WIDTH, generator=gen) / WIDTH**0.5
    return weight_OI, {name: tensor.bfloat16() for name, tensor in drawn.items()}


def results(function, x: Tensor, a: Tensor, b: Tensor, g: Tensor) -> dict[str, Tensor]:
    leaves = [t.clone().requires_grad_() for t in (x, a, b)]
    y = function(*leaves)
    grads = torch.autograd.grad(y, leaves, g)
    return dict(zip(RESULTS, (y.detach(), *grads), strict=True))


def pefts_layer(weight_OI: Tensor) -> nn.Module:
    """PEFT's layer on bitsandbytes' Linear4bit, in training mode, its repacking of weights switched off."""
    base = bnb.nn.Linear4bit(WIDTH, OUT, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4")
    base.weight = bnb.nn.Params4bit(weight_OI.clone(), requires_grad=False, quant_type="nf4", compress_statistics=True)
    base = base.to("cpu")
    base.support_avx512bf16_for_cpu = False
    config = LoraConfig(r=RANK, lora_alpha=SCALE * RANK, target_modules=["0"])
    return get_peft_model(nn.Sequential(base), config).train().base_model.model[0]


def pefts_results(weight_OI: Tensor, x: Tensor, a: Tensor, b: Tensor, g: Tensor) -> dict[str, Tensor]:
    layer = pefts_layer(weight_OI)
    parameters = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    x = x.clone().requires_grad_()
    for parameter, values in zip(parameters, (a, b), strict=True):
        parameter.data = values.clone()
    y = layer(x)
    y.backward(g)
    return dict(zip(RESULTS, (y.detach(), x.grad, *(p.grad for p in parameters)), strict=True))


def medians(found: dict[str, Tensor], truth: dict[str, Tensor]) -> dict[str, float]:
    return {name: (found[name].double() - truth[name]).abs().median().item() for name in RESULTS}


@pytest.mark.parametrize("seed", range(3))
def test_the_median_error_in_bf16_is_at_most_a_tenth_above_the_plain_paths_and_pefts(seed):
    """Of thousands of elements each. PEFT's adapters and their products are fp32 unless it is told otherwise: output
    and dx are held against that, too; dA and dB not, which are fp32 there and bf16 here."""
    weight_OI, drawn = draw_layer(seed)
    layer = QuantizedLinear(weight_OI, None, Quantization("nf4"))
    wide = {name: tensor.double() for name, tensor in drawn.items()}
    w = layer.dense(torch.bfloat16)  # what all of them multiply with
    truth = results(lambda x, a, b: x @ w.double().T + SCALE * x @ a.T @ b.T, **wide)
    base_only = (truth["y"] - wide["x"] @ w.double().T).abs().median()
    assert base_only > 0.2 * truth["y"].abs().median(), "the adapter matters"
    assert all(tensor.numel() >= 256 for tensor in truth.values())
    ours, plain = (
        medians(results(lambda x, a, b, op=op: op(x, layer.dense, None, a, b, SCALE), **drawn), truth)
        for op in (lora_linear, lora_linear_plain)
    )
    narrow = medians(pefts_results(weight_OI, **drawn), truth)
    in_fp32 = drawn | {"a": drawn["a"].float(), "b": drawn["b"].float()}
    default = medians(pefts_results(weight_OI, **in_fp32), truth)
    for name in RESULTS:
        assert 0 < ours[name] <= 1.1 * min(plain[name], narrow[name]), name
    assert ours["y"] <= 1.1 * default["y"]
    assert ours["dx"] <= 1.1 * default["dx"]


# --- models, beside their float64 twins ---


class Exact(nn.Module):
    """A linear layer and its update in float64, in plain torch."""

    def __init__(self, layer: LoraLinear) -> None:
        super().__init__()
        self.weight_OI = decode(layer.base, torch.float32).double()
        adapter = layer.adapter("default")
        self.a_RI, self.b_OR = (nn.Parameter(p.detach().double()) for p in (adapter.a_RI, adapter.b_OR))
        self.scale = adapter.scale

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight_OI + self.scale * self.b_OR @ self.a_RI)


class ExactExperts(nn.Module):
    """The experts of a layer and their updates likewise."""

    def __init__(self, layer: LoraExperts) -> None:
        super().__init__()
        stack, adapter = layer.base, layer.adapter("default")
        self.weight_EOI = torch.stack([stack.dense(e, torch.float32).double() for e in range(stack.experts)])
        self.a_RI, self.b_OR = (nn.Parameter(p.detach().double()) for p in (adapter.a_RI, adapter.b_OR))
        self.scale = adapter.scale

    def weights(self) -> Tensor:
        return self.weight_EOI + self.scale * self.b_OR @ self.a_RI


def exact_twin(model: nn.Module) -> nn.Module:
    twin = copy.deepcopy(model)
    for name, layer in list(lora_layers(twin)):
        twin.set_submodule(name, ExactExperts(layer) if isinstance(layer, LoraExperts) else Exact(layer))
    return twin.double()


def adapter_gradients(model: nn.Module) -> dict[str, Tensor]:
    ours = {name.replace("adapters.default.", ""): p.grad for name, p in model.named_parameters() if p.requires_grad}
    return {name: grad for name, grad in ours.items() if name.endswith(("a_RI", "b_OR"))}


def assert_near(found: dict[str, Tensor], truth: dict[str, Tensor], bound: float) -> None:
    assert found.keys() == truth.keys() != set()
    for name, wanted in truth.items():
        assert wanted.norm() > 0
        assert tiny.relative(found[name], wanted) < bound, f"{name}: {tiny.relative(found[name], wanted):.3g}"


def tuned(make, dtype: torch.dtype, **lora: object) -> nn.Module:
    model = tiny.quantized(make(), dtype=dtype)
    add_lora(model, **{"rank": 4, "alpha": 8, "dtype": dtype, **lora})
    tiny.wake(model)
    return model.train()


# In bf16 the decoded weight is rounded as well, and each of a handful of operations adds its 2^-9: relative errors of
# about 1 % after a layer, 3 % after a model of two.
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 2e-6), (torch.bfloat16, 1.5e-2)])
@pytest.mark.parametrize("make", [tiny.mixtral, tiny.qwen3_moe, tiny.gpt_oss])
def test_experts_with_adapters_are_within_rounding_of_float64(make, dtype, bound):
    model = tuned(make, dtype, targets="experts")
    ours = model.model.layers[0].mlp.experts
    exact = exact_twin(ours)
    gen = torch.Generator().manual_seed(0)
    x = torch.randn(40, 48, generator=gen).to(dtype)
    index = torch.stack([torch.randperm(ours.num_experts, generator=gen)[:2] for _ in range(40)])
    shares = torch.rand(40, 2, generator=gen).to(dtype)
    g = torch.randn(40, 48, generator=gen).to(dtype)

    leaf = x.clone().requires_grad_()
    y = experts_forward(ours, leaf, index, shares)
    y.backward(g)
    wide = x.double().requires_grad_()
    wanted = torch.zeros(40, 48, dtype=torch.float64)
    up, down = ((exact.gate_up_proj if exact.has_gate else exact.up_proj).weights(), exact.down_proj.weights())
    for token in range(40):
        for expert, share in zip(index[token], shares[token].double(), strict=True):
            h = up[expert] @ wide[token]
            h = h + exact.gate_up_proj_bias[expert] if exact.has_bias else h
            out = down[expert] @ exact._apply_gate(h[None])[0]
            out = out + exact.down_proj_bias[expert] if exact.has_bias else out
            wanted = wanted.index_add(0, torch.tensor([token]), share * out[None])
    wanted.backward(g.double())
    assert_near({"y": y.detach(), "dx": leaf.grad} | adapter_gradients(ours),
                {"y": wanted.detach(), "dx": wide.grad} | adapter_gradients(exact), bound)  # fmt: skip


class Plain(nn.Module):
    """A quantised linear layer and its update in plain torch, in the dtype of its input."""

    def __init__(self, layer: LoraLinear) -> None:
        super().__init__()
        self.base, adapter = layer.base, layer.adapter("default")
        self.a_RI, self.b_OR, self.scale = adapter.a_RI, adapter.b_OR, adapter.scale

    def forward(self, x: Tensor) -> Tensor:
        return lora_linear_plain(x, self.base.dense, self.base.bias, self.a_RI, self.b_OR, self.scale)


# Scores of some tens are rounded to bf16 (2^-9 of them is a tenth), and softmax makes of that a relative error. In fp32
# query, key and value take x A^T as one product, for which the BLAS adds up in another order: 1.22 times the error of
# three over 96 draws, and exactly the error of the plain path where they take it one by one.
@pytest.mark.parametrize(("dtype", "bound", "ratio"), [(torch.float32, 2e-5, 1.3), (torch.bfloat16, 0.2, 1.0)])
def test_attention_with_a_peaked_softmax_is_as_near_to_float64_as_the_plain_path(dtype, bound, ratio):
    """Where one key takes nearly all, scores are large and the gradients of query and key are small differences."""
    model = tuned(lambda: tiny.llama(num_hidden_layers=1), dtype, targets="attention")
    ours = model.model.layers[0].self_attn
    exact, plain = exact_twin(ours), copy.deepcopy(ours)
    for name, layer in list(lora_layers(plain)):
        plain.set_submodule(name, Plain(layer))
    errors, shares = {ours: [], plain: []}, []
    for seed in range(48):
        gen = torch.Generator().manual_seed(seed)
        x = (20 * torch.randn(2, 24, 48, generator=gen)).to(dtype)
        g = torch.randn(2, 24, 48, generator=gen).to(dtype)
        rotary = model.model.rotary_emb(x, torch.arange(24)[None])

        def run(attention, wide, x=x, g=g, rotary=rotary):
            leaf = x.detach().to(wide, copy=True).requires_grad_()
            attention.zero_grad()
            y, shares = attention(leaf, tuple(t.to(wide) for t in rotary), attention_mask=None)
            y.backward(g.to(wide))
            return {"y": y.detach(), "dx": leaf.grad, **adapter_gradients(attention)}, shares

        exact.config._attn_implementation = "sdpa"
        truth, _ = run(exact, torch.float64)
        for attention, found in errors.items():
            result, _ = run(attention, dtype)
            found.append([tiny.relative(result[name], wanted) for name, wanted in truth.items()])
        exact.config._attn_implementation = "eager"  # which gives its shares away, in fp32
        shares.append(run(exact, torch.float64)[1])
    assert torch.stack(shares).amax(-1).mean() > 0.9
    near, far = (torch.tensor(found) for found in errors.values())
    assert (near.median(0).values < bound).all()
    assert (near.mean(0) <= ratio * far.mean(0)).all()


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 6e-2)])
def test_after_an_evaluation_gradients_are_still_within_rounding_of_float64(dtype, bound):
    """Of a model of two blocks; its loss is taken in fp32 on both sides."""
    model = tuned(tiny.llama, dtype)
    twin = exact_twin(model)
    assert tiny.relative(tiny.logits(model.eval()), tiny.logits(twin)) < bound
    model.generate(tiny.tokens(rows=1), max_new_tokens=3, do_sample=False)
    tiny.train_step(model.train())
    tiny.train_step(twin)
    assert_near(adapter_gradients(model), adapter_gradients(twin), bound)
