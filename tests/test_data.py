"""Data: what is trained on is what was meant, and no row is lost without a word.

The chat templates below are written for these tests, in the style of well-known families; the tokenizers are trained
here on a few sentences.
"""

import json
import random
import re
from collections import Counter
from functools import cache

import hypothesis
import pyarrow
import pytest
import torch
from hypothesis import strategies as st
from pyarrow import parquet
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from qlora_kit.data import (
    Chat,
    Classes,
    Classified,
    Completion,
    Deck,
    EncodedSet,
    Faults,
    Labelled,
    Preference,
    Sampler,
    Text,
    collate,
    encode,
    encode_rows,
    encode_turns,
    find_template,
    held_out,
    load_rows,
    read_row,
    split_eval,
)
from qlora_kit.errors import DataError
from qlora_kit.run.score import reference

# ---- tokenizers and templates --------------------------------------------------------------------------------------

END = {"llama3": "<|eot_id|>", "chatml": "<|im_end|>", "mistral": "</s>", "gemma": "<end_of_turn>"}
MARKERS = ["<s>", "</s>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|im_start|>", "<|im_end|>",
           "[INST]", "[/INST]", "<start_of_turn>", "<end_of_turn>"]  # fmt: skip

OPEN, CLOSE = "{% generation %}", "{% endgeneration %}"
MARKED = {
    "llama3": "{{ bos_token }}{% for m in messages %}"
    "{% set said = m.content | trim + '<|eot_id|>' %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' }}"
    "{% if m.role == 'assistant' %}" + OPEN + "{{ said }}" + CLOSE + "{% else %}{{ said }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}",
    "chatml": "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}"
    + OPEN + "{{ m.content + '<|im_end|>' }}" + CLOSE + "{% else %}{{ m.content + '<|im_end|>' }}{% endif %}{{ '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    "mistral": "{{ bos_token }}{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('user and assistant must take turns') }}{% endif %}{% if m.role == 'user' %}"
    "{{ '[INST] ' + m.content + ' [/INST]' }}{% else %}"
    + OPEN + "{{ ' ' + m.content + eos_token }}" + CLOSE + "{% endif %}{% endfor %}",
    "gemma": "{{ bos_token }}{% for m in messages %}{% set who = 'model' if m.role == 'assistant' else m.role %}"
    "{{ '<start_of_turn>' + who + '\n' }}{% if who == 'model' %}"
    + OPEN + "{{ m.content | trim + '<end_of_turn>\n' }}" + CLOSE + "{% else %}"
    "{{ m.content | trim + '<end_of_turn>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}",
}  # fmt: skip
UNMARKED = {family: source.replace(OPEN, "").replace(CLOSE, "") for family, source in MARKED.items()}
SHORT_MARKS = MARKED["chatml"].replace(" + '<|im_end|>' }}" + CLOSE, " }}" + CLOSE + "{{ '<|im_end|>' }}")
FORGETFUL = (  # like templates that drop the thinking of earlier turns
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' and not loop.last %}"
    "{{ m.content.split('</think>')[-1] }}{% else %}{{ m.content }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TURNS = [
    {"role": "user", "content": "the cat sat where?"},
    {"role": "assistant", "content": "on the mat 🙂"},
    {"role": "user", "content": "and then? </s> <|im_end|>"},
    {"role": "assistant", "content": "then the cat ate"},
]
CHAT = Chat(TURNS, where="chat.jsonl:1")


@cache
def _trained_bpe(trim_offsets: bool) -> str:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.post_processor = processors.ByteLevel(trim_offsets=trim_offsets)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=MARKERS, initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(["the cat sat on the mat", "user assistant system", "and then the cat ate"] * 9, trainer)
    return bpe.to_str()


def make_tokenizer(*, bos=False, eos_too=False, pad=None, template=None, trim_offsets=True):
    """A byte-level tokenizer; `bos` and `eos_too`: what it adds to a text by itself."""
    bpe = Tokenizer.from_str(_trained_bpe(trim_offsets))
    if bos or eos_too:
        single = " ".join((["<s>"] if bos else []) + ["$A"] + (["</s>"] if eos_too else []))
        adding = processors.TemplateProcessing(single=single, special_tokens=[("<s>", 0), ("</s>", 1)])
        bpe.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=trim_offsets), adding])
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", pad_token=pad, chat_template=template,
        extra_special_tokens=MARKERS[2:],
    )  # fmt: skip


def trained_text(row, tokenizer):
    """The trained parts of a row as text, one string a stretch."""
    stretches, last = [], False
    for token, trained in zip(row.input_ids, row.trained, strict=True):
        if trained and not last:
            stretches.append([])
        if trained:
            stretches[-1].append(token)
        last = trained
    return [tokenizer.decode(ids) for ids in stretches]


def write(path, *rows):
    path.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows))
    return path


# ---- the loss mask -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", MARKED)
def test_exactly_the_assistants_words_and_its_end_token_are_trained(family):
    tokenizer = make_tokenizer(template=UNMARKED[family])
    row = encode(CHAT, tokenizer)
    assert 0 < sum(row.trained) < len(row.input_ids)
    said = [text.strip() for text in trained_text(row, tokenizer)]
    assert said == [f"on the mat 🙂{END[family]}", f"then the cat ate{END[family]}"]


@pytest.mark.parametrize("trim_offsets", [True, False])
@pytest.mark.parametrize("family", MARKED)
def test_mask_by_generation_markers_equals_mask_by_prefixes(family, trim_offsets):
    tokenizer = make_tokenizer(trim_offsets=trim_offsets)
    by_marks = encode(CHAT, tokenizer, template=MARKED[family])
    by_prefixes = encode(CHAT, tokenizer, template=UNMARKED[family])
    assert any(by_marks.trained)
    assert not all(by_marks.trained)
    assert by_marks == by_prefixes


def test_mask_by_markers_agrees_with_transformers_and_holds_where_transformers_loses_turns():
    """Their mask asks which token a character is in; a space that was trimmed off a token's offsets is in none."""
    tokenizer = make_tokenizer(template=MARKED["chatml"])

    def theirs(messages):
        out = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
        return [bool(one) for one in out["assistant_masks"]]

    assert any(theirs(TURNS))
    assert encode(CHAT, tokenizer).trained == theirs(TURNS)
    led = [TURNS[0], {"role": "assistant", "content": " on the mat"}, *TURNS[2:]]
    assert not any(theirs(led))
    said = trained_text(encode(Chat(led), tokenizer), tokenizer)
    assert said == [" on the mat<|im_end|>", "then the cat ate<|im_end|>"]

    tokenizer.chat_template = SHORT_MARKS
    trailed = [TURNS[0], {"role": "assistant", "content": "on the mat "}, *TURNS[2:]]
    asked = tokenizer.apply_chat_template(trailed, tokenize=False).index("and then?")
    assert theirs(trailed)[tokenizer(tokenizer.apply_chat_template(trailed, tokenize=False)).char_to_token(asked)]
    said = trained_text(encode(Chat(trailed), tokenizer), tokenizer)
    assert said == ["on the mat <|im_end|>", "then the cat ate<|im_end|>"]


def test_marks_that_stop_short_of_the_end_token_still_train_it():
    tokenizer = make_tokenizer()
    short, full = (encode(CHAT, tokenizer, template=source) for source in (SHORT_MARKS, MARKED["chatml"]))
    assert "<|im_end|>' }}" + CLOSE not in SHORT_MARKS
    assert short == full


