"""Templates: whatever a family's template does to a chat, what is trained is what inference sees and would have to say.

The oracle is transformers' own `apply_chat_template` on the turns before an answer.
"""

from collections import namedtuple
from dataclasses import replace
from datetime import date, datetime
from functools import cache

import pytest
from chat_templates import FAMILIES, LLAMA3, QWEN3, tokenizer_of
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.utils import chat_template_utils

from qlora_kit.data import Chat, collate, encode_rows, encode_turns, end_token_id, fix_tokenizer, template_tokens
from qlora_kit.data.chat_template import fix_template, writes_date
from qlora_kit.data.thinking import CLOSE, KEYS, after_prompt, thought_closed, thought_of, with_thinking
from qlora_kit.errors import DataError

SYSTEM = {"role": "system", "content": "Be a cat."}
ASKED = {"role": "user", "content": "where?"}
SAID = {"role": "assistant", "content": "on the mat"}
CALL = {"type": "function", "function": {"name": "clock", "arguments": {"zone": "UTC"}}}
TOOLS = [{"type": "function", "function": {"name": "clock", "parameters": {"type": "object", "properties": {}}}}]

CHATS = {
    "single": [ASKED, SAID],
    "multi": [ASKED, SAID, {"role": "user", "content": "and then?"}, {"role": "assistant", "content": "the cat 🙂"}],
    "system": [SYSTEM, ASKED, SAID, ASKED, {"role": "assistant", "content": "the cat"}],
    "quoted": [{"role": "user", "content": "</s> <|im_end|> <|end|> <end_of_turn> <|eot_id|>"}, SAID],
    "empty": [ASKED, {"role": "assistant", "content": ""}, ASKED, SAID],
    "spaced": [ASKED, {"role": "assistant", "content": "  on the mat \n"}, ASKED, SAID],
    "broken": [ASKED, {"role": "assistant", "content": "\n\non the mat\n\n"}, ASKED, SAID],
    "tools": [ASKED, {"role": "assistant", "tool_calls": [CALL]}, {"role": "tool", "content": "noon"}, SAID],
}
CASES = [
    (name, chat) for name, family in FAMILIES.items() for chat in CHATS if chat != "tools" or family.called is not None
]


def encoded(name, chat, **options):
    """The tokenizer of a family and the rows that a chat makes."""
    tokenizer = tokenizer_of(FAMILIES[name])
    tools = TOOLS if chat == "tools" else None
    return tokenizer, encode_turns(Chat(CHATS[chat], tools), tokenizer, **options)


def answers_of(messages):
    return [i for i, message in enumerate(messages) if message["role"] == "assistant"]


def prompts(tokenizer, chat):
    """Token ids that inference gives before each answer."""
    tools = TOOLS if chat == "tools" else None
    return [
        tokenizer.apply_chat_template(CHATS[chat][:i], tools=tools, add_generation_prompt=True)["input_ids"]
        for i in answers_of(CHATS[chat])
    ]


def stretches(row, tokenizer):
    """The trained parts of a row as text."""
    parts, was_trained = [], False
    for token, is_trained in zip(row.input_ids, row.trained, strict=True):
        if is_trained and not was_trained:
            parts.append([])
        if is_trained:
            parts[-1].append(token)
        was_trained = is_trained
    return [tokenizer.decode(part) for part in parts]


@pytest.mark.parametrize(("name", "chat"), CASES)
def test_trained_is_the_answer_and_its_end_token_and_nothing_else(name, chat):
    family = FAMILIES[name]
    tokenizer, rows = encoded(name, chat)
    assert all(0 < row.trained_tokens < len(row.input_ids) for row in rows)
    found = [text for row in rows for text in stretches(row, tokenizer)]
    wanted = [
        (family.called(CALL) if "tool_calls" in message else family.said(message["content"])) + family.end
        for message in CHATS[chat]
        if message["role"] == "assistant"
    ]
    assert found == wanted


