"""Recipes: what is read, what is refused and in which words, where paths point, and the recipes that are shipped."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from qlora_kit.data import FORMATS
from qlora_kit.errors import RecipeError
from qlora_kit.recipe import Base, Data, Lora, Recipe, Train, dump_recipe, names, read_recipe, schema_text, yaml12
from qlora_kit.recipe import find as find_shipped
from qlora_kit.recipe import summary as summary_of
from qlora_kit.recipe.tasks import TASKS, TaskName
from qlora_kit.recipe.words import SLOTS, nearest

MINIMAL = "base: {model: org/name}\ndata: {train: org/rows}\n"

# The design's list of keys and defaults: change it only together with the design.
DESIGN = """
base:
  model: org/name
  revision: null
  quantization: nf4
  double_quant: true
  block_size: 64
  compute_dtype: auto
  skip: []
  quantize_head: false
  cache: false
  attention: sdpa
  device: auto
lora:
  from: null
  rank: 16
  alpha: 32
  targets: all-linear
  dropout: 0.0
  scaling: standard
  init: default
  dora: false
  lr_ratio: 1.0
  rank_pattern: {}
  alpha_pattern: {}
  also_train: []
  added_tokens: []
  untie_head: false
data:
  train: org/rows
  eval: auto
  format: auto
  columns: {}
  max_tokens: 2048
  over_length: drop
  packing: auto
  loss_on: assistant
  template: auto
  thinking: keep
  on_error: stop
train:
  task: sft
  epochs: 1
  tokens: null
  steps: null
  micro_batch: auto
  accumulation: auto
  lr: auto
  schedule: constant
  warmup: 0.03
  optimizer: paged_adamw_8bit
  master_weights: auto
  weight_decay: 0.0
  max_grad_norm: 0.3
  beta: 0.1
  seed: 0
  eval_every: auto
  save_every: auto
  sample_every: null
  keep_checkpoints: 2
  early_stopping: null
  trackers: []
  full_finetune: false
memory:
  budget: null
  activations: auto
  loss_chunk: auto
  eval_tokens: auto