CLOSED = (  # in words behind the end token
    "{% for m in messages %}<{{ m.role }}>\n{% if m.role == 'assistant' %}" + OPEN
    + "{{ m.content + eos_token }}" + CLOSE + "{% else %}{{ m.content }}{% endif %}</{{ m.role }}>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>\n{% endif %}"
)  # fmt: skip


@pytest.mark.parametrize("content", ["the cat", "a </s></assistant>\n", "</s>"])
@pytest.mark.parametrize("ending", ["", "<|im_start|>"])
def test_words_that_a_template_writes_behind_the_end_token_are_neither_learnt_nor_asked_for(content, ending):
    tokenizer, chat = make_tokenizer(), Chat([TURNS[0], {"role": "assistant", "content": content}, *TURNS])
    closed = CLOSED.replace("</{{ m.role }}>", "</{{ m.role }}>" + ending)
    bare = closed.replace(OPEN, "").replace(CLOSE, "")
    marked, plain = (encode(chat, tokenizer, template=source) for source in (closed, bare))
    assert marked == plain
    assert (plain.odd, marked.odd) == ((), ())
    assert f"</s></assistant>{ending}\n" in tokenizer.decode(plain.input_ids), "they are there"
    assert trained_text(plain, tokenizer) == [content + "</s>", "on the mat 🙂</s>", "then the cat ate</s>"]
    assert reference(tokenizer, plain) == "then the cat ate"
    tokenizer.chat_template = closed
    learnt = encode(chat, tokenizer, loss_on="all")
    assert all(learnt.trained[1:])
    assert reference(tokenizer, learnt) == "then the cat ate"


def test_marks_around_all_that_is_written_reach_to_the_end_token_and_not_into_the_next_turn():
    tokenizer = make_tokenizer()
    wide = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}" + OPEN
        + "{{ m.content + eos_token }}</assistant>\n" + CLOSE + "{% else %}{{ m.content }}</{{ m.role }}>\n{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )  # fmt: skip
    row = encode(CHAT, tokenizer, template=wide)
    assert "</s></assistant>\n<|im_start|>user" in tokenizer.decode(row.input_ids)
    assert trained_text(row, tokenizer) == ["on the mat 🙂</s>", "then the cat ate</s>"]
    assert row.odd == ()


@pytest.mark.parametrize("family", MARKED)
def test_training_text_equals_what_inference_renders(family):
    tokenizer = make_tokenizer(template=UNMARKED[family])
    row = encode(CHAT, tokenizer, loss_on="last")
    prompt = tokenizer.apply_chat_template(TURNS[:-1], add_generation_prompt=True, return_dict=True)["input_ids"]
    assert row.prompt == prompt
    assert row.input_ids[: len(prompt)] == prompt
    assert not any(row.trained[: len(prompt)])
    # What inference would have to generate, token by token, to say this answer and stop.
    answer = row.input_ids[len(prompt) : len(row.trained) - row.trained[::-1].index(True)]
    assert all(row.trained[len(prompt) : len(prompt) + len(answer)])
    assert tokenizer.decode(answer).strip() == row.answer + END[family]
    assert sum(row.trained) == len(answer)


def test_mask_does_not_depend_on_whether_a_tokenizer_trims_offsets():
    """A header that ends in a space before an answer that begins with one: the header's is not the answer's."""
    source = UNMARKED["chatml"].replace("m.role + '\n'", "m.role + ': '").replace("assistant\n'", "assistant: '")
    chat = Chat([TURNS[0], {"role": "assistant", "content": " on the mat "}])
    trimmed, whole = (make_tokenizer(template=source, trim_offsets=trims) for trims in (True, False))
    text = trimmed.apply_chat_template(chat.messages, tokenize=False)
    offsets = [tokenizer(text, return_offsets_mapping=True)["offset_mapping"] for tokenizer in (trimmed, whole)]
    assert offsets[0] != offsets[1]
    assert encode(chat, trimmed) == encode(chat, whole)
    assert trained_text(encode(chat, trimmed), trimmed) == [" on the mat <|im_end|>"]


def test_marks_in_pieces_and_marks_that_begin_later_than_the_turn_are_believed():
    tokenizer = make_tokenizer()
    pieces = MARKED["chatml"].replace(" + '<|im_end|>' }}" + CLOSE, " }}" + CLOSE + OPEN + "<|im_end|>" + CLOSE)
    later = MARKED["chatml"].replace(OPEN, "{{ 'Well.\\n' }}" + OPEN)
    assert pieces.count(OPEN) == 2
    assert "Well.\non the mat" in tokenizer.apply_chat_template(TURNS, chat_template=later, tokenize=False)
    for source in (pieces, later):
        row = encode(CHAT, tokenizer, template=source)
        said = trained_text(row, tokenizer)
        assert (said, row.odd) == (["on the mat 🙂<|im_end|>", "then the cat ate<|im_end|>"], ())
    bare = later.replace(OPEN, "").replace(CLOSE, "")
    assert trained_text(encode(CHAT, tokenizer, template=bare), tokenizer)[1] == "Well.\nthen the cat ate<|im_end|>"


HEADER = "{{ '<|im_start|>' + m.role + '\n' }}"
LAST_MARKED = MARKED["chatml"].replace("m.role == 'assistant' %}", "m.role == 'assistant' and loop.last %}")
ASTRAY = {
    "around the user's turns": MARKED["chatml"].replace("m.role == 'assistant'", "m.role == 'user'"),
    "with the header, as SmolLM3's": MARKED["chatml"].replace(HEADER + "{% if m.role == 'assistant' %}" + OPEN,
        "{% if m.role == 'assistant' %}" + OPEN + HEADER).replace("{% else %}", "{% else %}" + HEADER),
    "with the header's line break, as TRL's for Qwen2.5": MARKED["chatml"].replace("m.role + '\n' }}", "m.role }}")
        .replace(OPEN, OPEN + "{{ '\n' }}").replace("{% else %}", "{% else %}{{ '\n' }}"),
    "beyond the end token, as TRL's for Phi-3": MARKED["chatml"].replace("{% endfor %}",
        "{% endfor %}{% if not add_generation_prompt %}" + OPEN + "{{ eos_token }}" + CLOSE + "{% endif %}"),
    "around the last turn alone": LAST_MARKED,
}  # fmt: skip


@pytest.mark.parametrize("marks", ASTRAY)
def test_marks_that_reach_out_of_the_turns_or_leave_one_out_give_way_to_prefixes(marks):
    tokenizer, source = make_tokenizer(), ASTRAY[marks]
    bare = source.replace(OPEN, "").replace(CLOSE, "")
    row, unmarked = (encode(CHAT, tokenizer, template=each) for each in (source, bare))
    theirs = tokenizer.apply_chat_template(
        TURNS, chat_template=source, return_dict=True, return_assistant_tokens_mask=True
    )["assistant_masks"]
    assert any(theirs)
    assert [bool(one) for one in theirs] != unmarked.trained, "whoever believes these marks trains something else"
    assert (row, row.odd) == (unmarked, ("marks",))
    assert trained_text(row, tokenizer) == ["on the mat 🙂<|im_end|>", "then the cat ate<|im_end|>"]