@pytest.mark.parametrize(("name", "chat"), CASES)
def test_every_answer_stands_behind_the_tokens_that_inference_gives(name, chat):
    tokenizer, rows = encoded(name, chat)
    given = prompts(tokenizer, chat)
    assert len(set(map(len, given))) == len(given), "each prompt is longer than the one before"
    assert len(rows) in (1, len(given))
    for number, prompt in enumerate(given):
        row = rows[0 if len(rows) == 1 else number]
        assert row.input_ids[: len(prompt)] == prompt
        assert row.trained[len(prompt) - 1 : len(prompt) + 1] == [False, True]
    assert rows[-1].prompt == given[-1]


@pytest.mark.parametrize(("name", "chat"), CASES)
def test_tokens_decode_to_what_the_template_renders_with_one_first_token(name, chat):
    family, messages = FAMILIES[name], CHATS[chat]
    tokenizer, rows = encoded(name, chat)
    tools = TOOLS if chat == "tools" else None
    turns = [len(messages) - 1] if len(rows) == 1 else answers_of(messages)
    for row, i in zip(rows, turns, strict=True):
        text = tokenizer.apply_chat_template(messages[: i + 1], tools=tools, tokenize=False)
        found = tokenizer.decode(row.input_ids)
        if name == "deepseek":  # its turns leave out the thought that its prompts open
            assert found.endswith("<think>\n" + family.said(messages[i]["content"]) + family.end)
            found = "".join(found.rsplit("<think>\n\n</think>\n\n", 1))
            text = text.replace("<|Assistant|>\n", "<|Assistant|>")
        assert text.startswith(found)
        assert text[len(found) :] in ("", "\n", "\n<|endoftext|>"), "what a template adds behind an end token"
        assert row.input_ids.count(tokenizer.bos_token_id) == (family.bos is not None)
        assert family.bos is None or row.input_ids[0] == tokenizer.bos_token_id


@pytest.mark.parametrize("name", FAMILIES)
def test_stable_chats_are_one_row_and_others_one_an_answer(name):
    rows = len(encoded(name, "multi")[1])
    assert rows == (1 if FAMILIES[name].is_stable else 2)
    assert len(encoded(name, "multi", loss_on="last")[1]) == len(encoded(name, "multi", loss_on="all")[1]) == 1


@pytest.mark.parametrize("name", FAMILIES)
def test_last_answer_alone_is_trained_as_its_own_row_would_be(name):
    tokenizer, rows = encoded(name, "multi")
    (last,) = encoded(name, "multi", loss_on="last")[1]
    assert stretches(last, tokenizer) == stretches(rows[-1], tokenizer)[-1:]
    assert last.prompt == rows[-1].prompt or len(rows) == 1


def test_an_answer_that_joins_the_line_break_of_its_prompt_is_a_row_of_its_own():
    """One token for both breaks would be in no prompt that inference gives."""
    tokenizer, rows = encoded("phi3", "broken")
    whole = tokenizer(tokenizer.apply_chat_template(CHATS["broken"], tokenize=False), add_special_tokens=False)
    first = prompts(tokenizer, "broken")[0]
    assert whole["input_ids"][: len(first)] != first
    assert len(rows) == 2
    assert len(encoded("phi3", "multi")[1]) == 1


def test_words_that_take_the_last_line_break_of_a_prompt_are_rows_of_their_own():
    """GPT-2's words split two line breaks before a letter, and join them at the end of a prompt."""
    tokenizer = tokenizer_of(FAMILIES["llama3"], breaks_join=False)
    rows = encode_turns(Chat(CHATS["multi"]), tokenizer)
    assert len(encoded("llama3", "multi")[1]) == 1
    assert [row.input_ids[: len(row.prompt)] for row in rows] == prompts(tokenizer, "multi")
    assert [stretches(row, tokenizer) for row in rows] == [["on the mat<|eot_id|>"], ["the cat 🙂<|eot_id|>"]]


def test_runs_of_spaces_that_are_added_tokens_join_over_no_prompt():
    """GPT-NeoX's and Phi-2's vocabularies add them, and look for them before they split words."""
    source = FAMILIES["phi4"].source.replace("assistant<|im_sep|>", "assistant<|im_sep|> ")
    source = source.replace("+ m.content", "+ ' ' * (m.role == 'assistant') + m.content")
    tokenizer = tokenizer_of(replace(FAMILIES["phi4"], source=source))
    tokenizer.add_tokens(["  ", "   "])
    messages = [ASKED, {"role": "assistant", "content": "  on the mat"}]
    prompt = tokenizer.apply_chat_template(messages[:1], add_generation_prompt=True)["input_ids"]
    whole = tokenizer.apply_chat_template(messages)["input_ids"]
    assert whole[: len(prompt)] != prompt
    (row,) = encode_turns(Chat(messages), tokenizer)
    assert row.input_ids[: len(prompt)] == prompt
    assert stretches(row, tokenizer) == ["  on the mat<|im_end|>"]


