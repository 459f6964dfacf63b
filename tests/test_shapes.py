"""Rows in the shapes of well-known data sets: taken as they are meant, or refused with what to write instead."""

import json

import pytest
from chat_templates import FAMILIES, tokenizer_of
from test_chat_rows import ASKED, SAID, called, tool
from test_templates import stretches

from qlora_kit.data import encode_turns, read_row
from qlora_kit.errors import DataError


def spoken(row, **options):
    """Who says what in the chat of a row."""
    return [(turn["role"], turn.get("content")) for turn in read_row(row, "f:1", **options).messages]


ALTERNATING = [("user", "where?"), ("assistant", "on the mat"), ("user", "who?"), ("assistant", "the cat")]


# ---- turns ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "role"),
    [
        ("chatgpt", "assistant"), ("bing", "assistant"), ("bard", "assistant"), ("model", "assistant"),
        ("Chatbot", "assistant"), ("User", "user"), ("prompter", "user"), ("System", "system"),
        ("function", "tool"), ("ipython", "tool"), ("observation", "tool"),
    ],
)  # fmt: skip
def test_speakers_of_other_programs_are_the_four_that_templates_know(name, role):
    turns = [{"from": "system", "value": "x"}, ASKED, {"from": name, "value": "said"}, ASKED, SAID]
    assert spoken({"conversations": turns})[2] == (role, "said")


@pytest.mark.parametrize(
    "turns",
    [
        ["where?", "on the mat", "who?", "the cat"],
        [{"input": "where?", "output": "on the mat"}, {"input": "who?", "output": "the cat"}],
        [{"human": "where?", "assistant": "on the mat"}, {"human": "who?", "assistant": "the cat"}],
        [{"role": "user", "parts": [{"text": "where?"}]},
         {"role": "model", "parts": [{"text": "on the "}, {"text": "mat"}]},
         {"author": "user", "content": "who?"}, {"author": "bot", "content": [{"text": "the cat"}]}],
    ],
    ids=["texts", "inputs and outputs", "humans and assistants", "parts and authors"],
)  # fmt: skip
@pytest.mark.parametrize("column", ["messages", "conversations"])
def test_texts_that_alternate_and_pairs_and_parts_are_turns(turns, column):
    assert spoken({column: turns}) == ALTERNATING


def test_a_list_of_answers_is_no_dialogue():
    """Only in a column of turns do texts alternate: a list of texts beside a prompt may be several answers to it."""
    for row, task in (
        ({"prompt": "where?", "completion": ["on the mat", "no idea"]}, "sft"),
        ({"prompt": "where?", "chosen": ["on the mat", "here"], "rejected": ["no idea", "?"]}, "dpo"),
    ):
        with pytest.raises(DataError, match=r"^f:1: turn 1 is text"):
            read_row(row, "f:1", task=task)


def test_the_systems_words_may_be_parts():
    assert spoken({"messages": [ASKED, SAID], "system": [{"text": "be a "}, {"text": "cat"}]})[0] == (
        "system",
        "be a cat",
    )


CALL = {"name": "clock", "arguments": '{"zone": "UTC"}'}
CALLED = called("clock", {"zone": "UTC"})


@pytest.mark.parametrize(
    "turn",
    [
        {"role": "assistant", "content": None, "function_call": CALL},
        {"role": "assistant", "content": "", "function_call": CALL},
        {"from": "function_call", "value": json.dumps({"name": "clock", "arguments": {"zone": "UTC"}})},
        {"from": "function_call", "value": json.dumps([CALL])},
    ],
    ids=["OpenAI's first form", "beside an empty text", "a turn of its own", "a list in a turn"],
)
@pytest.mark.parametrize("family", ["llama3", "qwen3"])
def test_a_call_in_another_form_is_learnt_as_a_call(turn, family):
    tools = [tool("clock", zone={"type": "string"})]
    after = [{"role": "function", "name": "clock", "content": "noon"}, SAID]
    expected = [ASKED, CALLED, {"role": "tool", "content": "noon"}, SAID]
    found = read_row({"messages": [ASKED, turn, *after], "tools": tools}, "f:1")
    assert found.messages[1]["tool_calls"] == CALLED["tool_calls"]
    tokenizer = tokenizer_of(FAMILIES[family])
    learnt, meant = (
        [text for row in encode_turns(each, tokenizer) for text in stretches(row, tokenizer)]
        for each in (found, read_row({"messages": expected, "tools": tools}, "f:1"))
    )
    assert len(meant) == 2
    assert learnt == meant


def test_functions_are_tools_in_openais_first_form():
    functions = [tool("clock", zone={"type": "string"})["function"]]
    row = {"messages": [ASKED, {"role": "assistant", "function_call": CALL}], "functions": functions}
    assert read_row(row, "f:1").tools == [tool("clock", zone={"type": "string"})]
    with pytest.raises(DataError, match=r"^f:1: column 'functions' is text \('clock'\), which is not JSON"):
        read_row(row | {"functions": "clock"}, "f:1")


def test_a_call_that_is_none_is_refused():
    with pytest.raises(DataError, match=r"^f:1: the call in turn 2 is text \('clock\(\)'\), which is not JSON"):
        read_row({"conversations": [ASKED, {"from": "function_call", "value": "clock()"}]}, "f:1")
    with pytest.raises(DataError, match=r"^f:1: tool_calls of turn 2 is a list .*, wanted a list of objects"):
        read_row({"conversations": [ASKED, {"from": "function_call", "value": '["clock"]'}]}, "f:1")
