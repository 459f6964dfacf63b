"""What a trained model is used for: prompts are put to it as training put them, and answers come out as they were."""

import copy
import json
import os
import shutil
import signal
from contextlib import nullcontext
from datetime import date
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch
import yaml
from chat_templates import FAMILIES, tokenizer_of
from safetensors.torch import load_file
from test_cli import assert_mistake, call
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, OPTConfig, OPTForCausalLM
from typer.testing import CliRunner

from qlora_kit.cli import chat
from qlora_kit.cli.app import app
from qlora_kit.cli.visible import visible
from qlora_kit.data import (
    Encoded,
    ask,
    collate,
    content_of,
    encode,
    encode_turns,
    fix_tokenizer,
    read_prompts,
    read_row,
)
from qlora_kit.data.chat_template import find_template
from qlora_kit.data.thinking import CLOSE, with_thinking
from qlora_kit.errors import AdapterError, DataError, ModelError
from qlora_kit.lora import add_lora
from qlora_kit.memory import Ledger
from qlora_kit.recipe import Data
from qlora_kit.run import Conversation, answer, load_run, load_speaker
from qlora_kit.run.ask import Speaker
from qlora_kit.run.rows import column_maps, eval_batches, eval_shapes_of, positions_for
from qlora_kit.run.score import score_rows
from qlora_kit.run.use import _recipe_for, load_any
from qlora_kit.storage import read_json
from qlora_kit.train import generate
from qlora_kit.train.evaluate import rehearse_evaluation
from qlora_kit.train.generate import Sampling, _Streamer, generate_texts, stream_text
from qlora_kit.train.samples import Question, Samples
from qlora_kit.watch import Watch

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
CHAT = {"messages": [{"role": "user", "content": "say cat "}, {"role": "assistant", "content": "cat"}]}
WORDS = ("cat", "dog", "owl", "bee", "ant", "elk")