def test_a_chat_of_one_answer_can_be_asked_whatever_is_trained():
    for loss_on in ("assistant", "last", "all"):
        tokenizer, (row,) = encoded("phi4", "single", loss_on=loss_on)
        assert (row.prompt, row.answer) == (prompts(tokenizer, "single")[0], "on the mat")


@pytest.mark.parametrize("loss_on", ["assistant", "last", "all"])
@pytest.mark.parametrize("chat", ["multi", "system", "tools"])
def test_a_chat_of_several_answers_can_be_asked_for_the_last_one_whatever_is_trained(chat, loss_on):
    tokenizer, (row,) = encoded("qwen2.5", chat, loss_on=loss_on)
    assert len(stretches(row, tokenizer)) == (2 if loss_on == "assistant" else 1)
    assert (row.prompt, row.answer) == (prompts(tokenizer, chat)[-1], CHATS[chat][-1]["content"])


@cache
def any_tokenizer(name, kind):
    return tokenizer_of(FAMILIES[name], **kind._asdict())


Kind = namedtuple("Kind", ["breaks_join", "prepends"])
CONTENTS = st.lists(
    st.sampled_from([" ", "\n", "\t", "the", "🙂", "<|im_end|>", "</s>", "\ue000", "\u200b"]), max_size=6
)


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(sorted(FAMILIES)),
    st.builds(Kind, st.booleans(), st.sampled_from([None, "always", "first"])),
    st.lists(CONTENTS.map("".join), min_size=4, max_size=4),
)
def test_whatever_is_asked_and_answered_prompts_are_those_of_inference(name, kind, contents):
    tokenizer = any_tokenizer(name, kind)
    roles = ("user", "assistant") * 2
    messages = [{"role": role, "content": content} for role, content in zip(roles, contents, strict=True)]
    rows = encode_turns(Chat(messages), tokenizer)
    end = tokenizer.convert_tokens_to_ids(FAMILIES[name].end)
    for number, i in enumerate((1, 3)):
        prompt = tokenizer.apply_chat_template(messages[:i], add_generation_prompt=True)["input_ids"]
        row = rows[0 if len(rows) == 1 else number]
        assert row.input_ids[: len(prompt)] == prompt
        stops = row.trained.index(False, len(prompt)) if False in row.trained[len(prompt) :] else len(row.trained)
        assert row.input_ids[stops - 1] == end
        assert all(row.trained[len(prompt) : stops])
        assert not row.trained[len(prompt) - 1]


@pytest.mark.parametrize("prepends", ["always", "first", "never"])
@pytest.mark.parametrize("name", ["mistral", "gemma", "qwen3", "phi3", "llama3"])
def test_vocabularies_of_pieces_keep_the_tokens_of_prompts_too(name, prepends):
    tokenizer = tokenizer_of(FAMILIES[name], prepends=prepends)
    spaces = tokenizer("the")["input_ids"] != tokenizer("<think>the")["input_ids"][1:]
    assert spaces == (prepends == "first"), "there a text that stands alone is not one behind another token"
    for chat in ("multi", "spaced", "broken"):
        rows = encode_turns(Chat(CHATS[chat]), tokenizer)
        given = prompts(tokenizer, chat)
        for number, prompt in enumerate(given):
            row = rows[0 if len(rows) == 1 else number]
            assert row.input_ids[: len(prompt)] == prompt
            assert row.trained[len(prompt) - 1 : len(prompt) + 1] == [False, True]


