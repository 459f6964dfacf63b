"""The floor of a step: the published table comes out, and no planned step is below it."""

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, GPT2Config, LlamaConfig, MixtralConfig, Qwen3Config

from qlora_kit.base import Quantization
from qlora_kit.base.architecture import build_model, read_config
from qlora_kit.base.freeze import body_linears
from qlora_kit.plan import Workload, dry_run, plan_methods
from qlora_kit.plan.cards import TOTAL_MIB
from qlora_kit.plan.floor import floor_bytes
from qlora_kit.recipe import Lora, read_recipe
from qlora_kit.report.plan_text import plan_text
from qlora_kit.run import plan_memory
from qlora_kit.train.head import automatic_chunk
from qlora_kit.train.pace import Pace
from qlora_kit.units import format_bytes

GIB = 2**30
MODELS = Path(__file__).parent.parent / "benchmarks" / "models"
SHAPES = {
    # hidden, inner, layers, heads, heads of keys, words
    "Llama-2-7B": (4096, 11008, 32, 32, 32, 32000),
    "Llama-3.1-8B": (4096, 14336, 32, 32, 8, 128256),
    "Mistral-7B": (4096, 14336, 32, 32, 8, 32768),
    "Qwen2.5-7B": (3584, 18944, 28, 28, 4, 152064),
    "Qwen3-8B": (4096, 12288, 36, 32, 8, 151936),
    "Llama-2-13B": (5120, 13824, 40, 40, 40, 32000),
    "LLaMA-33B": (6656, 17920, 60, 52, 52, 32000),
    "CodeLlama-34B": (8192, 22016, 48, 64, 8, 32000),
    "Llama-3.1-70B": (8192, 28672, 80, 64, 8, 128256),
}
TABLE = {
    # GiB at 512, 2,048 and 8,192 tokens; NF4 with double quantisation, rank 16, bf16, 8-bit Adam, no fp32 masters
    "Llama-2-7B": (4.10, 4.66, 6.92),
    "Llama-3.1-8B": (5.86, 6.42, 8.72),
    "Mistral-7B": (4.39, 4.97, 7.26),
    "Qwen2.5-7B": (5.71, 6.21, 8.27),
    "Qwen3-8B": (6.27, 6.80, 9.22),
    "Llama-2-13B": (7.47, 8.29, 11.58),
    "CodeLlama-34B": (18.38, 19.84, 25.69),
    "Llama-3.1-70B": (39.17, 41.44, 50.51),
}


def config_of(name):
    hidden, inner, layers, heads, keys, words = SHAPES[name]
    sizes = {"hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers, "vocab_size": words,
             "num_attention_heads": heads, "num_key_value_heads": keys, "tie_word_embeddings": False}  # fmt: skip
    kind = {"Qwen2.5-7B": "qwen2", "Qwen3-8B": "qwen3", "Mistral-7B": "mistral"}.get(name, "llama")
    return AutoConfig.for_model(kind, **sizes)


def counted(config, rank=16):
    """What a dry run says of parameters, counted on a model without storage."""
    with torch.device("meta"):
        model = build_model(config, torch.bfloat16, "eager")
    shapes = [module.weight.shape for _, module in body_linears(model)]
    return {
        "total": sum(parameter.numel() for parameter in model.parameters()),
        "quantized": sum(out * width for out, width in shapes),
        "trainable": sum(rank * (out + width) for out, width in shapes),
    }


@pytest.mark.parametrize("name", TABLE)
def test_the_published_floors_come_out_to_their_two_digits(name):
    config = config_of(name)
    parameters = counted(config)
    floors = [floor_bytes(config, parameters, tokens=tokens) / GIB for tokens in (512, 2048, 8192)]
    assert tuple(round(floor, 2) for floor in floors) == TABLE[name]


