"""Norms, gated MLPs and rotary embeddings as one operator each, in C, Triton and plain torch; layers with one input."""

import copy
import pickle
import threading

import pytest
import tiny
import torch
import torch.nn.functional as F
import transformers
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.models.llama import modeling_llama
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from qlora_kit.base import fuse as fuse_module
from qlora_kit.base import kernels
from qlora_kit.base.dense import QuantizedLinear
from qlora_kit.base.formats import BLOCK_SIZES, Quantization, decode_4bit, quantize
from qlora_kit.base.fuse import fuse
from qlora_kit.lora import add_lora, lora_layers, use_adapter
from qlora_kit.ops import (
    gated,
    gated_plain,
    native,
    rms_norm,
    rms_norm_plain,
    rotary,
    rotary_plain,
    share_input,
)

pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")  # by numpy, for Triton
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FORMS = ("twice", "once", "offset")
EPS = {dtype: torch.finfo(dtype).eps for dtype in DTYPES}


@pytest.fixture(params=["compiled", "plain", "triton"])
def way(request, monkeypatch):
    """By the compiled kernels, by torch's operators alone, and by the kernels of a CUDA device."""
    if request.param == "plain":
        tiny.uncompiled(monkeypatch)
    elif request.param == "triton":
        tiny.by_triton(monkeypatch)
    else:
        assert native.library() is not None, "these tests want a C compiler"
    return request.param