output: runs/NAME
"""

WORDS = {
    "base.quantization": "nf4 fp4 int8 none",
    "base.compute_dtype": "auto bfloat16 float16 float32",
    "base.attention": "sdpa eager flex flash",
    "base.device": "auto cpu cuda cuda:0 cuda:11",
    "lora.targets": "all-linear attention mlp experts head",
    "lora.scaling": "standard rslora",
    "lora.init": "default gaussian pissa loftq",
    "data.format": "auto messages sharegpt alpaca completion text preference labelled classification",
    "data.over_length": "drop truncate split error",
    "data.packing": "auto true false",
    "data.loss_on": "assistant last completion all",
    "data.thinking": "keep strip empty",
    "data.on_error": "stop skip",
    "train.task": "sft pretrain classify dpo ipo orpo kto",
    "train.schedule": "constant linear cosine wsd",
    "train.optimizer": "adamw sgd adamw_8bit adamw_32bit lion_8bit ademamix_8bit paged_adamw_8bit paged_adamw_32bit "
    "paged_lion_8bit paged_ademamix_8bit",
    "train.master_weights": "auto fp32 stochastic none",
    "train.trackers": "[tensorboard,wandb,mlflow,trackio]",
    "memory.activations": "auto keep selective recompute offload",
    "memory.budget": "24GiB 512MiB 8GB 0.5GiB null",
}


@pytest.fixture
def read(tmp_path, monkeypatch):
    """Writes a recipe's text to recipe.yaml in an empty working directory and reads it."""
    monkeypatch.chdir(tmp_path)

    def read_text(text=MINIMAL, *overrides):
        Path("recipe.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
        return read_recipe("recipe.yaml", overrides)

    return read_text


@pytest.fixture
def refused(read):
    """The message of the error that a recipe is refused with."""

    def read_text(text=MINIMAL, *overrides):
        with pytest.raises(RecipeError) as caught:
            read(text, *overrides)
        return str(caught.value)

    return read_text


def complaint(read, *arguments):
    """What a recipe is refused with; empty if it is not."""
    try:
        read(*arguments)
    except RecipeError as error:
        return str(error)
    return ""


def is_clean(message):
    return all(line.isprintable() for line in message.split("\n"))


def value_at(recipe, key):
    values = recipe.model_dump(by_alias=True)
    for part in key.split("."):
        values = values[part]
    return values


def ordered(values):
    """A mapping as nested pairs, so that the order of keys counts in a comparison."""
    return [(key, ordered(value) if value and isinstance(value, dict) else value) for key, value in values.items()]


# The schema


def test_schema_has_exactly_the_keys_defaults_and_order_of_the_design():
    recipe = Recipe(base=Base(model="org/name"), data=Data(train="org/rows"))
    assert ordered(recipe.model_dump(by_alias=True)) == ordered(yaml.safe_load(DESIGN))


def test_only_the_model_and_the_training_rows_have_no_default():
    required = {key for key, slot in SLOTS.items() if slot.field and slot.field.is_required()}
    assert required - {"data.train[].path", "data.eval[].path"} == {"base", "base.model", "data", "data.train"}


def test_every_key_says_on_one_line_what_it_is():
    for key, slot in SLOTS.items():
        if slot.field:
            about = slot.field.description
            assert about, key
            assert about.endswith("."), key
            assert "\n" not in about, key


def test_recipe_cannot_be_changed():
    recipe = Recipe(base=Base(model="org/name"), data=Data(train="org/rows"))
    with pytest.raises(ValidationError, match="frozen"):
        recipe.lora.rank = 8


def test_schema_text_names_every_key_with_its_default_its_values_and_its_reason():
    text = schema_text()
    for key, slot in SLOTS.items():
        if slot.field:
            assert key in text
    assert "base.model  (required)" in text
    assert "lora.rank  (default: 16)" in text
    assert "Values: a whole number of at least 1 or auto." in text
    assert "LoRA Without Regret" in text
    assert max(len(line) for line in text.splitlines()) <= 100


# Reading


def test_minimal_recipe_takes_every_default_and_names_its_run_folder_after_the_file(read, tmp_path):
    expected = yaml.safe_load(DESIGN) | {"output": str(tmp_path / "runs/recipe")}
    assert read().model_dump(by_alias=True) == expected


@pytest.mark.parametrize("text", ["output: null\n", "output:\n", "output: ~\n"])
def test_null_output_is_the_default(read, tmp_path, text):
    assert read(MINIMAL + text).output == str(tmp_path / "runs/recipe")


def test_section_with_all_its_keys_commented_out_keeps_its_defaults(read):
    assert read(MINIMAL + "lora:\n  # rank: 8\ntrain:\n").lora == Lora()


@pytest.mark.parametrize(
    ("written", "number"),
    [("2e-4", 2e-4), ("1e2", 1e2), ("1E-3", 1e-3), ("+.5", 0.5), ("1.", 1.0), ("010", 10), ("3", 3), ("0x10", 16),
     ("0o17", 15), ("-0.0e1", None), ("12:30", None), ("1_000", None), ("1e", None), ("2e-4x", None), ("'3'", None)],
)  # fmt: skip
def test_numbers_are_those_of_yaml_1_2(read, written, number):
    if number is None:
        with pytest.raises(RecipeError, match=r"train\.lr must be a number above 0 up to 1000 or auto"):
            read(MINIMAL, f"train.lr={written}")
    else:
        assert read(MINIMAL, f"train.lr={written}").train.lr == number


@pytest.mark.parametrize("word", ["on", "off", "yes", "no", "y", "2001-01-01", "12:30", "1_000", "0b1", "=", "none"])
def test_words_of_yaml_1_1_stay_text_in_both_directions(read, word):
    recipe = read(MINIMAL, f"base.revision={word}")
    assert recipe.base.revision == word
    assert yaml.safe_load(dump_recipe(recipe))["base"]["revision"] == word
    with pytest.raises(RecipeError, match=r"lora\.dora must be true or false, found"):
        read(MINIMAL, f"lora.dora={word}")


@pytest.mark.parametrize("key", WORDS)
def test_every_word_of_the_design_is_known(read, refused, key):
    for word in WORDS[key].split():
        assert value_at(read(MINIMAL, f"{key}={word}"), key) == yaml.safe_load(word)


def test_override_beats_the_file_and_the_last_override_of_a_key_wins(read):
    recipe = read(MINIMAL + "lora: {rank: 8, alpha: 4}\n", "lora.rank=32", "lora.rank=64")
    assert (recipe.lora.rank, recipe.lora.alpha) == (64, 4)


def test_override_mends_what_is_wrong_in_the_file(read):
    assert read(MINIMAL + "lora: {rank: 8.0}\ntrain: {trackers: [5]}\n", "lora.rank=8", "train.trackers=[]")


def test_override_fills_a_section_that_the_file_leaves_empty(read):
    assert read(MINIMAL + "lora:\n", "lora.rank=3").lora.rank == 3


def test_a_mistake_in_an_override_is_not_told_of_the_line_that_it_replaces(refused):
    told = refused("base: {model: org/name}\ndata:\n  train: [{path: a.jsonl}]\n", "data.train=[{split: test}]")
    assert told.startswith("override data.train=[{split: test}]: data.train[0].path is missing")


def test_override_values_are_yaml(read):
    recipe = read(
        MINIMAL,
        "lora.targets=[q_proj,v_proj]",
        "lora.rank_pattern.q_proj=8",
        "lora.rank_pattern.re:model.layers.0=4",
        "lora.alpha=2.5",
        "train.steps=null",
        "base.revision=",
        "train.schedule='cosine'",
    )
    assert recipe.lora.targets == ["q_proj", "v_proj"]
    assert recipe.lora.rank_pattern == {"q_proj": 8, "re:model.layers.0": 4}
    assert (recipe.lora.alpha, recipe.base.revision, recipe.train.schedule) == (2.5, None, "cosine")


@pytest.mark.parametrize("key", ["train.lr", "lora.lr_ratio"])
def test_a_rate_that_no_dtype_of_a_run_could_hold_is_refused(read, key):
    assert value_at(read(MINIMAL, f"{key}=1000"), key) == 1000
    with pytest.raises(RecipeError, match=rf"{re.escape(key)} must be a number above 0 up to 1000.*, found 1e38"):
        read(MINIMAL, f"{key}=1e38")


def test_overrides_alone_can_give_what_has_no_default(read):
    assert read("train: {seed: 3}\n", "base.model=org/name", "data.train=org/rows").base.model == "org/name"


def test_whole_numbers_and_fractions_keep_their_kind(read):
    recipe = read(MINIMAL, "lora.alpha=32", "train.epochs=0.5", "train.lr=1")
    assert [type(value) for value in (recipe.lora.alpha, recipe.train.epochs, recipe.train.lr)] == [int, float, float]


def test_data_may_be_a_list_of_names_and_sources(read, tmp_path):
    text = "base: {model: org/name}\ndata: {train: [a.jsonl, {path: b.csv, columns: {prompt: q}}, org/rows]}\n"
    first, second, third = read(text).data.train
    assert (first, second.path, third) == (str(tmp_path / "a.jsonl"), str(tmp_path / "b.csv"), "org/rows")
    assert (second.split, second.weight, second.format, second.columns) == ("train", 1, None, {"prompt": "q"})


def test_byte_order_mark_is_no_part_of_a_recipe(read):
    assert read(b"\xef\xbb\xbf" + MINIMAL.encode()).base.model == "org/name"


# Mistakes


def test_recipe_reports_every_mistake_at_once_with_line_numbers(refused):
    text = """\
base:
  model: org/name
  block_size: 100
  skip: [a, 3]
lora:
  rnak: 32
  rank: 8.0
  rank_pattern:
    q_proj: 1.5
    "re:(": 4
  alpha: 8
  alpha: 16
data:
  train:
    - {path: a.jsonl, wieght: 2}
    - {split: test}
    - 5
train:
  task: sleep
  lr: -1
loar: {rank: 2}
memory:
  budget: 24
"""
    assert refused(text, "lora.rnak=32", "lora.dropout=1.0", "seed") == "\n".join(
        [
            "17 mistakes in recipe.yaml",
            "recipe.yaml:3: base.block_size must be a power of two from 32 to 4096, found 100",
            "recipe.yaml:4: base.skip[1] must be text, found 3, which is text only in quotes",
            "recipe.yaml:6: lora.rnak is not a key (did you mean lora.rank?)",
            "recipe.yaml:7: lora.rank must be a whole number of at least 1 or auto, found 8.0",
            "recipe.yaml:9: lora.rank_pattern.q_proj must be a whole number of at least 1, found 1.5",
            "recipe.yaml:10: lora.rank_pattern.re:( is not a usable name: the regular expression does not compile: "
            "missing ), unterminated subpattern at position 0",
            "recipe.yaml:12: lora.alpha is written twice, first in line 11",
            "recipe.yaml:15: data.train[0].wieght is not a key (did you mean data.train[].weight?)",
            "recipe.yaml:16: data.train[1].path is missing; it must be a file, a folder or a hub id",
            "recipe.yaml:17: data.train[2] must be a file, a folder, a hub id or a mapping of path, split, format, "
            "columns, weight, found 5",
            "recipe.yaml:19: train.task must be sft, pretrain, classify, dpo, ipo, orpo or kto, found 'sleep'",
            "recipe.yaml:20: train.lr must be a number above 0 up to 1000 or auto, found -1",
            "recipe.yaml:21: loar is not a key (did you mean lora?)",
            "recipe.yaml:23: memory.budget must be a size above 0 with its unit (24GiB) or null, found 24",
            "override lora.rnak=32: lora.rnak is not a key (did you mean lora.rank?)",
            "override lora.dropout=1.0: lora.dropout must be a number from 0 to below 1, found 1.0",
            "override seed: an override is written key=value, as in lora.rank=32",
        ]
    )


def test_a_single_mistake_is_one_line(refused):
    message = "recipe.yaml:4: lora.rnak is not a key (did you mean lora.rank?)"
    assert refused(MINIMAL + "lora:\n  rnak: 32\n") == message


@pytest.mark.parametrize(("wrong", "meant"), [
    ("path: rows.jsonl", "data.train[].path"),
    ("splits: test", "data.train[].split"),
    ("eval: [{pth: rows.jsonl}]", "data.eval[].path"),
])  # fmt: skip
def test_of_keys_of_one_name_the_training_rows_is_meant_unless_another_stands_beside(wrong, meant, refused):
    assert f"did you mean {meant}?" in refused(f"base: {{model: org/name}}\ndata:\n  train: org/rows\n  {wrong}\n")


def test_held_out_rows_of_the_hub_are_named_as_training_rows_are(read):
    assert read(MINIMAL, "data.eval=org/rows").data.eval == "org/rows"
    assert read(MINIMAL, "data.eval=[org/rows]").data.eval == ["org/rows"]


def test_missing_keys_are_named_with_what_they_take(refused):
    assert refused("train: {seed: 1}\n") == "\n".join(
        [
            "2 mistakes in recipe.yaml",
            "recipe.yaml: base.model is missing; it must be a folder or a hub id",
            "recipe.yaml: data.train is missing; it must be a file, a folder, a hub id or a list of these or of "
            "{path, split, format, columns, weight}",
        ]
    )
    assert refused("data: {train: org/rows}\nbase:\n  device: cpu\n").startswith("recipe.yaml:2: base.model is missing")


@pytest.mark.parametrize(
    ("wrong", "meant"),
    [("lora.rnak", "lora.rank"), ("lora.lr", "train.lr"), ("lora.target", "lora.targets"), ("rank", "lora.rank"),
     ("trian", "train"), ("train.learning_rate", "train.lr"), ("lora.r", "lora.rank"), ("ouput", "output"),
     ("train.optimiser", "train.optimizer"), ("memory.max_tokens", "data.max_tokens"), ("lora.from_", "lora.from"),
     ("format", "data.format"), ("lora.drop", "lora.dropout"), ("train.zzz", None), ("zzz", None)],
)  # fmt: skip
def test_unknown_key_suggests_the_nearest_in_any_section(wrong, meant):
    assert nearest(tuple(wrong.split("."))) == meant


def test_familiar_names_lead_to_keys_that_exist():
    from qlora_kit.recipe.words import FAMILIAR

    assert set(FAMILIAR.values()) <= SLOTS.keys()
    assert not FAMILIAR.keys() & {key.rpartition(".")[2] for key in SLOTS}


@pytest.mark.parametrize(
    ("key", "bad", "good"),
    [
        ("lora.rank", "0 -1 8.0 true none 1e1 '8' [8]", "1 500"),
        ("lora.alpha", "0 -1 .nan .inf 1e400 true auto", "1 0.5 1e-3"),
        ("lora.dropout", "-0.1 1 1.5 .nan true", "0 0.0 0.999"),
        ("lora.lr_ratio", "0 -1 .inf auto", "16 0.5"),
        ("lora.targets", "q_proj [] [3] re: re:( [re:(] all_linear", "[q_proj] [mlp,lm_head] re:.*q_proj [re:q.*]"),
        ("train.lr", "0 -1e-4 -.inf .nan 1e400 fast", "1e-4 1 auto"),
        ("train.epochs", "0 -1 .nan auto null", "0.1 3"),
        ("train.steps", "0 -5 1.5 auto", "1 null"),
        ("train.tokens", "0 -5 1e6 auto", "1000000 null"),
        ("train.micro_batch", "0 1.0 null", "1 auto"),
        ("train.accumulation", "0 -2 true", "16 auto"),
        ("train.warmup", "-0.01 1.01 10 .nan", "0 1 0.5"),
        ("train.weight_decay", "-0.1 .inf", "0 0.1 5"),
        ("train.max_grad_norm", "0 -1 .inf null", "0.3 1"),
        ("train.beta", "0 -1", "0.1"),
        ("train.seed", "-1 4294967296 1.0 auto", "0 4294967295"),
        ("train.eval_every", "0 1.5 null", "1 auto"),
        ("train.save_every", "0 -1", "100 auto"),
        ("train.keep_checkpoints", "0 null", "1"),
        ("train.optimizer", "adam paged_adamw paged_sgd AdamW", "sgd paged_lion_8bit"),
        ("train.trackers", "wandb [neptune] null", "[] [wandb,mlflow]"),
        ("base.block_size", "16 48 8192 0 64.0 -64", "32 4096"),
        ("base.device", "gpu cuda: cuda:-1 cuda:x CUDA mps 0 'cuda:0\\n'", "cuda:3 cpu"),
        ("base.model", "'' \"\\t\" null 7 [a]", "org/name"),
        ("data.max_tokens", "0 -1 1e3 auto", "1 100000"),
        ("memory.budget", "24 24G 0GiB -1GiB all 1e400", "24GiB 0.5GB"),
    ],
)
def test_impossible_values_are_refused_and_possible_ones_are_not(read, refused, key, bad, good):
    for value in bad.split():
        assert f"override {key}={value}: {key}" in refused(MINIMAL, f"{key}={value}")
    for value in good.split():
        assert read(MINIMAL, f"{key}={value}")


WRONG = [
    *["null", "true", "0", "-1", "8.5", "zzz", "''", ".nan", "-.inf", "1e400", "9" * 400, "9" * 5000, "re:["],
    *["[]", "[1]", "[[]]", "[null]", "{}", "{a: 1}", "{a: {b: []}}", "[{path: 1}]", '"a\\nb"', '"\\0"', '"\\ud800"'],
]
KEYS = [key for key, slot in SLOTS.items() if slot.field and "[]" not in key]


@pytest.mark.parametrize("key", KEYS)
def test_no_mistake_in_any_key_is_told_in_the_words_of_a_library(read, key):
    complaints = [complaint(read, MINIMAL, f"{key}={value}") for value in WRONG]
    messages = [message for message in complaints if message]
    assert len(messages) >= 5, "a key that takes anything would make this test empty"
    for message in messages:
        assert "\n" not in message or message.startswith(f"{message.count(chr(10))} mistakes in recipe.yaml\n")
        told = message.splitlines()[-1]
        assert told.startswith(f"override {key}=")
        assert told.isprintable()
        assert len(told) < 500
        for foreign in ("pydantic", "Input should be", "[type=", "yaml.", "Error", "<class"):
            assert foreign not in message


def test_text_that_looks_like_a_number_is_told_to_take_quotes(read, refused):
    assert refused(MINIMAL, "base.revision=1234567").endswith("found 1234567, which is text only in quotes")
    assert read(MINIMAL, "base.revision='1234567'").base.revision == "1234567"


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("lora.rank", "an override is written key=value"),
        ("", "an override is written key=value"),
        ("=3", "is not a key"),
        ("lora.=3", "lora. is not a key"),
        ("lora={rank: 8}", "lora is a section; set its keys one by one"),
        ("lora.rank.x=3", "lora.rank.x is not a key"),
        ("data.train.0.weight=3", "is not a key"),
        ("lora.alpha=[", "this is not YAML"),
        ("lora.alpha=!!python/name:os.system", "tags (!name) are not used in recipes"),
        ("lora.alpha=*a", "aliases (*name) are not used in recipes"),
        ("lora.rank_pattern.q_proj=x", "lora.rank_pattern.q_proj must be a whole number"),
    ],
)
def test_override_that_cannot_be_used_says_why(refused, override, reason):
    message = refused(MINIMAL, override)
    assert message.startswith(f"override {override}: ")
    assert reason in message
    assert "\n" not in message