@pytest.fixture(scope="module")
def chatty(tmp_path_factory):
    """A tiny model folder whose tokenizer has a chat template; it has learnt the end token, which pads, too."""
    folder = tiny.save_model(tmp_path_factory.mktemp("chatty"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.get_input_embeddings().weight[tokenizer.eos_token_id].normal_(std=0.02, generator=torch.Generator())
    model.save_pretrained(folder)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model(chatty):
    """That model and its tokenizer, at logits so far apart that nothing is a draw."""
    tokenizer = AutoTokenizer.from_pretrained(chatty)
    return tiny.llama(vocab_size=len(tokenizer), eos_token_id=0, initializer_range=0.2), tokenizer


def trained(folder, model, rows, evals="rows.jsonl", lora=None, **train):
    """The folder of a run of a few steps."""
    result = call("train", write_recipe(folder, model, rows, evals, lora, **train))
    assert result.exit_code == 0, result.output + str(result.exception)
    (folder / "output.txt").write_text(result.output)
    return folder / "run"


def write_recipe(folder, model, rows, evals="rows.jsonl", lora=None, **train):
    """A recipe with its rows beside it."""
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    content = {
        "base": {"model": str(model), "compute_dtype": "float32", "device": "cpu"},
        "lora": lora or {"rank": 4},
        "data": {"train": "rows.jsonl", "max_tokens": 64, "eval": evals},
        "train": {"steps": 12, "micro_batch": 4, "lr": 0.01, "warmup": 0, "save_every": 11, "eval_every": 100, **train},
        "output": str(folder / "run"),
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(content))
    return folder / "recipe.yaml"


@pytest.fixture(scope="module")
def chat_run(tmp_path_factory, chatty):
    """A run on chats; with it every verb is tried."""
    return trained(tmp_path_factory.mktemp("chats"), chatty, [CHAT] * 6)


@pytest.fixture(scope="module")
def sampled(tmp_path_factory, chatty):
    """A run on prompts and completions that is asked nothing on the way, and one that is, on the same base; dropout
    would betray a random state that moved."""
    rows = [{"prompt": f"say {word} ", "completion": word} for word in WORDS]
    plain = {"optimizer": "adamw_8bit", "eval_every": 5}
    folders = [tmp_path_factory.mktemp(name) for name in ("quiet", "asked")]
    return [
        trained(folder, chatty, rows, lora={"rank": 4, "dropout": 0.2}, **plain, **asks)
        for folder, asks in zip(folders, ({}, {"sample_every": 4}), strict=True)
    ]


@pytest.fixture(scope="module")
def text_run(sampled):
    """A run on prompts and completions."""
    return sampled[0]


# --- generation -------------------------------------------------------------------------------------------------------

PROMPTS = [[40, 41, 42], [50], [60, 61, 62, 63, 64]]


@torch.no_grad()
def by_hand(model, prompt, tokens, end=0):
    """The likeliest token after the other, without cache, padding or `generate`."""
    ids = list(prompt)
    while len(ids) < len(prompt) + tokens and (len(ids) == len(prompt) or ids[-1] != end):
        ids.append(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax().item())
    return ids[len(prompt) :]


def test_answers_are_the_likeliest_tokens_one_by_one_however_they_are_batched(model):
    net, tokenizer = model
    wanted = [tokenizer.decode(by_hand(net, prompt, 6), skip_special_tokens=True) for prompt in PROMPTS]
    assert len(set(wanted)) == 3
    told = []
    for at_once in (1, 22, 1000):
        found = generate_texts(net, tokenizer, PROMPTS, max_new_tokens=6, tokens_at_once=at_once, tell=told.append)
        assert found == wanted
    assert [[*each] for each in told] == [[2], [0], [1], [2, 0], [1], [2, 0, 1]], "longest first"
    assert all(texts[row] == wanted[row] for texts in told for row in texts)


@pytest.mark.parametrize(("tokens", "is_compared"), [(32, True), (33, False)])
def test_answers_are_compared_word_for_word_where_none_has_more_than_32_tokens(model, tokens, is_compared):
    net, tokenizer = model
    rows = [Encoded([5] * 6 + [9] * tokens, [False] * 6 + [True] * tokens, [5] * 6, "x")]
    measured, _ = score_rows(net.eval(), tokenizer, rows, eval_batches(rows, 0, net.device))
    assert (measured.exact_match is not None) is is_compared


def test_a_prompt_may_leave_room_for_one_token_and_not_for_none(model):
    net, tokenizer = model
    speaker, positions = Speaker(net, tokenizer, is_chat=False), net.config.max_position_embeddings
    assert speaker.room([5] * (positions - 1)) == 1
    with pytest.raises(DataError, match="shorten it"):
        speaker.room([5] * positions)


def test_held_out_rows_go_together_up_to_the_tokens_that_are_asked_for_and_no_more_than_sixteen():
    rows = [Encoded([5] * 8, [False] + [True] * 7) for _ in range(40)]
    for asked, most in ((15, 1), (16, 2), (24, 3), ("auto", 16)):
        assert len(eval_batches(rows, 0, torch.device("cpu"), asked)[0].input_ids) == most


def test_a_planned_evaluation_has_as_many_rows_of_one_length_as_are_asked_for_and_sixteen_at_most():
    assert [eval_shapes_of(8, asked) for asked in (2048, 17, 1)] == [{2048: (16, 8)}, {17: (2, 8)}, {1: (1, 8)}]


def test_positions_are_those_of_the_model_and_for_a_classifier_those_that_its_tokenizer_leaves():
    config, tokenizer = OPTConfig(max_position_embeddings=514), SimpleNamespace(model_max_length=512)
    assert [positions_for(task, tokenizer, config) for task in ("sft", "classify")] == [514, 512]
    assert positions_for("classify", SimpleNamespace(model_max_length=10**30), config) == 514


@pytest.mark.parametrize("asked", ["auto", 40])
def test_answers_of_a_score_take_no_more_tokens_at_a_time_than_its_losses(model, monkeypatch, asked):
    net, tokenizer = model
    rows = [Encoded([5 + row % 9] * 9, [False] * 6 + [True] * 3, [5 + row % 9] * 6, "x") for row in range(40)]
    batches, real, together = eval_batches(rows, 0, net.device, asked), generate._generate, []

    def counted(net, tokenizer, prompts, room, *given, **named):
        together.append(len(prompts) * (6 + room))
        return real(net, tokenizer, prompts, room, *given, **named)

    monkeypatch.setattr(generate, "_generate", counted)
    score_rows(net.eval(), tokenizer, rows, batches)
    most = max(batch.input_ids.numel() for batch in batches)
    assert most == (16 if asked == "auto" else 4) * 9
    assert sum(together) == 40 * 10
    assert max(together) <= most


def test_held_out_rows_are_answered_within_the_positions_of_the_model_and_each_with_its_own_room(model):
    """Learned positions, as OPT has them, are a table: what lies behind its end is an error, and no worse answer."""
    _, tokenizer = model
    made_of = {"hidden_size": 48, "ffn_dim": 80, "num_hidden_layers": 2, "num_attention_heads": 4}
    net = tiny.spread(OPTForCausalLM(OPTConfig(vocab_size=260, max_position_embeddings=64, eos_token_id=0, **made_of)))
    prompts = [[5 + row] * length for row, length in enumerate((60, 62, 9, 64))]
    rows = [Encoded(prompt + [9] * more, [False] * len(prompt) + [True] * more, prompt, "x")
            for prompt, more in zip(prompts, (4, 2, 30, 0), strict=True)]  # fmt: skip
    _, texts = score_rows(net.eval(), tokenizer, rows, eval_batches(rows[:3], 0, net.device))
    wanted = [by_hand(net, prompt, min(31, 64 - len(prompt))) for prompt in prompts[:3]]
    assert [len(tokens) for tokens in wanted] == [4, 2, 31]
    assert texts == [*(tokenizer.decode(tokens, skip_special_tokens=True) for tokens in wanted), ""]


ODD = {
    "do_sample": True, "repetition_penalty": 9.0, "top_k": 1, "top_p": 0.1, "num_beams": 2, "min_p": 0.9,
    "stop_strings": ["a"], "bad_words_ids": [[99_999_999]], "forced_eos_token_id": 10**7, "min_length": 10**9,
    "suppress_tokens": list(range(200)), "max_time": 1e-4, "prompt_lookup_num_tokens": 5, "dola_layers": "high",
    "cache_implementation": "quantized", "return_dict_in_generate": True, "assistant_early_exit": 1,
    "guidance_scale": 2.0,
}  # fmt: skip
"""Settings that answer by other rules, are an error in generate(), or never let it end."""


@pytest.mark.parametrize("odd", [*ODD, "all"])
def test_the_models_own_generation_config_is_not_followed_but_for_its_end_tokens(odd, model, monkeypatch):
    net, tokenizer = model
    plain = generate_texts(net, tokenizer, PROMPTS, max_new_tokens=6)
    drawn = generate_texts(net, tokenizer, PROMPTS, max_new_tokens=6, sampling=Sampling(temperature=5.0))
    own = {name: value for name, value in ODD.items() if odd in (name, "all")}
    monkeypatch.setattr(net, "generation_config", GenerationConfig(eos_token_id=0, **own))
    config = net.generation_config
    assert generate_texts(net, tokenizer, PROMPTS, max_new_tokens=6) == plain
    again = generate_texts(net, tokenizer, PROMPTS, max_new_tokens=6, sampling=Sampling(temperature=5.0))
    assert again == drawn != plain
    assert net.generation_config is config, "it is back for an export"
    first = by_hand(net, PROMPTS[0], 6)[0]
    config.eos_token_id = [0, first]
    assert generate_texts(net, tokenizer, PROMPTS[:1], max_new_tokens=6) != plain[:1]


@pytest.mark.parametrize(
    "ends",
    [-1, [0, 10**6], *(pytest.param(other, marks=pytest.mark.slow) for other in ("x", 10**30, [[0]], True, 1.5))],
)
def test_end_tokens_that_are_none_are_told_before_the_first_step(ends, chatty, tmp_path):
    folder = shutil.copytree(chatty, tmp_path / "base")
    config = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps(config | {"eos_token_id": ends}))
    told = call("train", write_recipe(tmp_path, folder, [CHAT] * 4))
    assert told.exit_code == 2
    said = told.stderr.strip().splitlines()[-1]
    assert said.startswith("error: the base's generation_config.json, or its config.json, has ")
    assert "for an eos_token_id, wanted whole numbers from 0 to " in said
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_the_first_number_that_is_no_token_is_no_end_token(model, monkeypatch):
    net, tokenizer = model
    for token, is_one in ((net.config.vocab_size - 1, True), (net.config.vocab_size, False)):
        monkeypatch.setattr(net, "generation_config", GenerationConfig(eos_token_id=token))
        with nullcontext() if is_one else pytest.raises(ModelError, match="for an eos_token_id, wanted whole numbers"):
            assert token in generate.end_tokens(net, tokenizer)


def test_answers_end_with_the_tokens_of_model_and_tokenizer_alike(model, monkeypatch):
    net, tokenizer = model
    monkeypatch.setattr(net, "generation_config", GenerationConfig(eos_token_id=[7, 5]))
    assert generate.end_tokens(net, tokenizer) == sorted({5, 7, tokenizer.eos_token_id})


def test_draws_repeat_by_their_seed_and_leave_the_random_state_alone(model):
    net, tokenizer = model

    def drawn(**how):
        return generate_texts(net, tokenizer, PROMPTS, max_new_tokens=8, sampling=Sampling(temperature=3.0, **how))

    state = torch.get_rng_state()
    first = drawn(seed=1)
    torch.manual_seed(7)
    assert drawn(seed=1) == first
    assert drawn(seed=2) != first
    torch.set_rng_state(state)
    drawn(seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    greedy = generate_texts(net, tokenizer, PROMPTS, max_new_tokens=8)
    assert first != greedy
    for narrow in ({"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}):
        assert drawn(**narrow) == greedy, narrow
    cold = Sampling(temperature=1e-4)
    assert generate_texts(net, tokenizer, PROMPTS, max_new_tokens=8, sampling=cold) == greedy


def test_a_penalty_holds_back_what_was_there(model):
    net, tokenizer = model
    plain = by_hand(net, PROMPTS[0], 50, end=-1)
    assert len(set(plain)) < 50, "it repeats itself"
    held = generate_texts(net, tokenizer, PROMPTS[:1], max_new_tokens=50, sampling=Sampling(repetition_penalty=1e6))
    assert held != generate_texts(net, tokenizer, PROMPTS[:1], max_new_tokens=50)


def test_a_stop_text_ends_an_answer_and_is_no_part_of_it(model, monkeypatch):
    net, tokenizer = model
    whole = generate_texts(net, tokenizer, PROMPTS, max_new_tokens=12)
    stop = whole[0][3:5]
    assert whole[0].find(stop) > 0
    passes = []
    forward = type(net).forward
    monkeypatch.setattr(type(net), "forward", lambda self, *a, **k: passes.append(1) or forward(self, *a, **k))
    cut = generate_texts(net, tokenizer, PROMPTS[:1], max_new_tokens=12, sampling=Sampling(stop=("no such", stop)))
    assert cut == [whole[0][: whole[0].find(stop)]]
    assert len(passes) < 12
    both = generate_texts(net, tokenizer, PROMPTS, max_new_tokens=12, sampling=Sampling(stop=(stop,)))
    assert both == [text.partition(stop)[0] for text in whole], "each row ends by itself"


def test_a_stop_text_is_found_when_its_last_token_has_come_and_only_behind_the_prompt(model):
    _, tokenizer = model
    ids = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("xyab", "xabc", "xyza")])
    assert ids.shape == (3, 4)
    assert generate._StopTexts(tokenizer, ("ab",), 2)(ids, None).tolist() == [True, False, False]
    assert generate._StopTexts(tokenizer, ("ab",), 1)(ids[:, :3], None).tolist() == [False, True, False]


def test_of_several_stop_texts_the_first_in_the_answer_ends_it():
    assert generate._before("a.b,c", (",", ".", "no such")) == generate._before("a.b,c", (".", ",")) == "a"
    assert generate._before("a.b,c", ("no such",)) == "a.b,c"


def test_a_stop_text_in_the_prompt_ends_no_answer(model):
    net, tokenizer = model
    (whole,) = generate_texts(net, tokenizer, PROMPTS[:1], max_new_tokens=6)
    asked = tokenizer.decode(PROMPTS[0][-1:])
    assert asked not in whole
    assert generate_texts(net, tokenizer, PROMPTS[:1], max_new_tokens=6, sampling=Sampling(stop=(asked,))) == [whole]


def test_no_answer_goes_past_the_positions_of_the_model(model):
    net, tokenizer = model
    short = generate_texts(net, tokenizer, PROMPTS, max_new_tokens=30, tokens_at_once=1, positions=8)
    assert short == [tokenizer.decode(by_hand(net, p, 8 - len(p)), skip_special_tokens=True) for p in PROMPTS]


def test_a_streamed_answer_is_the_answer_in_pieces_and_stops_when_told_to(model):
    net, tokenizer = model
    (whole,) = generate_texts(net, tokenizer, PROMPTS[:1], max_new_tokens=12)
    pieces = []
    streamed = stream_text(net, tokenizer, PROMPTS[0], max_new_tokens=12, tell=pieces.append)
    assert "".join(pieces) == streamed == whole
    assert len(pieces) > 2
    few = []
    stream_text(net, tokenizer, PROMPTS[0], max_new_tokens=12, tell=few.append, stopped=lambda: len(few) >= 2)
    assert few == pieces[: len(few)]
    assert len(few) < len(pieces)


@pytest.mark.parametrize("text", ["süß 🙂 日本", "plain words", "\n\n  two", "🙂"])
def test_a_stream_tells_whole_characters(model, text):
    _, tokenizer = model
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert len(ids) >= len(text), "characters of several tokens are among them"
    pieces = []
    streamer = _Streamer(tokenizer, pieces.append)
    streamer.put(torch.tensor([[1, 2, 3]]))
    for token in ids:
        streamer.put(torch.tensor([token]))
    streamer.end()
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)


def test_a_stream_that_ends_within_a_character_says_so(model):
    _, tokenizer = model
    pieces = []
    streamer = _Streamer(tokenizer, pieces.append)
    streamer.put(torch.tensor([[1]]))
    for token in tokenizer("a🙂", add_special_tokens=False)["input_ids"][:-1]:
        streamer.put(torch.tensor([token]))
    streamer.end()
    assert "".join(pieces) == streamer.text
    assert streamer.text.startswith("a\ufffd")


def test_what_a_model_says_and_what_is_said_of_names_moves_no_cursor(capsys):
    hostile = "a\x1b[2J\x1b]0;title\x07b\rc\x9b31m\u0085\b\x00é\n🙂"
    for show in (chat._show, chat._say):
        show(hostile)
    shown = r"a\x1b[2J\x1b]0;title\x07b\rc\x9b31m\x85\x08\x00é" + "\n🙂"
    assert capsys.readouterr() == (shown, shown + "\n")
    chat._show("plain\ttext\n")
    assert capsys.readouterr().out == "plain\ttext\n"


# --- prompts ----------------------------------------------------------------------------------------------------------

ROWS = [
    {"prompt": "say cat ", "completion": "cat"},
    CHAT,
    {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}]},
    {"instruction": "add", "input": "1 2", "output": "3", "system": "be brief"},
]


