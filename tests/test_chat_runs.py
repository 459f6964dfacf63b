"""Runs on chats: what training rendered is rendered afterwards, on any day, and answers stop where they ended."""

import json
import shutil
from contextlib import contextmanager
from dataclasses import replace
from datetime import date, datetime
from pathlib import Path

import pytest
import torch
import yaml
from chat_templates import FAMILIES, tokenizer_of
from safetensors.torch import load_file
from tiny import llama
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from qlora_kit.data import end_token_id
from qlora_kit.errors import DataError
from qlora_kit.export import merge
from qlora_kit.recipe import read_recipe
from qlora_kit.run import Asked, export_run, load_run, pick_rate, train
from qlora_kit.run.prepare import prepare
from qlora_kit.run.tokenizer import load_tokenizer, set_template
from qlora_kit.storage import read_json
from qlora_kit.train.generate import end_tokens
from qlora_kit.watch import Watch

ANSWERS = {"where?": "on the mat", "who?": "the cat", "what?": "a dog 🙂", "why?": "hm"}
CHATS = [
    [{"role": "user", "content": asked}, {"role": "assistant", "content": said}] for asked, said in ANSWERS.items()
]


class Listening(Watch):
    """Keeps what is said and what rows were made."""

    def __init__(self):
        self.notes = []

    def note(self, text):
        self.notes.append(text)

    def prepared(self, prepared):
        self.rows = prepared.train.rows
        self.tokenizer = prepared.tokenizer


def base_of(folder, family, *unlearnt):
    """A random base with the family's tokenizer, saved, whose own config ends answers by the end of text alone.

    It knows nothing of the tokens `unlearnt`. Its head is drawn wide enough that adapters before it can make it certain
    of a token.
    """
    tokenizer = tokenizer_of(family)
    bos = tokenizer.bos_token_id if family.bos else None
    model = llama(vocab_size=len(tokenizer), max_position_embeddings=256, bos_token_id=bos, pad_token_id=None,
                  eos_token_id=tokenizer.eos_token_id, initializer_range=0.5)  # fmt: skip
    with torch.no_grad():
        model.model.embed_tokens.weight[tokenizer.convert_tokens_to_ids(unlearnt)] = 0.0
    model.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    return folder / "base"


def recipe_of(folder, base, *settings, chats=CHATS):
    """The recipe of a few steps on the chats, which are held out, too."""
    rows = folder / "chats.jsonl"
    rows.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    return read_recipe("default", [
        f"base.model={base}", f"data.train={rows}", f"data.eval={rows}", "data.max_tokens=200",
        f"output={folder / 'run'}", "base.compute_dtype=float32", "base.device=cpu", "train.micro_batch=4",
        "train.accumulation=1", "train.eval_every=1000", *settings,
    ])  # fmt: skip


def prepared_of(recipe):
    """What is known of a run before any weight is read, and the notes."""
    watch = Listening()
    return prepare(recipe, watch, weights=False), watch.notes


def tokenizer_afterwards(recipe, prepared):
    """The tokenizer with which a run of chats is used."""
    tokenizer = load_tokenizer(Path(recipe.base.model), recipe)
    set_template(tokenizer, recipe, prepared.date)
    return tokenizer


LEARN = ("train.steps=60", "train.lr=5e-3", "lora.rank=32", "train.optimizer=adamw")
DATED = replace(
    FAMILIES["qwen2.5"],
    source=FAMILIES["qwen2.5"].source.replace("'You help.'", "('It is ' + strftime_now('%d %b %Y'))"),
)


@contextmanager
def day(*numbers):
    """Another day by the clock, for the kit and for templates."""

    class Fake(datetime):
        @classmethod
        def now(cls, tz=None):
            return cls(*numbers, 12)

        @classmethod
        def today(cls):
            return date(*numbers)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("qlora_kit.run.rows.Date", Fake)
        patch.setattr("transformers.utils.chat_template_utils.datetime", Fake)
        yield


@pytest.fixture(scope="module")
def learnt(tmp_path_factory):
    """Chats learnt by heart on 6 May 2024; the tokenizer has no pad token, and its end of text ends no turn."""
    folder = tmp_path_factory.mktemp("learnt")
    recipe, watch = recipe_of(folder, base_of(folder, DATED, "<|im_end|>"), *LEARN), Listening()
    with day(2024, 5, 6):
        train(recipe, watch=watch)
    return folder, watch


def said(model, tokenizer, asked, generation_config=None):
    """The ids that transformers' own generate gives to a question, greedily."""
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": asked}], add_generation_prompt=True, return_tensors="pt"
    )
    options = {} if generation_config is None else {"generation_config": generation_config}
    out = model.generate(**prompt, max_new_tokens=24, do_sample=False, pad_token_id=5, **options)
    return out[0, prompt["input_ids"].shape[1] :].tolist()