def test_override_into_a_section_that_is_no_mapping_leaves_the_mistake_to_the_file(refused):
    assert refused(MINIMAL + "lora: 5\n", "lora.rank=3").startswith(
        "recipe.yaml:3: lora must be a mapping of from, rank"
    )


# Files that are no recipes


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "recipe.yaml is empty"),
        (b"# only a comment\n", "recipe.yaml is empty"),
        (b"- a\n- b\n", "recipe.yaml:1: a recipe is a mapping of base, lora, data, train, memory, output"),
        (b"just text\n", "recipe.yaml:1: a recipe is a mapping"),
        (b"base:\n  model: [\n", "recipe.yaml:3: this is not YAML"),
        (b"base:\n\tmodel: x\n", "recipe.yaml:2: this is not YAML"),
        (b"a: 1\n---\nb: 2\n", "recipe.yaml:2: this is not YAML"),
        (b"base:\n  model: \xff\n", "recipe.yaml:2: this is not UTF-8 text"),
        ("base: ü".encode("utf-16"), "recipe.yaml:1: this is not UTF-8 text"),
        (b"base:\n  model: a\x00b\n", "recipe.yaml:2: the character U+0000 is not allowed in a recipe"),
        (b'base:\n  model: "\\UFFFFFFFF"\n', "recipe.yaml:2: this is not YAML"),
        (b"base: &a [*a]\n", "recipe.yaml:1: aliases (*name) are not used"),
        (b"base: {<<: {model: x}}\n", "base.<< is not a key"),
        (b"? [a, b]\n: 1\n", "recipe.yaml:1: a key must be text, found ['a', 'b']"),
        (b"base:\n  model: !!str x\n", "recipe.yaml:2: tags (!name) are not used"),
        (b"base: " + b"[" * 20_000, "recipe.yaml:1: nested more than 16 levels deep"),
        (b"base: " + b"{a: " * 20_000, "recipe.yaml:1: nested more than 16 levels deep"),
        (b"a: [" + b"1," * 6_000 + b"]\n", "recipe.yaml:1: more than 5000 values"),
        (b"#" * (2**20 + 1), "recipe.yaml is larger than 1 MiB"),
        (b"%YAML 1." + b"1" * 5_000 + b"\n---\na: 1\n", "recipe.yaml:1: this is not YAML"),
    ],
)
def test_file_that_is_no_recipe_is_refused_in_one_line(refused, content, reason):
    message = refused(content)
    assert reason in message
    if b"<<" not in content and b"?" not in content:
        assert "\n" not in message


