"""Chats in rows: whatever form turns, calls and tools come in, templates get the one that they are written for."""

import json
from dataclasses import replace

import pyarrow
import pytest
from chat_templates import FAMILIES, tokenizer_of
from pyarrow import parquet
from test_data import SKIP, write
from test_templates import stretches

from qlora_kit.data import Chat, Completion, Faults, encode_turns, load_rows, read_row, split_eval
from qlora_kit.data.examples import conversations
from qlora_kit.errors import DataError

ASKED = {"role": "user", "content": "where?"}
SAID = {"role": "assistant", "content": "on the mat"}
TOOL_FAMILIES = [name for name, family in FAMILIES.items() if family.called is not None]


def called(name, arguments):
    """A turn that calls a tool."""
    return {
        "role": "assistant",
        "tool_calls": [{"type": "function", "function": {"name": name, "arguments": arguments}}],
    }


def tool(name, **properties):
    return {"type": "function", "function": {"name": name, "parameters": {"type": "object", "properties": properties}}}


def tool_row(name, arguments, **properties):
    """A chat that calls a tool, and the tool."""
    return {
        "messages": [ASKED, called(name, arguments), {"role": "tool", "content": "noon"}, SAID],
        "tools": [tool(name, **properties)],
    }


def ids_of(example, family):
    return [row.input_ids for row in encode_turns(example, tokenizer_of(FAMILIES[family]))]


# ---- nulls ---------------------------------------------------------------------------------------------------------

TEXT = {"type": "string"}
MIXED = [tool_row("weather", {"city": "Rome"}, city=TEXT), tool_row("clock", {"zone": {"name": "CET"}}, zone=TEXT)]


@pytest.mark.parametrize("family", TOOL_FAMILIES)
def test_a_table_gives_the_ids_of_the_rows_that_it_was_made_of_though_it_fills_keys_with_null(family, tmp_path):
    parquet.write_table(pyarrow.Table.from_pylist(MIXED), tmp_path / "a.parquet")
    filled = parquet.read_table(tmp_path / "a.parquet").to_pylist()[0]
    assert filled["messages"][1]["tool_calls"][0]["function"]["arguments"] == {"city": "Rome", "zone": None}
    rows = [load_rows(path) for path in (write(tmp_path / "a.jsonl", *MIXED), tmp_path / "a.parquet")]
    assert rows[0] == rows[1]
    plain, from_table = ([ids_of(row, family) for row in each] for each in rows)
    assert plain == from_table
    assert "null" not in tokenizer_of(FAMILIES[family]).decode(from_table[0][0])


def test_nulls_in_lists_stay_and_keys_that_hold_null_go_at_every_depth():
    schema = {"enum": ["a", None], "default": None, "anyOf": [{"type": "string", "pattern": None}]}
    row = tool_row("clock", {"zones": [None, {"name": None}], "at": None}, zone=schema)
    chat = read_row(row, "f:1")
    assert chat.messages[1]["tool_calls"][0]["function"]["arguments"] == {"zones": [None, {}]}
    assert chat.tools == [tool("clock", zone={"enum": ["a", None], "anyOf": [TEXT]})]


def test_a_row_that_is_nested_without_end_is_a_fault_with_its_place():
    deep = []
    for _ in range(2000):
        deep = [deep]
    with pytest.raises(DataError, match=r"^f:1: objects and lists are nested too deep"):
        read_row({"messages": [ASKED, called("clock", {"zone": deep})]}, "f:1")


# ---- calls and tools as JSON texts ---------------------------------------------------------------------------------

ARGUMENTS = {"city": "Málaga", "days": [1, 2]}
AS_TEXT = json.dumps(ARGUMENTS, ensure_ascii=False)
ONE_CALL = "{%- for m in messages -%}{%- if m.tool_calls -%}{%- set given = m.tool_calls[0].function.arguments -%}"
FORMS = {
    "joined": "{{- 'call' + given + '!' -}}",
    "joined by tildes": "{{- 'call' ~ given ~ '!' -}}",
    "printed": "call{{ given }}!",
    "text or object": "{{- 'call' + (given if given is string else given | tojson) + '!' -}}",
    "object": "{{- 'call' + given | tojson + '!' -}}",
    "walked through": "{{- 'call{' -}}{%- for name, value in given.items() -%}{{- '\"' + name + '\": ' + value | tojson"
    " -}}{%- if not loop.last -%}{{- ', ' -}}{%- endif -%}{%- endfor -%}{{- '}!' -}}",
    "trimmed": "{{- 'call' + given | string | trim + '!' -}}",
}