@pytest.mark.parametrize("row", ROWS)
def test_a_prompt_is_the_one_that_its_row_was_trained_with(model, row, tmp_path):
    _, tokenizer = model
    trained_with = encode(read_row(row, "row"), tokenizer)
    bare = {key: value for key, value in row.items() if key not in ("completion", "output")}
    for column in ("messages", "conversations"):
        if column in row:
            bare[column] = row[column][:-1]
    (tmp_path / "p.jsonl").write_text(json.dumps(row) + "\n" + json.dumps(bare) + "\n")
    whole, unanswered = read_prompts(tmp_path / "p.jsonl", tokenizer, is_chat=False)
    assert whole.ids == unanswered.ids == trained_with.prompt
    assert len(whole.ids) > 1
    assert (whole.reference, unanswered.reference) == (trained_with.answer, None)


THOUGHTFUL = [
    {"role": "user", "content": "where?"},
    {"role": "assistant", "content": "<think>\nhm\n</think>\n\nthere"},
    {"role": "user", "content": "who?"},
    {"role": "assistant", "content": "the cat", "reasoning_content": "well"},
]


@pytest.mark.parametrize("mode", ["keep", "strip", "empty"])
@pytest.mark.parametrize("family", ["qwen2.5", "qwen3", "gemma"])
def test_thoughts_of_a_prompt_are_treated_as_training_treated_them(family, mode, tmp_path):
    tokenizer = tokenizer_of(FAMILIES[family])
    fix_tokenizer(tokenizer, mode, date(2024, 5, 6))
    row = {"messages": THOUGHTFUL}
    trained_with = encode(with_thinking(read_row(row, "row"), mode), tokenizer, loss_on="last")
    bare = {"messages": THOUGHTFUL[:-1]}
    (tmp_path / "p.jsonl").write_text(json.dumps(row) + "\n" + json.dumps(bare) + "\n")
    how = {"is_chat": True, "thinking": mode}
    whole, unanswered = read_prompts(tmp_path / "p.jsonl", tokenizer, **how)
    assert whole.ids == unanswered.ids == ask(bare["messages"], tokenizer, **how).ids == trained_with.prompt
    assert (whole.reference, unanswered.reference) == (trained_with.answer, None)
    assert ("hm" in tokenizer.decode(whole.ids)) == (mode == "keep" and family != "qwen3")


