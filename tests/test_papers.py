"""The papers' own numbers of memory and of parameters, out of the kit's own plan and injection; their slips asserted.

`printed` is what a paper says, `exact` what its formula gives. Sources: LoRA, arXiv 2106.09685v2; QLoRA, arXiv
2305.14314; LoRA Without Regret, doi 10.64434/tml.20250929. GB is 10**9 bytes, M is 10**6.
"""

import math

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import LlamaConfig, OPTConfig
from transformers.initialization import no_init_weights

from qlora_kit.base import Quantization
from qlora_kit.base.formats import quantize
from qlora_kit.base.load import build_model
from qlora_kit.lora import adapter_parameters, add_lora
from qlora_kit.plan import Workload, dry_run, plan_methods
from qlora_kit.recipe import Lora, read_recipe
from qlora_kit.train.pace import Pace

GB = 10**9


def llama(hidden, inner, layers, heads, keys=None, words=32000):
    sizes = {"hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers, "vocab_size": words}
    return LlamaConfig(**sizes, num_attention_heads=heads, num_key_value_heads=keys or heads, tie_word_embeddings=False)


LLAMA = {
    "7B": llama(4096, 11008, 32, 32),
    "13B": llama(5120, 13824, 40, 40),
    "33B": llama(6656, 17920, 60, 52),
    "65B": llama(8192, 22016, 80, 64),
}
TOKENS = 8
"""So few that activations are nothing beside the weights."""


@pytest.fixture(scope="module")
def plan_65b():
    settings = ["base.model=x", "data.train=x", "base.device=cpu", "base.compute_dtype=bfloat16", "lora.rank=64",
                "memory.activations=recompute", "train.micro_batch=1", "train.accumulation=1",
                "train.optimizer=paged_adamw_32bit", "train.master_weights=none"]  # fmt: skip
    pace = Pace(1, 1, 1, 1, None, 1e-4, "the test", TOKENS, TOKENS)
    return plan_methods(read_recipe("default", settings), LLAMA["65B"], pace, TOKENS, card="none")


@pytest.fixture(scope="module")
def plans():
    """QLoRA steps of the paper's four models: rank 64 on all linear layers, NF4 with double quantisation, AdamW."""
    work = Workload(Quantization("nf4"), Lora(rank=64), torch.bfloat16, "sdpa", 1, TOKENS, 1, "recompute",
                    "paged_adamw_32bit", "none")  # fmt: skip
    return {name: dry_run(LLAMA[name], work) for name in LLAMA}


# --- QLoRA: what full fine-tuning would take ---


@pytest.mark.slow
def test_full_fine_tuning_of_65b_comes_to_783_gb(plan_65b):
    """Section 1 prints "more than 780 GB": 12 bytes a parameter, of weights, gradients and two fp32 moments."""
    full, total = plan_65b["methods"]["full_finetune"], plan_65b["parameters"]["total"]
    held = sum(full["by_category"][name] for name in ("base_weights", "gradients", "optimizer_state"))
    assert total == 65_285_660_672
    rotary = 4 * 2 * 64  # two fp32 buffers of half a head's width
    assert held == pytest.approx(12 * total + rotary, abs=3)  # extrapolated categories are rounded one by one
    assert round(held / GB, 1) == 783.4
    assert held == pytest.approx(full["peak_bytes"], rel=1e-4), "and is all of the peak, at eight tokens"
    qlora = plan_65b["methods"]["qlora"]["peak_bytes"]
    assert qlora < 48 * GB, "the paper's other half: less than 48 GB"
    assert plan_65b["savings_vs_full"] == pytest.approx(1 - qlora / full["peak_bytes"])


# --- QLoRA: what weights take ---


def test_a_quantised_weight_takes_4_127_bits_off_real_tensors():
    """Section 3: 8 / 64 + 32 / (64 x 256) = 0.127 bits of constants in place of 0.5, to the last bit."""
    weight = torch.randn(1024, 512, generator=torch.Generator().manual_seed(0))
    bits = {}
    for is_double in (True, False):
        stored = quantize(weight, Quantization("nf4", double_quant=is_double))
        counted = [tensor for name, tensor in stored.items() if name != "absmax_offset"]  # one number a matrix
        bits[is_double] = 8 * sum(tensor.numel() * tensor.element_size() for tensor in counted) / weight.numel()
    assert bits == {True: 4.126953125, False: 4.5}
    assert round(bits[True], 3) == 4.127
    assert round(bits[False] - bits[True], 3) == 0.373


@pytest.mark.parametrize("name", LLAMA)
def test_a_quantised_weight_takes_4_127_bits_off_the_plan(plans, name):
    held, counts, config = plans[name]["by_category"], plans[name]["parameters"], LLAMA[name]
    rotary = 4 * 2 * 64
    dense = 2 * (counts["total"] - counts["quantized"]) + rotary
    offsets = 4 * 7 * config.num_hidden_layers
    quantised = held["base_weights"] - dense + held["quantization_state"] - offsets
    assert 8 * quantised / counts["quantized"] == 4.126953125


@pytest.mark.parametrize(
    ("name", "linear", "formula", "with_norms", "printed"),
    [
        ("7B", 6_476_005_376, 3.865, 3.866, 5),
        ("13B", 12_687_769_600, 7.201, 7.201, 10),
        ("33B", 32_102_154_240, 17.412, 17.414, 21),
        ("65B", 64_760_053_760, 34.456, 34.459, 41),
    ],
)
def test_weights_take_what_the_formula_says_and_less_than_the_papers_footprints(
    plans, name, linear, formula, with_norms, printed
):
    """Table 6 prints 5, 10, 21 and 41 GB: measured footprints, 1.19 to 1.39 times the weights. A bound, no equality."""
    held, config = plans[name]["by_category"], LLAMA[name]
    weights = held["base_weights"] + held["quantization_state"]
    norms = 2 * (2 * config.num_hidden_layers + 1) * config.hidden_size
    assert plans[name]["parameters"]["quantized"] == linear
    assert round((weights - norms) / GB, 3) == formula
    assert round(weights / GB, 3) == with_norms
    assert 1.19 <= round(printed * GB / weights, 2) <= 1.39


def test_erratum_the_papers_7b_footprint_has_two_values_and_no_formula(plans):
    """Table 6 prints 5 GB, table 1 prints 6 GB, and section 2 prints 5,048 MB, which would be 5.99 bits a parameter."""
    held, total = plans["7B"]["by_category"], plans["7B"]["parameters"]["total"]
    weights = held["base_weights"] + held["quantization_state"]
    assert round(8 * 5048e6 / total, 2) == 5.99
    assert weights < 5e9 < 5048e6 < 6e9


@pytest.mark.parametrize(
    ("name", "trained"), [("7B", 159_907_840), ("13B", 250_347_520), ("33B", 487_587_840), ("65B", 799_539_200)]
)
def test_rank_64_on_all_linear_layers_trains_what_the_released_scripts_train(plans, name, trained):
    assert plans[name]["parameters"]["trainable"] == trained


# --- LoRA: what it trains ---


def fake(config):
    """A frozen model on fake tensors, and the mode that it lives in."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode, no_init_weights():
        return build_model(config, torch.bfloat16, "sdpa").requires_grad_(False), mode


def opt(hidden, layers):
    """A decoder with query, key, value and output projections apart, as the LoRA paper counts them."""
    return OPTConfig(hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=hidden // 64, vocab_size=512,
                     ffn_dim=4 * hidden, word_embed_proj_dim=hidden)  # fmt: skip


def trained_by(hidden, layers, rank, matrices):
    """Parameters of an adapter, injected into one layer of `layers` that are alike."""
    model, mode = fake(opt(hidden, 1))
    with mode:
        report = add_lora(model, rank=rank, targets=[MATRICES[matrix] for matrix in matrices])
    assert len(report.matched) == len(matrices)
    return report.trainable * layers


def cut(count):
    """Millions with one digit, what follows cut off."""
    return math.floor(count / 10**5) / 10


MATRICES = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "out_proj"}
GPT3 = (12288, 96)
TABLE_15 = [
    # matrices, rank, exact, printed in millions
    ("v", 2, 4_718_592, 4.7),
    ("qv", 1, 4_718_592, 4.7),
    ("qv", 2, 9_437_184, 9.4),
    ("qkvo", 1, 9_437_184, 9.4),
    ("qv", 4, 18_874_368, 18.8),
    ("qkvo", 2, 18_874_368, 18.8),
    ("qv", 8, 37_748_736, 37.7),
    ("qkvo", 4, 37_748_736, 37.7),
    ("qv", 64, 301_989_888, 301.9),
    ("qkvo", 64, 603_979_776, 603.8),
]


@pytest.mark.parametrize(("matrices", "rank", "exact", "printed"), TABLE_15)
def test_gpt3_trains_what_table_15_counts(matrices, rank, exact, printed):
    found = trained_by(*GPT3, rank, matrices)
    assert found == exact == len(matrices) * 96 * 2 * 12288 * rank
    if printed != 603.8:
        assert cut(found) == printed


def test_gpt3_at_its_full_depth_trains_ninety_six_times_what_a_layer_does():
    model, mode = fake(opt(*GPT3))
    with mode:
        report = add_lora(model, rank=2, targets=["v_proj"])
    assert (len(report.matched), report.trainable) == (96, 4_718_592)


def test_erratum_table_15_cuts_digits_off_and_its_last_number_is_wrong_even_so():
    assert (round(18_874_368 / 1e6, 1), cut(18_874_368)) == (18.9, 18.8)
    assert (round(301_989_888 / 1e6, 1), cut(301_989_888)) == (302.0, 301.9)
    exact = {(matrices, rank): exact for matrices, rank, exact, _ in TABLE_15}
    printed = {(matrices, rank): printed for matrices, rank, _, printed in TABLE_15}
    assert printed["qkvo", 64] == 603.8
    assert cut(exact["qkvo", 64]) == 603.9
    assert round(exact["qkvo", 64] / 1e6, 2) == 603.98


def test_erratum_appendix_d4_gives_rank_2_the_count_of_rank_4():
    """It says 37.7M for rank 2 on all four matrices; table 15 has that for rank 4."""
    assert cut(trained_by(*GPT3, 2, "qkvo")) == 18.8
    assert cut(trained_by(*GPT3, 4, "qkvo")) == 37.7


@pytest.mark.parametrize(
    ("hidden", "layers", "rank", "exact", "printed"),
    [
        pytest.param(768, 12, 8, 294_912, 0.3, id="RoBERTa-base"),
        pytest.param(1024, 24, 8, 786_432, 0.8, id="RoBERTa-large"),
        pytest.param(1536, 48, 16, 4_718_592, 4.7, id="DeBERTa-XXL"),
    ],
)
def test_the_other_models_of_the_lora_paper(hidden, layers, rank, exact, printed):
    found = trained_by(hidden, layers, rank, "qv")
    assert found == exact
    assert round(found / 1e6, 1) == printed


@pytest.mark.parametrize(
    ("hidden", "layers", "exact", "printed"),
    [pytest.param(1024, 24, 393_216, 0.35, id="GPT-2 M"), pytest.param(1280, 36, 737_280, 0.77, id="GPT-2 L")],
)
def test_erratum_gpt2_trains_more_or_less_than_is_printed(hidden, layers, exact, printed):
    """Rank 4 on query and value: 0.35M and 0.77M are neither the count rounded nor cut off."""
    found = trained_by(hidden, layers, 4, "qv")
    assert found == exact
    assert printed not in (round(found / 1e6, 2), math.floor(found / 1e4) / 100)


# --- LoRA Without Regret: its table counts the unembedding ---


@pytest.fixture(scope="module")
def llama_8b():
    return fake(llama(4096, 14336, 32, 32, 8, 128256))


HEAD = 4096 + 128256
"""Parameters of the unembedding's adapter for a unit of rank."""


@pytest.mark.parametrize(
    ("targets", "rank", "exact", "without", "printed"),
    [
        ("mlp", 256, 486_866_944, 452_984_832, 0.49),
        ("attention", 256, 251_985_920, 218_103_808, 0.25),
        ("all-linear", 256, 704_970_752, 671_088_640, 0.70),
        ("mlp", 128, 243_433_472, 226_492_416, 0.24),
    ],
)
def test_llama_8b_trains_what_the_table_prints_only_with_the_unembedding(
    llama_8b, targets, rank, exact, without, printed
):
    model, mode = llama_8b
    name = f"{targets}-{rank}"
    with mode:
        report = add_lora(model, rank=rank, targets=[targets, "head"], name=name)
    head = sum(each.numel() for key, each in adapter_parameters(model, name) if key.startswith("lm_head."))
    assert report.trainable == exact
    assert head == rank * HEAD
    assert report.trainable - head == without
    assert round(report.trainable / 1e9, 2) == printed
    assert round(without / 1e9, 2) != printed


def test_llama_8b_at_rank_1_trains_3_million(llama_8b):
    """Printed as "3M", which it is with the unembedding and without."""
    model, mode = llama_8b
    with mode:
        report = add_lora(model, rank=1, targets=["all-linear", "head"], name="one")
    assert report.trainable == 2_753_792 == 1_769_472 + 851_968 + HEAD
    assert HEAD == 132_352
    assert report.trainable - HEAD == 2_621_440
    assert round(report.trainable / 1e6) == round((report.trainable - HEAD) / 1e6) == 3