@pytest.mark.slow
def test_a_set_learnt_by_heart_is_said_word_for_word_and_every_answer_stops_at_its_end_token(learnt):
    folder, _ = learnt
    scores = read_json(folder / "run" / "scores.json")
    assert scores["base"]["exact_match"] == 0
    assert scores["adapter"]["exact_match"] == 1
    assert scores["adapter"]["loss"] < 0.01, "60 steps on 21 tokens of which each can be made certain: nothing is left"
    model, tokenizer, _ = load_run(folder / "run")
    assert (tokenizer.pad_token, tokenizer.eos_token) == (None, "<|endoftext|>")
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert end_tokens(model, tokenizer) == sorted([tokenizer.eos_token_id, end])
    for asked, answer in ANSWERS.items():
        told = said(model, tokenizer, asked, GenerationConfig(eos_token_id=end_tokens(model, tokenizer)))
        assert told == [*tokenizer(answer)["input_ids"], end]
        assert len(said(model, tokenizer, asked)) > len(told), "told of the end of text alone, it goes on"


@pytest.mark.slow
def test_a_run_trains_the_rows_of_a_token_that_its_base_has_not_learnt_as_planned_and_goes_on_so(learnt, tmp_path):
    folder, watch = learnt
    told = [note for note in watch.notes if "has not learnt" in note]
    assert len(told) == 1
    assert "those rows are trained" in told[0]
    run = shutil.copytree(folder / "run", tmp_path / "run")
    assert yaml.safe_load((run / "recipe.yaml").read_text())["lora"]["added_tokens"] == ["<|im_end|>"]
    rows = [value for key, value in load_file(run / "adapter" / "adapter_model.safetensors").items() if "delta" in key]
    assert [len(value) for value in rows] == [1, 1], "of the embedding and of the head"
    memory = read_json(run / "memory.json")
    assert abs(memory["error"]["peak"]) < 0.01
    assert memory["error"]["adapters"] == 0
    with day(2024, 5, 6):
        recipe = recipe_of(folder, folder / "base", *LEARN, "train.steps=61", f"output={run}")
        assert recipe.lora.added_tokens == []
        for _ in range(2):
            train(recipe, resume=True)
    assert read_json(run / "plan.json")["added_tokens"] == ["<|im_end|>"]


@pytest.mark.slow
def test_a_search_for_the_rate_trains_the_rows_that_the_run_itself_would(tmp_path):
    recipe = recipe_of(tmp_path, base_of(tmp_path, DATED, "<|im_end|>"), "train.optimizer=adamw", "train.steps=4")
    searching, alone = Listening(), Listening()
    picked = pick_rate(recipe, watch=searching)
    settings = ("train.schedule=constant", "train.warmup=0", f"train.lr={picked.best}")
    train(recipe_of(tmp_path, tmp_path / "base", "train.optimizer=adamw", "train.steps=4", *settings), watch=alone)
    for watch in (searching, alone):
        assert [note for note in watch.notes if "those rows are trained" in note]
    metrics = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert next(each.loss for each in picked.tried if each.rate == picked.best) == metrics[-1]["eval_loss"]