def test_marks_of_turns_that_are_not_trained_are_not_asked_for():
    tokenizer = make_tokenizer()
    odd = [encode(CHAT, tokenizer, template=LAST_MARKED, loss_on=choice).odd for choice in ("assistant", "last")]
    assert odd == [("marks",), ()]
    last, unmarked = (
        encode(CHAT, tokenizer, template=source, loss_on="last") for source in (LAST_MARKED, UNMARKED["chatml"])
    )
    assert last == unmarked


@pytest.mark.parametrize(("asked", "said"), [("the", "\ue001 cat"), ("\ue000 the \ue001", "\ue001 cat \ue000")])
def test_text_that_holds_the_private_characters_is_masked_all_the_same(asked, said):
    chat = Chat([{"role": "user", "content": asked}, {"role": "assistant", "content": said}])
    tokenizer = make_tokenizer()
    assert trained_text(encode(chat, tokenizer, template=MARKED["chatml"]), tokenizer) == [f"{said}<|im_end|>"]


def test_a_chat_that_ends_with_the_users_turn_has_no_answer_to_compare_with():
    row = encode(Chat(TURNS[:3]), make_tokenizer(template=MARKED["chatml"]))
    assert row.trained_tokens > 0
    assert (row.prompt, row.answer) == (None, None)


def test_a_tool_call_is_no_answer_to_compare_with():
    call = {"role": "assistant", "content": "hm", "tool_calls": [{"function": {"name": "clock"}}]}
    tokenizer = make_tokenizer(template=UNMARKED["chatml"].replace("{{ m.content", "{{ m.tool_calls }}{{ m.content"))
    assert encode(Chat(TURNS[:2]), tokenizer).answer == "on the mat 🙂"
    row = encode(Chat([TURNS[0], call]), tokenizer)
    assert (row.prompt, row.answer) == (None, None)


def test_a_quoted_end_token_is_not_trained_and_masks_nothing():
    """Masks go by position: the user's text holds the very tokens that end a turn."""
    tokenizer = make_tokenizer(template=UNMARKED["chatml"])
    row = encode(CHAT, tokenizer)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert row.input_ids.count(end) == 5
    assert [trained for token, trained in zip(row.input_ids, row.trained, strict=True) if token == end] == [
        False, True, False, False, True,
    ]  # fmt: skip


def test_loss_on_last_trains_the_last_answer_alone_and_all_trains_all_but_bos():
    tokenizer = make_tokenizer(template=UNMARKED["llama3"])
    last, every = (encode(CHAT, tokenizer, loss_on=choice) for choice in ("last", "all"))
    assert trained_text(last, tokenizer) == ["then the cat ate<|eot_id|>"]
    assert last == encode(CHAT, tokenizer, loss_on="completion")
    assert every.trained == [False] + [True] * (len(every.input_ids) - 1)


def test_chat_of_a_forgetful_template_is_one_row_an_answer_as_inference_has_it():
    tokenizer = make_tokenizer(template=FORGETFUL)
    thought = {"role": "assistant", "content": "<think>hm</think>on the mat"}
    chat = Chat([TURNS[0], thought, *TURNS[2:]])
    assert len(encode_turns(CHAT, tokenizer)) == 1
    rows = encode_turns(chat, tokenizer)
    said = [trained_text(row, tokenizer) for row in rows]
    assert said == [["<think>hm</think>on the mat<|im_end|>"], ["then the cat ate<|im_end|>"]]
    assert "hm" not in tokenizer.decode(rows[1].input_ids)
    for row, i in zip(rows, (1, 3), strict=True):
        prompt = tokenizer.apply_chat_template(chat.messages[:i], add_generation_prompt=True, return_dict=True)
        assert row.prompt == row.input_ids[: len(row.prompt)] == prompt["input_ids"]
    assert trained_text(encode(chat, tokenizer, loss_on="last"), tokenizer) == said[1]
    with pytest.raises(DataError, match=r"makes 2 rows where one is wanted: set data\.loss_on=last"):
        encode(chat, tokenizer)
    kept = encode_rows([chat, CHAT], tokenizer, max_tokens=256)
    assert (kept.counts.rows, kept.counts.turns, len(kept.rows)) == (3, 1, 3)


def test_answer_that_opens_a_chat_needs_markers():
    greeting = Chat([{"role": "assistant", "content": "then"}, *TURNS[:2]])
    tokenizer = make_tokenizer()
    said = trained_text(encode(greeting, tokenizer, template=MARKED["chatml"]), tokenizer)
    assert said == ["then<|im_end|>", "on the mat 🙂<|im_end|>"]
    astray = ASTRAY["around the user's turns"]
    for chat, source in [(greeting, UNMARKED["chatml"]), (greeting, astray), (Chat(greeting.messages[:2]), astray)]:
        with pytest.raises(DataError, match="opens with an assistant turn"):
            encode(chat, tokenizer, template=source)


def test_refusal_by_a_template_is_an_error_of_the_row():
    tokenizer = make_tokenizer(template=UNMARKED["mistral"])
    with pytest.raises(DataError, match=r"^chat.jsonl:9: .*user and assistant must take turns"):
        encode_rows([Chat([TURNS[0], *TURNS], where="chat.jsonl:9")], tokenizer)


@pytest.mark.parametrize("trim_offsets", [True, False])
@pytest.mark.parametrize("name", ["chatml", "plain"])
def test_shipped_templates_train_answers_with_their_ends(name, trim_offsets):
    tokenizer = make_tokenizer(bos=True, trim_offsets=trim_offsets)
    source = find_template(name)
    chat = Chat([{"role": "system", "content": "be a cat"}, *TURNS])
    row = encode(chat, tokenizer, template=source)
    end = {"chatml": "<|im_end|>", "plain": "</s>"}[name]
    assert [text.strip() for text in trained_text(row, tokenizer)] == [f"on the mat 🙂{end}", f"then the cat ate{end}"]
    assert row.input_ids.count(tokenizer.bos_token_id) == 1
    bare = re.sub(r"\{%-? (end)?generation -?%\}", "", source)
    assert bare != source
    assert row.trained == encode(chat, tokenizer, template=bare).trained


@pytest.mark.parametrize("name", ["chatml", "plain"])
def test_shipped_templates_write_tools_and_train_calls(name, tmp_path):
    clock = {"name": "clock", "description": "<time> & more"}
    calls = [
        {"type": "function", "function": {"name": "clock", "arguments": json.dumps({"city": each})}} for each in "ab"
    ]
    turns = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "noon?"},
             {"role": "assistant", "content": None, "tool_calls": calls}, {"role": "tool", "content": "12"},
             {"role": "assistant", "content": "so it is", "tool_calls": calls[:1]}]  # fmt: skip
    rows = {"messages": turns, "tools": [{"type": "function", "function": clock}]}
    (chat,) = load_rows(write(tmp_path / "a.jsonl", rows))
    tokenizer = make_tokenizer(bos=True)
    row = encode(chat, tokenizer, template=find_template(name))
    call = 'Call: {"name": "clock", "arguments": {"city": "%s"}}'
    end = {"chatml": "<|im_end|>", "plain": "</s>"}[name]
    wanted = [f"{call % 'a'}\n{call % 'b'}{end}", f"so it is\n{call % 'a'}{end}"]
    assert [text.strip() for text in trained_text(row, tokenizer)] == wanted
    said = tokenizer.decode(row.input_ids)
    assert f"Tools:\n{json.dumps(clock)}" in said
    assert all(each in said for each in ("be brief", "noon?", "12"))
    assert said.index("Tools:") < said.index("be brief") < said.index("noon?") < said.index("Call: ")