def test_texts_are_read_up_to_the_limits_and_no_further():
    for fits, beyond in (("[" * 16 + "]" * 16, "[" * 17 + "]" * 17), (f"[{'1,' * 4999}]", f"[{'1,' * 5000}]")):
        assert yaml12.parse(fits) is not None
        with pytest.raises(yaml12.Unreadable, match="more than"):
            yaml12.parse(beyond)


@pytest.mark.parametrize("tag", ["!!python/object/apply:os.system", "!!python/object/new:os.system", "!x"])
def test_tags_never_run_a_command(refused, tmp_path, tag):
    assert "recipe.yaml:2: tags (!name)" in refused(f"base:\n  model: {tag} ['touch {tmp_path}/ran']\n")
    assert not (tmp_path / "ran").exists()


def test_many_unknown_keys_are_told_in_reasonable_time(refused):
    message = refused("".join(f"key_{number}: 1\n" for number in range(1000)))
    assert message.startswith("1002 mistakes in recipe.yaml")


def test_paths_that_hold_no_recipe_are_told_apart(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run/recipe.yaml").write_text(MINIMAL)
    for path, reason in {
        "absent.yaml": "absent.yaml does not exist",
        "run=1/absent.yaml": "run=1/absent.yaml does not exist",
        "absent/recipe": "absent/recipe does not exist",
        "run": "run is a folder, and a recipe is a file; did you mean the recipe.yaml in it?",
        "/dev/null": "/dev/null is not a regular file",
        "no-such-name": "there is no file and no shipped recipe 'no-such-name'",
        "a\0b.yaml": "does not exist",
        "lora.rank=8": "lora.rank=8 is a setting, and a recipe comes first: default, another shipped one, or a file",
        "base.model=models/small": "base.model=models/small is a setting, and a recipe comes first",
        "": "there is no file and no shipped recipe ''",
    }.items():
        with pytest.raises(RecipeError) as caught:
            read_recipe(path)
        assert reason in str(caught.value)
        assert str(caught.value).isprintable()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_unreadable_file_is_told_with_the_reason_of_the_system(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.touch(mode=0)
    with pytest.raises(RecipeError, match="cannot be read: Permission denied"):
        read_recipe(path)


# Paths


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """A recipe's folder and a working directory that is another one."""
    recipes, work = tmp_path / "recipes", tmp_path / "work"
    recipes.mkdir()
    work.mkdir()
    monkeypatch.chdir(work)
    return recipes, work


def test_inputs_in_a_file_resolve_against_the_file_and_overrides_against_the_working_directory(elsewhere):
    recipes, work = elsewhere
    for folder in (recipes, work):
        (folder / "tiny").mkdir()
        (folder / "chat.txt").touch()
    text = "base: {model: tiny}\ndata: {train: [rows.jsonl, {path: ./more}], eval: held.jsonl, template: chat.txt}\n"
    (recipes / "mine.yaml").write_text(text + "output: out\n")
    recipe = read_recipe(recipes / "mine.yaml")
    assert recipe.base.model == str(recipes / "tiny")
    assert [recipe.data.train[0], recipe.data.train[1].path] == [str(recipes / "rows.jsonl"), str(recipes / "more")]
    assert (recipe.data.eval, recipe.data.template) == (str(recipes / "held.jsonl"), str(recipes / "chat.txt"))
    assert recipe.output == str(work / "out")
    (recipes / "mine.yaml").write_text(
        text.replace("held.jsonl,", "[held.jsonl, {path: ./held, split: test}, org/rows],")
    )
    held = read_recipe(recipes / "mine.yaml").data.eval
    assert [held[0], held[1].path, held[2]] == [str(recipes / "held.jsonl"), str(recipes / "held"), "org/rows"]
    overrides = [
        "base.model=tiny",
        "data.train=[{path: a.csv}]",
        "data.eval=held.jsonl",
        "data.template=chat.txt",
        "output=out",
    ]
    recipe = read_recipe("../recipes/mine.yaml", overrides)
    assert recipe.base.model == str(work / "tiny")
    assert recipe.data.train[0].path == str(work / "a.csv")
    assert (recipe.data.eval, recipe.data.template) == (str(work / "held.jsonl"), str(work / "chat.txt"))
    assert recipe.output == str(work / "out")


@pytest.mark.parametrize("name", ["org/name", "gpt2", "name.gguf", "rows.jsonl"])
def test_model_that_is_no_folder_is_a_hub_id_as_it_is_written(read, name):
    assert read(MINIMAL, f"base.model={name}").base.model == name


@pytest.mark.parametrize("name", ["./absent", "../absent", "/absent", ".", "here", "deep/er"])
def test_model_is_a_folder_if_it_looks_like_one_or_exists(read, tmp_path, name):
    (tmp_path / "here").mkdir()
    (tmp_path / "deep/er").mkdir(parents=True)
    assert read(MINIMAL, f"base.model={name}").base.model == os.path.abspath(tmp_path / name)


def test_home_folder_is_found(read, monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    assert read(MINIMAL, "base.model=~/models/tiny").base.model == "/home/someone/models/tiny"


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".tsv", ".parquet", ".txt", ".md", ".JSONL"])
def test_data_with_the_ending_of_a_file_is_a_file_and_other_data_a_hub_id(read, tmp_path, suffix):
    recipe = read(MINIMAL, f"data.train=[x{suffix}, org/rows, ./folder]")
    assert recipe.data.train == [str(tmp_path / f"x{suffix}"), "org/rows", str(tmp_path / "folder")]


def test_auto_and_null_are_no_paths(read, tmp_path):
    (tmp_path / "auto").mkdir()
    recipe = read(MINIMAL)
    assert (recipe.data.eval, recipe.data.template) == ("auto", "auto")
    assert read(MINIMAL, "data.eval=null").data.eval is None


# Writing


def test_dumped_recipe_reads_back_equal_from_any_folder(elsewhere):
    recipes, work = elsewhere
    (recipes / "mine.yaml").write_text(
        "base: {model: ./m, revision: '010', skip: ['off', '2e-4', 'null', 'a: b', '#', ü]}\n"
        "data: {train: [x.jsonl, {path: y.csv, columns: {prompt: 'yes'}}]}\n"
        "train: {lr: 1e-5, max_grad_norm: 1e22}\nlora: {rank_pattern: {'re:.*\\.0\\.': 4}}\n"
    )
    recipe = read_recipe(recipes / "mine.yaml")
    run = work / "runs/mine"
    run.mkdir(parents=True)
    (run / "recipe.yaml").write_text(dump_recipe(recipe))
    assert read_recipe(run / "recipe.yaml") == recipe
    assert yaml.safe_load(dump_recipe(recipe)) == recipe.model_dump(by_alias=True), "any YAML reader reads the same"


LINES = st.text(st.characters(codec="utf-8", exclude_categories=["C", "Z"]), min_size=1, max_size=12) | st.sampled_from(
    ["no", "2e-4", "010", "12:30", "a: b", " x ", "~", "- a", "'", '"', "#", "null", "{", "\x7f", "\u00a0x", "9" * 400]
)
COUNTS = st.integers(1, 10**12)
NUMBERS = st.floats(min_value=0, exclude_min=True, allow_infinity=False, allow_nan=False)
AUTO = st.just("auto")
VALUES = {
    "base": {
        "model": LINES,
        "revision": st.none() | LINES,
        "quantization": st.sampled_from(["nf4", "none"]),
        "double_quant": st.booleans(),
        "block_size": st.sampled_from([32, 64, 4096]),
        "skip": st.lists(LINES, max_size=3),
    },
    "lora": {
        "rank": COUNTS,
        "alpha": COUNTS | NUMBERS,
        "targets": st.sampled_from(["mlp", "re:.*", ["q_proj", "re:k"]]),
        "dropout": st.floats(0, 1, exclude_max=True),
        "rank_pattern": st.dictionaries(LINES.filter(lambda text: not text.startswith("re:")), COUNTS, max_size=3),
    },
    "data": {
        "train": LINES
        | st.lists(LINES | st.fixed_dictionaries({"path": LINES, "split": LINES}), min_size=1, max_size=3),
        "eval": st.none() | LINES,
        "columns": st.dictionaries(LINES, LINES, max_size=3),
        "template": LINES,
    },
    "train": {
        "epochs": NUMBERS,
        "steps": st.none() | COUNTS,
        "micro_batch": COUNTS | AUTO,
        "lr": st.floats(min_value=0, max_value=1000, exclude_min=True) | AUTO,
        "warmup": st.floats(0, 1),
        "seed": st.integers(0, 2**32 - 1),
        "trackers": st.lists(st.sampled_from(["wandb", "mlflow"])),
    },
    "memory": {"budget": st.none() | st.sampled_from(["24GiB", "8 GB"])},
}
DOCUMENTS = st.fixed_dictionaries(
    {name: st.fixed_dictionaries(keys) for name, keys in VALUES.items()} | {"output": LINES}
)
SLOW_READ = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
FUZZ = settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@SLOW_READ
@given(values=DOCUMENTS)
def test_any_recipe_survives_writing_and_reading(read, values):
    recipe = read(dump_recipe(Recipe.model_validate(values)))
    assert recipe.lora == Lora(**values["lora"]), "nothing here is a path, so nothing may change"
    assert recipe.train == Train(**values["train"])
    assert read(dump_recipe(recipe)) == recipe


# Hostile input

SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
TREES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(SCALARS, inner, max_size=3),
    max_leaves=12,
)
SECTION_NAMES = st.sampled_from(["base", "lora", "data", "train", "memory", "output"])
KEY_NAMES = st.sampled_from(sorted({key.rpartition(".")[2] for key in KEYS}))


