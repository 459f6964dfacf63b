"""Preview: it shows what is trained on and what became of every row, and no row can do anything to a terminal."""

import io
import json
import re
import shutil
from collections import Counter
from functools import cache
from itertools import count
from types import SimpleNamespace

import pyarrow
import pytest
import torch
import yaml
from huggingface_hub import constants
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet
from rich.console import Console
from safetensors.torch import save_file
from test_data import ASTRAY, END, MARKED, TURNS, UNMARKED, make_tokenizer, write
from tiny import llama
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

from qlora_kit.cli.app import app, main
from qlora_kit.cli.preview import draw
from qlora_kit.cli.show import Screen
from qlora_kit.cli.visible import visible
from qlora_kit.data import (
    Chat,
    Completion,
    EncodedSet,
    Preference,
    Sampler,
    Text,
    encode_rows,
    load_rows,
    measure_lengths,
    remarks_on,
    show_rows,
)
from qlora_kit.recipe import read_recipe
from qlora_kit.run import preview
from qlora_kit.run import rows as run_rows
from qlora_kit.run.prepare import prepare
from qlora_kit.train.loop import _micro_batches
from qlora_kit.train.pace import room_of
from qlora_kit.watch import Watch

# ---- rows as text --------------------------------------------------------------------------------------------------


@cache
def sentencepiece():
    """As Llama-2's: a space in front of words, and characters that it does not know as single bytes."""
    trained = Tokenizer(models.BPE(unk_token="<unk>"))
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    trained.train_from_iterator(
        ["the cat sat on the mat"] * 9,
        trainers.BpeTrainer(vocab_size=60, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False),
    )
    model = json.loads(trained.to_str())["model"]
    vocab = model["vocab"] | {f"<0x{byte:02X}>": len(model["vocab"]) + byte for byte in range(256)}
    bpe = Tokenizer(models.BPE(vocab, [tuple(pair) for pair in model["merges"]], unk_token="<unk>", byte_fallback=True))
    bpe.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    bpe.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    bpe.add_special_tokens([AddedToken(token, normalized=False) for token in ("<unk>", "<s>", "</s>")])
    return PreTrainedTokenizerFast(tokenizer_object=bpe, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def whole_words():
    """A vocabulary of words without a decoder: texts are words with spaces between them."""
    words = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1, "the": 2, "cat": 3, "sat": 4}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", eos_token="</s>")


TOKENIZERS = {"bytes": make_tokenizer, "sentencepiece": sentencepiece, "words": whole_words}
HARD = "the cat 🙂🙂 sat\n\n  on é漢字 mat\t👩‍👩‍👧"


def pieces_of(example, tokenizer, **how):
    rows = encode_rows([example], tokenizer, **how)
    (shown,) = show_rows(rows, tokenizer, most=1)
    (side,) = shown.sides
    return rows.rows[0], side


@pytest.mark.parametrize("kind", TOKENIZERS)
@settings(max_examples=30, deadline=None)
@given(prompt=st.text(max_size=12), answer=st.text(min_size=1, max_size=12))
def test_pieces_are_the_tokens_of_the_row_and_its_decoded_text(kind, prompt, answer):
    tokenizer = TOKENIZERS[kind]()
    row, side = pieces_of(Completion(f"the cat {prompt}", f" sat {answer}"), tokenizer)
    assert [number for piece in side.pieces for number in piece.ids] == row.input_ids
    assert sum(len(piece.ids) for piece in side.pieces if piece.trained) == row.trained_tokens == side.trained_tokens
    assert 0 < side.trained_tokens < side.tokens == len(row.input_ids)
    said = "".join(piece.text for piece in side.pieces)
    assert said == tokenizer.decode(row.input_ids, clean_up_tokenization_spaces=False)


@pytest.mark.parametrize("kind", ["bytes", "sentencepiece"])
def test_a_character_that_is_cut_over_several_tokens_is_shown_whole(kind):
    tokenizer = TOKENIZERS[kind]()
    row, side = pieces_of(Completion("the", HARD), tokenizer)
    halves = [tokenizer.decode([number]) for number in row.input_ids]
    assert sum("\ufffd" in half for half in halves) > 20, "single tokens show halves"
    assert "".join(piece.text for piece in side.pieces).endswith(HARD + "</s>")
    assert not any("\ufffd" in piece.text for piece in side.pieces)
    assert max(len(piece.ids) for piece in side.pieces) <= 4, "the most bytes of a character"


def test_text_that_holds_the_replacement_character_itself_is_shown_in_short_pieces():
    row, side = pieces_of(Text("the \ufffd\ufffd cat" + "\ufffd" * 40), make_tokenizer())
    said = "".join(piece.text for piece in side.pieces)
    # Where a long run of them is cut, halves of one look like one: their number may grow, and nothing else changes.
    assert re.sub("\ufffd+", "?", said) == "the ? cat?</s>"
    assert max(len(piece.ids) for piece in side.pieces) <= 16 < len(row.input_ids)


def test_a_character_cut_by_the_end_of_a_row_is_all_that_is_not_whole():
    row, side = pieces_of(Text("the 🙂"), make_tokenizer(), max_tokens=4, over_length="truncate")
    assert len(row.input_ids) == 4
    assert [("\ufffd" in piece.text) for piece in side.pieces] == [False] * (len(side.pieces) - 1) + [True]