def test_chat_without_template_says_what_to_set():
    with pytest.raises(DataError, match=r"no chat template: set data\.template="):
        encode(CHAT, make_tokenizer())
    with pytest.raises(DataError, match=r"data\.template=chatm is neither .*did you mean chatml"):
        find_template("chatm")
    assert find_template("auto") is None


# ---- completions, texts, first and last tokens ---------------------------------------------------------------------


@pytest.mark.parametrize("pad", [None, "</s>", "[INST]"])
def test_end_token_is_trained_even_when_pad_is_eos(pad):
    tokenizer = make_tokenizer(pad=pad, template=UNMARKED["mistral"])
    pad_id = tokenizer.eos_token_id if pad is None else tokenizer.pad_token_id
    rows = [encode(row, tokenizer) for row in (Completion("the", " cat"), Text("the mat"), CHAT)]
    batch = collate(rows, pad_id=pad_id)
    assert min(batch.lengths) < max(batch.lengths)
    for b, length in enumerate(batch.lengths):
        assert batch.labels[b, length - 1] == tokenizer.eos_token_id
        assert (batch.labels[b, length:] == -100).all()


@pytest.mark.parametrize("habit", [{"bos": True}, {"bos": True, "eos_too": True}, {"eos_too": True}, {}])
def test_exactly_one_bos_and_one_eos(habit):
    """One BOS where the tokenizer adds one by itself, or the template writes one; none otherwise; never two."""
    tokenizer = make_tokenizer(template=UNMARKED["llama3"], **habit)
    own = tokenizer("the").input_ids
    assert (own[0] == tokenizer.bos_token_id) == habit.get("bos", False)
    assert (own[-1] == tokenizer.eos_token_id) == habit.get("eos_too", False)
    for row in (Completion("the", " cat"), Completion("<s>the", " cat</s>"), Text("the mat"), Text("<s>the mat</s>")):
        ids = encode(row, tokenizer).input_ids
        written = "<s>" in str(row)
        assert ids.count(tokenizer.bos_token_id) == int(written or habit.get("bos", False))
        assert ids.count(tokenizer.eos_token_id) == 1
        assert ids[-1] == tokenizer.eos_token_id
    assert encode(CHAT, tokenizer).input_ids.count(tokenizer.bos_token_id) == 1


def test_completion_trains_the_completion_behind_the_prompt_of_inference():
    tokenizer = make_tokenizer(bos=True)
    straddling = Completion("the ca", "t sat")
    assert tokenizer("the cat sat").input_ids[:3] != tokenizer("the ca").input_ids[:3]
    for row in (Completion("the cat", " sat on 🙂"), straddling):
        encoded = encode(row, tokenizer)
        prompt = tokenizer(row.prompt).input_ids
        assert encoded.prompt == encoded.input_ids[: len(prompt)] == prompt
        assert tokenizer.decode(encoded.input_ids) == f"<s>{row.prompt}{row.completion}</s>"
        assert trained_text(encoded, tokenizer) == [f"{row.completion}</s>"]
        assert encoded.answer == row.completion
        assert encode(row, tokenizer, loss_on="all").trained == [False] + [True] * (len(encoded.input_ids) - 1)


def test_completion_that_goes_on_within_a_word_gains_no_space():
    """SentencePiece vocabularies put a space before every text, and so before a completion that stands alone."""
    pieces = Tokenizer(models.BPE(unk_token="<unk>"))
    pieces.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    pieces.decoder = decoders.Metaspace(prepend_scheme="always")
    trainer = trainers.BpeTrainer(vocab_size=60, special_tokens=["<unk>", "</s>"], show_progress=False)
    pieces.train_from_iterator(["the cat sat on the mat\n"] * 9, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=pieces, unk_token="<unk>", eos_token="</s>")
    apart = tokenizer("the ca").input_ids + tokenizer("t sat").input_ids
    assert tokenizer.decode(apart) == "the ca t sat"
    row = encode(Completion("the ca", "t sat"), tokenizer)
    assert row.prompt == row.input_ids[: len(row.prompt)] == tokenizer("the ca").input_ids
    assert tokenizer.decode(row.input_ids) == "the cat sat</s>"


def test_tokenizer_without_end_token_is_refused():
    tokenizer = make_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(DataError, match="no end token"):
        encode(Text("the mat"), tokenizer)


# ---- whole data sets -----------------------------------------------------------------------------------------------

LONG = Completion("the cat", " sat on the mat" * 20, where="long.jsonl:2")
SHORT = Completion("the cat", " sat", where="long.jsonl:1")


def test_long_rows_are_dropped_or_cut_and_counted():
    tokenizer = make_tokenizer()
    whole = encode(LONG, tokenizer)
    assert len(whole.input_ids) > 64
    dropped = encode_rows([SHORT, LONG], tokenizer, max_tokens=16)
    assert (dropped.counts.rows, dropped.counts.dropped, len(dropped.rows)) == (1, 1, 1)
    assert dropped.counts.longest == len(whole.input_ids)
    cut = encode_rows([SHORT, LONG], tokenizer, max_tokens=16, over_length="truncate")
    assert (cut.counts.rows, cut.counts.truncated, cut.counts.dropped) == (2, 1, 0)
    assert cut.rows[1].input_ids == whole.input_ids[:16]
    assert (cut.rows[1].prompt, cut.rows[1].answer) == (None, None)
    assert cut.counts.tokens == len(cut.rows[0].input_ids) + 16
    with pytest.raises(DataError, match=r"^long.jsonl:2: \d+ tokens, more than data.max_tokens=16"):
        encode_rows([SHORT, LONG], tokenizer, max_tokens=16, over_length="error")


def test_a_run_on_the_smaller_half_of_its_rows_is_refused_and_a_preview_of_it_is_not():
    tokenizer = make_tokenizer()
    half, most = (encode_rows([*[SHORT] * 2, *[LONG] * long], tokenizer, max_tokens=16) for long in (2, 3))
    half.check_most_fit(16)
    with pytest.raises(DataError, match=r"^3 of 5 rows have more than data.max_tokens=16 tokens and would be left out"):
        most.check_most_fit(16)
    cut = encode_rows([SHORT, *[LONG] * 3], tokenizer, max_tokens=16, over_length="truncate")
    cut.check_most_fit(16)


def test_split_rows_predict_every_token_exactly_once():
    tokenizer = make_tokenizer()
    whole = encode(LONG, tokenizer)
    for max_tokens in (2, 7, len(whole.input_ids) - 1):
        pieces = encode_rows([LONG], tokenizer, max_tokens=max_tokens, over_length="split", loss_on="all")
        assert (pieces.counts.split, pieces.counts.no_trained) == (1, 0)
        assert max(len(piece.input_ids) for piece in pieces.rows) == max_tokens
        predicted = [token for piece in pieces.rows for token in piece.input_ids[1:]]
        assert predicted == whole.input_ids[1:]
        assert pieces.counts.trained_tokens == len(predicted)


def test_rows_that_train_nothing_are_counted_and_a_set_of_them_is_refused():
    tokenizer = make_tokenizer()
    all_prompt = Completion("the cat sat on the mat " * 9, " sat")
    kept = encode_rows([all_prompt, SHORT], tokenizer, max_tokens=16, over_length="truncate")
    assert (kept.counts.rows, kept.counts.no_trained, kept.counts.truncated) == (1, 1, 1)
    with pytest.raises(DataError, match=r"no row is left to train on: of 2, .* 2 have no trained token"):
        encode_rows([all_prompt] * 2, tokenizer, max_tokens=16, over_length="truncate")
    with pytest.raises(DataError, match=r"of 1, 1 have more than data.max_tokens=4 tokens"):
        encode_rows([LONG], tokenizer, max_tokens=4)