@pytest.mark.parametrize("name", FAMILIES)
def test_padding_with_the_end_token_changes_no_label(name):
    family = FAMILIES[name]
    tokenizer, rows = encoded(name, "multi")
    rows = rows + encoded(name, "single")[1]
    end = tokenizer.convert_tokens_to_ids(family.end)
    ours, other = (collate(rows, pad_id=pad) for pad in (end, 5))
    assert min(ours.lengths) < max(ours.lengths)
    assert not (ours.input_ids == other.input_ids).all()
    assert (ours.labels == other.labels).all()
    assert all((labels == end).any() for labels in ours.labels)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_token_that_ends_answers_is_found_by_rendering_one(name):
    family = FAMILIES[name]
    tokenizer = tokenizer_of(family)
    assert tokenizer.convert_ids_to_tokens(end_token_id(tokenizer)) == family.end
    assert family.end in template_tokens(tokenizer)
    assert set(template_tokens(tokenizer)) <= {*family.specials, family.bos, family.eos}
    for source in (None, {"tool_use": family.source}, "{{ messages[0].nothing.there }}"):
        tokenizer.chat_template = source
        assert (end_token_id(tokenizer), template_tokens(tokenizer)) == (None, [])


# ---- thoughts ------------------------------------------------------------------------------------------------------

THOUGHT = "a mat is there"
INSIDE = {"role": "assistant", "content": f"<think>\n{THOUGHT}\n</think>\n\non the mat"}
APART = {"role": "assistant", "content": "on the mat", "reasoning_content": THOUGHT}
BLOCK = "<think>\n\n</think>\n\n"
FULL = f"<think>\n{THOUGHT}\n</think>\n\n"


def thinking(family, mode, *answers):
    """The tokenizer of a run in a mode, and the rows of one chat with these answers."""
    tokenizer = tokenizer_of(family)
    fix_tokenizer(tokenizer, mode, date(2024, 5, 6))
    messages = [message for answer in answers for message in (ASKED, answer)]
    return tokenizer, encode_rows([Chat(messages)], tokenizer, thinking=mode).rows


@pytest.mark.parametrize("answer", [INSIDE, APART])
@pytest.mark.parametrize(
    ("name", "mode", "opened", "said"),
    [
        ("qwen3", "keep", "", FULL),
        ("qwen3", "strip", BLOCK, ""),
        ("qwen3", "empty", BLOCK, ""),
        ("phi4", "keep", "", FULL),
        ("phi4", "strip", "", ""),
        ("phi4", "empty", "", BLOCK),
        ("deepseek", "keep", "<think>\n", FULL.removeprefix("<think>\n")),
        ("deepseek", "strip", "<think>\n", BLOCK.removeprefix("<think>\n")),
        ("deepseek", "empty", "<think>\n", BLOCK.removeprefix("<think>\n")),
    ],
)
def test_thoughts_are_kept_left_out_or_emptied_behind_the_prompt_of_that_mode(name, mode, opened, said, answer):
    """`opened` is what inference writes before the answer of itself, `said` what the model has to say before it."""
    family = FAMILIES[name]
    tokenizer, rows = thinking(family, mode, answer, answer)
    assert THOUGHT in str(answer)
    for row in rows:
        parts = stretches(row, tokenizer)
        assert set(parts) == {said + "on the mat" + family.end}
    prompt = tokenizer.apply_chat_template([ASKED], add_generation_prompt=True)["input_ids"]
    assert rows[0].input_ids[: len(prompt)] == prompt
    assert tokenizer.decode(prompt).endswith(opened)
    assert (BLOCK in tokenizer.decode(prompt)) == (opened == BLOCK)


@pytest.mark.parametrize("asked", KEYS)
def test_a_thought_is_written_whatever_the_row_and_the_template_call_it(asked):
    source = FAMILIES["qwen3"].source.replace("reasoning_content", asked)
    for held in KEYS:
        answer = {"role": "assistant", "content": "on the mat", held: THOUGHT}
        tokenizer, (row,) = thinking(replace(FAMILIES["qwen3"], source=source), "keep", answer)
        assert stretches(row, tokenizer) == [FULL + "on the mat<|im_end|>"]


@pytest.mark.parametrize("family", ["qwen3", "phi4"])
def test_a_thought_in_the_content_is_written_once_beside_empty_columns_of_others(family):
    """A table has every column in every row."""
    tokenizer, (row,) = thinking(FAMILIES[family], "keep", INSIDE | dict.fromkeys(KEYS))
    assert stretches(row, tokenizer) == [FULL + "on the mat<|im_end|>"]


