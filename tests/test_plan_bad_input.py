"""`plan` on bad input: one line that says what was found and what to do, its exit code, and no dry run before it."""

import json

import pytest
import tiny
import torch
from huggingface_hub import constants
from transformers import AutoConfig, LlamaConfig
from typer.testing import CliRunner

from qlora_kit.base import Quantization
from qlora_kit.base.architecture import build_model
from qlora_kit.cli.app import app
from qlora_kit.errors import ModelError, RecipeError
from qlora_kit.plan import Workload, table, weight_bytes
from qlora_kit.recipe import Lora, read_recipe
from qlora_kit.units import format_bytes

SOUND = {**tiny.LLAMA, "model_type": "llama", "architectures": ["LlamaForCausalLM"]}
WEIGHTS = Workload(Quantization("nf4"), Lora(), torch.bfloat16, "sdpa", 1, 1, 1, "recompute", "adamw", "none")


class PlannedError(Exception):
    """A dry run was made."""


@pytest.fixture(autouse=True)
def no_dry_run(monkeypatch):
    """What is refused here is refused before a step is planned."""

    def refuse(*_, **__):
        raise PlannedError

    monkeypatch.setattr(table, "dry_run", refuse)


def model_folder(tmp_path, content):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


def call(model, *more):
    settings = [
        f"base.model={model}",
        "data.train=/nowhere/none.jsonl",
        "base.device=cpu",
        "base.compute_dtype=bfloat16",
    ]
    lengths = [] if any("max_tokens" in setting for setting in more) else ["data.max_tokens=32"]
    return CliRunner().invoke(app, ["plan", "default", *settings, *lengths, *more])


def assert_mistake(result, *words, code=2):
    assert result.exit_code == code, repr(result.exception)
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("error: ")
    for word in words:
        assert word in lines[0]


@pytest.mark.slow
def test_a_sound_model_within_its_budget_is_planned(tmp_path):
    """What the other tests ask of is there: without a fault the way leads to the dry run."""
    folder = model_folder(tmp_path, SOUND)
    for good in ([], ["--budget", "1GiB"], ["--gpu", "RTX 4090"], ["data.max_tokens=64"]):
        assert isinstance(call(folder, *good).exception, PlannedError), good


# --- config.json ---


NO_MODELS = {
    "no JSON": ('{"model_type": "llama", ', ["config.json is damaged", "JSON"]),
    "nothing": ("", ["config.json is damaged"]),
    "a list": ([SOUND], ["expected a JSON object, found a list"]),
    "a text": ('"llama"', ["expected a JSON object"]),
    "another program's": ({"version": 3, "services": {}}, ["no model_type"]),
    "an unknown kind": ({"model_type": "nonesuch"}, ["`nonesuch`"]),
    "an encoder with a decoder": ({"model_type": "bart", "is_encoder_decoder": True}, ["bart", "both directions"]),
    "one that only encodes and decodes": ({"model_type": "t5", "is_encoder_decoder": True}, ["t5", "not a causal"]),
    "an encoder": ({"model_type": "bert"}, ["bert", "both directions"]),
    "pictures": ({"model_type": "clip"}, ["clip", "not a causal"]),
    "words for numbers": ({**SOUND, "hidden_size": "many"}, ["hidden_size", "expected int", "many"]),
    "null for numbers": ({**SOUND, "num_hidden_layers": None}, ["num_hidden_layers", "expected int"]),
    "a size below zero": ({**SOUND, "hidden_size": -4}, ["hidden_size=-4", "at least 1"]),
    "no layers": ({**SOUND, "num_hidden_layers": 0}, ["num_hidden_layers=0"]),
    "no words": ({**SOUND, "vocab_size": 0}, ["vocab_size=0"]),
    "no heads": ({**SOUND, "num_attention_heads": 0}, ["config.json cannot be used"]),
    "heads that do not divide": ({**SOUND, "num_attention_heads": 5}, ["not a multiple", "5"]),
    "larger than can be": ({**SOUND, "hidden_size": 2**40}, ["hidden_size", "no model has more"]),
    "an unknown activation": ({**SOUND, "hidden_act": "nonsense"}, ["cannot be built", "nonsense"]),
    "unknown positions": ({**SOUND, "rope_scaling": {"rope_type": "nonsense"}}, ["cannot be built", "nonsense"]),
    "an unknown dtype": ({**SOUND, "dtype": "nonsense"}, ["cannot be used", "nonsense"]),
    "a number where a mapping goes": ({**SOUND, "text_config": 5}, ["config.json"]),
}


@pytest.mark.parametrize("name", NO_MODELS)
def test_a_config_that_is_no_model_is_one_line(name, tmp_path):
    content, words = NO_MODELS[name]
    assert_mistake(call(model_folder(tmp_path, content)), *words)


def test_a_model_that_cannot_be_built_is_the_kits_own_error():
    with pytest.raises(ModelError, match="a llama that cannot be built"), torch.device("meta"):
        build_model(LlamaConfig(**{**tiny.LLAMA, "hidden_act": "nonsense"}), torch.float32, "sdpa")