@pytest.mark.parametrize("family", TOOL_FAMILIES)
def test_arguments_and_tools_as_json_texts_are_rendered_as_the_objects_that_they_are(family):
    plain = tool_row("weather", {"city": "Málaga"}, city=TEXT)
    texts = {**plain, "tools": json.dumps(plain["tools"])}
    texts["messages"] = [ASKED, called("weather", '{"city":"Málaga"}'), *plain["messages"][2:]]
    tokenizer = tokenizer_of(FAMILIES[family])
    whole, as_is = (
        tokenizer.apply_chat_template(row["messages"], tools=plain["tools"], tokenize=False) for row in (plain, texts)
    )
    assert "\\" in as_is, "a template that is given the text writes it in quotes, once more"
    assert ids_of(read_row(texts, "f:1"), family) == ids_of(read_row(plain, "f:1"), family)
    (*_, last) = encode_turns(read_row(texts, "f:1"), tokenizer)
    assert whole.startswith(tokenizer.decode(last.input_ids))


@pytest.mark.parametrize("form", FORMS)
def test_templates_that_take_text_and_those_that_take_an_object_write_the_same_arguments(form):
    template = ONE_CALL + FORMS[form] + "{%- else -%}{{- m.content + '<|im_end|>' -}}{%- endif -%}{%- endfor -%}"
    tokenizer = tokenizer_of(replace(FAMILIES["phi4"], source=template))
    for arguments in (AS_TEXT, ARGUMENTS):
        (row,) = encode_turns(read_row({"messages": [ASKED, called("weather", arguments)]}, "f:1"), tokenizer)
        assert tokenizer.decode(row.input_ids) == f"where?<|im_end|>call{AS_TEXT}!"


def test_a_call_without_what_stands_around_it_is_read_like_one_with_it_and_a_text_keeps_its_nulls():
    bare = {"name": "weather", "arguments": '{"city": null}'}
    chat = read_row({"messages": [ASKED, {"role": "assistant", "tool_calls": [bare]}]}, "f:1")
    assert chat.messages[1]["tool_calls"] == [{"name": "weather", "arguments": {"city": None}}]


def test_tools_of_a_table_of_text_are_read_and_none_are_none():
    row = {"messages": [ASKED, SAID]}
    assert read_row({**row, "tools": json.dumps([tool("clock")])}, "f:1").tools == [tool("clock")]
    assert [read_row({**row, "tools": none}, "f:1").tools for none in ("", "[]", [], None)] == [None] * 4


@pytest.mark.parametrize(
    ("row", "fault"),
    [
        ({"messages": [ASKED, called("w", "Rome")]}, r"function.arguments in turn 2 is text \('Rome'\), .* not JSON: "),
        ({"messages": [ASKED, called("w", "[1]")]}, r"in turn 2 is text \('\[1\]'\), wanted an object, or the JSON of"),
        (
            {"messages": [ASKED, called("w", [1])]},
            r"function.arguments in turn 2 is a list \(\[1\]\), wanted an object",
        ),
        ({"messages": [ASKED, called("w", r'{"a": "\ud800"}')]}, "function.arguments in turn 2 holds half of a surrog"),
        (
            {"messages": [ASKED, called("w", '{"a": 1, "a": 2}')]},
            r"in turn 2: the key 'a' appears twice \(1 and 2\): keep",
        ),
        ({"messages": [ASKED, SAID | {"tool_calls": "w"}]}, r"tool_calls of turn 2 is text \('w'\), wanted a list of"),
        (
            {"messages": [ASKED, SAID | {"tool_calls": ["w"]}]},
            "tool_calls of turn 2 is a list .*, wanted a list",
        ),
        ({"messages": [ASKED, SAID], "tools": "clock"}, r"column 'tools' is text \('clock'\), which is not JSON: "),
        ({"messages": [ASKED, SAID], "tools": '"a"'}, r"column 'tools' is text .*, wanted a list of objects, or the J"),
        ({"messages": [ASKED, SAID], "tools": "[" * 3000}, "objects and lists are nested too deep"),
    ],
)
def test_a_text_that_is_not_the_json_of_what_is_wanted_is_a_fault_of_the_row(row, fault):
    with pytest.raises(DataError, match=r"^f\.jsonl:3: .*" + fault):
        read_row(row, "f.jsonl:3")