def test_special_tokens_are_told_from_text():
    _, side = pieces_of(Chat(TURNS), make_tokenizer(template=UNMARKED["chatml"]))
    special = [piece.text for piece in side.pieces if piece.special]
    assert special.count("<|im_end|>") == 5
    assert [piece.text for piece in side.pieces if piece.special and piece.trained] == [END["chatml"]] * 2


# ---- lengths and padding -------------------------------------------------------------------------------------------


@given(lengths=st.lists(st.integers(1, 300), min_size=1, max_size=250))
def test_the_99th_length_keeps_99_of_100_rows_and_the_next_lower_one_does_not(lengths):
    found = measure_lengths(EncodedSet(lengths_given=lengths))
    for share, enough in ((0.5, found.median), (0.95, found.p95), (0.99, found.p99), (1, found.longest)):
        assert sum(length <= enough for length in lengths) >= share * len(lengths)
        assert sum(length < enough for length in lengths) < share * len(lengths)


def test_lengths_are_those_before_rows_are_cut_or_left_out():
    rows = [Completion("the", " cat" * count, where=f"f:{count}") for count in range(1, 31)]
    found = [encode_rows(rows, make_tokenizer(), max_tokens=8, over_length=choice) for choice in ("drop", "truncate")]
    whole = encode_rows(rows, make_tokenizer())
    assert max(whole.lengths) > 20
    assert [measure_lengths(each) for each in found] == [measure_lengths(whole)] * 2


LONG = {"answers": "prompt completion", "pairs": "prompt chosen rejected", "verdicts": "prompt completion label"}


