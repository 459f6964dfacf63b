"""Tokens that a base has not learnt are told of, and no others."""

from pathlib import Path

import pytest
import torch
from chat_templates import FAMILIES, tokenizer_of
from tiny import llama
from transformers import AutoModelForCausalLM, AutoTokenizer

import qlora_kit
from qlora_kit.base.formats import Quantization
from qlora_kit.base.freeze import freeze_and_quantize
from qlora_kit.base.vocabulary import QuantizedEmbedding
from qlora_kit.data import find_template
from qlora_kit.recipe import read_recipe
from qlora_kit.run.unlearnt import tokens_to_learn, unlearnt_tokens

MARKS = ["<|im_end|>", "<|im_start|>"]


def base_of(*, rows_more=0, **changes):
    """A random model and a tokenizer whose template writes two marks."""
    tokenizer = tokenizer_of(FAMILIES["qwen2.5"])
    return llama(vocab_size=len(tokenizer) + rows_more, pad_token_id=None, **changes), tokenizer


def marks(tokenizer):
    return tokenizer.convert_tokens_to_ids(MARKS)


@torch.no_grad()
def zeroed(model, tokenizer, of):
    of(model).weight[marks(tokenizer)] = 0.0


@torch.no_grad()
def like_unused(model, tokenizer, of):
    weight = of(model).weight
    for row, share in zip(marks(tokenizer), (1.0, 1.001), strict=True):
        weight[row] = weight[-1] * share


@torch.no_grad()
def at_one_mean(model, tokenizer, of):
    """As transformers adds rows: the mean of the others, and 1e-9 of their variance beside it."""
    weight = of(model).weight
    spread = weight.std() * 1e-9**0.5
    for row in marks(tokenizer):
        weight[row] = weight.mean(0) + torch.randn(weight.shape[1]) * spread


EMBEDDING, HEAD = (lambda model: model.model.embed_tokens), (lambda model: model.lm_head)


@pytest.mark.parametrize("of", [EMBEDDING, HEAD])
@pytest.mark.parametrize("spoil", [zeroed, like_unused, at_one_mean])
def test_rows_as_they_were_added_are_found_in_embedding_and_head(spoil, of):
    model, tokenizer = base_of(rows_more=8)
    assert unlearnt_tokens(model, tokenizer) == []
    spoil(model, tokenizer, of)
    assert unlearnt_tokens(model, tokenizer) == MARKS


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_rows_of_a_quantised_vocabulary_are_found_too(kind):
    model, tokenizer = base_of(hidden_size=64, rows_more=8)
    zeroed(model, tokenizer, EMBEDDING)
    freeze_and_quantize(model, Quantization(kind), torch.float32, torch.device("cpu"), quantize_head=True)
    assert isinstance(EMBEDDING(model), QuantizedEmbedding)
    assert unlearnt_tokens(model, tokenizer) == MARKS


def test_a_row_of_outsized_numbers_makes_no_other_look_unlearnt():
    model, tokenizer = base_of()
    with torch.no_grad():
        EMBEDDING(model).weight[0] *= 1e3
    assert unlearnt_tokens(model, tokenizer) == []


def test_one_token_of_several_is_named_alone():
    model, tokenizer = base_of()
    with torch.no_grad():
        EMBEDDING(model).weight[marks(tokenizer)[0]] = 0.0
    assert unlearnt_tokens(model, tokenizer) == MARKS[:1]


def test_tokens_are_learnt_unasked_where_nothing_else_trains_their_rows():
    model, tokenizer = base_of()
    zeroed(model, tokenizer, EMBEDDING)
    given = ["base.model=org/name", "data.train=org/rows"]
    names, told = tokens_to_learn(model, tokenizer, read_recipe("default", given))
    assert names == MARKS
    assert "has not learnt" in told
    assert "those rows are trained" in told
    mending = "lora.added_tokens=[<|im_end|>, <|im_start|>]"
    for setting in (mending, "train.full_finetune=true", "lora.also_train=[embed_tokens]"):
        assert tokens_to_learn(model, tokenizer, read_recipe("default", [*given, setting])) == ([], None)
    tokenizer.chat_template = find_template("plain")
    assert tokens_to_learn(model, tokenizer, read_recipe("default", given)) == ([], None)


@pytest.mark.parametrize(
    ("setting", "named"),
    [("lora.targets=[all-linear, head]", ""), ("lora.from=adapter", ""), ("lora.added_tokens=[<think>]", "<think>, ")],
)
def test_where_their_rows_cannot_be_trained_unasked_the_setting_that_does_it_is_named(setting, named):
    model, tokenizer = base_of()
    zeroed(model, tokenizer, EMBEDDING)
    recipe = read_recipe("default", ["base.model=org/name", "data.train=org/rows", setting])
    names, told = tokens_to_learn(model, tokenizer, recipe)
    assert names == []
    assert f"train them with 'lora.added_tokens=[{named}<|im_end|>, <|im_start|>]'" in told


def test_the_shipped_base_raises_no_alarm():
    folder = Path(qlora_kit.__file__).parents[1] / "recipes" / "quickstart" / "base"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = find_template("plain")
    assert unlearnt_tokens(model, tokenizer) == []
    end = tokenizer.eos_token_id
    with torch.no_grad():
        model.get_input_embeddings().weight[end] *= 1e-3
    assert unlearnt_tokens(model, tokenizer) == [tokenizer.eos_token]