def test_a_floor_is_the_sum_of_its_parts_by_hand():
    """Two layers of 64 x 192 and 100 words, 8 tokens in 2 rows of 4, so few that the loss is the smaller part."""
    config = LlamaConfig(hidden_size=64, intermediate_size=192, num_hidden_layers=2, num_attention_heads=4,
                         num_key_value_heads=2, vocab_size=100, tie_word_embeddings=False)  # fmt: skip
    linear = 2 * 64 * (64 + 32 + 32 + 64 + 3 * 192)
    parameters = {"total": linear + 2 * 100 * 64 + 5 * 64, "quantized": linear, "trainable": 1024}
    resident = linear * (4 + (8 + 32 / 256) / 64) / 8 + (parameters["total"] - linear) * 2
    adam, checkpoints = 2 * (1 + 4 / 256), 2 * 64 * 8 * 2
    work = (64 + 64 + 32 + 32 + 64 + 64 + 64 + 3 * 192 + 64) * 8 * 2 + 192 * 64 * 2 + 192 * 64 // 64 * 4
    loss = 2 * 64 * 8 * 2 + 8 * 100 * 6
    assert work > loss
    expected = resident + checkpoints + work + 1024 * (2 + 2 + adam)
    assert floor_bytes(config, parameters, tokens=4, micro_batch=2) == pytest.approx(expected, abs=1)

    whole = floor_bytes(config, parameters, tokens=8)
    assert whole == pytest.approx(expected, abs=1), "rows and tokens weigh the same"
    assert floor_bytes(config, parameters, tokens=8, has_masters=True) == whole + 4 * 1024
    assert floor_bytes(config, parameters, tokens=8, optimizer="paged_adamw_8bit") == whole
    assert floor_bytes(config, parameters, tokens=8, optimizer="adamw_32bit") - whole == pytest.approx(
        1024 * (8 - adam), abs=1
    )
    assert floor_bytes(config, parameters, tokens=8, optimizer="lion_8bit") - whole == pytest.approx(
        -1024 * adam / 2, abs=1
    )
    simple = Quantization("nf4", double_quant=False)
    assert floor_bytes(config, parameters, tokens=8, quantization=simple) - whole == pytest.approx(
        linear * 0.5 / 8 - linear * (8 + 32 / 256) / 64 / 8, abs=1
    )
    once = (
        resident + 1024 * (2 + adam) + max(checkpoints + loss, work + max(checkpoints + 1024, checkpoints / 2 + 2048))
    )
    assert floor_bytes(config, parameters, tokens=8, accumulation=1) == pytest.approx(once, abs=1)
    assert once < expected, "in a single micro-batch not all gradients stand beside all checkpoints"


@pytest.mark.parametrize(
    "config",
    [
        GPT2Config(n_layer=2),
        MixtralConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
                      num_key_value_heads=2, vocab_size=100),
        AutoConfig.for_model("gpt_neox", hidden_size=64, intermediate_size=256, num_hidden_layers=2,
                             num_attention_heads=4, vocab_size=100),
    ],
    ids=["gpt2", "mixtral", "gpt_neox"],
)  # fmt: skip
def test_no_floor_is_told_of_a_model_of_other_parts(config):
    assert floor_bytes(config, counted(config), tokens=8) is None


def test_a_tied_head_is_counted_once():
    tied, loose = (
        Qwen3Config(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, head_dim=16,
                    num_key_value_heads=2, vocab_size=1000, tie_word_embeddings=is_tied)
        for is_tied in (True, False)
    )  # fmt: skip
    floors = [floor_bytes(config, counted(config), tokens=8) for config in (tied, loose)]
    assert floors[1] - floors[0] == 2 * 64 * 1000


# --- the plan beside it ---