def draw(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def with_gradients(function, inputs, grad):
    """What a function gives, and the gradients of its inputs."""
    inputs = [each.detach().requires_grad_() for each in inputs]
    out = function(*inputs)
    out.backward(grad.to(out.dtype))
    return out.detach(), *(each.grad for each in inputs)


def error(found, truth):
    return ((found.double() - truth).norm() / truth.norm()).item()


# --- the operators ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", [(2, 5, 48), (7, 1), (3, 1, 33), (300, 512)])
def test_a_norm_and_its_gradient_are_within_rounding_of_float64(shape, form, dtype, way):
    x, w, g = draw(*shape, dtype=dtype), draw(shape[-1], seed=1, dtype=dtype), draw(*shape, seed=2, dtype=dtype)
    y, dx = with_gradients(lambda x: rms_norm(x, w, 1e-6, form), [x], g)
    x64 = x.double().requires_grad_()
    normed = x64 * torch.rsqrt(x64.square().mean(-1, keepdim=True) + 1e-6)
    truth = normed * (w.double() + (form == "offset"))
    truth.backward(g.double())
    assert y.dtype == dx.dtype == dtype
    # Each value is rounded once or twice; fp32 sums of 512 values round some more.
    assert error(y, truth.detach()) < 1.5 * EPS[dtype]
    if shape[-1] > 1:  # a single value has the norm of itself: its gradient is what epsilon leaves of it
        assert error(dx, x64.grad) < 2 * EPS[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gate", ["silu", "gelu"])
def test_a_gated_product_and_its_gradients_are_within_rounding_of_float64(gate, dtype, way):
    g, u, grad = (4 * draw(3, 5, 333, seed=seed).to(dtype) for seed in range(3))
    found = with_gradients(lambda g, u: gated(g, u, gate), [g, u], grad)
    truth = with_gradients(lambda g, u: gated_plain(g, u, gate), [g.double(), u.double()], grad)
    for each, exact in zip(found, truth, strict=True):
        assert each.dtype == dtype
        assert error(each, exact) < 2 * EPS[dtype]  # two roundings, and in fp32 those of the exponential


@pytest.mark.parametrize(
    "value",
    [0.0, -0.0, 1e-30, 30.0, -30.0, 89.0, -89.0, 1e4, -1e4, 3e38, -3e38, float("inf"), -float("inf"), float("nan")],
)
@pytest.mark.parametrize("gate", ["silu", "gelu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_far_from_zero_a_gate_is_open_or_shut_as_torchs_own(dtype, gate, value, way):
    g, u, grad = torch.full((40,), value, dtype=dtype), torch.ones(40, dtype=dtype), torch.ones(40, dtype=dtype)
    found = with_gradients(lambda g, u: gated(g, u, gate), [g, u], grad)
    wanted = with_gradients(lambda g, u: gated_plain(g, u, gate), [g, u], grad)
    for each, other in zip(found, wanted, strict=True):
        if torch.isfinite(each).all() and torch.isnan(other).all():
            assert gate == "gelu"
            assert abs(value) > 1e12  # torch's own gradient there is 0 times an infinite x^3
            continue
        # What is left of a shut gate, 2e-37 and less, may be nothing in one of the two.
        torch.testing.assert_close(each, other, rtol=2 * EPS[dtype], atol=1e-35, equal_nan=True)


HEADS = [(2, 5, 3, 8), (1, 7, 1, 2), (3, 4, 2, 66), (1, 40, 40, 64)]


def turned(shape, dtype, rows):
    """Queries, the angles of some rows (no sine and cosine of one angle, so that each number is told from the others),
    and a gradient."""
    _, tokens, _, width = shape
    angles = (draw(rows, tokens, width, seed=seed, dtype=dtype) for seed in (1, 2))
    return draw(*shape, dtype=dtype), *angles, draw(*shape, seed=3, dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", HEADS)
@pytest.mark.parametrize("shared", [True, False])
def test_a_rotary_embedding_rounds_as_torch_does_and_its_gradient_is_within_rounding_of_float64(
    shape, shared, dtype, way
):
    x, cos, sin, grad = turned(shape, dtype, 1 if shared else shape[0])
    y, dx = with_gradients(lambda x: rotary(x, cos, sin), [x], grad)
    truth = with_gradients(lambda x: rotary_plain(x, cos.double(), sin.double()), [x.double()], grad)
    assert torch.equal(y, rotary_plain(x, cos, sin))
    assert error(y, truth[0]) > 0 or dtype == torch.float32
    assert error(dx, truth[1]) < 1.5 * EPS[dtype]  # two products and their sum, rounded one by one
    assert y.dtype == dx.dtype == dtype


def test_a_rotary_embedding_keeps_its_angles_alone():
    x, cos, sin, _ = turned(HEADS[0], torch.bfloat16, 1)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
        rotary(x.requires_grad_(), cos, sin)
    assert {*kept} == {cos.data_ptr(), sin.data_ptr()}


@pytest.mark.parametrize("value", [float("inf"), float("nan"), 1e30, 0.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_no_number_stays_none_in_a_norm(dtype, value, way):
    x, w = draw(2, 48, dtype=dtype), draw(48, seed=1, dtype=dtype)
    x[0, 5] = value
    torch.testing.assert_close(
        rms_norm(x, w, 1e-6), rms_norm_plain(x, w, 1e-6), rtol=4 * EPS[dtype], atol=0, equal_nan=True
    )


def test_operators_take_tensors_that_are_not_contiguous(way):
    x, w = draw(6, 4, 48).transpose(0, 1), draw(48, seed=1)
    assert not x.is_contiguous()
    g = draw(6, 4, 48, seed=2).transpose(0, 1)
    angles = g[None, :, 0], g[None, :, 1]
    for function, plain in [
        (lambda x: rms_norm(x, w, 1e-6), lambda x: rms_norm_plain(x, w, 1e-6)),
        (lambda x: gated(x, g, "silu"), lambda x: gated_plain(x, g, "silu")),
        (lambda x: gated(g, x, "gelu"), lambda x: gated_plain(g, x, "gelu")),
        (lambda x: rotary(x[None], *angles)[0], lambda x: rotary_plain(x[None], *angles)[0]),
    ]:
        for found, wanted in zip(with_gradients(function, [x], g), with_gradients(plain, [x], g), strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("threads", [1, 2])
def test_compiled_kernels_give_the_same_bits_with_more_threads(threads):
    x, w = draw(64, 512, dtype=torch.bfloat16), draw(512, seed=1, dtype=torch.bfloat16)
    before, alone = torch.get_num_threads(), None
    try:
        for count in (1, threads):
            torch.set_num_threads(count)
            made = [*with_gradients(lambda x: rms_norm(x, w, 1e-6), [x], x), gated(x, x, "silu")]
            heads, angles = x.view(2, 32, 8, 64), (x[None, :32, :64], x[None, 32:, :64])
            made += with_gradients(lambda x, angles=angles: rotary(x, *angles), [heads], heads)
            alone = made if alone is None else alone
            assert all(map(torch.equal, made, alone))
    finally:
        torch.set_num_threads(before)


def test_a_norm_keeps_its_input_alone_and_a_gate_its_two():
    x, w = draw(4, 48, dtype=torch.bfloat16).requires_grad_(), draw(48, dtype=torch.bfloat16)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        rms_norm(x, w, 1e-6)
        assert {t.data_ptr() for t in kept if t.numel() > 48} == {x.data_ptr()}
        kept.clear()
        u = x.detach().clone().requires_grad_()
        gated(x, u, "silu")
    assert {t.data_ptr() for t in kept} == {x.data_ptr(), u.data_ptr()}


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_the_compiled_decoder_gives_the_bits_of_bitsandbytes(kind, double_quant, monkeypatch):
    assert native.library() is not None
    for block_size in BLOCK_SIZES:
        for shape in ((64, 4096), (40, 1024 * 3), (33, 127)):
            how = Quantization(kind, double_quant, block_size)
            stored = quantize(draw(*shape, dtype=torch.bfloat16), how)
            constants = [stored.get(name) for name in ("codes", "absmax", "absmax_scale", "absmax_offset")]
            found = []
            for library in (native.library, lambda: None):
                monkeypatch.setattr(kernels, "library", library)
                found.append(decode_4bit(*constants, how, torch.empty(shape, dtype=torch.bfloat16)))
            assert found[0].any()
            assert torch.equal(*found), (block_size, shape)


@pytest.mark.parametrize(("offset", "threads"), [(0, 1), (0, 2), (1, 1), (32, 2)])
def test_a_matrix_that_no_cache_keeps_has_the_bits_of_its_parts_wherever_it_lies(offset, threads, monkeypatch):
    """Above 48 MiB the decoder for AVX512 writes past the caches, if a result begins where a line does."""
    if not native.library().decodes_fast():
        pytest.skip("this processor has no such decoder")
    monkeypatch.setattr(kernels, "threads", lambda: threads)
    rows, width = 6200, 4096
    codes = torch.randint(256, (rows * width // 2,), dtype=torch.uint8)
    absmax = torch.rand(rows * width // 64)
    whole = torch.empty(offset + rows * width + 64, dtype=torch.bfloat16).fill_(7)
    out = whole[offset:-64].view(rows, width)
    assert out.nbytes > 48 * 2**20
    assert (out.data_ptr() % 64 == 0) == (offset % 32 == 0)
    assert kernels.decode_4bit_into(out, codes, absmax, 64, "nf4").any()
    parts = zip(out.split(2000), codes.split(1000 * width), absmax.split(2000 * width // 64), strict=True)
    for part, *stored in parts:
        assert torch.equal(part, kernels.decode_4bit_into(torch.empty_like(part), *stored, 64, "nf4"))
    assert (whole[:offset] == 7).all()
    assert (whole[-64:] == 7).all()


# --- a model's modules ------------------------------------------------------------------------------------------------

FAMILIES = ("Llama", "Qwen2", "Qwen3", "Mistral", "Gemma", "Gemma2", "Gemma3Text", "Olmo2", "Granite", "SmolLM3")


def family(name, **changes):
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 61, "pad_token_id": 0}  # fmt: skip
    config = getattr(transformers, f"{name}Config")(**(sizes | changes))
    torch.manual_seed(0)
    return tiny.spread(AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)).eval()


def fused(model):
    return {type(module).__name__ for module in model.modules() if "forward" in vars(module)}


@pytest.mark.parametrize("name", FAMILIES)
def test_norms_and_gated_mlps_are_known_and_a_fused_model_says_the_same(name):
    model = family(name)
    ids = tiny.tokens(vocab=61)
    before = tiny.logits(model, ids)
    fuse(model)
    assert {kind[-7:] for kind in fused(model)} >= {"RMSNorm"}
    assert any(kind.endswith("MLP") for kind in fused(model))
    assert any(kind.endswith("Attention") for kind in fused(model))
    assert not any("Norm" in type(m).__name__ and "forward" not in vars(m) for m in model.modules())
    # The same roundings: what differs is the order of a sum of 32 squares, and an exponential's last bit.
    assert error(tiny.logits(model, ids), before.double()) < 2 * EPS[torch.bfloat16]


@pytest.mark.parametrize(("name", "dtype", "turns"), [
    ("Llama", torch.float32, 4),
    ("Llama", torch.bfloat16, 4),
    ("Qwen3", torch.bfloat16, 4),
    ("Phi", torch.bfloat16, 4),  # a part of each head, which the layer cuts off
    ("StableLm", torch.float32, 4),
    ("GPTNeoX", torch.bfloat16, 0),  # a part of each head, which the function cuts off
    ("Olmo2", torch.float32, 4),
    ("Olmo2", torch.bfloat16, 0),  # angles in fp32
])  # fmt: skip
def test_with_our_rotary_embedding_a_family_s_code_gives_the_same_bits(name, dtype, turns, monkeypatch):
    model, ids = family(name).to(dtype), tiny.tokens(vocab=61)
    before = tiny.logits(model, ids)
    for module in model.modules():
        if type(module).__name__.endswith(("Norm", "MLP")):
            module.forward = module.forward  # somebody's own, and so left as it is
    fuse(model)
    assert any(kind.endswith("Attention") for kind in fused(model))
    seen = []
    monkeypatch.setattr(fuse_module, "rotary", lambda *given: seen.append(given[0].dtype) or rotary(*given))
    assert torch.equal(tiny.logits(model, ids), before)
    assert seen == [dtype] * turns


@pytest.mark.parametrize("name", ["Cohere", "Glm", "Llama4Text", "GPT2"])
def test_heads_that_turn_otherwise_are_left_as_they_are(name):
    fuse(model := family(name))
    assert not any(kind.endswith("Attention") for kind in fused(model))


def test_fusing_a_model_leaves_its_family_s_code_to_others():
    before, rotate = modeling_llama.LlamaAttention.forward, modeling_llama.apply_rotary_pos_emb
    fuse(model := family("Llama"))
    tiny.logits(model, tiny.tokens(vocab=61))
    assert modeling_llama.LlamaAttention.forward is before
    assert before.__globals__["apply_rotary_pos_emb"] is modeling_llama.apply_rotary_pos_emb is rotate


ROTATE = modeling_llama.apply_rotary_pos_emb


@pytest.mark.parametrize("other", [
    lambda q, k, cos, sin: ROTATE(q, k, sin, cos),
    lambda q, k, cos, sin: None,
    lambda q, k, cos, sin: ROTATE(q, k, cos, sin)[:1],
    lambda q, k, cos, sin: [each.float() for each in ROTATE(q, k, cos, sin)],
    lambda q, k, positions: ROTATE(q, k, *positions),
])  # fmt: skip
def test_an_attention_that_turns_by_something_else_is_left_as_it_is(other, monkeypatch):
    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", other)
    fuse(model := family("Llama"))
    assert "LlamaAttention" not in fused(model)


def test_angles_that_are_trained_get_their_gradient():
    ours = fuse_module._with_fused_rotation(modeling_llama.LlamaAttention.forward).__globals__["apply_rotary_pos_emb"]
    q, k, sin = draw(1, 2, 4, 8), draw(1, 1, 4, 8, seed=1), draw(1, 4, 8, seed=2)
    grads = []
    for rotate in (ours, ROTATE):
        cos = draw(1, 4, 8, seed=3).requires_grad_()
        sum(each.square().sum() for each in rotate(q, k, cos, sin)).backward()
        grads.append(cos.grad)
    assert grads[0].any()
    assert torch.equal(*grads)


@pytest.mark.parametrize("name", ["GPT2", "Cohere", "StableLm"])
def test_other_norms_are_left_as_they_are(name):
    kinds = fused(model := family(name))
    fuse(model)
    assert not any("Norm" in kind for kind in fused(model) | kinds)


def test_a_module_that_does_something_else_under_the_same_names_is_left_as_it_is():
    class Doubling(LlamaRMSNorm):
        def forward(self, hidden_states):
            return 2 * super().forward(hidden_states)

    class Swapped(LlamaMLP):
        def forward(self, x):
            return self.down_proj(self.act_fn(self.up_proj(x)) * self.gate_proj(x))

    model = family("Llama")
    for layer in model.model.layers:
        layer.input_layernorm.__class__, layer.mlp.__class__ = Doubling, Swapped
    fuse(model)
    assert fused(model) == {"LlamaRMSNorm", "LlamaAttention"}


class Clamped(LlamaMLP):
    """As in families that hold their gates to a limit, far above what a unit input reaches."""

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x).clamp(max=7)) * self.up_proj(x).clamp(-7, 7))


class Dropped(LlamaMLP):
    def forward(self, x):
        return F.dropout(super().forward(x), 0.1, training=self.training)


class Outside(LlamaRMSNorm):
    """Epsilon beside the root."""

    def forward(self, x):
        rms = x.float().square().mean(-1, keepdim=True).sqrt()
        return self.weight * (x.float() / (rms + self.variance_epsilon)).to(x.dtype)


class Flat(LlamaRMSNorm):
    """Wants two axes."""

    def forward(self, x):
        _, _ = x.shape
        return super().forward(x)


@pytest.mark.parametrize("kind", [Clamped, Dropped, Outside, Flat])
def test_a_module_that_differs_only_far_out_or_in_training_is_left_as_it_is(kind):
    model = family("Llama")
    for layer in model.model.layers:
        (layer.mlp if issubclass(kind, LlamaMLP) else layer.input_layernorm).__class__ = kind
    fuse(model)
    assert kind.__name__ not in fused(model)
    assert "LlamaRMSNorm" in fused(model)


def test_norms_without_a_weight_or_an_epsilon_and_forward_passes_of_others_are_left_as_they_are():
    model = nn.Sequential(nn.RMSNorm(8), nn.RMSNorm(8, eps=1e-6, elementwise_affine=False), LlamaRMSNorm(8))
    model[2].forward = lambda x: x * 0
    fuse(model)
    assert not model[2](torch.ones(1, 8)).any()
    assert model(torch.ones(1, 8)).shape == (1, 8)


@pytest.mark.parametrize("bits", [0x7FFF, 0xFFFF, 0x7E00, 0x7C00])
def test_a_weight_that_is_no_number_stays_none_when_it_is_decoded(bits):
    w = draw(4, 128).half()
    w.view(torch.int16)[1, 5] = bits - 65536 if bits > 32767 else bits
    assert not w.isfinite().all()
    for kind, double_quant in (("int8", False), ("nf4", False), ("nf4", True)):
        how = Quantization(kind, double_quant)
        layer = QuantizedLinear(w, None, how)
        compiled = layer.dense(torch.bfloat16)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(kernels, "library", lambda: None)
            patch.setattr(kernels, "typed_kernel", lambda *_: None)
            plain = layer.dense(torch.bfloat16)
        assert torch.equal(compiled.isnan(), plain.isnan())


def test_operators_refuse_shapes_that_do_not_belong_together():
    x = draw(4, 48)
    for fails in (
        lambda: rms_norm(x, draw(1), 1e-6),
        lambda: torch.ops.qlora_kit.rms_norm_backward(draw(3, 48), x, draw(48), torch.ones(4), "once"),
        lambda: gated(x, draw(48), "silu"),
        lambda: torch.ops.qlora_kit.gated_backward(draw(3, 48), x, x, "silu"),
        lambda: rotary(draw(1, 4, 1, 48), draw(1, 3, 48), draw(1, 4, 48)),
        lambda: rotary(draw(3, 4, 1, 48), draw(2, 4, 48), draw(2, 4, 48)),
        lambda: kernels.decode_int8_into(x, torch.zeros(2, 48, dtype=torch.int8), draw(2)),
        lambda: kernels.decode_int8_into(x, torch.zeros(4, 48, dtype=torch.int8), draw(4).bfloat16()),
    ):
        with pytest.raises(RuntimeError, match=r"48|bfloat16"):
            fails()
    w = draw(96)
    assert torch.equal(rms_norm(x, w[::2], 1e-6), rms_norm(x, w[::2].clone(), 1e-6))


def test_no_rows_are_no_fault(way):
    x = torch.zeros(0, 48).requires_grad_()
    turned = rotary(x[:, None, None], x[:, None].detach(), x[:, None].detach())[:, 0, 0]
    (gated(x, x, "silu") + rms_norm(x, draw(48), 1e-6) + turned).sum().backward()
    assert x.grad.shape == (0, 48)


def test_a_norm_that_is_trained_has_its_gradient():
    model = tiny.llama()
    norm = model.model.layers[0].input_layernorm
    fuse(model)
    assert "forward" in vars(norm)
    tiny.train_step(model)
    assert norm.weight.grad.abs().sum() > 0


def test_fusing_takes_nothing_from_the_random_state_and_changes_no_name():
    model = family("Llama")
    state, names = torch.get_rng_state(), list(model.state_dict())
    printed = repr(model)
    fuse(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert list(model.state_dict()) == names
    assert repr(model) == printed


@pytest.mark.parametrize("again", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_of_a_fused_model_is_fused_and_its_own(again):
    model = tiny.quantized(tiny.llama())
    add_lora(model, rank=4)
    move(model)
    copied, wanted = again(model), tiny.logits(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert fused(copied) == fused(model) != set()
    assert torch.equal(tiny.logits(copied), wanted)
    assert not torch.equal(tiny.logits(model), wanted)


# --- layers with one input --------------------------------------------------------------------------------------------


def move(model):
    """Adapters that are no longer at their start, where B is zero."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "b_OR" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


def adapted(dtype=torch.float32, **how):
    model = tiny.quantized(tiny.llama(), dtype=dtype)
    add_lora(model, rank=4, dtype=torch.float32, **how)
    move(model)
    return model.train()


def gradients(model):
    tiny.train_step(model)
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.fixture
def shares(monkeypatch):
    """How many layers each common product was for."""
    from qlora_kit.lora import siblings

    counts = []
    monkeypatch.setattr(
        siblings, "share_input", lambda x, updates: counts.append(len(updates)) or share_input(x, updates)
    )
    return counts


def test_query_key_value_and_gate_up_share_their_products_and_nothing_else_changes(shares):
    together, apart = gradients(adapted()), gradients(tiny.one_by_one(adapted()))
    assert shares == [3, 2, 3, 2]
    assert together.keys() == apart.keys()
    for name, grad in apart.items():
        assert grad.any()
        assert error(together[name], grad.double()) < 5e-6, name  # fp32 sums in another order, through two blocks


def test_under_recomputation_they_share_too_and_the_gradients_are_the_same_bits(shares):
    from qlora_kit.train.activations import set_activation_policy

    kept, model = gradients(adapted()), adapted()
    set_activation_policy(model, "recompute")
    shares.clear()
    again = gradients(model)
    assert shares == [3, 2] * 4
    assert all(torch.equal(grad, again[name]) for name, grad in kept.items())


@pytest.mark.parametrize("how", [{"dora": True}, {"dropout": 0.5}, {"alpha_pattern": {"k_proj": 7, "up_proj": 3}},
                                 {"targets": ["q_proj", "o_proj", "gate_proj"]}])  # fmt: skip
def test_updates_that_are_no_plain_ones_with_one_scale_go_alone(how, shares):
    model = adapted(**how)
    assert gradients(model)
    assert shares == []


def test_ranks_may_differ_among_those_that_share(shares):
    how = {"rank_pattern": {"k_proj": 2, "up_proj": 7}, "alpha_pattern": {"k_proj": 16, "up_proj": 56}}
    together, apart = gradients(adapted(**how)), gradients(tiny.one_by_one(adapted(**how)))
    assert shares == [3, 2, 3, 2]
    for name, grad in apart.items():
        assert error(together[name], grad.double()) < 5e-6, name


def test_layers_that_turn_out_to_have_different_inputs_go_alone(shares):
    def forward(mlp, x):
        return mlp.down_proj(mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x + 1))

    found = []
    for separate in (False, True):
        model = adapted()
        for layer in model.model.layers:
            layer.mlp.forward = forward.__get__(layer.mlp)
        model = tiny.one_by_one(model) if separate else model
        found.append([gradients(model), gradients(model)][1])
    assert shares.count(2) == 2  # once a block, and never again
    for name, grad in found[1].items():
        assert error(found[0][name], grad.double()) < 5e-6, name


def test_a_pass_that_broke_off_does_not_part_them(shares):
    model = adapted()
    wanted = gradients(model)
    model.model.layers[0].self_attn.q_proj(torch.zeros(1, 3, 48))  # and no call of key and value
    assert gradients(copy.deepcopy(model)).keys() == wanted.keys()
    shares.clear()
    again = gradients(model)
    assert shares == [3, 2, 3, 2]
    assert all(torch.equal(grad, again[name]) for name, grad in wanted.items())


@pytest.mark.parametrize("how", ["without gradients", "in another dtype", "of what was there before"])
def test_what_a_layer_took_otherwise_than_the_next_one_wants_it_serves_nobody(how):
    """As they would be asked for by hand: models call them one after another, and alike."""
    model = adapted()
    attention, x = model.model.layers[0].self_attn, torch.randn(1, 3, 48, generator=torch.Generator().manual_seed(1))
    wanted = tiny.one_by_one(adapted()).model.layers[0].self_attn.k_proj(x + (how == "of what was there before"))
    with (
        torch.set_grad_enabled(how != "without gradients"),
        torch.autocast("cpu", torch.bfloat16, enabled=how == "in another dtype"),
    ):
        attention.q_proj(x)
    if how == "of what was there before":
        x.add_(1)
    found = attention.k_proj(x)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)  # products of another width
    found.sum().backward()
    assert attention.k_proj.adapter("default").b_OR.grad.any()


def test_nothing_waits_after_a_pass():
    model = adapted()
    gradients(model)
    tiny.logits(model)
    assert {layer.siblings is None or not layer.siblings._waiting for _, layer in lora_layers(model)} == {True}


def test_two_threads_do_not_take_each_others_products():
    model = adapted().eval()
    inputs = [tiny.tokens(seed=seed) for seed in range(2)]
    wanted = [tiny.logits(model, ids) for ids in inputs]
    wrong = []

    def run(ids, logits):
        wrong.extend(1 for _ in range(20) if not torch.equal(tiny.logits(model, ids), logits))

    threads = [threading.Thread(target=run, args=pair) for pair in zip(inputs, wanted, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert all(layer.siblings is None or layer.siblings.layers for _, layer in lora_layers(model))


def test_switching_adapters_switches_what_is_shared():
    model = adapted()
    one = tiny.logits(model.eval())
    add_lora(model, rank=4, name="other", targets="attention", seed=3)
    move(model)
    assert not torch.equal(tiny.logits(model), one)
    use_adapter(model, "default")
    assert isinstance(model.model.layers[0].mlp, nn.Module)
    with torch.no_grad():
        shared = tiny.logits(model)
        assert torch.allclose(shared, tiny.logits(tiny.one_by_one(model)), atol=1e-5)  # fp32 products of other widths