# ---- contents and roles --------------------------------------------------------------------------------------------


def parts(*texts):
    return [{"type": "text", "text": text} for text in texts]


def test_parts_of_text_are_joined_as_they_stand():
    row = {"messages": [ASKED | {"content": parts("whe", "re?")}, SAID | {"content": parts("on the mat")}]}
    assert read_row(row, "f:1") == Chat([ASKED, SAID])


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        ([*parts("where?"), {"type": "image_url", "image_url": {"url": "a.png"}}],
         "content of turn 1 has a part of type 'image_url', and only text can be trained: leave the row out"),
        ([{"type": "text"}], "text in the content of turn 1 is null, wanted text"),
        ([{"image": "a.png"}], r"content of turn 1 is a list .*, wanted text, or a list of parts with type and text"),
    ],
)  # fmt: skip
def test_a_part_that_is_no_text_is_a_fault_by_its_name(content, fault):
    with pytest.raises(DataError, match=f"^f:1: {fault}$"):
        read_row({"messages": [{"role": "user", "content": content}, SAID]}, "f:1")


def test_a_developer_speaks_as_the_system():
    rules = {"role": "developer", "content": "be a cat"}
    assert read_row({"messages": [rules, ASKED, SAID]}, "f:1").messages[0] == rules | {"role": "system"}


# ---- a prompt and a completion of turns ----------------------------------------------------------------------------

GIVEN = [{"role": "system", "content": "be a cat"}, ASKED, {"role": "assistant", "content": "hm"}, ASKED]
LEARNT = [SAID, ASKED, {"role": "assistant", "content": "the cat"}]


@pytest.mark.parametrize("family", FAMILIES)
def test_of_a_completion_of_turns_its_answers_are_learnt_and_none_of_its_prompt(family):
    tokenizer, said = tokenizer_of(FAMILIES[family]), FAMILIES[family].said
    plain, parted = ({"messages": GIVEN + LEARNT}, {"prompt": GIVEN, "completion": LEARNT})
    learnt = [
        [text for row in encode_turns(read_row(each, "f:1"), tokenizer) for text in stretches(row, tokenizer)]
        for each in (plain, parted)
    ]
    assert learnt[0] == [said(text) + FAMILIES[family].end for text in ("hm", "on the mat", "the cat")]
    assert learnt[1] == learnt[0][1:]


def test_a_text_beside_turns_is_a_turn_and_the_last_answer_alone_or_all_can_be_learnt():
    turns = read_row({"prompt": [ASKED], "completion": [SAID]}, "f:1")
    assert turns == Chat([ASKED, SAID], given=1)
    assert read_row({"prompt": "where?", "completion": [SAID]}, "f:1") == turns
    assert read_row({"prompt": [ASKED], "completion": "on the mat"}, "f:1") == turns
    assert read_row({"prompt": "where?", "completion": "on the mat"}, "f:1") == Completion("where?", "on the mat")
    tokenizer, parted = tokenizer_of(FAMILIES["phi4"]), read_row({"prompt": GIVEN, "completion": LEARNT}, "f:1")
    assert parted.given == len(GIVEN)
    for loss_on in ("last", "all"):
        assert encode_turns(parted, tokenizer, loss_on=loss_on) == encode_turns(
            replace(parted, given=0), tokenizer, loss_on=loss_on
        )