def test_thoughts_that_are_left_out_where_all_is_learnt_are_told():
    tokenizer = tokenizer_of(FAMILIES["qwen3"])
    for turns, is_told in (((APART | {"reasoning_content": "a rug is there"}, APART), True), ((APART,), False)):
        chat = Chat([turn for answer in turns for turn in (ASKED, answer)])
        (row,) = encode_turns(chat, tokenizer, loss_on="all")
        assert (row.odd == ("thoughts",)) == is_told
        assert tokenizer.decode(row.input_ids).count(THOUGHT) == 1


def test_earlier_thoughts_of_a_forgetful_template_are_trained_and_not_seen_again():
    tokenizer, rows = thinking(FAMILIES["qwen3"], "keep", APART, APART)
    assert [stretches(row, tokenizer) for row in rows] == [[FULL + "on the mat<|im_end|>"]] * 2
    assert tokenizer.decode(rows[1].input_ids).count(THOUGHT) == 1


@pytest.mark.parametrize(
    ("prompt", "turn", "thought", "said"),
    [
        ("<A>", "<A>yes<E>", "", "yes<E>"),
        ("<A><think>\n", "<A><think>\nhm\n</think>\n\nyes<E>", "hm", "hm\n</think>\n\nyes<E>"),
        ("<A><think>\n", "<A>yes<E>", "hm", "hm\n</think>\n\nyes<E>"),
        ("<A><think>", "<A></think>yes<E>", "hm", "hm\n</think>\n\nyes<E>"),
        ("<A></think>", "<A>yes<E>", "", "yes<E>"),
        ("<A>" + BLOCK, "<A>yes<E>", "", "yes<E>"),
        ("<B>", "<A>yes<E>", "", None),
        ("<B><think>\n", "<A>yes<E>", "hm", None),
    ],
)
def test_a_turn_goes_on_from_its_prompt_whatever_the_prompt_says_of_a_thought(prompt, turn, thought, said):
    assert after_prompt(prompt, turn, thought) == said


@pytest.mark.parametrize(
    ("content", "thought", "bare"),
    [
        ("<think>hm</think>yes", "hm", "yes"),
        ("\n<think>\nhm\n</think>\n\nyes", "hm", "yes"),
        ("hm\n</think>\n\nyes", "hm", "yes"),
        ("<think></think>yes", "", "yes"),
        ("yes", "", "yes"),
        ("say <think>hm</think> to think", "", "say <think>hm</think> to think"),
        ("<think>a</think>yes<think>b</think>", "a", "yes<think>b</think>"),
    ],
)
def test_a_thought_is_what_stands_first_and_nothing_that_is_quoted_later(content, thought, bare):
    message = {"role": "assistant", "content": content}
    assert thought_of(message) == thought
    stripped, user = with_thinking(Chat([message, {**message, "role": "user"}]), "strip").messages
    assert (stripped["content"], user["content"]) == (bare, content)


def test_templates_that_could_not_say_a_thought_refuse_to_lose_it():
    deaf = replace(
        FAMILIES["phi4"], source=FAMILIES["phi4"].source.replace("m.content", "m.content.split('</think>')[-1]")
    )
    assert deaf.source != FAMILIES["phi4"].source
    with pytest.raises(DataError, match=r"leaves out the thought of turn 2: set data\.thinking=strip"):
        thinking(deaf, "keep", APART)
    tokenizer, rows = thinking(deaf, "strip", APART)
    assert stretches(rows[0], tokenizer) == ["on the mat<|im_end|>"]


def test_a_thought_is_ended_only_where_it_was_cut():
    assert thought_closed("<think>so") == "<think>so" + CLOSE
    for whole in ("<think>so</think>it is", "it is", "it is <think>"):
        assert thought_closed(whole) == whole


def test_a_thought_that_is_not_closed_is_refused_where_it_is_to_go():
    open_ended = {"role": "assistant", "content": "<think>hm, on the mat"}
    assert thinking(FAMILIES["phi4"], "keep", open_ended)[1]
    with pytest.raises(DataError, match="opens <think> and does not close it"):
        thinking(FAMILIES["phi4"], "strip", open_ended)