def test_a_hub_that_cannot_be_reached_is_one_line_with_the_way_out(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert_mistake(call("nobody/such-model-1234"), "HF_HUB_OFFLINE", "hf download nobody/such-model-1234")
    assert_mistake(call("no such model"), "neither a folder here nor a hub id")


# --- cards and budgets ---


def test_an_unknown_card_names_the_nearest(tmp_path):
    assert_mistake(
        call(model_folder(tmp_path, SOUND), "--gpu", "RTX 4061"), "RTX 4061", "nearest: RTX 4060", "--budget"
    )


BUDGETS = ("24", "24G", "0GiB", "-1GiB", "GiB", "nanGiB", "1e30TiB", "99999999999TiB", "9" * 400 + "TiB", "lots")


@pytest.mark.parametrize("form", ["--budget", "memory.budget="])
@pytest.mark.parametrize("budget", BUDGETS)
def test_a_budget_that_is_none_is_one_line(form, budget, tmp_path):
    folder = model_folder(tmp_path, SOUND)
    more = [form, budget] if form == "--budget" else [form + budget]
    assert_mistake(call(folder, *more), "memory.budget must be a size above 0 with its unit (24GiB)", "found")


@pytest.mark.parametrize("budget", ["", " ", "null", "~"])
def test_an_option_without_a_size_is_not_taken_for_no_budget(budget, tmp_path):
    assert_mistake(call(model_folder(tmp_path, SOUND), "--budget", budget), "memory.budget must be a size")


def test_the_largest_budget_is_a_pebibyte():
    asked = ["base.model=x", "data.train=x"]
    assert read_recipe("default", [*asked, "memory.budget=1024TiB"]).memory.budget == "1024TiB"
    with pytest.raises(RecipeError, match="no device has more than 1024 TiB"):
        read_recipe("default", [*asked, "memory.budget=1025TiB"])


# --- budgets below the weights ---


@pytest.mark.parametrize("kind", ["nf4", "int8", "none"])
def test_the_weights_are_told_as_loading_leaves_them(kind):
    model = tiny.quantized(tiny.llama(), kind, dtype=torch.float32)
    held = sum(tensor.numel() * tensor.element_size() for tensor in (*model.parameters(), *model.buffers()))
    work = Workload(Quantization(kind), None, torch.float32, "sdpa", 1, 1, 1, "recompute", "adamw", "none")
    assert weight_bytes(LlamaConfig(**tiny.LLAMA), work) == held


LARGE = {**SOUND, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
         "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 131072}  # fmt: skip


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["--budget", "4GiB"], ["memory.budget is 4.00 GiB", "alone take 5.31 GiB", "base.quantize_head=true"]),
        (["memory.budget=1MiB"], ["memory.budget is 1.00 MiB", "alone take 5.31 GiB"]),
        (["--budget", "8GiB", "base.quantization=none"], ["alone take 15.0 GiB", "base.quantization=nf4"]),
        (["--gpu", "RTX 4060", "base.quantization=none"], ["memory.budget is 7.41 GiB", "alone take 15.0 GiB"]),
    ],
)
def test_a_budget_below_the_weights_says_what_they_take_and_plans_no_step(settings, words, tmp_path):
    result = call(model_folder(tmp_path, LARGE), *settings)
    assert_mistake(result, *words, code=3)
    assert "{" not in result.stdout


@pytest.mark.parametrize("settings", [
    ["--budget", "2GiB"], ["--budget", "4GiB", "base.quantization=none"],
    ["--budget", "8GiB", "base.quantization=none", "train.full_finetune=true"],
])  # fmt: skip
def test_no_setting_is_advised_with_which_the_weights_would_still_be_above_the_budget(settings, tmp_path):
    result = call(model_folder(tmp_path, LARGE), *settings)
    assert_mistake(result, "raise the budget, or take a smaller base", code=3)


def test_adapters_are_advised_where_only_all_weights_in_16_bits_are_above_the_budget(tmp_path):
    result = call(model_folder(tmp_path, LARGE), "--budget", "8GiB", "train.full_finetune=true")
    assert_mistake(result, "alone take 15.0 GiB", "set train.full_finetune=false", code=3)


@pytest.mark.parametrize("kind", ["gemma2", "bloom"])
def test_a_family_without_sdpa_takes_eager_and_says_so(kind, tmp_path):
    sound = AutoConfig.for_model(kind, **{**tiny.LLAMA, "head_dim": 16, "n_head": 4, "n_layer": 2}).to_dict()
    result = call(model_folder(tmp_path, sound))
    assert isinstance(result.exception, PlannedError), result.output
    assert f"transformers has no sdpa for a {kind}: base.attention is eager here" in result.stderr + result.stdout
    folder = tmp_path / "llama"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(SOUND))
    assert "eager" not in call(folder).output


def test_a_budget_of_just_the_weights_goes_on_to_the_plan(tmp_path):
    weights = weight_bytes(LlamaConfig(**SOUND), WEIGHTS)
    folder = model_folder(tmp_path, SOUND)
    assert isinstance(call(folder, "--budget", f"{weights}B").exception, PlannedError)
    assert_mistake(call(folder, "--budget", f"{weights - 1}B"), f"alone take {format_bytes(weights)}", code=3)


# --- lengths ---


def test_a_length_above_the_models_positions_is_refused_without_the_rows_too(tmp_path):
    folder = model_folder(tmp_path, SOUND)
    assert_mistake(call(folder, "data.max_tokens=65"), "data.max_tokens=65", "64 positions", "set data.max_tokens=64")
    assert_mistake(call(folder, "data.max_tokens=1"), "data.max_tokens=1", "two tokens")