def test_prompts_are_read_under_the_names_that_a_run_gave_its_columns(model, tmp_path):
    _, tokenizer = model
    rows = {"q": "say cat ", "a": "cat"}, {"q": "say cat "}, {"prompt": "say cat "}, {"frage": "say cat ", "a": "dog"}
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sources = [{"path": "a.jsonl", "columns": {"prompt": "frage", "completion": "a"}}, "b.jsonl", {"path": "c.jsonl"}]
    columns = column_maps(Data.model_validate({"train": sources, "columns": {"prompt": "q", "completion": "a"}}))
    found = read_prompts(tmp_path / "p.jsonl", tokenizer, is_chat=False, columns=columns)
    assert [prompt.ids for prompt in found] == [ask("say cat ", tokenizer, is_chat=False).ids] * 4
    assert [prompt.reference for prompt in found] == ["cat", None, None, "dog"]


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["keep", "strip"])
def test_a_run_is_asked_with_its_thinking_and_its_columns_in_files_and_in_a_chat(mode, chat_run, tmp_path, monkeypatch):
    said = "a", "<think>b</think>c", "d", "e"
    turns = [{"role": role, "content": text} for role, text in zip(("user", "assistant") * 2, said, strict=True)]
    run = shutil.copytree(chat_run, tmp_path / "run")
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    recipe["data"] |= {"thinking": mode, "train": [{"path": "rows.jsonl", "columns": {"messages": "turns"}}]}
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    (tmp_path / "p.jsonl").write_text(json.dumps({"turns": turns}) + "\n")
    asked, speaker = [], load_speaker(run)
    monkeypatch.setattr("qlora_kit.run.ask.generate_texts", lambda _, __, prompts, **how: asked.extend(prompts) or [""])
    answer(speaker, tmp_path / "p.jsonl", max_new_tokens=1)
    conversation = Conversation([run], max_new_tokens=1, sampling=Sampling())
    conversation.messages = turns[:2]
    monkeypatch.setattr("qlora_kit.run.talk.stream_text", lambda _, __, prompt, **how: asked.append(prompt) or "")
    conversation.answer("d", tell=print, note=print, stopped=lambda: False)
    monkeypatch.setattr("qlora_kit.run.talk.stream_text", lambda *_, **how: "<think>\ncut")
    for line in ("f", "g"):
        conversation.answer(line, tell=print, note=print, stopped=lambda: False)
    assert conversation.messages[-1]["content"] == "<think>\ncut" + ("" if mode == "keep" else CLOSE)
    row = with_thinking(read_row({"messages": turns}, "row"), mode)
    assert asked == [encode(row, speaker.tokenizer, loss_on="last").prompt] * 2


@pytest.mark.slow
@pytest.mark.parametrize("to", ["merged", "quantized"])
def test_an_export_is_asked_as_its_run_is(to, text_run, chat_run, tmp_path):
    """Though the tokenizer of both has a chat template."""
    asked = {}
    for name, run in (("text", text_run), ("chat", shutil.copytree(chat_run, tmp_path / "chat"))):
        recipe = yaml.safe_load((run / "recipe.yaml").read_text())
        if name == "chat":
            recipe["data"]["thinking"] = "strip"
            (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        out = tmp_path / f"out-{name}"
        assert call("export", run, "--to", to, "--out", out, "--force").exit_code == 0
        speaker, exported = load_speaker(run), load_speaker(out)
        assert exported.tokenizer.chat_template == TEMPLATE
        assert (exported.is_chat, exported.thinking) == (speaker.is_chat, speaker.thinking)
        asked[name] = exported.given("say cat ")
        assert asked[name] == speaker.given("say cat ")
    assert asked["text"] != asked["chat"]
    assert exported.thinking == "strip"
    assert _recipe_for(exported.model, exported.tokenizer, out, "rows.jsonl").data.thinking == "strip"


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "say cat ", "chosen": "cat", "rejected": "dog"},
        {"prompt": "say cat ", "chosen": "cat", "rejected": "dog", "system": "be brief"},
        {"chosen": CHAT["messages"], "rejected": [CHAT["messages"][0], {"role": "assistant", "content": "dog"}]},
    ],
)
def test_a_pair_is_asked_for_its_answers_as_it_was_trained(row, model, tmp_path):
    _, tokenizer = model
    trained_with = encode(read_row(row, "row", task="dpo"), tokenizer)
    (tmp_path / "p.jsonl").write_text(json.dumps(row) + "\n")
    (found,) = read_prompts(tmp_path / "p.jsonl", tokenizer, is_chat=False)
    assert found.ids == trained_with.prompt
    assert found.reference == "cat"


def test_a_prompt_is_asked_whatever_verdict_its_answer_has_and_may_be_turns(model, tmp_path):
    turns = [{"role": "user", "content": "where?"}]
    rows = [{"prompt": "where?", "completion": "on the mat", "label": False}, {"prompt": turns}]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    labelled, unanswered = read_prompts(tmp_path / "p.jsonl", model[1], is_chat=True)
    assert (labelled.shown, labelled.reference) == (turns, "on the mat")
    assert (unanswered.ids, unanswered.reference) == (labelled.ids, None)


def test_a_text_is_a_turn_for_a_model_of_chats_and_a_beginning_for_others(model, tmp_path):
    _, tokenizer = model
    as_turn = ask([{"role": "user", "content": "hi"}], tokenizer, is_chat=True)
    (tmp_path / "p.txt").write_text("hi\n\nho\r\n")
    for is_chat in (True, False):
        texts = [ask(text, tokenizer, is_chat=is_chat) for text in ("hi", "ho")]
        assert read_prompts(tmp_path / "p.txt", tokenizer, is_chat=is_chat) == texts
        assert (texts[0].ids == as_turn.ids) == is_chat
    assert tokenizer.decode(as_turn.ids) == "<user>hi</s><assistant>"
    with_system = ask("hi", tokenizer, is_chat=True, system="be brief")
    assert tokenizer.decode(with_system.ids) == "<system>be brief</s><user>hi</s><assistant>"
    own = [{"role": "system", "content": "be long"}, {"role": "user", "content": "hi"}]
    assert ask(own, tokenizer, is_chat=True, system="be brief").ids == ask(own, tokenizer, is_chat=True).ids
    with pytest.raises(DataError, match="--system"):
        ask("hi", tokenizer, is_chat=False, system="be brief")
    with pytest.raises(DataError, match="no prompt"):
        ask("", tokenizer, is_chat=False)