def test_a_prompt_that_no_turn_begins_with_is_refused():
    odd = replace(FAMILIES["phi4"], source=FAMILIES["phi4"].source + "{% if add_generation_prompt %}Well:{% endif %}")
    with pytest.raises(
        DataError, match=r"turn 2, as rendered by the chat template, does not start with its own prompt: .*Well:"
    ):
        thinking(odd, "keep", SAID)


# ---- what a template leaves out --------------------------------------------------------------------------------------

LOOKS = [
    ASKED,
    {"role": "assistant", "content": "Let me look.", "tool_calls": [CALL]},
    {"role": "tool", "content": "9"},
]
RULELESS = replace(
    FAMILIES["phi4"], source=FAMILIES["phi4"].source.replace("in messages -%}", "in messages if m.role != 'system' -%}")
)
EITHER = replace(  # writes calls where there are no words
    FAMILIES["qwen2.5"],
    source=FAMILIES["qwen2.5"].source.replace("in m.tool_calls", "in not m.content and m.tool_calls"),
)


def odd_of(family, messages, tools=None, **options):
    return [row.odd for row in encode_turns(Chat(messages, tools), tokenizer_of(family), **options)]


@pytest.mark.parametrize(("name", "chat"), CASES)
def test_nothing_is_said_of_what_a_template_writes_in_whatever_place(name, chat):
    assert {row.odd for row in encoded(name, chat)[1]} == {()}


def test_a_call_that_the_template_leaves_out_would_teach_another_answer_and_is_refused():
    text = tokenizer_of(FAMILIES["phi4"]).apply_chat_template(LOOKS, tokenize=False)
    assert ("Let me look." in text, "clock" in text) == (True, False)
    wanted = r"^f:1: .*leaves out the tool calls of turn 2.*name a template that writes them with data\.template=FILE"
    with pytest.raises(DataError, match=wanted):
        encode_rows([Chat([*LOOKS, SAID], where="f:1")], tokenizer_of(FAMILIES["phi4"]))


def test_a_call_is_missed_though_others_of_the_chat_are_written():
    silent = [ASKED, {"role": "assistant", "tool_calls": [CALL]}, {"role": "tool", "content": "9"}]
    assert encode_turns(Chat([*silent, SAID]), tokenizer_of(EITHER))
    with pytest.raises(DataError, match="leaves out the tool calls of turn 5"):
        encode_turns(Chat([*silent, SAID, *LOOKS[1:], SAID]), tokenizer_of(EITHER))


@pytest.mark.parametrize("loss_on", ["last", "all"])
def test_calls_that_are_left_out_before_what_is_learnt_are_told_of(loss_on):
    assert odd_of(FAMILIES["qwen2.5"], [*LOOKS, SAID], loss_on=loss_on) == [()]
    assert odd_of(FAMILIES["phi4"], [*LOOKS, SAID], loss_on=loss_on) == [("tool_calls",)]


def test_tools_that_are_left_out_are_told_of_in_every_row_of_the_chat():
    assert odd_of(FAMILIES["qwen2.5"], CHATS["multi"], TOOLS) == [()]
    assert odd_of(FAMILIES["phi4"], CHATS["multi"], TOOLS) == [("tools",)]
    assert odd_of(FAMILIES["deepseek"], CHATS["multi"], TOOLS) == [("tools",)] * 2
    assert odd_of(FAMILIES["phi4"], CHATS["multi"], []) == [()]


def test_a_system_text_that_is_left_out_is_told_of():
    assert SYSTEM["content"] not in tokenizer_of(RULELESS).apply_chat_template(CHATS["system"], tokenize=False)
    assert odd_of(RULELESS, CHATS["system"]) == [("system",)]
    assert odd_of(RULELESS, [{"role": "system", "content": " "}, ASKED, SAID]) == [()], "there is nothing to leave out"


def test_a_system_text_like_the_one_that_a_template_has_for_itself_is_written():
    tokenizer, own = tokenizer_of(FAMILIES["qwen2.5"]), [{"role": "system", "content": "You help."}, ASKED, SAID]
    with_it, without = (tokenizer.apply_chat_template(chat, tokenize=False) for chat in (own, own[1:]))
    assert with_it == without
    assert odd_of(FAMILIES["qwen2.5"], own) == [()]