def test_a_chat_is_held_out_or_not_whichever_of_its_turns_are_given():
    chats = [Chat([ASKED, SAID | {"content": str(n)}]) for n in range(40)]
    held = split_eval(chats, share=0.2)[1]
    assert 0 < len(held) < len(chats)
    given = split_eval([replace(chat, given=1) for chat in chats], share=0.2)[1]
    assert [chat.messages for chat in given] == [chat.messages for chat in held]


def test_a_completion_without_an_answer_is_refused_whatever_the_prompt_says():
    with pytest.raises(DataError, match=r"^f:1: no assistant turn: nothing to learn from"):
        read_row({"prompt": [ASKED, SAID], "completion": [ASKED]}, "f:1")
    with pytest.raises(DataError, match=r"^f:1: completion is empty"):
        read_row({"prompt": [ASKED], "completion": " "}, "f:1")


@pytest.mark.parametrize("weights", [(0, 1, 1), (1, 0, 1), (1, 1, 0), (0, 1, 0), (1, 0, 0), (0, 0, 1), (0.0, None, 0)])
@pytest.mark.parametrize("family", ["llama3", "phi4", "marked", "qwen3", "deepseek"])
def test_answers_of_weight_zero_are_not_learnt_wherever_they_stand(weights, family):
    """As OpenAI's interface has it: 1 or no weight at all is learnt."""
    words = ("on the mat", "the cat", "at noon")
    answers = [SAID | {"content": text, "weight": weight} for text, weight in zip(words, weights, strict=True)]
    turns = [turn for answer in answers for turn in (ASKED, answer)]
    tokenizer, form = tokenizer_of(FAMILIES[family]), FAMILIES[family]
    expected = [form.said(text) + form.end for text, weight in zip(words, weights, strict=True) if weight != 0]
    for row in ({"messages": turns}, {"conversations": turns}, {"prompt": turns[:1], "completion": turns[1:]}):
        rows = encode_turns(read_row(row, "f:1"), tokenizer)
        assert [text for each in rows for text in stretches(each, tokenizer)] == expected
        assert not any(each.odd for each in rows)
        (*_, last) = encode_turns(read_row(row, "f:1"), tokenizer, loss_on="last")
        assert stretches(last, tokenizer) == expected[-1:]


def test_weights_that_cannot_be_kept_are_refused():
    silent = {**SAID, "weight": 0}
    with pytest.raises(DataError, match=r"^f:1: every assistant turn has weight 0: nothing to learn"):
        read_row({"messages": [ASKED, silent]}, "f:1")
    with pytest.raises(DataError, match=r"^f:1: every assistant turn has weight 0: nothing to learn"):
        read_row({"prompt": [ASKED, SAID, ASKED], "completion": [silent]}, "f:1")
    with pytest.raises(DataError, match=r"^f:1: turn 2 has weight 0.5, wanted 0 .* or 1"):
        read_row({"messages": [ASKED, {**SAID, "weight": 0.5}]}, "f:1")
    with pytest.raises(DataError, match=r"^f:1: turn 2 has weight '0', wanted 0 .* or 1"):
        read_row({"messages": [ASKED, {**SAID, "weight": "0"}]}, "f:1")


# ---- a system's words and tools in columns of their own ------------------------------------------------------------

RULES = {"role": "system", "content": "be a cat"}
ANSWERS = {"chosen": SAID, "rejected": SAID | {"content": "hm"}}
IN_TURNS = {
    "messages": ("sft", {"messages": [ASKED, SAID]}),
    "conversations": ("sft", {"conversations": [ASKED, SAID]}),
    "alpaca": ("sft", {"instruction": "where?", "output": "on the mat"}),
    "turns": ("sft", {"prompt": [ASKED], "completion": [SAID]}),
    "texts": ("sft", {"prompt": "where?", "completion": "on the mat"}),
    "pair of turns": ("dpo", {"prompt": [ASKED], **{name: [turn] for name, turn in ANSWERS.items()}}),
    "pair of texts": ("dpo", {"prompt": "where?", **{name: turn["content"] for name, turn in ANSWERS.items()}}),
    "verdict on turns": ("kto", {"messages": [ASKED, SAID], "label": True}),
    "verdict on a text": ("kto", {"prompt": "where?", "completion": "on the mat", "label": True}),
}