def test_prompts_that_cannot_be_used_are_told_with_their_lines(model, tmp_path):
    _, tokenizer = model
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "good"}\n{"prompt": 5}\n{nonsense\n{"text": "no question"}\n')
    with pytest.raises(DataError) as caught:
        read_prompts(path, tokenizer, is_chat=False)
    message = str(caught.value)
    assert message.startswith("3 rows cannot be used: "), "by a recipe rows can be left out, and here there is none"
    assert len(message.splitlines()) == 3, "of which the first line tells one"
    assert [f"{path}:{line}" in message for line in (1, 2, 3, 4)] == [False, True, True, True]
    with pytest.raises(DataError, match="is a folder; give one file"):
        read_prompts(tmp_path, tokenizer, is_chat=False)
    (tmp_path / "none.txt").write_text("\n\n")
    with pytest.raises(DataError, match="no prompts"):
        read_prompts(tmp_path / "none.txt", tokenizer, is_chat=False)


# --- generate ---------------------------------------------------------------------------------------------------------


def test_a_file_of_prompts_is_answered_in_its_order(text_run, tmp_path):
    lines = [f"say {word} " for word in ("elephant", "ox", "cat")]
    (tmp_path / "p.txt").write_text("\n".join(lines))
    short = ["--max-new-tokens", 5]
    one_by_one = [call("generate", text_run, "--prompt", line, *short).output.rstrip("\n") for line in lines]
    assert len(set(one_by_one)) > 1
    printed = call("generate", text_run, "--prompts", tmp_path / "p.txt", *short)
    rows = [json.loads(line) for line in printed.stdout.splitlines()]
    assert [row["prompt"] for row in rows] == lines
    assert [row["answer"].rstrip("\n") for row in rows] == one_by_one
    assert "3 of 3" in printed.stderr
    out = tmp_path / "answers.jsonl"
    assert call("generate", text_run, "--prompts", tmp_path / "p.txt", *short, "--out", out).exit_code == 0
    assert out.read_text() == printed.stdout
    assert_mistake(call("generate", text_run, "--prompts", tmp_path / "p.txt", "--out", out), "exists", "--out")
    whole = json.loads(call("generate", text_run, "--prompts", text_run.parent / "rows.jsonl", *short, "--json").stdout)
    assert whole["schema"] == 1
    assert [each["reference"] for each in whole["answers"]] == list(WORDS)


def test_answers_that_were_made_before_a_stop_are_kept(text_run, tmp_path, monkeypatch):
    generate, done = import_module("qlora_kit.train.generate"), []
    real = generate._generate

    def interrupted(model, tokenizer, prompts, *rest, **more):
        if done:
            raise KeyboardInterrupt
        done.extend(prompts)
        return real(model, tokenizer, prompts, *rest, **more)

    out, part = tmp_path / "new" / "answers.jsonl", tmp_path / "new" / "answers.jsonl.part"
    (tmp_path / "p.txt").write_text("".join(f"{number:03}\n" for number in range(40)))
    asked = ("generate", text_run, "--prompts", tmp_path / "p.txt", "--max-new-tokens", 61, "--out", out)
    with monkeypatch.context() as patch:
        patch.setattr(generate, "_generate", interrupted)
        stopped = call(*asked)
    assert stopped.exit_code == 130
    assert f"stopped: {part} has 32 answers" in stopped.stderr
    assert not out.exists()
    kept = jsonl(part)
    assert len(kept) == len(done) == 32
    assert_mistake(call(*asked), f"{part} holds answers", "--out")
    part.unlink()
    assert call(*asked).exit_code == 0
    assert not part.exists()
    whole = jsonl(out)
    assert [row["prompt"] for row in whole] == [f"{number:03}" for number in range(40)]
    assert all(row in whole for row in kept)
    not_there = call("generate", tmp_path, "--prompt", "hi", "--out", tmp_path / "p.txt" / "answers.jsonl")
    assert_mistake(not_there, "p.txt", "--out")


def test_a_checkpoint_and_a_merged_model_answer_as_the_run_does_and_the_latter_has_no_base(chat_run, tmp_path):
    exported = call("export", chat_run, "--dtype", "float32", "--out", tmp_path / "merged")
    assert exported.exit_code == 0, exported.output

    def said(folder, *more):
        return call("generate", folder, "--prompt", "say cat ", "--max-new-tokens", 6, *more).output

    end, early = (chat_run / "checkpoints" / name for name in ("step-000012", "step-000011"))
    assert said(chat_run) == said(end) != said(chat_run, "--base")
    logits = [tiny.logits(load_run(folder)[0]) for folder in (chat_run, end, early)]
    assert torch.equal(logits[0], logits[1])
    assert not torch.equal(logits[0], logits[2])
    assert said(tmp_path / "merged", "--raw") != said(tmp_path / "merged")
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"prompt": "say", "completion": " cat"}))
    for verb, *asked in (("generate", "--prompt", "x"), ("eval", "--data", rows)):
        assert_mistake(call(verb, tmp_path / "merged", *asked, "--base"), "--base", "same weights")
    (tmp_path / "damaged" / "checkpoints").mkdir(parents=True)
    for name in ("recipe.yaml", "data.json"):
        shutil.copy(chat_run / name, tmp_path / "damaged")
    shutil.copytree(end, tmp_path / "damaged" / "checkpoints" / "step-000012")
    (tmp_path / "damaged" / "checkpoints" / "step-000012" / "parameters.safetensors").write_bytes(b"")
    assert_mistake(call("generate", tmp_path / "damaged/checkpoints/step-000012", "--prompt", "x"), "parameters")


@pytest.mark.slow
def test_a_checkpoint_is_exported_as_its_run_is_with_how_it_was_asked(chat_run, tmp_path):
    for to in ("merged", "quantized", "gguf", "adapter", "gguf-adapter"):
        for name, folder in {"end": chat_run, "checkpoint": chat_run / "checkpoints" / "step-000012"}.items():
            exported = call("export", folder, "--to", to, "--out", tmp_path / f"{to}-{name}")
            assert exported.exit_code == 0, exported.output
        sums = [read_json(tmp_path / f"{to}-{name}" / "export.json") for name in ("end", "checkpoint")]
        assert sums[0]["files"] == sums[1]["files"]
        assert sums[0]["provenance"] == sums[1]["provenance"]
        assert ("prompts" in sums[1]["provenance"]) == ("adapter" not in to)


def test_ollama_gives_a_run_on_plain_prompts_the_prompt_alone_and_one_on_chats_its_template(
    chat_run, text_run, tmp_path
):
    templates = []
    for run in (chat_run, text_run):
        assert call("export", run, "--to", "gguf", "--out", tmp_path / run.parent.name).exit_code == 0
        lines = (tmp_path / run.parent.name / "Modelfile").read_text().splitlines()
        templates.append(next(line for line in lines if line.startswith("TEMPLATE")))
    assert "range .Messages" in templates[0]
    assert templates[1] == 'TEMPLATE """{{ .Prompt }}"""'


def test_an_export_in_fp32_is_loaded_in_fp32_and_says_what_the_run_says(chat_run, tmp_path):
    for to in ("merged", "quantized"):
        exported = call("export", chat_run, "--to", to, "--dtype", "float32", "--out", tmp_path / to)
        assert exported.exit_code == 0, exported.output
        assert load_any(tmp_path / to)[0].dtype == torch.float32
    wanted = tiny.logits(load_run(chat_run)[0], torch.tensor([[5, 6, 7]]))
    found = tiny.logits(load_any(tmp_path / "merged")[0], torch.tensor([[5, 6, 7]]))
    assert tiny.relative(found, wanted) < 1e-5  # merged weights are rounded once, to fp32