@FUZZ
@given(values=st.dictionaries(SECTION_NAMES, st.dictionaries(KEY_NAMES, TREES, max_size=4) | TREES, max_size=4))
def test_any_yaml_structure_is_a_recipe_or_a_recipe_error(read, values):
    assert is_clean(complaint(read, yaml.safe_dump(values, allow_unicode=True)))


@FUZZ
@given(text=st.text(alphabet=st.sampled_from("ab01.e-+:?,[]{}!&*|>%@`'\"#\\ \t\nxuU~<=\0é"), max_size=60) | st.text())
def test_any_text_is_a_recipe_or_a_recipe_error(read, text):
    for content, overrides in ((text, []), (MINIMAL, [text]), (MINIMAL, [f"lora.alpha={text}"])):
        assert is_clean(complaint(read, content.encode("utf-8", "surrogatepass"), *overrides))


@FUZZ
@given(content=st.binary(max_size=80))
def test_any_bytes_are_a_recipe_or_a_recipe_error(read, content):
    assert is_clean(complaint(read, content))


def test_broken_expressions_of_every_kind_are_refused(refused):
    for expression in ("re:(", "re:a{99999999999999999999}", "re:" + "(" * 2000, "re:[", "re:*"):
        assert "does not compile" in refused(MINIMAL, f"lora.targets='{expression}'")