@pytest.mark.slow
def test_exports_stop_at_the_end_token_and_render_what_training_rendered(learnt, tmp_path):
    folder, watch = learnt
    export_run(folder / "run", tmp_path / "merged", Asked(dtype="float32"))
    export_run(folder / "run", tmp_path / "adapter", Asked(to="adapter"))
    merge(tmp_path / "adapter", folder / "base", tmp_path / "again", dtype="float32", device="cpu")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    for out in ("merged", "adapter", "again"):
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / out)
        ends = GenerationConfig.from_pretrained(tmp_path / out).eos_token_id
        assert ends == sorted(tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_end|>"]))
        for row, (asked, answer) in zip(watch.rows, ANSWERS.items(), strict=True):
            with day(2025, 12, 31):
                prompt = tokenizer.apply_chat_template([{"role": "user", "content": asked}], add_generation_prompt=True)
                told = said(model, tokenizer, asked)
            assert prompt["input_ids"] == row.prompt
            assert told == tokenizer(answer + "<|im_end|>")["input_ids"]


@pytest.mark.slow
def test_a_date_that_a_template_writes_is_the_runs_own_whatever_day_it_is(learnt):
    folder, watch = learnt
    assert read_json(folder / "run" / "data.json")["date"] == "2024-05-06"
    assert any("it stays 2024-05-06" in note for note in watch.notes)
    assert "It is 06 May 2024" in watch.tokenizer.decode(watch.rows[0].input_ids)
    with day(2025, 12, 31):
        _, tokenizer, recipe = load_run(folder / "run")
        text = tokenizer.apply_chat_template(CHATS[0][:1], add_generation_prompt=True, tokenize=False)
        assert tokenizer(text)["input_ids"] == watch.rows[0].prompt
        assert prepared_of(recipe)[0].train.rows != watch.rows, "a new run has its own"


@pytest.mark.slow
def test_a_resumed_run_keeps_its_date(learnt, tmp_path):
    folder, watch = learnt
    shutil.copytree(folder / "run", tmp_path / "run")
    recipe, resumed = recipe_of(tmp_path, folder / "base", *LEARN, "train.steps=61"), Listening()
    recipe = recipe.model_copy(update={"data": read_recipe(folder / "run" / "recipe.yaml").data})
    with day(2025, 12, 31):
        train(recipe, resume=True, watch=resumed)
    assert resumed.rows == watch.rows
    assert read_json(tmp_path / "run" / "data.json")["date"] == "2024-05-06"


def test_a_base_without_a_template_learns_chats_in_plain_words_and_says_so(tmp_path):
    recipe = recipe_of(tmp_path, base_of(tmp_path, replace(FAMILIES["marked"], source=None)))
    prepared, notes = prepared_of(recipe)
    assert any("no chat template: chats are written by the shipped template plain" in note for note in notes)
    row = prepared.train.rows[0]
    assert prepared.tokenizer.decode(row.input_ids) == "<s>User: where?\nAssistant: on the mat</s>\n"
    tokenizer = tokenizer_afterwards(recipe, prepared)
    assert tokenizer.apply_chat_template(CHATS[0][:1], add_generation_prompt=True)["input_ids"] == row.prompt
    without_end = replace(FAMILIES["marked"], source=None, eos=None)
    with pytest.raises(DataError, match=r"plain ends answers with the tokenizer's end token .* it has none"):
        prepared_of(recipe_of(tmp_path, base_of(tmp_path, without_end)))


def test_a_run_of_completions_is_given_no_template(tmp_path):
    recipe = recipe_of(tmp_path, base_of(tmp_path, replace(FAMILIES["marked"], source=None)))
    Path(recipe.data.train).write_text('{"prompt": "the cat", "completion": " sat"}\n')
    prepared, notes = prepared_of(recipe)
    assert prepared.tokenizer.chat_template is None
    assert not any("template" in note for note in notes)


def test_chats_of_several_answers_are_counted_where_each_is_a_row(tmp_path):
    chats = [CHATS[0] + CHATS[1], CHATS[2]]
    recipe = recipe_of(tmp_path, base_of(tmp_path, FAMILIES["qwen3"]), "data.thinking=strip", chats=chats)
    prepared, notes = prepared_of(recipe)
    assert (prepared.train.counts.turns, len(prepared.train.rows)) == (1, 3)
    assert any("one row an answer, 1 row more" in note for note in notes)
    row, tokenizer = prepared.train.rows[1], tokenizer_afterwards(recipe, prepared)
    prompt = tokenizer.apply_chat_template(chats[0][:3], add_generation_prompt=True)["input_ids"]
    assert prompt == row.prompt == row.input_ids[: len(prompt)]
    assert tokenizer.decode(prompt).endswith("<think>\n\n</think>\n\n")


def special(tokenizer):
    """The special tokens among those added to a tokenizer."""
    return {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}


def test_tokens_whose_rows_are_trained_stay_special_where_they_are_and_those_that_end_answers_become_so(tmp_path):
    base = base_of(tmp_path, FAMILIES["qwen2.5"])
    again = AutoTokenizer.from_pretrained(base)
    before = special(again)
    again.add_tokens(["<|im_end|>"])
    assert "<|im_end|>" in before - special(again), "transformers makes it plain"
    named = recipe_of(tmp_path, base, "lora.added_tokens=[<|im_start|>, <|im_end|>, <call>]")
    tokenizer = load_tokenizer(base, named)
    assert special(tokenizer) == before
    assert tokenizer.convert_tokens_to_ids("<call>") == len(tokenizer) - 1
    alone = Path(__file__).parents[1] / "recipes" / "quickstart" / "base"
    assert "<|im_end|>" not in AutoTokenizer.from_pretrained(alone).get_vocab()
    written = recipe_of(tmp_path, alone, "data.template=chatml", "lora.added_tokens=[<|im_start|>, <|im_end|>, user]")
    tokenizer = load_tokenizer(alone, written)
    assert special(tokenizer) - special(AutoTokenizer.from_pretrained(alone)) == {"<|im_start|>", "<|im_end|>"}
    assert end_token_id(tokenizer) == tokenizer.convert_tokens_to_ids("<|im_end|>")