def test_a_pair_whose_answers_differ_only_where_they_are_cut_is_counted_and_left_out():
    tokenizer = make_tokenizer()
    long = Preference(
        Completion("the", " cat sat on the mat, and then"), Completion("the", " cat sat on the mat, and ate")
    )
    (whole,) = encode_rows([long], tokenizer, max_tokens=64).rows
    kept = min(n for n in range(64) if whole.input_ids[:n] != whole.other.input_ids[:n])
    short = Preference(Completion("the", " cat"), Completion("the", " mat"))
    for max_tokens, counts in ((kept, (2, 0)), (kept - 1, (1, 1))):
        rows = encode_rows([long, short], tokenizer, max_tokens=max_tokens, over_length="truncate")
        assert (rows.counts.rows, rows.counts.no_trained) == counts
        assert rows.counts.truncated == 1
    with pytest.raises(DataError, match=r"1 have no trained token \(see data.loss_on\) or have two identical answers"):
        encode_rows([long], tokenizer, max_tokens=kept - 1, over_length="truncate")


def test_tokens_and_lengths_that_the_model_has_not_are_refused():
    tokenizer = make_tokenizer()
    highest = max(encode(SHORT, tokenizer).input_ids)
    assert encode_rows([SHORT], tokenizer, vocab_size=highest + 1, max_tokens=64, max_positions=64).counts.rows == 1
    with pytest.raises(
        DataError, match=f"^long.jsonl:1: token {highest} is beyond the model's vocabulary of {highest}"
    ):
        encode_rows([SHORT], tokenizer, vocab_size=highest)
    with pytest.raises(DataError, match="max_tokens=65 is more than the 64 positions"):
        encode_rows([SHORT], tokenizer, max_tokens=65, max_positions=64)


def test_faults_of_rows_can_be_left_out_and_counted():
    kept = EncodedSet()
    bad = Chat([TURNS[0], *TURNS], where="chat.jsonl:1")
    encode_rows([bad, CHAT], make_tokenizer(template=UNMARKED["mistral"]), onto=kept)
    assert (kept.counts.rows, kept.counts.faults, kept.faults.count) == (1, 1, 1)


def test_a_file_that_breaks_off_hides_rows_whatever_is_found_after_it():
    faults = Faults()
    faults.add("rows.json:3: not JSON", hides_rows=True)
    faults.add("more.jsonl:1: no label")
    assert faults.hides_rows
    assert (Faults() + faults).hides_rows


def test_faults_are_counted_with_the_source_that_has_them():
    kept, tokenizer = EncodedSet(), make_tokenizer(template=UNMARKED["mistral"])
    bad = Chat([TURNS[0], *TURNS], where="chat.jsonl:1")
    for examples in ([bad, bad, CHAT], [bad, CHAT]):
        encode_rows(examples, tokenizer, onto=kept)
    assert [part.counts.faults for part in kept.parts] == [2, 1]


SAYS_MORE = Preference(Completion("the cat", " the"), Completion("the cat", " sat on the mat"), where="pairs.jsonl:1")


def test_both_answers_of_a_pair_have_to_fit_the_model():
    tokenizer = make_tokenizer()
    (row,) = encode_rows([SAYS_MORE], tokenizer).rows
    shorter, longer = len(row.input_ids), len(row.other.input_ids)
    highest = max(row.other.input_ids)
    assert highest > max(row.input_ids)
    with pytest.raises(DataError, match=f"^pairs.jsonl:1: token {highest} is beyond the model's vocabulary"):
        encode_rows([SAYS_MORE], tokenizer, vocab_size=highest)
    with pytest.raises(DataError, match=f"^pairs.jsonl:1: {longer} tokens, more than data.max_tokens={shorter}"):
        encode_rows([SAYS_MORE], tokenizer, max_tokens=shorter, over_length="error")


def test_a_pair_is_left_out_where_rows_are_split_since_its_pieces_would_be_none():
    rows = encode_rows([SAYS_MORE, Preference(SHORT, LONG)], make_tokenizer(), max_tokens=16, over_length="split")
    assert (rows.counts.rows, rows.counts.dropped, rows.counts.split) == (1, 1, 0)


@pytest.mark.parametrize("is_good", [True, False])
def test_an_answer_that_is_cut_keeps_its_verdict(is_good):
    (row,) = encode_rows([Labelled(LONG, is_good)], make_tokenizer(), max_tokens=16, over_length="truncate").rows
    assert row.longest == 16
    assert row.is_good is is_good


def test_a_set_has_the_fingerprint_of_all_that_is_learnt_from_it():
    tokenizer = make_tokenizer()

    def mark(*examples, **how):
        return encode_rows(examples, tokenizer, **how).fingerprint

    sets = [mark(SHORT), mark(SHORT, loss_on="all"), mark(SHORT, SHORT), mark(SHORT, LONG), mark(LONG, SHORT)]
    sets += [mark(Labelled(SHORT, is_good)) for is_good in (True, False)]
    sets += [mark(Classified("a", (name,), False), classes=Classes(("x", "y"), False)) for name in ("x", "y")]
    sets += [mark(SAYS_MORE), mark(Preference(SAYS_MORE.rejected, SAYS_MORE.chosen))]
    assert len(set(sets)) == len(sets)
    assert mark(SHORT, LONG) == sets[3]


# ---- formats -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "example"),
    [
        ({"messages": TURNS[:2]}, Chat(TURNS[:2])),
        ({"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}], "system": "be brief"},
         Chat([{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"},
               {"role": "assistant", "content": "ho"}])),
        ({"conversations": TURNS[:2]}, Chat(TURNS[:2])),
        ({"instruction": "add", "input": "1 2", "output": "3"},
         Chat([{"role": "user", "content": "add\n\n1 2"}, {"role": "assistant", "content": "3"}])),
        ({"instruction": "add", "input": "", "output": "3"},
         Chat([{"role": "user", "content": "add"}, {"role": "assistant", "content": "3"}])),
        ({"prompt": "a", "completion": "b", "id": 7}, Completion("a", "b")),
        ({"text": "a"}, Text("a")),
    ],
)  # fmt: skip
def test_format_is_found_by_the_columns(row, example):
    found = read_row(row, "f.jsonl:3")
    assert found == example
    assert found.where == "f.jsonl:3"


def test_a_null_column_is_none_in_a_table_of_several_formats():
    asked = {"messages": None, "conversations": None, "prompt": "a", "completion": "b", "text": None}
    assert read_row(asked, "f:1") == Completion("a", "b")
    chat = {"messages": TURNS[:2], "prompt": None, "completion": None}
    assert read_row(chat, "f:1") == Chat(TURNS[:2])
    answers = {"prompt": "a", "messages": None, "completion": "b", "label": True, "chosen": None, "rejected": None}
    assert read_row(answers, "f:1", task="kto") == Labelled(Completion("a", "b"), True)
    with pytest.raises(DataError, match=r"^f:1: column 'messages' is null"):
        read_row(dict.fromkeys(asked), "f:1")


def test_tool_calls_and_other_keys_of_a_message_survive_and_nulls_go():
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "clock"}}], "name": None}
    chat = read_row({"messages": [TURNS[0], call], "tools": [{"name": "clock"}]}, "f:1")
    assert chat.messages[1] == {"role": "assistant", "tool_calls": call["tool_calls"]}
    assert chat.tools == [{"name": "clock"}]