def test_rows_that_a_run_is_scored_on_go_together_as_its_recipe_says(chat_run, tmp_path, monkeypatch):
    use, sizes = import_module("qlora_kit.run.use"), []
    score = use.score_rows

    def seen(model, tokenizer, rows, batches, *others):
        sizes.append([len(batch.input_ids) for batch in batches])
        return score(model, tokenizer, rows, batches, *others)

    monkeypatch.setattr(use, "score_rows", seen)
    run = shutil.copytree(chat_run, tmp_path / "run")
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    for tokens in (2048, 1):
        recipe["memory"]["eval_tokens"] = tokens
        (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        assert call("eval", run).exit_code == 0
    assert sizes == [[6], [1] * 6]


def test_a_folder_of_weights_is_scored_on_rows_up_to_2048_tokens_or_its_positions(model):
    for positions, most in ((64, 64), (2047, 2047), (4096, 2048)):
        given = tiny.llama(max_position_embeddings=positions)
        assert _recipe_for(given, model[1], Path("somewhere"), "rows.jsonl").data.max_tokens == most


def test_bad_rows_that_a_run_is_scored_on_name_no_setting_that_would_leave_them_out(chat_run, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": 5, "completion": " cat"}\n{"prompt": "say", "completion": ""}\n')
    result = call("eval", chat_run, "--data", path)
    assert result.exit_code == 2
    assert f"2 rows cannot be used: {path}:1: " in result.stderr
    path.write_text(json.dumps({"prompt": "say", "completion": " cat" * 999}) + "\n")
    result = call("eval", chat_run, "--data", path)
    assert_mistake(result, "no row is left to score: of 1, 1 have more than data.max_tokens=64 tokens (the longest ")
    assert "data.over_length" not in result.stderr


def test_an_adapter_that_has_other_bytes_than_its_run_wrote_is_refused_until_it_is_written_again(chat_run, tmp_path):
    run = shutil.copytree(chat_run, tmp_path / "run")
    path = run / "adapter" / "adapter_model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-40] + bytes([whole[-40] ^ 64]) + whole[-39:])
    told = f"{path} does not have the bytes that were written", f"qlora-kit train {run / 'recipe.yaml'} --resume"
    asked = ["generate", run, "--prompt", "hi"]
    for verb in (asked, ["eval", run], ["export", run, "--to", "adapter", "--out", tmp_path / "out"], ["chat", run]):
        assert_mistake(call(*verb), *told)
    assert_mistake(call("train", run / "recipe.yaml", f"lora.from={run}", f"output={tmp_path / 'next'}"), told[0])
    assert call(*asked, "--force").exit_code == 0
    assert call("generate", run, "--base", "--prompt", "hi").exit_code == 0


def test_a_run_whose_base_was_moved_says_how_to_note_where_to(chat_run, tmp_path):
    run = shutil.copytree(chat_run, tmp_path / "run")
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    there = recipe["base"]["model"]
    recipe["base"]["model"] = str(tmp_path / "elsewhere")
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    told = f"{tmp_path / 'elsewhere'} is not there", f"qlora-kit train {run / 'recipe.yaml'} --resume base.model=PLACE"
    for verb in (["generate", run, "--prompt", "hi"], ["eval", run], ["export", run, "--out", tmp_path / "out"]):
        assert_mistake(call(*verb), *told)
    shutil.copytree(there, tmp_path / "elsewhere")
    assert call("eval", run).exit_code == 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], ["--prompt", "--prompts"]),
        (["--prompt", "a", "--prompts", "b"], ["either"]),
        (["--prompt", "a", "--top-p", 0.5], ["--top-p", "--temperature"]),
        (["--prompt", "a", "--stop", ""], ["--stop"]),
        (["--prompt", "a", "--system", "b"], ["--system"]),
        (["--prompt", "a" * 99], ["99 tokens", "64 positions"]),
        (["--prompt", ""], ["no prompt"]),
        (["--prompts", "nothing.jsonl"], ["nothing.jsonl", "no such file"]),
        (["--prompts", "nothing"], ["nothing", "no such file"]),
    ],
)
def test_what_cannot_be_asked_is_one_line(text_run, options, words):
    assert_mistake(call("generate", text_run, *options), *words)


# --- chat -------------------------------------------------------------------------------------------------------------


def talk(*arguments, lines=(), code=0):
    """What a chat says to piped lines: standard output, and standard error."""
    result = CliRunner().invoke(app, ["chat", *map(str, arguments), "--max-new-tokens", "6"], input="\n".join(lines))
    assert result.exit_code == code, result.output + str(result.exception)
    return result.stdout, result.stderr


@pytest.fixture
def conversation(chat_run):
    """A chat with the run, of answers that differ by what was said before."""
    return Conversation([chat_run], max_new_tokens=6, sampling=Sampling())


def say(conversation, text, stopped=lambda: False):
    notes, pieces = [], []
    said = conversation.answer(text, tell=pieces.append, note=notes.append, stopped=stopped)
    assert "".join(pieces) == said
    return said, notes


def test_a_chat_answers_what_the_turns_so_far_would_be_answered(conversation):
    first, _ = say(conversation, "hi")
    second, _ = say(conversation, "ho")
    turns = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": first},
        {"role": "user", "content": "ho"},
    ]
    assert conversation.messages == [*turns, {"role": "assistant", "content": second}]
    asked = ask(turns, conversation._speaker.tokenizer, is_chat=True).ids
    assert generate_texts(conversation.model, conversation._speaker.tokenizer, [asked], max_new_tokens=6) == [second]
    assert conversation.undo()
    assert conversation.messages == turns[:2]
    assert say(conversation, "ho")[0] == second
    conversation.set_system("be brief")
    conversation.start_anew()
    assert conversation.messages == [{"role": "system", "content": "be brief"}]
    assert not conversation.undo()


def test_a_chat_forgets_its_oldest_turns_when_the_positions_run_out_and_keeps_the_system(conversation):
    conversation.set_system("s")
    notes = [note for text in "abcdef" for note in say(conversation, text)[1]]
    assert notes, "64 positions are few"
    assert "64 positions" in notes[0]
    assert conversation.messages[0] == {"role": "system", "content": "s"}
    assert [turn["role"] for turn in conversation.messages[1:3]] == ["user", "assistant"]
    kept = list(conversation.messages)
    with pytest.raises(DataError, match="positions"):
        say(conversation, "x" * 99)
    assert conversation.messages == kept


WRITTEN = {
    "plain": (None, " cat", "cat"),  # of the kit: "Assistant:" and then " " + content
    "own": (TEMPLATE, " cat", " cat"),  # a space that was said
    "trims": (TEMPLATE.replace("m.content", "m.content | trim"), " cat", " cat"),
    "none": (None, "cat", "cat"),
    "more": (None, "  cat", " cat"),
    "two": (TEMPLATE.replace("m.content", "'\n\n' + m.content"), "\n\ncat", "cat"),
}


@pytest.mark.parametrize("case", WRITTEN)
def test_a_space_that_the_template_writes_itself_is_no_part_of_what_was_said(case, model):
    template, said, wanted = WRITTEN[case]
    tokenizer = copy.deepcopy(model[1])
    tokenizer.chat_template = template or find_template("plain")
    turns = [{"role": "user", "content": "hi"}]
    kept = content_of(said, turns, tokenizer)
    assert kept == wanted
    written = tokenizer.apply_chat_template([*turns, {"role": "assistant", "content": kept}], tokenize=False)
    begun = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    if case in ("plain", "own", "more", "two"):
        assert written.startswith(begun + said), "as it was said"


def test_turns_of_a_chat_in_plain_words_are_kept_and_answered_as_they_are_trained(chat_run, monkeypatch):
    monkeypatch.setattr(import_module("qlora_kit.run.talk"), "stream_text", lambda *_, **__: " cat")
    conversation = Conversation([chat_run], max_new_tokens=6, sampling=Sampling())
    conversation._speaker.tokenizer.chat_template = find_template("plain")
    say_ok(conversation, "say cat ")
    assert conversation.rows == [{"messages": [{"role": "user", "content": "say cat "}, CHAT["messages"][1]]}]
    (row,) = encode_turns(read_row(conversation.rows[0], "saved"), conversation._speaker.tokenizer)
    assert "Assistant: cat<" in conversation._speaker.tokenizer.decode(row.input_ids)
    monkeypatch.setattr(import_module("qlora_kit.run.ask"), "generate_texts", lambda *_, **__: [" cat"])
    (told,) = answer(conversation._speaker, ["say cat "], max_new_tokens=6)
    assert told["answer"] == "cat"


