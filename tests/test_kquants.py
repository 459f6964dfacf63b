"""Claims about the k-quants: the package's decoder reads them, and none is further off than ggml's own."""

import gguf
import pytest
import torch
from gguf import GGMLQuantizationType as Type
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_kit.export.gguf.kquants import q4_k, q5_k, q6_k
from qlora_kit.export.gguf.mixture import Mixture

KINDS = {"q4_k": (q4_k, Type.Q4_K, 144), "q5_k": (q5_k, Type.Q5_K, 176), "q6_k": (q6_k, Type.Q6_K, 210)}
# Relative errors of `ggml_quantize_chunk` without an importance matrix, of ggml 0.25.3, on the weights of `drawn`.
OF_GGML = {
    ("normal", "q4_k"): 0.07159, ("normal", "q5_k"): 0.03615, ("normal", "q6_k"): 0.01777,
    ("heavy", "q4_k"): 0.08660, ("heavy", "q5_k"): 0.04385, ("heavy", "q6_k"): 0.02272,
    ("shifted", "q4_k"): 0.02983, ("shifted", "q5_k"): 0.01483, ("shifted", "q6_k"): 0.01278,
}  # fmt: skip


def drawn():
    """Weights as layers have them, weights with heavy tails, and weights of one sign."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    found = {"normal": normal(128, 2048) * 0.02}
    found["heavy"] = normal(128, 2048) / normal(4, 128, 2048).square().mean(0).sqrt() * 0.02
    return {**found, "shifted": normal(128, 2048) * 0.02 + 0.05}


def decoded(x, kind):
    quantize, stored_as, _ = KINDS[kind]
    return torch.from_numpy(gguf.dequantize(quantize(x).numpy(), stored_as))


@pytest.mark.parametrize("kind", KINDS)
def test_no_kquant_is_further_off_than_that_of_ggml(kind):
    for name, x in drawn().items():
        found = ((decoded(x, kind) - x).norm() / x.norm()).item()
        assert 0.9 * OF_GGML[name, kind] < found <= OF_GGML[name, kind]


@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_quantised_each_on_its_own_and_take_the_bytes_that_they_should(kind):
    quantize, _, block_bytes = KINDS[kind]
    x = torch.randn(7, 768, generator=torch.Generator().manual_seed(1))
    whole = quantize(x)
    assert whole.shape == (7, 3 * block_bytes)
    assert torch.equal(whole, torch.cat([quantize(row) for row in x.split([3, 1, 3])]))


def on_a_grid(kind):
    """Weights that the format can hold exactly: every sub-block has both ends of its numbers, every block the largest
    scale, and d is a power of two."""
    generator = torch.Generator().manual_seed(2)

    def whole(low, high, *shape):
        return torch.randint(low, high + 1, shape, generator=generator)

    if kind == "q6_k":
        q, sc = whole(-32, 31, 40, 16, 16), whole(-128, 127, 40, 16)
        q[..., 3], sc[:, 5] = -32, -128
        return (q * sc[..., None]).view(8, -1) * 2.0**-14
    levels = 15 if kind == "q4_k" else 31
    q, sc, mn = whole(0, levels, 40, 8, 32), whole(1, 63, 40, 8), whole(0, 63, 40, 8)
    q[..., 3], q[..., 30], sc[:, 5], mn[:, 2] = 0, levels, 63, 63
    return (q * sc[..., None] * 2.0**-10 - mn[..., None] * 2.0**-9).view(8, -1)


@pytest.mark.parametrize("kind", KINDS)
def test_weights_that_the_format_can_hold_come_back_bit_for_bit(kind):
    x = on_a_grid(kind)
    assert x.unique().numel() > 500
    assert torch.equal(decoded(x, kind), x)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=25, deadline=None)
@given(
    data=st.data(),
    scale=st.sampled_from([1e-9, 1e-6, 1e-3, 1.0, 1e3, 6e4]),
    odd=st.sampled_from(["none", "zeros", "constant", "negative constant", "outlier", "one sign", "zero block"]),
)
def test_hostile_blocks_are_decoded_to_finite_values_near_them(kind, data, scale, odd):
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    x = torch.rand(3, 512, generator=generator) * 2 - 1
    match odd:
        case "zeros":
            x.zero_()
        case "constant":
            x.fill_(1)
        case "negative constant":
            x.fill_(-1)
        case "outlier":
            x[1] *= 1e-4
            x[1, 77] = 1
        case "one sign":
            x.abs_()
        case "zero block":
            x[:, :256] = 0
    x *= scale
    found = decoded(x, kind)
    assert torch.isfinite(found).all()
    # A step is a 15th of a sub-block's range, at most 2 with 0 in it; scales in 6 bits and fp16's smallest numbers
    # (2^-24, times 63 for a scale and 15 for a weight) take as much again.
    assert (found - x).abs().max() <= 0.15 * x.abs().max() + 6e-8 * 63 * 15
    assert not found[x.abs().amax(-1) == 0].any()


# --- which tensor takes which ---


@pytest.mark.parametrize(("layers", "is_grouped", "wanted"), [(80, True, Type.Q5_K), (80, False, Type.Q4_K),
                                                              (32, True, Type.Q4_K)])  # fmt: skip
def test_few_values_of_many_queries_have_more_bits_in_a_model_of_80_layers(layers, is_grouped, wanted):
    mixture = Mixture("q4_k_m", layers, is_tied=False, is_grouped=is_grouped)
    assert mixture.type_of("blk.10.attn_v.weight", (512, 1024)) == wanted


LAYERS_WITH_MORE_BITS = {2: {1}, 9: {0, 3, 6, 7, 8}, 32: {0, 1, 2, 3, 6, 9, 12, 15, 18, 21, 24, 27, 28, 29, 30, 31}}
"""By number of layers, as llama.cpp's quantiser chose them (tests/test_llamacpp.py asks it again)."""