@pytest.mark.parametrize(
    ("task", "kind", "packing"),
    [("sft", "answers", False), ("sft", "answers", True), ("dpo", "pairs", False), ("orpo", "pairs", False),
     ("kto", "verdicts", False), ("kto", "pairs", False)],
)  # fmt: skip
def test_padding_is_counted_as_the_batches_of_the_loop_have_it(task, kind, packing, recipe):
    """Of an epoch, and of every sequence: a pair is two, and so is an answer beside the one that it is swapped with."""
    rows = [
        {"prompt": "the " * (1 + n % 3), "completion": "cat " * (1 + 7 * n % 11), "label": n % 2 == 0,
         "chosen": "sat " * (1 + 5 * n % 13), "rejected": "on " * (1 + 3 * n % 17)}
        for n in range(40)
    ]  # fmt: skip
    write(recipe.parent / "rows.jsonl", *({name: row[name] for name in LONG[kind].split()} for row in rows))
    words = [f"train.task={task}", f"data.packing={json.dumps(packing)}", "train.accumulation=2", "train.steps=1000"]
    asked = read_recipe(str(recipe), words)
    prepared = prepare(asked, Watch(), weights=False)
    device, pace, given = torch.device("cpu"), prepared.pace, prepared.train.rows
    job = SimpleNamespace(rows=given, packing=prepared.packing, pace=pace, pad_id=0, device=device,
                          room=room_of(asked.train, pace, prepared.longest, device))  # fmt: skip
    sampler, batches = Sampler(len(given), 0), []
    for _ in range(len(given) // pace.rows_a_step):
        batches += _micro_batches(job, sampler.next_rows(pace.rows_a_step))
    tokens = sum(sum(batch.lengths) for batch in batches)
    places = sum(batch.input_ids.numel() for batch in batches)
    assert tokens < places
    shown = preview(asked)
    found = shown.packed if packing else shown.apart
    assert found.steps == len(given) // pace.rows_a_step
    assert found.sequences == sum(len(batch.lengths) for batch in batches)
    assert found.efficiency == pytest.approx(tokens / places, rel=1e-12)
    assert (found.sequences < len(given)) == packing


# ---- remarks -------------------------------------------------------------------------------------------------------

NO_END = "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}" + (
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


def kinds(examples, tokenizer, held_out=(), **how):
    train = encode_rows(examples, tokenizer, **how)
    held = encode_rows(held_out, tokenizer, may_be_empty=True, **how)
    return {each.kind: each for each in remarks_on(train, held, tokenizer)}


def rows_named(count, answer=" sat {}"):
    return [Completion(f"the cat {n}", answer.format(n), where=f"f.jsonl:{n}") for n in range(1, count + 1)]


def test_sound_rows_call_for_no_remark():
    tokenizer = make_tokenizer(bos=True, template=UNMARKED["llama3"])
    assert kinds([*rows_named(9), Chat(TURNS, where="f.jsonl:10")], tokenizer, [Text("the mat")]) == {}


def test_answers_without_an_end_token_are_named_and_those_with_one_are_not():
    for template, said in ((NO_END, {"no_end"}), (UNMARKED["chatml"], set())):
        tokenizer = make_tokenizer(template=template)
        for loss_on in ("assistant", "all"):  # of all, the line break behind the last end token is trained, too
            found = kinds([Chat(TURNS, where="f.jsonl:4")], tokenizer, loss_on=loss_on)
            assert found.keys() == said, (template, loss_on)
    found = kinds([Chat(TURNS, where="f.jsonl:4")], make_tokenizer(template=NO_END))["no_end"]
    assert str(found) == (
        "1 row with an answer that has no end token after it: the model may not learn to stop (see data.template): "
        "f.jsonl:4"
    )


def test_rows_that_were_cut_are_not_blamed_for_having_no_end():
    long = Completion("the", " cat" * 30, where="f.jsonl:7")
    for choice, said in (("truncate", {"truncated"}), ("split", set())):
        assert kinds([*rows_named(3), long], make_tokenizer(), over_length=choice, max_tokens=20).keys() == said


def test_a_piece_that_is_all_prompt_is_counted_and_a_row_without_any_trained_token_is_named():
    asked = Completion("the cat sat " * 9, " on the mat", where="f.jsonl:9")
    rows = encode_rows([asked], make_tokenizer(), over_length="split", max_tokens=8)
    assert (rows.counts.no_trained > 0, rows.counts.rows > 0) == (True, True)
    assert kinds([asked], make_tokenizer(), over_length="split", max_tokens=8) == {}
    found = kinds([asked, *rows_named(2)], make_tokenizer(), over_length="truncate", max_tokens=12)
    assert found["no_trained"].rows == ["f.jsonl:9"]


def test_two_bos_are_named():
    tokenizer = make_tokenizer(template=UNMARKED["llama3"])
    twice = Chat([{"role": "user", "content": "the"}, TURNS[1]], where="f.jsonl:2")
    assert kinds([twice], tokenizer) == {}
    tokenizer = make_tokenizer(template="{{ bos_token }}" + UNMARKED["llama3"])
    assert kinds([twice], tokenizer)["two_bos"].rows == ["f.jsonl:2"]


def test_marks_of_a_template_that_are_not_believed_are_told_of_once_for_all_rows():
    rows = [Chat([{"role": "user", "content": f"the cat {n}"}, TURNS[1]], where=f"f.jsonl:{n}") for n in range(1, 6)]
    assert kinds(rows, make_tokenizer(template=MARKED["chatml"])) == {}
    astray = make_tokenizer(template=ASTRAY["around the user's turns"])
    found = kinds(rows, astray)
    assert (found.keys(), found["marks"].is_for_runs) == ({"marks"}, True)
    assert kinds(rows_named(1), astray, rows[:1])["marks"].text.startswith("1 held-out row for which")
    assert str(found["marks"]) == (
        "5 rows for which the chat template's generation marks cover more than the assistant's answers: the marks are "
        "not used, and what follows each prompt is learnt (see data.template): f.jsonl:1; f.jsonl:2; f.jsonl:3; and 2 "
        "more"
    )


def test_parts_of_chats_that_the_template_does_not_write_are_told_of():
    call = {"role": "assistant", "content": "hm", "tool_calls": [{"function": {"name": "clock"}}]}
    odd = {
        "system": Chat([{"role": "system", "content": "in Latin"}, *TURNS], where="f.jsonl:1"),
        "tools": Chat(TURNS, [{"name": "clock"}], where="f.jsonl:2"),
        "tool_calls": Chat([TURNS[0], call, *TURNS[2:]], where="f.jsonl:3"),
    }
    deaf = make_tokenizer(template=UNMARKED["chatml"].replace("in messages", "in messages if m.role != 'system'"))
    assert kinds([Chat(TURNS)], deaf) == {}
    for kind, chat in odd.items():
        found = kinds([chat], deaf, loss_on="last")
        assert (found.keys(), found[kind].rows, found[kind].is_for_runs) == ({kind}, [chat.where], True)
    assert str(kinds([odd["system"]], deaf)["system"]) == (
        "1 row with a system text that the chat template does not write: answers are learnt without it "
        "(see data.template): f.jsonl:1"
    )
    asked, chosen, rejected = TURNS[0], TURNS[1], {**TURNS[1], "content": "hm"}
    pair = Preference(*(Chat([asked, each], [{"name": "clock"}]) for each in (chosen, rejected)), where="f.jsonl:4")
    assert kinds([pair], deaf)["tools"].rows == ["f.jsonl:4"], "once, though both answers have them"


def test_rows_that_say_the_same_are_named_with_the_first_of_them():
    rows = [*rows_named(3), Completion("the cat 2", " sat 2", where="f.jsonl:9")]
    assert kinds(rows, make_tokenizer())["repeated"].rows == ["f.jsonl:9 (as f.jsonl:2)"]
    weighted = [*rows_named(3), *rows_named(3)]
    assert "repeated" not in kinds(weighted, make_tokenizer()), "a row that is read twice stands in one place"
    few = kinds([*rows_named(300), rows[-1]], make_tokenizer())["repeated"]
    assert not few.is_for_runs
    assert kinds(rows, make_tokenizer())["repeated"].is_for_runs


def test_training_rows_that_are_held_out_too_are_named():
    held_out = [Completion("the cat 2", " sat 2", where="eval.jsonl:1")]
    assert kinds(rows_named(3), make_tokenizer(), held_out)["leaked"].rows == ["f.jsonl:2 (as eval.jsonl:1)"]
    assert "leaked" not in kinds(rows_named(1), make_tokenizer(), held_out)


@pytest.mark.parametrize(("sound", "is_said"), [(98, True), (99, False), (199, False)])
def test_rows_that_are_left_out_for_their_length_are_named_above_one_in_a_hundred(sound, is_said):
    long = Completion("the", " cat" * 99, where="f.jsonl:500")
    found = kinds([*rows_named(sound), long], make_tokenizer(), max_tokens=60)
    assert ("dropped" in found) == is_said
    if is_said:
        assert "1 row left out for being longer than data.max_tokens, 1.0% of all" in str(found["dropped"])


@pytest.mark.parametrize(("long", "is_refused"), [(2, False), (3, True)])
def test_a_preview_says_that_train_would_refuse_a_set_of_which_most_rows_are_too_long(long, is_refused):
    rows = [Completion("the", " cat" * 99, where=f"f.jsonl:{500 + number}") for number in range(long)]
    found = kinds([*rows_named(2), *rows], make_tokenizer(), max_tokens=60)
    assert ("refused" in found) == is_refused
    held_out = kinds(rows_named(2), make_tokenizer(), held_out=rows, max_tokens=60)
    assert "dropped" in held_out
    assert "refused" not in held_out


def test_a_remark_names_three_rows_and_counts_the_rest():
    found = kinds(rows_named(30, " sat" * 40), make_tokenizer(), over_length="truncate", max_tokens=20)["truncated"]
    assert (found.count, len(found.rows)) == (30, 20)
    assert str(found).endswith("f.jsonl:1; f.jsonl:2; f.jsonl:3; and 27 more")


# ---- the terminal --------------------------------------------------------------------------------------------------


@given(st.text())
def test_what_is_visible_holds_nothing_that_acts_on_a_terminal(text):
    shown = visible(text)
    assert not re.search("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]", shown)
    if text.isprintable() and "\\" not in text:
        assert shown == text


def test_joiners_that_hold_emoji_together_stay():
    assert visible("👩‍👧") == "👩‍👧"
    assert visible("a\u202eb\x1b[2J\n") == "a\\u202eb\\x1b[2J\\n"


def test_a_note_shows_what_it_is_given_and_no_more(capsys):
    Screen().note("rows\x1b[2J.jsonl:3 [bold] :smile:\n")
    assert capsys.readouterr().out == "note: rows\\x1b[2J.jsonl:3 [bold] :smile:\\n\n"


# ---- through the command line --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    """Config and tokenizer of a tiny Llama, and no weights."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer = make_tokenizer(template=UNMARKED["chatml"])
    llama(vocab_size=len(tokenizer), eos_token_id=1, max_position_embeddings=256).config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


GOOD = [{"prompt": f"the cat {n} ", "completion": f"sat on {n}"} for n in range(12)]


@pytest.fixture
def recipe(tmp_path, model_folder):
    """Rows in rows.jsonl, and a recipe that takes them."""
    write(tmp_path / "rows.jsonl", *GOOD)
    content = {
        "base": {"model": str(model_folder), "compute_dtype": "float32", "device": "cpu"},
        "lora": {"rank": 2},
        "data": {"train": "rows.jsonl", "eval": None, "max_tokens": 64},
        "train": {"steps": 2, "micro_batch": 4, "accumulation": 1},
        "output": str(tmp_path / "run"),
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def call(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def seen(*arguments):
    result = call("preview", *arguments, "--json")
    assert result.exit_code == 0, result.output + str(result.exception)
    return json.loads(result.stdout)


def drawn(recipe, *overrides, **console):
    shown = Console(record=True, width=120, soft_wrap=True, emoji=False, highlight=False, **console)
    with shown.capture() as captured:
        draw(preview(read_recipe(str(recipe), overrides)), shown)
    return captured.get()


def test_a_preview_needs_no_weights_and_leaves_nothing_behind(recipe, model_folder):
    assert not list(model_folder.glob("*.safetensors"))
    result = call("preview", recipe, "--rows", 2)
    assert result.exit_code == 0, result.output + str(result.exception)
    assert "the cat 1 ⟦sat on 1</s>⟧" in result.stdout
    assert result.stdout.count("rows.jsonl:") == 2
    assert not (recipe.parent / "run").exists()


def test_an_adapter_to_go_on_from_brings_its_tokens_and_its_shape(recipe, tmp_path):
    adapter = tmp_path / "start"
    adapter.mkdir()
    config = {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], "peft_type": "LORA"}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    save_file({"a": torch.zeros(1)}, adapter / "adapter_model.safetensors", {"added_tokens": '["<note>"]'})
    write(tmp_path / "rows.jsonl", {"prompt": "the <note>", "completion": "sat"})
    pieces = seen(recipe, f"lora.from={adapter}")["rows"][0]["sides"][0]["pieces"]
    assert "<note>" in [piece["text"] for piece in pieces]
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"r": 3}))
    refused = call("preview", recipe, f"lora.from={adapter}")
    assert refused.exit_code == 2
    assert "leave out lora.rank" in refused.stderr