def test_half_the_positions_are_left_for_an_answer_and_no_more_turns_go_than_that_takes(chat_run, monkeypatch):
    monkeypatch.setattr(import_module("qlora_kit.run.talk"), "stream_text", lambda *_, **__: "ok")
    conversation = Conversation([chat_run], max_new_tokens=500, sampling=Sampling())
    conversation.model.config.max_position_embeddings = 200
    tokens_of = conversation._speaker.given
    before, sizes = [], []
    for text in ("a", "bc", "def", "g", "h" * 6, "i"):
        asked = [*before, {"role": "user", "content": text}]
        notes = say_ok(conversation, text)
        kept = conversation.messages[:-1]
        assert kept == asked[len(asked) - len(kept) :]
        assert len(tokens_of(kept)) + 100 <= 200
        if len(kept) < len(asked):
            assert len(tokens_of(asked[len(asked) - len(kept) - 2 :])) + 100 > 200
        assert bool(notes) == (len(kept) < len(asked))
        sizes.append(len(kept))
        before = conversation.messages
    assert max(sizes) > 3, "several turns have room"
    assert sizes[-1] < 11, "and not all"
    conversation.start_anew()
    long = "x" * 110
    assert len(tokens_of([{"role": "user", "content": long}])) > 100, "more than half"
    assert say_ok(conversation, long) == []
    assert [turn["content"] for turn in conversation.messages] == [long, "ok"], "a question is not dropped"


def say_ok(conversation, text):
    notes = []
    conversation.answer(text, tell=lambda text: None, note=notes.append, stopped=lambda: False)
    return notes


def test_no_two_answers_of_a_chat_are_drawn_from_one_seed(chat_run, monkeypatch):
    seeds = []
    monkeypatch.setattr(
        import_module("qlora_kit.run.talk"),
        "stream_text",
        lambda *_, sampling, **__: seeds.append(sampling.seed) or "ok",
    )
    conversation = Conversation([chat_run], max_new_tokens=2, sampling=Sampling(seed=5))
    for _ in range(3):
        conversation.answer("hi", tell=lambda text: None, note=lambda text: None, stopped=lambda: False)
    assert seeds == [5, 6, 7]


def test_a_stopped_answer_is_kept_as_far_as_it_came(conversation):
    whole, _ = say(conversation, "hi")
    conversation.undo()
    answers = iter([False, True])
    part, _ = say(conversation, "hi", stopped=lambda: next(answers))
    assert whole.startswith(part)
    assert conversation.messages[-1]["content"] == part


def test_adapters_of_one_base_take_turns_and_the_base_is_bare(chat_run, text_run, tmp_path):
    other = shutil.copytree(text_run, tmp_path / "other")
    conversation = Conversation([chat_run, other], max_new_tokens=6, sampling=Sampling())
    ids = torch.tensor([[5, 6, 7]])
    alone = [tiny.logits(load_run(run, bare_base=bare)[0], ids) for run, bare in
             ((chat_run, False), (other, False), (chat_run, True))]  # fmt: skip
    assert not torch.equal(alone[0], alone[1])
    assert not torch.equal(alone[0], alone[2])
    for name, wanted, is_chat in (("run", alone[0], True), ("other", alone[1], False), ("run", alone[0], True)):
        conversation.use(name)
        assert torch.equal(tiny.logits(conversation.model, ids), wanted)
        assert conversation.is_chat == is_chat
    conversation.use(None)
    said, _ = say(conversation, "hi")
    speaker = load_speaker(chat_run, bare_base=True)
    wanted = generate_texts(speaker.model, speaker.tokenizer, [ask("hi", speaker.tokenizer, is_chat=True).ids],
                            max_new_tokens=6)  # fmt: skip
    assert [said] == wanted
    conversation.use(str(shutil.copytree(text_run / "adapter", tmp_path / "bare")))
    assert torch.equal(tiny.logits(conversation.model, ids), alone[1])
    with pytest.raises(AdapterError, match="nowhere"):
        conversation.use("nowhere")