@pytest.mark.parametrize("label", [True, "true", 0, 1, None, "no"])
def test_a_label_that_does_not_call_an_answer_bad_is_nobodys_business(label):
    assert read_row({"prompt": "a", "completion": "b", "label": label}, "f:1") == Completion("a", "b")
    assert read_row({"text": "a", "label": False}, "f:1") == Text("a"), "nor is the class of a text"


def test_mapped_columns_name_the_format():
    row = {"question": "a", "answer": "b", "text": "not this"}
    assert read_row(row, "f:1") == Text("not this")
    columns = {"prompt": "question", "completion": "answer"}
    assert read_row(row, "f:1", columns=columns) == Completion("a", "b")
    assert read_row({**row, "messages": TURNS}, "f:1", columns={"text": "answer"}) == Text("b")


@pytest.mark.parametrize(
    ("row", "options", "fault"),
    [
        ({"promt": "a", "completion": "b"}, {}, r"missing 'prompt' \(did you mean 'promt'\?\); found columns: promt, "
         r"completion; expected: prompt, completion"),
        ({"text": "a"}, {"format": "completion"}, "missing 'prompt', 'completion'; found columns: text"),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, {}, "such rows are for train.task=dpo, ipo, orpo, kto"),
        ({"prompt": "a", "completion": "b"}, {"task": "dpo"}, r"are for train.task=sft, pretrain\)"),
        ({"prompt": "a", "completion": "b"}, {"format": "text"}, r"expected: text \(data.columns maps other names\)"),
        ({"quest": "a"}, {"columns": {"text": "question"}}, "column 'question' .*is missing .*mean 'quest'"),
        ({"text": 5}, {}, r"text is a number \(5\), wanted text"),
        ({"text": None}, {}, "text is null"),
        ({"text": " \n"}, {}, "text is empty"),
        ({"prompt": "a", "completion": ""}, {}, "completion is empty: nothing to learn from"),
        ({"text": "\ud83d"}, {}, "half of a surrogate pair"),
        ([1], {}, r"found a list \(\[1\]\), wanted an object"),
        ({"prompt": "a", "completion": "b", "label": False}, {}, "column 'label' is false: .* or set train.task=kto"),
        ({"messages": TURNS, "label": "False"}, {"task": "pretrain"}, "column 'label' is false: the answer is marked"),
        ({"messages": "hi"}, {}, "column 'messages' is text"),
        ({"messages": []}, {}, "holds no turns"),
        ({"messages": [{"role": "user", "content": "hi"}]}, {}, "no assistant turn"),
        ({"messages": [{"role": "assistant", "content": ""}]}, {}, "every assistant turn is empty"),
        ({"messages": [{"role": "wizard", "content": "hi"}]}, {}, "turn 1 has the unknown role 'wizard'; known: syst"),
        ({"messages": [{"role": "asistant", "content": "hi"}]}, {}, "did you mean 'assistant'"),
        ({"messages": [{"content": "hi"}]}, {}, "turn 1 has no role; found: content"),
        ({"messages": [{"role": "assistant", "content": ["hi"]}]}, {}, "content of turn 1 is a list"),
        ({"messages": ["hi"]}, {}, "turn 1 is text"),
    ],
)  # fmt: skip
def test_bad_row_says_where_and_what(row, options, fault):
    with pytest.raises(DataError, match=r"^f\.jsonl:3: .*" + fault):
        read_row(row, "f.jsonl:3", **options)


# ---- files ---------------------------------------------------------------------------------------------------------

ROW = {"prompt": "the", "completion": " cat"}


SKIP = " (data.on_error=skip leaves the row out)"


def test_malformed_json_names_file_and_line(tmp_path):
    path = write(tmp_path / "a.jsonl", ROW, ROW, '{"prompt": "the"\n', ROW)
    with pytest.raises(DataError, match=re.escape(f"{path}:3: not JSON: ")):
        load_rows(path)
    listed = write(tmp_path / "b.json", '[{"text": "a"},\n {"text": "b"},\n {"text" "c"}]')
    with pytest.raises(DataError, match=re.escape(f"{listed}:3: not JSON: ")):
        load_rows(listed)


def test_all_bad_rows_are_gathered_and_the_first_20_are_shown(tmp_path):
    path = write(tmp_path / "a.jsonl", ROW, *["[]\n"] * 24, {"prompt": "the"}, ROW)
    with pytest.raises(DataError) as caught:
        load_rows(path)
    first, *others = str(caught.value).splitlines()
    assert first.startswith(f"25 rows cannot be used (data.on_error=skip leaves them out): {path}:2: found a list")
    assert [line.split(": ")[0] for line in others[:-1]] == [f"  {path}:{line}" for line in range(3, 22)]
    assert others[-1] == "  and 5 more"
    faults = Faults()
    assert load_rows(path, faults=faults) == [Completion("the", " cat")] * 2
    assert faults.count == 25


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.csv", "rows.txt"])
def test_a_utf16_file_is_one_fault_and_not_one_a_line(name, tmp_path):
    (tmp_path / name).write_text("".join(f'{{"text": "{number}"}}\n' for number in range(50)), encoding="utf-16")
    with pytest.raises(DataError, match=rf"^{tmp_path / name} is UTF-16: save it as UTF-8 \(iconv"):
        load_rows(str(tmp_path / name))


def test_text_that_is_not_utf8_names_file_and_line(tmp_path):
    for name, data in (
        ("a.jsonl", b'{"text": "a"}\n{"text": "\xff"}'),
        ("b.txt", b"a\n\xffb"),
        ("c.csv", b"text\n\xff"),
    ):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(DataError, match=rf"{name}:2: not UTF-8 \(byte 0xff\)"):
            load_rows(tmp_path / name)


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.txt"])
def test_empty_file_is_refused_by_name(tmp_path, name):
    (tmp_path / name).write_text("prompt,completion\n" if name == "a.csv" else "\n")
    with pytest.raises(DataError, match=f"{name} is empty"):
        load_rows(tmp_path / name)


def test_hostile_json_is_a_fault_and_no_crash(tmp_path):
    path = write(tmp_path / "a.jsonl", "[" * 100_000 + "\n", '{"text": ' + "9" * 5000 + "}\n", "\ufeff\n")
    with pytest.raises(DataError, match=r"a.jsonl:1: not readable JSON.*\n  .*a.jsonl:2: not readable JSON"):
        load_rows(path)