def test_a_model_of_the_hub_needs_its_config_and_tokenizer_alone(recipe, model_folder, monkeypatch):
    commit = "0123456789abcdef0123456789abcdef01234567"
    cached = recipe.parent / "hub" / "models--owner--model"
    shutil.copytree(model_folder, cached / "snapshots" / commit)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(commit)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(recipe.parent / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    result = call("preview", recipe, "base.model=owner/model")
    assert result.exit_code == 0, result.output + str(result.exception)
    assert "HF_HUB_OFFLINE" in result.output
    assert "the cat 1 ⟦sat on 1</s>⟧" in result.stdout
    as_json = call("preview", recipe, "base.model=owner/model", "--json")
    assert json.loads(as_json.stdout)["train"]["rows"] == 12
    assert "HF_HUB_OFFLINE" in as_json.stderr
    assert "owner/nothing" in call("preview", recipe, "base.model=owner/nothing").stderr


def test_json_holds_what_is_shown(recipe):
    found = seen(recipe, "--rows", 1)
    assert found["schema"] == 1
    assert found["train"]["rows"] == 12
    assert found["lengths"]["longest"] == found["train"]["longest"]
    (row,) = found["rows"]
    (side,) = row["sides"]
    assert row["where"] == f"{recipe.parent / 'rows.jsonl'}:1"
    assert "".join(piece["text"] for piece in side["pieces"] if piece["trained"]) == "sat on 0</s>"
    assert Counter(piece["trained"] for piece in side["pieces"])[True] == side["trained_tokens"]
    assert found["apart"]["sequences"] == 8 > found["packed"]["sequences"]
    assert seen(recipe, "--rows", 0)["rows"] == []


def test_in_colour_what_is_trained_is_bold_and_there_are_no_brackets(recipe):
    text = drawn(recipe, force_terminal=True, color_system="standard", no_color=False)
    assert "⟦" not in text.replace("⟦in brackets", "")
    bold_green = "".join(re.findall("\x1b\\[1;(?:32|92|35)m([^\x1b]*)\x1b", text))
    assert bold_green == "".join(f"sat on {n}</s>" for n in range(3))
    for without in ({"no_color": True}, {"color_system": None}):
        assert "⟦sat on 0</s>⟧" in drawn(recipe, force_terminal=True, **without)


def test_an_output_that_takes_ascii_alone_gets_the_rest_spelt(recipe, monkeypatch):
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr("sys.stdout", out)
    monkeypatch.setattr("sys.argv", ["qlora-kit", "preview", str(recipe), "--rows", "1"])
    with pytest.raises(SystemExit) as ended:
        main()
    out.flush()
    assert ended.value.code == 0
    assert b"\\u27e6sat on 0</s>\\u27e7" in out.buffer.getvalue()


def test_no_more_tokens_are_advised_than_the_model_takes(recipe):
    write(recipe.parent / "rows.jsonl", {"prompt": "the cat ", "completion": "sat " * 5000})
    text = drawn(recipe, "data.over_length=truncate")
    assert "keeps 99 %" not in text
    assert "longer rows can be cut or split (data.over_length)" in text


def test_line_breaks_are_seen_and_still_break_the_line(recipe):
    write(recipe.parent / "rows.jsonl", {"prompt": "the\ncat", "completion": "\nsat"})
    assert "\nthe⏎\ncat⟦⏎\nsat</s>⟧\n" in drawn(recipe)


def test_rows_can_do_nothing_to_a_terminal(recipe):
    hostile = "[bold red]x[/] :smile: \x1b[2J\x1b]0;owned\x07 \u202eevil ⟧ \r"
    write(recipe.parent / "rows.jsonl", {"prompt": hostile, "completion": f"the ⟦cat {hostile}"})
    text = drawn(recipe, "data.max_tokens=200")
    assert text.count("[bold red]x[/] :smile: \\x1b[2J\\x1b]0;owned\\x07 \\u202eevil \\u27e7 \\r") == 2
    assert "the \\u27e6cat" in text
    coloured = drawn(recipe, "data.max_tokens=200", force_terminal=True, color_system="standard", no_color=False)
    assert set(re.findall("\x1b(.)", coloured)) == {"["}
    assert not re.search("\x1b\\[[^m]*[^0-9;m]", coloured)
    assert not set("\x07\r\u202e") & set(text + coloured)


def test_a_file_or_a_column_can_do_nothing_to_a_terminal_either(recipe):
    path = recipe.parent / "rows\x1b[2J.jsonl"
    write(path, *GOOD)
    shown = call("preview", recipe, f"data.train={json.dumps(str(path))}")
    assert shown.exit_code == 0, shown.output
    assert "\\x1b[2J.jsonl:1" in shown.output
    write(recipe.parent / "rows.jsonl", {"pro\x1b[2Jmpt": "x", "completion": "y"})
    refused = call("preview", recipe)
    assert refused.exit_code == 2
    assert "\\x1b[2J" in refused.stderr
    assert "\x1b" not in refused.output + shown.output


def test_the_middle_of_a_long_stretch_is_left_out_of_the_picture_and_counted(recipe):
    write(recipe.parent / "rows.jsonl", {"prompt": "ab" * 100 + "MIDDLE" * 80 + "cd" * 100, "completion": "sat"})
    (side,) = seen(recipe, "data.max_tokens=2048", "base.model=" + str(_longer(recipe)))["rows"][0]["sides"]
    text = drawn(recipe, "data.max_tokens=2048", "base.model=" + str(_longer(recipe)))
    assert side["tokens"] > 800
    assert f"[... {len(side['pieces']) - side['trained_tokens'] - 300} tokens ...]" in text
    assert "⟦sat</s>⟧" in text


def _longer(recipe):
    """The model, with more positions."""
    folder = recipe.parent / "longer"
    if not folder.exists():
        shutil.copytree(yaml.safe_load(recipe.read_text())["base"]["model"], folder)
        config = json.loads((folder / "config.json").read_text()) | {"max_position_embeddings": 4096}
        (folder / "config.json").write_text(json.dumps(config))
    return folder


# ---- bad rows ------------------------------------------------------------------------------------------------------

BAD = ['{"prompt": "the"\n', {"promt": "the", "completion": " cat"}, {"prompt": "the", "completion": 4}]
GREEDY = "{% for m in messages %}{% if m.content == 'no' %}{{ raise_exception('not that') }}{% endif %}" + (
    "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def test_all_bad_rows_are_told_at_once_a_line_each(recipe):
    rows = recipe.parent / "rows.jsonl"
    write(rows, *BAD, *GOOD)
    for verb in ("preview", "plan"):
        result = call(verb, recipe)
        assert (result.exit_code, result.stdout.count("Traceback")) == (2, 0)
        first, *others = result.stderr.strip().splitlines()
        assert first.startswith("error: 3 rows cannot be used (data.on_error=skip leaves them out): ")
        assert f": {rows}:1: not JSON: " in first
        assert [line.split(": ")[0] for line in others] == [f"  {rows}:2", f"  {rows}:3"]
    write(rows, BAD[0], *GOOD)
    assert call("preview", recipe).stderr.startswith(f"error: {rows}:1: not JSON")
    write(rows, *BAD * 10, *GOOD)
    assert call("preview", recipe).stderr.splitlines()[20:] == ["  and 10 more"]


def test_bad_rows_of_both_sets_are_told_together(recipe):
    write(recipe.parent / "rows.jsonl", *GOOD, BAD[0])
    held_out = write(recipe.parent / "eval.jsonl", BAD[1], GOOD[0])
    lines = call("preview", recipe, f"data.eval={held_out}").stderr.splitlines()
    assert [line.count(name) for line, name in zip(lines, ["rows.jsonl:13: ", "eval.jsonl:1: "], strict=True)] == [1, 1]


def test_rows_that_a_template_refuses_are_told_or_skipped_like_those_that_cannot_be_read(recipe):
    template = recipe.parent / "greedy.jinja"
    template.write_text(GREEDY)
    turns = [[{"role": "user", "content": asked}, TURNS[1]] for asked in ("the", "no", "cat", "no")]
    write(recipe.parent / "rows.jsonl", *({"messages": each} for each in turns))
    refused = call("preview", recipe, f"data.template={template}").stderr
    assert re.search(r"^error: 2 rows cannot .*rows.jsonl:2: the chat template rejects.*\n  .*rows.jsonl:4: ", refused)
    found = seen(recipe, f"data.template={template}", "data.on_error=skip")
    assert (found["train"]["rows"], found["train"]["faults"]) == (2, 2)


def test_skipped_rows_are_counted_and_named_and_the_run_goes_on_with_the_others(recipe):
    write(recipe.parent / "rows.jsonl", GOOD[0], *BAD, *GOOD[1:])
    found = seen(recipe, "data.on_error=skip")
    assert (found["train"]["rows"], found["train"]["faults"]) == (12, 3)
    (remark,) = found["remarks"]
    assert (remark["kind"], remark["count"]) == ("faults", 3)
    assert [row.split(": ")[0][-2:] for row in remark["rows"]] == [":2", ":3", ":4"]
    shown = call("preview", recipe, "data.on_error=skip").stdout
    assert "12 rows" in shown
    assert "; 3 left out as faulty" in shown
    assert "note: 3 rows left out as unusable (data.on_error=skip): " in shown


def test_nothing_but_bad_rows_is_an_error_even_where_they_are_skipped(recipe):
    write(recipe.parent / "rows.jsonl", *BAD)
    for choice in ("stop", "skip"):
        result = call("preview", recipe, f"data.on_error={choice}")
        assert result.exit_code == 2
        first, *others = result.stderr.strip().splitlines()
        assert "no row is left" in first
        assert "none of the 3 can be used" in first
        assert len(others) == 2


def test_where_all_rows_are_too_long_and_that_is_an_error_their_lengths_are_told(recipe):
    write(recipe.parent / "rows.jsonl", *({"prompt": "the cat " * 90, "completion": "x"} for _ in range(3)))
    for choice in ("stop", "skip"):
        result = call("preview", recipe, "data.over_length=error", f"data.on_error={choice}")
        assert result.exit_code == 2
        first, *others = result.stderr.strip().splitlines()
        assert "no row is left to train on: none of the 3 can be used: " in first
        assert all("tokens, more than data.max_tokens=" in line for line in (first, *others))
        assert len(others) == 2


def test_a_set_of_rows_without_a_trained_token_is_an_error(recipe):
    write(recipe.parent / "rows.jsonl", *({"prompt": "the cat " * 90, "completion": "x"} for _ in range(3)))
    result = call("preview", recipe, "data.over_length=truncate")
    assert result.exit_code == 2
    assert "3 have no trained token" in result.stderr
    write(recipe.parent / "rows.jsonl", {"prompt": "the cat " * 90, "completion": "x"}, *GOOD)
    remarks = {each["kind"]: each for each in seen(recipe, "data.over_length=truncate")["remarks"]}
    assert [row[-2:] for row in remarks["no_trained"]["rows"]] == [":1"]


class Notes(Watch):
    """Keeps what it is told."""

    def __init__(self):
        self.told = []

    def note(self, text):
        self.told.append(text)


def test_a_run_hears_of_what_matters_and_a_preview_of_all(recipe):
    write(recipe.parent / "rows.jsonl", *GOOD, {"prompt": "the", "completion": " cat" * 99}, *GOOD[:1], *GOOD[4:6])
    held_out = write(recipe.parent / "eval.jsonl", *GOOD[2:6])
    overrides = [f"data.eval={held_out}", "data.over_length=truncate"]
    remarks = {each["kind"]: each for each in seen(recipe, *overrides)["remarks"]}
    assert remarks.keys() == {"truncated", "repeated", "leaked"}
    notes = Notes()
    prepare(read_recipe(str(recipe), overrides), notes, weights=False)
    told = [note for note in notes.told if "rows.jsonl" in note]
    assert [note.partition(":")[0] for note in told] == [
        "3 rows identical to an earlier row, 18.8% of all", "6 rows both trained on and held out"
    ]  # fmt: skip
    assert told[1].endswith("; and 3 more")


def test_whoever_waits_for_a_large_set_is_told_how_far_it_is_less_and_less_often(recipe, monkeypatch):
    hours = count(0, 3.0)  # a row takes three seconds
    monkeypatch.setattr(run_rows, "time", SimpleNamespace(monotonic=lambda: next(hours)))
    shown = call("preview", recipe, "data.eval=null")
    assert shown.exit_code == 0, shown.stderr
    told = [line for line in shown.stdout.splitlines() if "encoded ..." in line]
    assert told == [f"data   {done} of 12 rows encoded ..." for done in (2, 4, 7)]


# ---- sources -------------------------------------------------------------------------------------------------------

TABLE = "prompt,completion\n" + "".join(f"the cat {n},sat on {n}\n" for n in range(12))
EXCEL = "\ufeff" + TABLE.replace("\n", "\r\n")


COLUMNS = {"prompt": [f"the cat {n}" for n in range(12)], "completion": [f"sat on {n}" for n in range(12)]}
ROWS_OF_TABLE = [dict(zip(COLUMNS, values, strict=True)) for values in zip(*COLUMNS.values(), strict=True)]
FILES = {
    "rows.jsonl": "".join(json.dumps(row) + "\n" for row in ROWS_OF_TABLE),
    "rows.json": json.dumps(ROWS_OF_TABLE, indent=2),
    "rows.csv": TABLE,
    "excel.csv": EXCEL,
    "odd [1] {a}*.csv": TABLE,
    "blank.csv": "\n" + TABLE.replace("\n", "\n\n"),
    "with spaces/rows.jsonl": "".join(json.dumps(row) + "\n" for row in ROWS_OF_TABLE),
}


@pytest.mark.parametrize("name", [*FILES, "rows.parquet", "odd [1] {a}*.parquet", "folder"])
def test_every_kind_of_source_gives_the_same_rows(recipe, name):
    path = recipe.parent / "source" / name
    path.parent.mkdir(parents=True)
    if name.endswith(".parquet"):
        parquet.write_table(pyarrow.Table.from_pydict(COLUMNS), path)
    elif name == "folder":
        path.mkdir()
        for part in range(2):
            write(path / f"{part}.jsonl", *ROWS_OF_TABLE[6 * part : 6 * part + 6])
    else:
        path.write_text(FILES[name], newline="")
    found = seen(recipe, f"data.train={json.dumps(str(path))}", "--rows", 12)
    wanted = seen(recipe, f"data.train={json.dumps(str(write(recipe.parent / 'plain.jsonl', *ROWS_OF_TABLE)))}",
                  "--rows", 12)  # fmt: skip
    assert wanted["train"]["rows"] == 12
    assert [row["sides"] for row in found["rows"]] == [row["sides"] for row in wanted["rows"]]


@pytest.mark.parametrize(
    ("name", "text", "fault"),
    [
        ("a.jsonl", "", "is empty"),
        ("a.jsonl", "null\n", r":1: found null, wanted an object"),
        ("a.jsonl", '{"prompt": NaN, "completion": "x"}\n', r":1: prompt is a number \(nan\), wanted text"),
        ("a.jsonl", '{"a": {"b": 1}}\n', ":1: missing"),
        ("a.json", "[]", "is empty"),
        ("a.json", '"rows"', ":1: found text"),
        ("a.json", "[1, 2]", r"none of the 2 can .*a.json row 1: found a number"),
        ("a.json", '{\n "version": 1,\n "data": []\n}', r"a.json row 1: missing .*found columns: version, data"),
        ("a.json", '{\n "version": 1,\n}', r"a.json:3: not JSON"),
        (
            "a.csv",
            "prompt|completion\nthe|cat\n",
            ":2: missing .*found columns: prompt.completion; .* separated by '.': save",
        ),
        ("a.csv", "prompt,prompt\nthe,cat\n", ":1: the column 'prompt' appears twice"),
        ("a.csv", 'prompt,completion\n"the,cat\n', ":2: not CSV: unexpected end"),
        ("a.txt", " \n", "is empty"),
        ("a.pdf", "x", "files that can be read end in"),
        ("a.parquet", "x", "not readable Parquet, after row 0"),
    ],
)
def test_hostile_sources_are_told_in_a_line(recipe, name, text, fault):
    path = recipe.parent / name
    path.write_text(text, newline="")
    result = call("preview", recipe, f"data.train={path}")
    assert result.exit_code == 2, result.output + str(result.exception)
    assert re.search(fault, result.stderr.splitlines()[0]), result.stderr
    assert result.stderr.startswith("error: ")


def table(path, **columns):
    parquet.write_table(pyarrow.table(columns), path)
    return path


def refusal(recipe, path, *overrides):
    result = call("preview", recipe, f"data.train={path}", *overrides)
    assert result.exit_code == 2, result.output
    return result.stderr


def test_a_parquet_table_of_other_kinds_is_told_row_by_row_and_an_empty_one_by_name(recipe):
    empty = table(recipe.parent / "empty.parquet", text=pyarrow.array([], pyarrow.string()))
    assert "empty.parquet is empty" in refusal(recipe, empty)
    turns = [{"role": "user", "content": "the", "name": None}, {"role": "assistant", "content": "cat", "name": "x"}]
    nested = table(recipe.parent / "nested.parquet", messages=pyarrow.array([turns, None, turns]))
    assert "nested.parquet row 2: column 'messages' is null" in refusal(recipe, nested)
    found = seen(recipe, f"data.train={nested}", "data.on_error=skip")
    assert (found["train"]["rows"], found["train"]["faults"]) == (2, 1)


def test_a_file_that_breaks_off_is_never_skipped(recipe):
    """How many rows are lost in it is not known, so they could not be counted."""
    times = pyarrow.array([0, 2**60], pyarrow.timestamp("us"))
    files = {
        "late.parquet": table(recipe.parent / "late.parquet", text=pyarrow.array(["the", "cat"]), time=times),
        "cut.csv": write(recipe.parent / "cut.csv", 'text\nthe\n"cat\n'),
        "cut.json": write(recipe.parent / "cut.json", '[{"text": "the"},\n {"text": '),
    }
    good = write(recipe.parent / "good.jsonl", {"text": "the"}, "nonsense\n", {"text": "cat"})
    assert seen(recipe, f"data.train={good}", "data.on_error=skip")["train"]["rows"] == 2
    for name, path in files.items():
        error = refusal(recipe, json.dumps([str(good), str(path)]), "data.on_error=skip")
        assert name in error
        assert "on_error" not in error
    cut = recipe.parent / "cut.parquet"
    cut.write_bytes(files["late.parquet"].read_bytes()[:-40])
    assert "cut.parquet: not readable Parquet, after row 0" in refusal(recipe, cut)


def test_a_data_set_saved_to_disk_is_told_what_to_do(recipe):
    folder = recipe.parent / "saved"
    folder.mkdir()
    (folder / "data-00000-of-00001.arrow").write_bytes(b"ARROW1")
    (folder / "state.json").write_text("{}")
    assert "holds .arrow files, which are not supported" in refusal(recipe, folder)


def test_a_table_of_long_cells_is_read_and_a_row_stands_where_it_begins(recipe):
    path = recipe.parent / "long.csv"
    path.write_text('text\n"' + "the cat " * 40_000 + '"\n"one\ntwo"\nlast\n')
    rows = load_rows(path)
    assert len(rows[0].text) > 131_072, "the csv module's own limit"
    assert [row.where.rpartition(":")[2] for row in rows] == ["2", "3", "5"]


def test_a_wide_row_is_told_in_few_words(recipe):
    write(recipe.parent / "rows.jsonl", {f"column {n}": n for n in range(500)})
    error = call("preview", recipe).stderr
    assert "found columns: column 0, column 1, column 2, column 3, column 4 and 495 more" in error


def test_a_preview_says_how_each_source_is_read_and_which_columns_are_not(recipe):
    rows = [{**row, "id": n, "note": None} for n, row in enumerate(GOOD)]
    write(recipe.parent / "rows.jsonl", {"prompt": 5}, *rows)
    found = seen(recipe, "data.on_error=skip")
    read_as = {"format": "completion", "columns": ["prompt", "completion"], "unread": ["id"]}
    assert found["read_as"] == {str(recipe.parent / "rows.jsonl"): read_as}
    assert (
        "format    completion (prompt, completion); not read: id\n"
        in call("preview", recipe, "data.on_error=skip").stdout
    )
    other = write(
        recipe.parent / "other.jsonl", *({"asked": {"for": row["prompt"]}, **row, "prompt": 5} for row in GOOD)
    )
    sources = [str(recipe.parent / "rows.jsonl"), {"path": str(other), "columns": {"prompt": "asked.for"}}]
    found = seen(recipe, "data.on_error=skip", f"data.train={json.dumps(sources)}")
    assert found["read_as"][str(other)] == {
        "format": "completion", "columns": ["asked", "completion"], "unread": ["prompt"]
    }  # fmt: skip


def test_columns_can_be_mapped_and_a_map_that_does_not_fit_names_the_nearest(recipe):
    write(recipe.parent / "rows.jsonl", *({"question": row["prompt"], "answer": row["completion"]} for row in GOOD))
    found = seen(recipe, "data.columns={prompt: question, completion: answer}")
    assert found["train"]["rows"] == 12
    result = call("preview", recipe, "data.columns={prompt: question, completion: anwser}")
    assert "column 'anwser' (data.columns maps it to completion) is missing (did you mean 'answer'?)" in result.stderr
    swapped = seen(recipe, "data.columns={prompt: answer, completion: question}", "--rows", 1)
    said = [piece["text"] for piece in swapped["rows"][0]["sides"][0]["pieces"] if piece["trained"]]
    assert "".join(said) == "the cat 0 </s>"