def test_a_template_that_refuses_a_chat_without_a_part_has_it():
    refusal = "{%- if not tools -%}{{- raise_exception('no tools') -}}{%- endif -%}"
    strict = replace(FAMILIES["phi4"], source=refusal + FAMILIES["phi4"].source)
    with pytest.raises(DataError, match="no tools"):
        odd_of(strict, CHATS["multi"])
    assert odd_of(strict, CHATS["multi"], TOOLS) == [()]


# ---- dates ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def clock(monkeypatch):
    """Sets what day it is for templates."""

    def it_is(year, month, day):
        class Fake(datetime):
            @classmethod
            def now(cls, tz=None):
                return cls(year, month, day, 15, 30)

        monkeypatch.setattr(chat_template_utils, "datetime", Fake)

    return it_is


def test_a_fixed_template_says_the_same_on_every_day(clock):
    tokenizer = tokenizer_of(FAMILIES["llama3"])
    clock(2024, 5, 6)
    then = tokenizer.apply_chat_template([ASKED, SAID], tokenize=False)
    clock(2025, 12, 31)
    now = tokenizer.apply_chat_template([ASKED, SAID], tokenize=False)
    assert ("06 May 2024" in then, "31 Dec 2025" in now) == (True, True)
    assert fix_tokenizer(tokenizer, "keep", date(2024, 5, 6)) == date(2024, 5, 6)
    assert tokenizer.apply_chat_template([ASKED, SAID], tokenize=False) == then
    assert fix_tokenizer(tokenizer, "keep", date(2025, 12, 31)) is None, "it is fixed already"
    assert tokenizer.apply_chat_template([ASKED, SAID], tokenize=False) == then
    given = tokenizer.apply_chat_template([ASKED, SAID], tokenize=False, date_string="tomorrow")
    assert "Today: tomorrow" in given, "who renders may still give a date"


@pytest.mark.parametrize("form", ["%d %b %Y", "%Y-%m-%d", "%A, %B %-d, %y", "%H:%M:%S", "100%%", "%j %W"])
def test_every_form_of_a_date_is_that_of_the_clock(form, clock):
    source = "{{ strftime_now('" + form + "') }}"
    tokenizer = tokenizer_of(replace(FAMILIES["phi4"], source=source))
    tokenizer.chat_template = fix_template(source, today=date(2024, 5, 6))
    clock(2025, 12, 31)
    assert tokenizer.apply_chat_template([ASKED], tokenize=False) == datetime(2024, 5, 6).strftime(form)


@pytest.mark.parametrize("source", [LLAMA3, QWEN3, "\n  {{ messages[0].content }}", "{% if x %}\n{% endif %} a"])
def test_what_is_written_in_front_of_a_template_leaves_no_trace(source, clock):
    clock(2024, 5, 6)
    tokenizer = tokenizer_of(replace(FAMILIES["phi4"], source=source))
    before = tokenizer.apply_chat_template([ASKED, SAID], tokenize=False, enable_thinking=False)
    marked = source + "{# enable_thinking strftime_now #}"
    fixed = fix_template(marked, thinking="strip", today=date(2024, 5, 6))
    assert fixed.endswith(marked) != (fixed == marked)
    tokenizer.chat_template = fixed
    assert tokenizer.apply_chat_template([ASKED, SAID], tokenize=False) == before
    assert not writes_date(fixed)
    assert fix_template(fixed, thinking="strip", today=date(2025, 1, 1)) == fixed


def test_fixing_reaches_every_template_of_a_tokenizer_that_has_several():
    tokenizer = tokenizer_of(FAMILIES["llama3"])
    tokenizer.chat_template = {"default": LLAMA3, "tool_use": LLAMA3}
    assert fix_tokenizer(tokenizer, "keep", date(2024, 5, 6))
    assert not any(map(writes_date, tokenizer.chat_template.values()))
    assert "06 May 2024" in tokenizer.apply_chat_template([ASKED], tools=TOOLS, tokenize=False)