def test_every_kind_of_file_gives_the_same_rows(tmp_path):
    rows = [{"prompt": "2 + 2 =", "completion": "4"}, {"prompt": "NA\u2028,\n", "completion": 'say "NA"'}]
    expected = [Completion(**row) for row in rows]
    write(tmp_path / "a.jsonl", "\ufeff", rows[0], "\n", rows[1])
    write(tmp_path / "b.json", json.dumps(rows, indent=1))
    write(tmp_path / "c.json", *rows)
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "d.parquet")
    with (tmp_path / "e.csv").open("w", newline="") as file:
        file.write('prompt,completion\r\n2 + 2 =,4\r\n"NA\u2028,\n","say ""NA"""\r\n')
    (tmp_path / "g.csv").write_text('prompt;completion\n2 + 2 =;4\n"NA\u2028,\n";"say ""NA"""\n')
    (tmp_path / "f.tsv").write_text('prompt\tcompletion\n2 + 2 =\t4\n"NA\u2028,\n"\t"say ""NA"""\n')
    for name in ("a.jsonl", "b.json", "c.json", "d.parquet", "e.csv", "f.tsv", "g.csv"):
        assert load_rows(tmp_path / name) == expected, name
    assert load_rows(tmp_path / "d.parquet")[1].where.endswith("d.parquet row 2")
    (tmp_path / "bad.parquet").write_bytes(b"not a table")
    with pytest.raises(DataError, match=r"bad.parquet: not readable Parquet, after row 0: "):
        load_rows(tmp_path / "bad.parquet")


def test_a_key_or_a_column_that_is_there_twice_is_refused_by_its_place(tmp_path):
    lines = ['{"text": "the"}\n', '{"prompt": "a", "completion": "x", "completion": "y"}\n']
    nested = '[{"messages": [{"role": "user", "content": "a", "content": "b"}]}]'
    columns = pyarrow.table([["a"], ["x"], ["y"]], names=["prompt", "completion", "completion"])
    parquet.write_table(columns, tmp_path / "c.parquet")
    for path, fault in (
        (write(tmp_path / "a.jsonl", *lines), ":2: the key 'completion' appears twice ('x' and 'y'): keep one" + SKIP),
        (write(tmp_path / "b.json", nested), ": the key 'content' appears twice ('a' and 'b'): keep one"),
        (tmp_path / "c.parquet", ": the column 'completion' appears twice"),
        (write(tmp_path / "d.csv", "text,text\n"), ":1: the column 'text' appears twice"),
    ):
        with pytest.raises(DataError) as refused:
            load_rows(path)
        assert str(refused.value) == f"{path}{fault}"
    faults = Faults()
    assert load_rows(tmp_path / "a.jsonl", faults=faults) == [Text("the")]
    assert (faults.count, faults.hides_rows) == (1, False)


def test_line_ends_of_every_kind_and_marks_in_the_middle_stand_in_a_csv_as_they_are(tmp_path):
    path = tmp_path / "a.csv"
    for end in ("\n", "\r\n", "\r"):
        path.write_text(end.join(["\ufefftext", '"the\r\ncat\r\n\ufeff"', "\ufeff\u2028sat", '"on']), newline="")
        faults = Faults()
        assert load_rows(path, faults=faults) == [Text("the\r\ncat\r\n\ufeff"), Text("\ufeff\u2028sat")]
        assert faults.shown == [f"{path}:6: not CSV: unexpected end of data"]


def test_csv_rows_of_another_width_are_faults(tmp_path):
    path = write(tmp_path / "a.csv", "prompt,completion\na,b\na\na,b,c\n")
    faults = Faults()
    assert load_rows(path, faults=faults) == [Completion("a", "b")]
    assert [fault.split(": ")[0] for fault in faults.shown] == [f"{path}:3", f"{path}:4"]
    path = write(tmp_path / "a.tsv", 'prompt\tcompletion\na,b\tc\na\n"a\tb\n')
    faults = Faults()
    assert load_rows(path, faults=faults) == [Completion("a,b", "c")]
    assert faults.shown == [f"{path}:3: 1 values for 2 columns", f"{path}:4: not TSV: unexpected end of data"]


def test_folder_stands_for_its_files_and_documents_are_whole(tmp_path):
    folder = tmp_path / "rows"
    (folder / "deep").mkdir(parents=True)
    write(folder / "b.jsonl", {"text": "2"})
    write(folder / "a.jsonl", {"text": "1"})
    write(folder / "deep" / "c.jsonl", {"text": "3"})
    write(folder / ".hidden.jsonl", "nonsense")
    assert load_rows(folder) == [Text("1"), Text("2"), Text("3")]
    write(folder / "README.md", "about these rows")
    with pytest.raises(DataError, match=r"holds rows \(a.jsonl\) and documents \(README.md\)"):
        load_rows(folder)
    assert load_rows(folder / "README.md") == [Text("about these rows")]


def test_several_sources_each_have_their_own_format_and_are_read_once_whatever_their_weight(tmp_path):
    plain = write(tmp_path / "a.jsonl", *({"text": str(n), "note": "x"} for n in range(9)))
    asked = write(tmp_path / "b.jsonl", {"q": "the", "a": " cat"})
    half = {"path": str(plain), "weight": 0.5, "format": "text", "split": None, "columns": None}
    twice = {"path": str(asked), "weight": 2, "columns": {"prompt": "q", "completion": "a"}}
    assert load_rows([half, twice]) == [*(Text(str(n)) for n in range(9)), Completion("the", " cat")]


@pytest.mark.parametrize(
    ("source", "options", "fault"),
    [
        ("./nowhere.jsonl", {}, "there is no such file or folder"),
        ("nowhere/train.jsonl", {}, "there is no such file or folder"),
        ({"path": "a.jsonl", "splt": "x"}, {}, "a source has the keys path, split"),
        ({"path": "a.jsonl", "weight": 0}, {}, "wanted a number above 0"),
        ({"path": "a.jsonl", "weight": 1001}, {}, "wanted a number above 0, at most 1000"),
        ("a.jsonl", {"format": "mesages"}, r"data.format=mesages is not known \(did you mean 'messages'\?\)"),
        ("a.jsonl", {"columns": {"promt": "q"}}, r"promt is not an expected column \(did you mean 'prompt'\?\)"),
        ("a.jsonl", {"columns": {"prompt": "q", "text": "t"}}, "no single format has the columns prompt, text"),
    ],
)
def test_source_that_cannot_be_meant_is_refused(source, options, fault):
    with pytest.raises(DataError, match=fault):
        load_rows(source, **options)


def test_hub_id_goes_to_datasets_with_its_split(monkeypatch):
    datasets = pytest.importorskip("datasets")
    asked = []

    def load_dataset(name, *, split):
        asked.append((name, split))
        if split == "nope":
            raise ValueError("Unknown split nope")
        return [{"text": "a"}, {"text": 1}]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(DataError, match=r"^owner/name row 2: text is a number"):
        load_rows("owner/name")
    with pytest.raises(DataError, match=r"owner/name \(split nope\) cannot be read: Unknown split nope"):
        load_rows({"path": "owner/name", "split": "nope"})
    assert asked == [("owner/name", "train"), ("owner/name", "nope")]


# ---- the evaluation split ------------------------------------------------------------------------------------------


def test_a_hub_id_has_one_slash_at_most_and_behind_its_first_colon_a_configuration(monkeypatch):
    asked = []
    monkeypatch.setattr("datasets.load_dataset", lambda *words, split: asked.append(words) or [{"text": "a"}])
    assert len(load_rows("owner/name:de:2024")) == 1
    assert asked == [("owner/name", "de:2024")]
    with pytest.raises(DataError, match="there is no such file or folder"):
        load_rows("owner/name/rows")


def test_split_does_not_depend_on_order_and_keeps_equal_rows_together():
    rows = [Text(str(n % 300), where=f"f:{n}") for n in range(500)]
    train, held = split_eval(rows, share=0.1)
    assert len(held) == 50
    assert sorted(row.where for row in train + held) == sorted(row.where for row in rows)
    assert not {row.text for row in train} & {row.text for row in held}
    shuffled = random.Random(0).sample(rows, len(rows))
    assert shuffled != rows
    assert {row.text for row in split_eval(shuffled, share=0.1)[1]} == {row.text for row in held}