@pytest.mark.parametrize("kind", IN_TURNS)
def test_a_system_text_and_tools_beside_any_row_stand_in_its_chat(kind):
    task, row = IN_TURNS[kind]
    tools = [tool("clock", zone=TEXT)]
    found = read_row({**row, "system": "be a cat", "tools": json.dumps(tools)}, "f:1", task=task)
    for part in conversations(found):
        assert isinstance(part, Chat)
        assert part.messages[:2] == [RULES, ASKED]
        assert len(part.messages) == 3
        assert part.tools == tools
        assert part.given in (0, 2)


@pytest.mark.parametrize("kind", IN_TURNS)
def test_an_empty_system_text_is_none_and_its_row_is_a_chat_like_the_others_of_its_table(kind):
    task, row = IN_TURNS[kind]
    for part in conversations(read_row({**row, "system": ""}, "f:1", task=task)):
        assert isinstance(part, Chat)
        assert part.messages[0] == ASKED


def test_a_system_text_that_stands_in_the_turns_too_is_taken_once_and_another_is_refused():
    row = {"messages": [RULES, ASKED, SAID], "system": "be a cat"}
    assert read_row(row, "f:1") == Chat([RULES, ASKED, SAID])
    with pytest.raises(DataError, match=r"^f:1: column 'system' .*'be a dog'.* the first turn .*: keep one"):
        read_row(row | {"system": "be a dog"}, "f:1")


# ---- turns before ---------------------------------------------------------------------------------------------------


def test_the_history_of_an_alpaca_row_stands_before_its_question_and_its_answers_are_learnt():
    row = {"instruction": "where?", "output": "on the mat", "history": [["hello", "hi"], ["who?", "a cat"]]}
    found = read_row(row | {"system": "be a cat"}, "f:1")
    spoken = [(turn["role"], turn["content"]) for turn in found.messages]
    assert spoken == [
        ("system", "be a cat"), ("user", "hello"), ("assistant", "hi"), ("user", "who?"), ("assistant", "a cat"),
        ("user", "where?"), ("assistant", "on the mat"),
    ]  # fmt: skip
    assert found.given == 0
    for none in (None, [], ""):
        assert len(read_row(row | {"history": none}, "f:1").messages) == 2


@pytest.mark.parametrize("history", ["hello", [["hello"]], ["hi"], [["a", 1]], {"a": "b"}])
def test_a_history_that_is_no_list_of_pairs_is_refused(history):
    with pytest.raises(DataError, match=r"^f:1: history"):
        read_row({"instruction": "where?", "output": "on the mat", "history": history}, "f:1")


# ---- characters ----------------------------------------------------------------------------------------------------

HALF = "a\ud800b"


@pytest.mark.parametrize(
    ("column", "row"),
    [
        ("messages", {"messages": [ASKED, called("clock", {"zone": HALF})]}),
        ("messages", {"messages": [ASKED, called("clock", {HALF: "zone"})]}),
        ("messages", {"messages": [ASKED, SAID | {"reasoning_content": HALF}]}),
        ("messages", {"messages": [ASKED, SAID | {"content": HALF}]}),
        ("tools", {"messages": [ASKED, SAID], "tools": [tool(HALF)]}),
        ("tools", {"instruction": "the", "output": "cat", "tools": [tool(HALF)]}),
        ("system", {"conversations": [ASKED, SAID], "system": HALF}),
    ],
)
def test_half_a_character_anywhere_in_a_row_is_a_fault_with_its_line_that_can_be_skipped(column, row, tmp_path):
    path = write(tmp_path / "a.jsonl", {"messages": [ASKED, SAID]}, row)
    with pytest.raises(DataError) as refused:
        load_rows(path)
    assert str(refused.value) == (
        f"{path}:2: column {column!r} holds half of a surrogate pair ('a\\ud800b'), which is not a character{SKIP}"
    )
    faults = Faults()
    assert len(load_rows(path, faults=faults)) == faults.count == 1


def test_half_a_character_in_a_column_that_is_not_read_is_nobodys_business():
    assert read_row({"text": "the cat", "id": HALF}, "f:1").text == "the cat"