# Shipped recipes


@pytest.fixture
def shelf(tmp_path, monkeypatch):
    """Three shipped recipes, one of which is a folder that brings a model; and a folder that is no recipe."""
    folder, work = tmp_path / "shelf", tmp_path / "work"
    (folder / "quick/model").mkdir(parents=True)
    (folder / "assets").mkdir()
    work.mkdir()
    (folder / "default.yaml").write_text("# Takes any model and data.\n\ntrain: {seed: 7}\n")
    (folder / "small.yaml").write_text("base: {model: ./model}\ndata: {train: rows.jsonl}\n# late comment\n")
    (folder / "quick/recipe.yaml").write_text("base: {model: model}\ndata: {train: rows.jsonl}\n")
    (folder / "assets/notes.txt").touch()
    monkeypatch.setattr("qlora_kit.recipe.shipped.folder", lambda: folder)
    monkeypatch.chdir(work)
    return folder


def test_shipped_recipes_are_known_by_file_or_folder_name(shelf):
    assert names() == ["default", "quick", "small"]
    assert find_shipped("small") == shelf / "small.yaml"
    assert find_shipped("quick") == shelf / "quick/recipe.yaml"


def test_unknown_shipped_recipe_is_answered_with_the_nearest_and_the_list(shelf):
    with pytest.raises(RecipeError, match=r"'defalt' \(did you mean default\?\); shipped: default, quick, small$"):
        find_shipped("defalt")