@pytest.mark.parametrize("layers", LAYERS_WITH_MORE_BITS)
@pytest.mark.parametrize(("dtype", "base"), [("q4_k_m", Type.Q4_K), ("q5_k_m", Type.Q5_K)])
def test_values_and_the_way_down_have_more_bits_in_the_layers_in_which_llamacpp_gives_them_more(dtype, base, layers):
    mixture = Mixture(dtype, layers, is_tied=False, is_grouped=True)
    for leaf in ("attn_v", "ffn_down", "attn_qkv"):
        kinds = {layer: mixture.type_of(f"blk.{layer}.{leaf}.weight", (512, 1024)) for layer in range(layers)}
        assert {layer for layer, kind in kinds.items() if kind == Type.Q6_K} == LAYERS_WITH_MORE_BITS[layers]
        assert set(kinds.values()) == {Type.Q6_K, base}
    for leaf in ("attn_q", "attn_k", "attn_output", "ffn_up", "ffn_gate"):
        assert mixture.type_of(f"blk.0.{leaf}.weight", (512, 1024)) == base
    assert mixture.type_of("token_embd.weight", (512, 1024)) == base
    assert mixture.type_of("output.weight", (512, 1024)) == Type.Q6_K


@pytest.mark.parametrize(
    ("dtype", "width", "body", "head"),
    [
        ("q4_k_m", 256, Type.Q4_K, Type.Q6_K), ("q4_k_m", 160, Type.Q5_0, Type.Q8_0),
        ("q4_k_m", 72, Type.F16, Type.F16), ("q5_k_m", 160, Type.Q5_1, Type.Q8_0),
        ("q6_k", 160, Type.Q8_0, Type.Q8_0), ("q4_0", 160, Type.Q4_0, Type.Q8_0),
        ("q4_0", 256, Type.Q4_0, Type.Q6_K), ("q8_0", 160, Type.Q8_0, Type.Q8_0), ("q8_0", 72, Type.F16, Type.F16),
        ("bf16", 72, Type.BF16, Type.BF16),
    ],
)  # fmt: skip
def test_rows_that_do_not_fill_a_block_take_the_types_that_llamacpp_gives_them(dtype, width, body, head):
    apart, tied = (Mixture(dtype, 9, is_tied, is_grouped=False) for is_tied in (False, True))
    assert apart.type_of("blk.1.attn_q.weight", (64, width)) == body
    assert apart.type_of("token_embd.weight", (64, width)) == body
    assert apart.type_of("output.weight", (64, width)) == head
    assert tied.type_of("token_embd.weight", (64, width)) == head
    for small in ("output_norm.weight", "blk.1.attn_q.bias", "position_embd.weight"):
        assert apart.type_of(small, (64, width) if "embd" in small else (width,)) == Type.F32