@pytest.mark.parametrize(
    ("texts", "sizes"),
    [
        ("", (0, 0)),
        ("a", (1, 0)),
        ("aaa", (3, 0)),
        ("ab", (1, 1)),
        ("aab", (2, 1)),
        ("aabb", (2, 2)),
        ("abcdefg", (6, 1)),
    ],
)
def test_small_sets_keep_a_row_on_each_side_if_two_differ(texts, sizes):
    train, held = split_eval([Text(text) for text in texts])
    assert (len(train), len(held)) == sizes


def test_a_row_is_left_to_train_on_however_many_are_to_be_held_out():
    assert [sum(held_out(range(rows), least=2)) for rows in (2, 3, 4)] == [1, 2, 2]


def test_split_takes_a_share_and_no_more_than_the_most():
    rows = [Text(str(n)) for n in range(1000)]
    assert len(split_eval(rows)[1]) == 20
    assert len(split_eval(rows, share=0.5)[1]) == 200
    assert len(split_eval(rows, share=0.5, most=7)[1]) == 7


# ---- batches -------------------------------------------------------------------------------------------------------


def test_batch_labels_count_what_a_shifted_loss_predicts():
    tokenizer = make_tokenizer()
    rows = [encode(Text("the"), tokenizer), encode(Completion("the cat", " sat on"), tokenizer)]
    assert rows[0].trained[0]  # without BOS the first token is marked, and yet nothing predicts it
    batch = collate(rows, pad_id=0)
    assert batch.trained_tokens == int((batch.labels[:, 1:] != -100).sum()) == int((batch.labels != -100).sum())
    kept = batch.labels != -100
    assert torch.equal(batch.labels[kept], batch.input_ids[kept])
    assert batch.input_ids.dtype == batch.labels.dtype == torch.int64
    assert batch.lengths == tuple(len(row.input_ids) for row in rows)
    assert batch.position_ids is None, "the model's own are right: 0, 1, ... in every row"


def test_padding_rows_does_not_change_other_rows_loss_or_gradients():
    """Rows alone, and side by side with different pads: one sum of losses, one gradient (fp32, rounding aside)."""
    tokenizer = make_tokenizer(template=UNMARKED["chatml"])
    rows = [encode(row, tokenizer) for row in (Completion("the", " cat"), CHAT, Text("on the mat"))]
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=2,
                         num_attention_heads=2, max_position_embeddings=256)  # fmt: skip
    model = LlamaForCausalLM(config)

    def loss_and_gradient(groups, pad_id):
        model.zero_grad()
        total = 0.0
        for batch in (collate(group, pad_id) for group in groups):
            logits = model(input_ids=batch.input_ids, use_cache=False).logits
            targets = batch.labels[:, 1:].flatten()
            loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), targets, reduction="sum")
            loss.backward()
            total += loss.item()
        return total, torch.cat([parameter.grad.flatten() for parameter in model.parameters()])

    alone, gradient = loss_and_gradient([[row] for row in rows], pad_id=0)
    assert alone > 1
    assert gradient.norm() > 1
    for pad_id in (0, tokenizer.eos_token_id):
        together, gradient_together = loss_and_gradient([rows], pad_id)
        assert together == pytest.approx(alone, rel=1e-5)
        assert (gradient_together - gradient).norm() < 1e-5 * gradient.norm()


# ---- the sampler ---------------------------------------------------------------------------------------------------


def test_sampler_seek_equals_uninterrupted():
    uninterrupted = Sampler(7, seed=3).next_rows(33)
    for position in range(30):
        resumed = Sampler(7, seed=3)
        resumed.position = position
        assert resumed.next_rows(3) == uninterrupted[position : position + 3]
    back = Sampler(7, seed=3)
    back.next_rows(20)
    back.position = 2
    assert next(back) == uninterrupted[2]


def test_sampler_gives_every_row_once_an_epoch_in_orders_that_differ():
    sampler = Sampler(33, seed=0)
    epochs = []
    for epoch in range(3):
        assert sampler.epoch == epoch
        epochs.append(sampler.next_rows(33))
        assert sampler.position == 33 * (epoch + 1)
    assert all(sorted(order) == list(range(33)) for order in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert Sampler(33, seed=1).next_rows(33) != epochs[0]


@hypothesis.given(
    decks=st.lists(st.builds(Deck, st.integers(0, 40), st.floats(0.02, 4)), min_size=1, max_size=4),
    epochs=st.integers(1, 5),
)
def test_every_row_of_a_source_is_drawn_as_often_as_its_weight_says_and_once_before_again(decks, epochs):
    hypothesis.assume(any(deck.rows for deck in decks))
    sampler = Sampler(decks, seed=2)
    drawn, first = Counter(sampler.next_rows(epochs * sampler.epoch_rows)), 0
    for deck in decks:
        times = [drawn.pop(first + row, 0) for row in range(deck.rows)]
        first += deck.rows
        assert sum(times) == epochs * deck.drawn
        if deck.rows:
            assert max(times) - min(times) <= 1
            assert abs(sum(times) - epochs * deck.weight * deck.rows) <= epochs / 2 or deck.drawn == 1
    assert not drawn


def test_weights_of_one_change_no_order_and_half_a_source_is_another_half_in_the_next_epoch():
    assert Sampler([Deck(20), Deck(0), Deck(13)], 5).next_rows(99) == Sampler(33, 5).next_rows(99)
    sampler = Sampler([Deck(10, 0.5), Deck(4, 2)], seed=5)
    epochs = [sampler.next_rows(13) for _ in range(2)]
    assert sampler.epoch == 2
    halves = [{row for row in epoch if row < 10} for epoch in epochs]
    assert halves[0] | halves[1] == set(range(10))
    assert [len(half) for half in halves] == [5, 5]
    assert all(Counter(epoch)[row] == 2 for epoch in epochs for row in range(10, 14))
    assert len({tuple(epoch) for epoch in epochs}) == 2
    again = Sampler([Deck(10, 0.5), Deck(4, 2)], seed=5)
    again.position = 7
    assert again.next_rows(19) == [*epochs[0], *epochs[1]][7:], "a run resumes at a row"
    assert Sampler([Deck(10, 0.5), Deck(4, 2)], seed=6).next_rows(13) != epochs[0]


def test_sources_of_one_size_are_not_drawn_alike():
    drawn = Sampler([Deck(20, 0.5), Deck(20, 0.5)], seed=5).next_rows(20)
    assert {row for row in drawn if row < 20} != {row - 20 for row in drawn if row >= 20}


def test_a_place_far_out_is_as_near_as_any():
    sampler = Sampler([Deck(10, 0.5), Deck(4, 2)], seed=5)
    sampler.position = 13 * 10**15
    assert Counter(row for row in sampler.next_rows(13) if row >= 10) == dict.fromkeys(range(10, 14), 2)


def test_sampler_neither_moves_nor_reads_global_random_state():
    torch.manual_seed(0)
    random.seed(0)
    before, python_before = torch.get_rng_state(), random.getstate()
    first = Sampler(9, seed=0).next_rows(20)
    assert torch.equal(torch.get_rng_state(), before)
    assert random.getstate() == python_before
    torch.manual_seed(1)
    random.seed(1)
    assert Sampler(9, seed=0).next_rows(20) == first