def test_shipped_recipe_resolves_against_the_working_directory_unless_it_brings_its_files(shelf):
    recipe = read_recipe("small")
    assert (recipe.base.model, recipe.data.train) == (os.path.abspath("model"), os.path.abspath("rows.jsonl"))
    assert recipe.output == os.path.abspath("runs/small")
    recipe = read_recipe("quick", ["data.eval=held.jsonl"])
    assert (recipe.base.model, recipe.data.train) == (str(shelf / "quick/model"), str(shelf / "quick/rows.jsonl"))
    assert (recipe.data.eval, recipe.output) == (os.path.abspath("held.jsonl"), os.path.abspath("runs/quick"))


def test_the_default_recipe_takes_its_model_and_data_from_overrides(shelf):
    with pytest.raises(RecipeError, match=r"^2 mistakes in default\ndefault: base.model is missing"):
        read_recipe("default")
    assert read_recipe("default", ["base.model=org/name", "data.train=org/rows"]).train == Train(seed=7)


def test_existing_file_comes_before_a_shipped_recipe_of_its_name(shelf):
    Path("small").write_text(MINIMAL)
    assert read_recipe("small").base.model == "org/name"


def test_summary_is_the_first_comment_line(shelf):
    assert [summary_of(find_shipped(name)) for name in names()] == ["Takes any model and data.", "", "late comment"]


def test_every_shipped_recipe_reads(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in names():
        recipe = read_recipe(name, ["base.model=org/name", "data.train=org/rows"])
        assert recipe.output == str(tmp_path / "runs" / name)
        assert summary_of(find_shipped(name)), name


# Cost


def test_importing_recipes_is_cheap_and_brings_no_heavy_library():
    """Processor time against that of torch on the same machine: a seventh was seen, whatever the machine's mood."""

    def run(module):
        code = (
            f"import sys, time; start = time.process_time(); import {module}; print(time.process_time() - start);"
            "print(*sorted({'torch', 'transformers', 'numpy', 'rich', 'typer'} & sys.modules.keys()))"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        return done.stdout.split("\n")[:2]

    seconds, heavy = zip(*(run("qlora_kit.recipe") for _ in range(3)), strict=True)
    assert set(heavy) == {""}
    torch_seconds, brought = run("torch")
    assert "torch" in brought
    assert min(map(float, seconds)) < 0.25 * float(torch_seconds)


def test_every_task_has_its_row_and_every_format_a_task():
    assert tuple(TASKS) == get_args(TaskName)
    assert {name for kind in TASKS.values() for name in kind.formats} == set(FORMATS)