def test_runs_share_a_base_if_only_one_trains_rows_that_it_has_and_not_if_one_adds_rows(chat_run, tmp_path):
    def with_tokens(name, *tokens):
        run = shutil.copytree(chat_run, tmp_path / name)
        recipe = yaml.safe_load((run / "recipe.yaml").read_text())
        recipe["lora"]["added_tokens"] = list(tokens)
        (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        return run

    how = {"max_new_tokens": 1, "sampling": Sampling()}
    Conversation([chat_run, with_tokens("same", "</s>")], **how)
    with pytest.raises(AdapterError, match=r"tokens added to the base is \['<new>'\], not \[\]"):
        Conversation([chat_run, with_tokens("other", "<new>", "</s>")], **how)


@pytest.mark.parametrize(
    ("key", "value", "before"),
    [
        ("quantization", "int8", "nf4"),
        ("double_quant", False, True),
        ("block_size", 128, 64),
        ("skip", ["0"], []),
        ("quantize_head", True, False),
        ("revision", "main", None),
        ("model", "./elsewhere", ""),
    ],
)
def test_runs_on_different_bases_do_not_share_one(key, value, before, chat_run, tmp_path):
    other = shutil.copytree(chat_run, tmp_path / "other")
    recipe = yaml.safe_load((other / "recipe.yaml").read_text())
    recipe["base"][key] = value
    (other / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    told = f"is {value}, not {before}" if key != "model" else "elsewhere, not"
    assert_mistake(call("chat", chat_run, other), "trained on another base", f"base.{key} ", told)


def test_a_run_speaks_once_and_a_folder_that_is_none_not_at_all(chat_run, tmp_path):
    assert_mistake(call("chat", chat_run, chat_run), "already an adapter called run")
    assert_mistake(call("chat", tmp_path), str(tmp_path))


def test_chat_works_through_a_pipe(chat_run, tmp_path):
    saved = tmp_path / "saved.jsonl"
    said, told = talk(
        chat_run,
        lines=["hi", "", "/nothing", "//new", "/undo", f"/save {saved}", f"/save {saved}", "/base", "hi",
               "/adapter run", "/adapter", "/system be brief", "/help", "/new", "/quit", "never read"],
    )  # fmt: skip
    rows = jsonl(saved)
    assert rows[0]["messages"][0] == {"role": "user", "content": "hi"}
    assert said.startswith(visible(rows[0]["messages"][1]["content"], keep="\n\t") + "\n")
    assert len(rows[0]["messages"]) == 2, "the second question was taken back"
    for words in ("there is no /nothing", "undone", "already exists", "the base is active", "run (active)",
                  "/undo", "as training data"):  # fmt: skip
        assert words in told
    assert "never read" not in said + told


def test_chat_with_a_run_on_texts_says_that_lines_stand_by_themselves_and_saves_them_so(text_run, tmp_path):
    saved = tmp_path / "saved.jsonl"
    lines = [f"/save {saved}", "say", "say", "x", "/system be brief", f"/save {saved}"]
    said, told = talk(text_run, lines=[*lines, "/save ~no-such-person/x.jsonl"])
    assert "on its own" in told
    assert "no system turn" in told
    assert "nothing has been said yet" in told
    assert "error: ~no-such-person/x.jsonl cannot be written" in told
    first, second = jsonl(saved)
    assert first == second
    assert read_row(first, "saved").prompt == "say"
    alone, nothing = (
        call("generate", text_run, "--prompt", text, "--max-new-tokens", 6).stdout for text in ("say", "x")
    )
    assert nothing == "\n", "an answer of no tokens is not saved"
    assert said == 2 * alone + nothing
    assert (alone, nothing) == (first["completion"] + "\n", "\n")
    assert_mistake(call("chat", text_run, "--system", "be brief"), "no system turn")


def test_a_chat_without_any_input_is_over(monkeypatch):
    monkeypatch.setattr("sys.stdin", None)
    assert chat._read() is None


@pytest.fixture
def interruptible():
    """Ctrl-C as a terminal's programs have it: where tests run in the background of a shell, it is ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_an_interrupt_ends_an_answer_and_not_the_chat(chat_run, monkeypatch, interruptible):
    """A signal after the first piece: what is said is shorter, and the next line is read."""
    whole, _ = talk(chat_run, lines=["/base", "hi", "/quit"])
    show, pieces = chat._show, []

    def interrupted(piece):
        pieces.append(piece)
        show(piece)
        if len(pieces) == 1:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(chat, "_show", interrupted)
    before = signal.getsignal(signal.SIGINT)
    said, told = talk(chat_run, lines=["/base", "hi", "/undo", "/quit"])
    assert 1 < len(said) < len(whole)
    assert whole.startswith(said.rstrip("\n\ufffd"))
    assert "undone" in told
    assert signal.getsignal(signal.SIGINT) is before


# --- samples on the way -----------------------------------------------------------------------------------------------


def jsonl(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_samples_leave_training_bit_for_bit_as_it_was(sampled):
    quiet, asked = sampled
    assert not (quiet / "samples.jsonl").exists()
    assert [row["step"] for row in jsonl(asked / "samples.jsonl")] == [4] * 4 + [8] * 4 + [12] * 4
    told = ("step", "loss", "grad_norm", "eval_loss")
    courses = [[{key: row.get(key) for key in told} for row in jsonl(run / "metrics.jsonl")] for run in sampled]
    assert len({row["loss"] for row in courses[0]}) > 10
    assert courses[0] == courses[1]
    weights = [load_file(run / "adapter" / "adapter_model.safetensors") for run in sampled]  # the header has no order
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


def test_samples_ask_the_same_each_time_and_are_what_the_checkpoint_says(sampled):
    rows = jsonl(sampled[1] / "samples.jsonl")
    prompts = [f"say {word} " for word in WORDS[:4]]
    assert [row["prompt"] for row in rows] == 3 * prompts
    assert [row["reference"] for row in rows] == 3 * list(WORDS[:4])
    assert len({row["answer"] for row in rows}) > 1
    model, tokenizer, _ = load_run(sampled[1] / "checkpoints" / "step-000012")
    asked = [ask(prompt, tokenizer, is_chat=False).ids for prompt in prompts]
    assert [row["answer"] for row in rows[-4:]] == generate_texts(model, tokenizer, asked, max_new_tokens=64)


def test_samples_of_a_step_that_is_taken_again_are_replaced(sampled, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(sampled[1], run)
    before = jsonl(run / "samples.jsonl")
    shutil.rmtree(run / "checkpoints" / "step-000012")
    with (run / "samples.jsonl").open("a") as file:
        file.write('{"step": 13, "prompt": "from a run that crashed"}\n{"half a li')
    recipe = yaml.safe_load((run / "recipe.yaml").read_text()) | {"output": str(run)}
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    resumed = call("train", run / "recipe.yaml", "--resume")
    assert resumed.exit_code == 0, resumed.output
    assert "continuing from step-000011" in resumed.output
    assert jsonl(run / "samples.jsonl") == before


def test_samples_take_no_more_tokens_at_one_time_than_an_evaluation(model, monkeypatch):
    """So that the plan of an evaluation is theirs as well."""
    net, tokenizer = model
    shapes = []
    prompts = [[40 + i] * 20 for i in range(3)]
    real = type(net).generate

    def watched(self, input_ids, generation_config, **rest):
        shapes.append((input_ids.shape[0], input_ids.shape[1] + generation_config.max_new_tokens))
        return real(self, input_ids=input_ids, generation_config=generation_config, **rest)

    monkeypatch.setattr(type(net), "generate", watched)
    for most, positions in ((30, None), (63, 25), (100, 64)):
        asked = [Question(ids, "?", "!") for ids in prompts]
        log = SimpleNamespace(add=lambda row: None)
        shapes.clear()
        Samples(net, tokenizer, asked, 2, most, positions, log, lambda step, rows: None)(4)
        assert sum(rows for rows, _ in shapes) == 3
        assert all(rows * tokens <= most and tokens <= (positions or most) for rows, tokens in shapes), shapes


@pytest.mark.parametrize(
    ("rows", "length", "prompt"), [pytest.param(16, 30, 20, marks=pytest.mark.slow), (4, 60, 55), (1, 64, 40)]
)
def test_samples_take_less_memory_than_the_evaluation_that_is_planned(model, rows, length, prompt):
    _, tokenizer = model
    net = tiny.quantized(tiny.llama(vocab_size=len(tokenizer)))
    add_lora(net, rank=4)
    batch = collate([Encoded([5] * length, [place >= prompt for place in range(length)])] * rows, 0)
    asked = [Question([5 + i] * prompt, "?", "!") for i in range(4)]
    log = SimpleNamespace(add=lambda row: None)
    peaks = []
    for act in (
        lambda ledger: rehearse_evaluation(net, batch, phase=ledger.phase),
        lambda ledger: Samples(net, tokenizer, asked, 1, rows * length, 64, log, lambda step, rows: None)(1),
    ):
        ledger = Ledger()
        ledger.adopt(net)
        with ledger:
            before = ledger.current()
            act(ledger)
        peaks.append(ledger.peak() - before)
    assert 0 < peaks[1] < peaks[0]


def test_samples_without_held_out_prompts_are_told(model):
    _, tokenizer = model
    watch, asks = Told(), SimpleNamespace(train=SimpleNamespace(sample_every=4))
    prepared = SimpleNamespace(tokenizer=tokenizer, eval=SimpleNamespace(rows=[Encoded([5, 6], [False, True])]))
    job = SimpleNamespace(sample=None)
    assert import_module("qlora_kit.run.course")._let_sample(job, asks, prepared, None, watch) is None
    assert job.sample is None
    assert watch.notes == [
        "train.sample_every has no effect: no held-out row has a prompt and an answer; set data.eval"
    ]


def test_samples_are_told_and_reported_first_and_last(sampled):
    asked = sampled[1]
    rows = jsonl(asked / "samples.jsonl")
    output = (asked.parent / "output.txt").read_text()
    assert all(f"step {step}: say cat ->" in output for step in (4, 8, 12))
    page = (asked / "report.html").read_text()
    assert "step 4" in page
    assert "step 12" in page
    assert "Samples on the way" in page
    assert "Samples on the way" not in (sampled[0] / "report.html").read_text()
    (asked / "samples.jsonl").write_text(json.dumps(rows[0] | {"answer": "<script>x</script>"}) + "\n")
    try:
        assert call("report", asked).exit_code == 0
        assert "<script>" not in (asked / "report.html").read_text()
        (asked / "samples.jsonl").write_text('{"step": 1}\n')
        assert_mistake(call("report", asked), "samples.jsonl", "prompt")
    finally:
        (asked / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


# --- a loss that explodes ---------------------------------------------------------------------------------------------


def test_a_loss_that_explodes_is_told_once_during_the_run_and_after_a_resume_as_well():
    rows = [{"step": step, "loss": 1.0 if step <= 40 else 9.0} for step in range(1, 81)]
    rows.insert(50, {"step": 50, "eval_loss": 5.0})
    rows.insert(51, {"step": 51, "loss": None, "nonfinite": True})
    for before in (0, 30):
        watch = Told()
        show = import_module("qlora_kit.run.course")._watched(rows[:before], watch)
        for row in rows[before:]:
            show(row)
        assert watch.rows == rows[before:]
        (note,) = watch.notes
        assert "exploded" in note


class Told(Watch):
    """Keeps what it is told."""

    def __init__(self):
        self.notes, self.rows = [], []

    def note(self, text):
        self.notes.append(text)

    def row(self, row):
        self.rows.append(row)