@pytest.mark.parametrize(("model", "accumulation"), [("llama-2-7b", 1), ("llama-3.1-8b", 2)])
def test_no_planned_step_is_below_its_floor(model, accumulation):
    config = read_config(MODELS / model)
    work = Workload(Quantization("nf4"), Lora(), torch.bfloat16, "sdpa", 1, 512, accumulation, "recompute",
                    "paged_adamw_8bit", "none")  # fmt: skip
    planned = dry_run(config, work)
    least = floor_bytes(config, planned["parameters"], tokens=512, accumulation=accumulation)
    assert planned["parameters"] == counted(config), "both count the same model"
    assert 1 <= planned["peak_bytes"] / least < 1.2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "activations", "most"),
    [
        ("llama-3.1-8b", "recompute", 6.79),
        ("llama-3.1-8b", "offload", 6.21),
        ("llama-2-7b", "recompute", 4.94),
        ("llama-2-7b", "offload", 4.38),
    ],
)
def test_a_planned_step_of_2048_tokens_is_within_a_twentieth_of_the_floor(model, activations, most):
    """GiB: 1.05 times the floor and 0.05 beside it; the lower ones with the blocks' inputs in the host's memory."""
    config = read_config(MODELS / model)
    work = Workload(Quantization("nf4"), Lora(rank=16), torch.bfloat16, "sdpa", 1, 2048, 2, activations,
                    "paged_adamw_8bit", "stochastic", on_card=True,
                    loss_chunk=automatic_chunk(config.vocab_size))  # fmt: skip
    planned = dry_run(config, work)
    assert 0.9 * most < planned["peak_bytes"] / GIB <= most


RECIPE = ("base.model=./nowhere", "data.train=rows.jsonl", "base.device=cpu", "base.compute_dtype=bfloat16")
PACE = Pace(200, 2, 2, 20, None, 2e-4, "the test", 5000, 1000)


@pytest.mark.slow
def test_a_plan_says_how_far_from_its_floor_it_is():
    config = LlamaConfig(hidden_size=128, intermediate_size=320, num_hidden_layers=2, num_attention_heads=4,
                         num_key_value_heads=2, vocab_size=512, tie_word_embeddings=False)  # fmt: skip
    plan, other = (
        plan_methods(read_recipe("default", [*RECIPE, setting]), config, PACE, 48, card="none")
        for setting in ("train.master_weights=fp32", "base.quantization=int8")
    )
    least = floor_bytes(config, counted(config), tokens=48, micro_batch=2, has_masters=True)
    phases = plan["methods"]["qlora"]["peak_by_phase"]
    step = max(phases[phase] for phase in ("forward", "loss", "backward", "optimizer"))
    assert plan["floor"] == {"bytes": least, "ratio": round(step / least, 4), "logits_tokens": 2 * 48}
    text = " ".join(plan_text({"schema": 1, **plan}).split())
    assert f"takes {step / least:.2f} times the least that its mathematics needs ({format_bytes(least)}), with " in text
    assert "with nothing offloaded and logits of 96 tokens at once." in text
    assert other["floor"] is None
    assert "mathematics" not in plan_text({"schema": 1, **other})
    del plan["floor"]
    assert "mathematics" not in plan_text({"schema": 1, **plan}), "older folders have none"


@pytest.mark.parametrize(
    ("name", "card", "settings"),
    [
        pytest.param("Llama-2-7B", "RTX 3050 Laptop 6GB", ["base.quantize_head=true"], marks=pytest.mark.slow),
        pytest.param("Llama-2-7B", "RTX 4060", [], marks=pytest.mark.slow),
        pytest.param("Llama-2-13B", "RTX 3060", [], marks=pytest.mark.long),
        pytest.param("LLaMA-33B", "RTX 4090", [], marks=pytest.mark.long),
        pytest.param("Llama-3.1-70B", "RTX A6000", [], marks=pytest.mark.long),
    ],
)
def test_a_model_of_each_size_fits_the_card_that_it_is_to_fit(name, card, settings, tmp_path):
    """Cards of 6, 8, 12, 24 and 48 GB, rows of 2,048 tokens, rank 16: with what the card's allocator adds."""
    config_of(name).save_pretrained(tmp_path)
    smallest = ("lora.rank=16", "data.max_tokens=2048", "train.micro_batch=1", "memory.activations=offload")
    recipe = read_recipe("default", [f"base.model={tmp_path}", *RECIPE[1:], *smallest, *settings])
    plan = plan_memory(recipe, gpu=card)
    least = plan["floor"]["bytes"]
    assert plan["tokens"] == 2048
    assert 0.75 * least < plan["methods"]["qlora"]["peak_bytes"] < plan["needs_bytes"] <= plan["budget"]
    assert plan["budget"] < TOTAL_MIB[card] * 2**20
