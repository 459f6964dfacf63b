"""Rows in the shapes of well-known data sets: taken as they are meant, or refused with what to write instead."""

import json
import shlex

import pytest
from chat_templates import FAMILIES, tokenizer_of
from test_chat_rows import ASKED, SAID, called, tool
from test_data import write
from test_templates import stretches

from qlora_kit.data import Chat, Completion, Labelled, Preference, Text, encode_turns, load_rows, read_row
from qlora_kit.data.prompts import renamed
from qlora_kit.errors import DataError
from qlora_kit.recipe import read_recipe


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
    for same in (json.dumps(functions), row["functions"] + [tool("weather")["function"]]):
        assert read_row(row | {"functions": same}, "f:1").tools[0] == tool("clock", zone={"type": "string"})


def test_functions_that_are_wrapped_already_are_not_wrapped_twice():
    wrapped, bare = tool("clock", zone={"type": "string"}), tool("weather")
    for functions in ([wrapped, bare["function"]], json.dumps([wrapped, bare["function"]])):
        assert read_row({"messages": [ASKED, SAID], "functions": functions}, "f:1").tools == [wrapped, bare]


@pytest.mark.parametrize(
    "value",
    ["", "math", "[sort]", "5", '{"name": "clock"}', '["sort"]', ["sort"], {"name": "clock"}, 3, True, [{"id": "1"}],
     [{"name": "clock"}, "sort"], [{"name": 5}], [{"type": "function", "function": "clock"}],
     pytest.param("[" * 100_000, id="nested deeply")],
    ids=str,
)  # fmt: skip
def test_a_column_functions_of_something_else_is_not_read(value):
    for row, task in (
        ({"instruction": "where?", "output": "on the mat"}, "sft"),
        ({"messages": [ASKED, SAID]}, "sft"),
        ({"prompt": "where?", "completion": "on the mat"}, "sft"),
        ({"prompt": "where?", **PAIR}, "dpo"),
    ):
        assert read_row(row | {"functions": value}, "f:1", task=task) == read_row(row, "f:1", task=task)


def test_an_empty_list_of_functions_makes_a_chat_as_others_of_its_table_do():
    for none in ([], "[]"):
        row = {"prompt": "where?", "completion": "on the mat", "functions": none}
        assert read_row(row, "f:1") == Chat(TURNS, given=1)


def test_functions_in_which_a_key_would_be_lost_are_refused():
    with pytest.raises(DataError, match=r"^f:1: column 'functions': the key 'name' appears twice"):
        read_row({"messages": [ASKED, SAID], "functions": '[{"name": "clock", "name": "sort"}]'}, "f:1")


NO_CALL = {"name": None, "arguments": None}


def test_a_call_of_nulls_as_tables_fill_them_in_is_none():
    turns = [{"role": "system", "content": "be a cat"}, ASKED, SAID]
    found = read_row({"messages": [turn | {"function_call": NO_CALL} for turn in turns], "system": "be a cat"}, "f:1")
    assert found.messages == turns


def test_a_call_in_the_first_form_counts_for_the_assistant_alone_and_not_beside_calls_in_the_later_one():
    later = called("weather", {"city": "Rome"})
    turns = [ASKED | {"function_call": CALL}, later | {"function_call": CALL}, SAID]
    assert read_row({"messages": turns}, "f:1").messages == [ASKED, later, SAID]
    unused = {"role": "assistant", "content": "", "tool_calls": [], "function_call": CALL}
    assert read_row({"messages": [ASKED, unused]}, "f:1").messages[1]["tool_calls"] == CALLED["tool_calls"]


@pytest.mark.parametrize("calls", [{"function_call": CALL}, {"tool_calls": CALLED["tool_calls"]}])
@pytest.mark.parametrize("column", [{}, {"system": "be a cat"}])
def test_a_system_turn_has_words_whatever_it_calls(calls, column):
    turns = [{"role": "system", "content": None, **calls}, ASKED, SAID]
    with pytest.raises(DataError, match=r"^f:1: content of turn 1 is null, wanted text"):
        read_row({"messages": turns, **column}, "f:1")


def test_a_call_that_is_none_is_refused():
    with pytest.raises(DataError, match=r"^f:1: the call in turn 2 is text \('clock\(\)'\), which is not JSON"):
        read_row({"conversations": [ASKED, {"from": "function_call", "value": "clock()"}]}, "f:1")
    with pytest.raises(DataError, match=r"^f:1: tool_calls of turn 2 is a list .*, wanted a list of objects"):
        read_row({"conversations": [ASKED, {"from": "function_call", "value": '["clock"]'}]}, "f:1")


# ---- maps ----------------------------------------------------------------------------------------------------------


def test_a_map_reads_what_stands_in_an_object_or_a_list():
    row = {"translation": {"en": "cat", "de": "Katze"}, "answers": {"text": ["on the mat"]}, "question": "where?"}
    columns = {"instruction": "translation.en", "output": "translation.de"}
    assert spoken(row, columns=columns) == [("user", "cat"), ("assistant", "Katze")]
    columns = {"prompt": "question", "completion": "answers.text.0"}
    assert read_row(row, "f:1", columns=columns) == Completion("where?", "on the mat")
    assert read_row({"a.b": "dotted", "a": {"b": "nested"}}, "f:1", columns={"text": "a.b"}) == Text("dotted")
    system = {"instruction": "question", "output": "answers.text.0", "system": "meta.system"}
    assert spoken(row | {"meta": None}, columns=system) == [("user", "where?"), ("assistant", "on the mat")]
    for path in ("answers.text.1", "answers.text.first", "question.0", "translation.fr"):
        with pytest.raises(DataError, match=rf"^f:1: column '{path}' \(data.columns maps it to text\) is missing"):
            read_row(row, "f:1", columns={"text": path})


def test_a_column_that_is_mapped_does_not_stand_under_its_own_name_as_well():
    row = {"input": "where?", "output": "on the mat"}
    assert spoken(row, columns={"instruction": "input"}) == [("user", "where?"), ("assistant", "on the mat")]
    assert renamed(row, [{"instruction": "input"}]) == {"instruction": "where?", "output": "on the mat"}


# ---- hints ---------------------------------------------------------------------------------------------------------

TURNS = [{"role": "user", "content": "where?"}, {"role": "assistant", "content": "on the mat"}]
PAIR = {"chosen": "on the mat", "rejected": "hm"}
MAPS = {
    "dolly": ("sft", {"instruction": "where?", "context": "a mat", "response": "on it", "category": "qa"},
              "{output: response, input: context}", "category"),
    "openorca": ("sft", {"id": "1", "system_prompt": "be a cat", "question": "where?", "response": "here"},
                 "{instruction: question, output: response, system: system_prompt}", "id"),
    "gsm8k": ("sft", {"question": "where?", "answer": "here"}, "{instruction: question, output: answer}", None),
    "in capitals": ("sft", {"Context": "where?", "Response": "here"}, "{instruction: Context, output: Response}", None),
    "metamath": ("sft", {"type": "x", "query": "where?", "original_question": "?", "response": "here"},
                 "{instruction: query, output: response}", "type, original_question"),
    "firefly": ("sft", {"kind": "x", "input": "where?", "target": "here"}, "{instruction: input, output: target}",
                "kind"),
    "helpsteer": ("sft", {"prompt": "where?", "response": "here", "helpfulness": 3},
                  "{instruction: prompt, output: response}", "helpfulness"),
    "cnn": ("sft", {"article": "long", "highlights": "short"}, "{instruction: article, output: highlights}", None),
    "spider": ("sft", {"question": "where?", "query": "SELECT 1"}, "{instruction: question, output: query}", None),
    "squad": ("sft", {"context": "a mat", "question": "where?", "answers": {"text": ["here"], "answer_start": [0]}},
              "{instruction: question, output: answers.text.0, input: context}", None),
    "xlam": ("sft", {"query": "where?", "answers": "[]", "tools": "[]"}, "{instruction: query, output: answers}", None),
    "capybara": ("sft", {"source": "x", "conversation": [{"input": "where?", "output": "here"}]},
                 "{messages: conversation}", "source"),
    "ultrachat": ("sft", {"id": "1", "data": ["where?", "here"]}, "{messages: data}", "id"),
    "gemini": ("sft", {"systemInstruction": {"role": "system", "parts": [{"text": "be a cat"}]}, "contents": TURNS},
               "{messages: contents, system: systemInstruction.parts}", None),
    "the stack": ("pretrain", {"ext": "py", "content": "def f(): pass"}, "{text: content}", "ext"),
    "a name with marks": ("classify", {"text: raw": "a cat", "label": 1}, '{text: "text: raw"}', None),
    "a name of a shell": ("classify", {"'; rm \"x\" #": "a cat", "label": 1}, '{text: "\'; rm \\"x\\" #"}', None),
    "a name that is a number": ("classify", {"0": "a cat", "label": 1}, '{text: "0"}', None),
    "a name that is nothing": ("classify", {"Null": "a cat", "label": 1}, '{text: "Null"}', None),
    "sst2": ("classify", {"idx": 1, "sentence": "a cat", "label": 1}, "{text: sentence}", "idx"),
    "sms": ("classify", {"sms": "a cat", "label": 1}, "{text: sms}", None),
    "go_emotions": ("classify", {"text": "a cat", "labels": [1, 2]}, "{label: labels}", None),
    "imdb": ("classify", {"review": "a cat", "sentiment": "positive"}, "{text: review, label: sentiment}", None),
    "intel orca": ("dpo", {"system": "be a cat", "question": "where?", **PAIR}, "{instruction: question}", None),
    "sharegpt": ("dpo", {"conversations": TURNS[:1], "chosen": TURNS[1], "rejected": {"from": "gpt", "value": "hm"}},
                 "{prompt: conversations}", None),
    "openai": ("dpo", {"input": {"messages": TURNS[:1], "tools": []}, "preferred_output": TURNS[1:],
                       "non_preferred_output": [{"role": "assistant", "content": "hm"}]},
               "{chosen: preferred_output, rejected: non_preferred_output, prompt: input.messages, tools: input.tools}",
               None),
    "kto": ("kto", {"instruction": "where?", "output": "here", "kto_tag": True},
            "{label: kto_tag, completion: output}", None),
}  # fmt: skip


@pytest.mark.parametrize("name", MAPS)
def test_a_row_of_other_names_is_refused_with_a_map_under_which_it_is_read(name):
    task, row, names, unread = MAPS[name]
    with pytest.raises(DataError) as caught:
        read_row(row, "f:1", task=task)
    told = str(caught.value)
    assert told.startswith("f:1: ")
    assert "\n" not in told
    setting = shlex.quote(f"data.columns={names}")
    assert told.endswith(f"; set {setting}" + ("" if unread is None else f" (not read: {unread})"))
    settings = [f"data.columns={names}", "base.model=x", "data.train=x.jsonl", f"train.task={task}"]
    read_row(row, "f:1", columns=read_recipe("default", settings).data.columns, task=task)


@pytest.mark.parametrize(
    ("row", "task", "words"),
    [
        ({"question": "where?", "choices": ["here", "there"], "answer": 1}, "sft",
         "missing the columns of any format; found columns: question, choices, answer; expected: "
         "messages, or conversations, or instruction "
         r"and output, or prompt and completion, or text \(data.columns maps other names\)$"),
        ({"id": "1", "translation": {"en": "cat", "de": "Katze"}}, "sft",
         "; data.columns reads what is in an object, too, as translation.en$"),
        ({"version": "1", "data": [{"instruction": "where?", "input": "", "output": "here"}]}, "sft",
         "; column 'data' holds the rows: save that list alone as the file$"),
        ({"premise": "a cat", "hypothesis": "a pet", "label": 0}, "classify",
         "; a class is told from one text: join premise, hypothesis in a column text$"),
        ({"where\twho": "here\tme"}, "sft", r"; columns are separated by '\\t': save the file with commas$"),
        ({"sentence": "a cat", "label": 1}, "dpo", r"expected: chosen, rejected \(data.columns maps other names\)$"),
    ],
)  # fmt: skip
def test_where_no_map_would_do_the_way_out_is_another(row, task, words):
    with pytest.raises(DataError, match=words):
        read_row(row, "f:1", task=task)


def test_a_map_is_no_way_out_of_a_fault_that_it_would_not_mend():
    for row in ({"instruction": "where?", "output": "", "response": ""}, {"prompt": "where?", "response": 5}):
        with pytest.raises(DataError) as caught:
            read_row(row, "f:1")
        assert "set 'data.columns" not in str(caught.value)


# ---- texts that are not all there is to learn ----------------------------------------------------------------------


def test_a_text_beside_its_answer_is_not_learnt_alone_unless_that_is_asked_for():
    row = {"text": "a long bill", "summary": "a bill", "title": "bill"}
    with pytest.raises(DataError, match=r"^f:1: column 'text' would be learnt without 'summary': set 'data.columns="):
        read_row(row, "f:1")
    assert spoken(row, columns={"instruction": "text", "output": "summary"})[1] == ("assistant", "a bill")
    for options in ({"format": "text"}, {"task": "pretrain"}, {"columns": {"text": "text"}}):
        assert read_row(row, "f:1", **options) == Text("a long bill")
    assert read_row({"text": "q: where? a: here", "question": "where?", "answer": "here"}, "f:1") == Text(
        "q: where? a: here"
    ), "a text beside a question and its answer is both, written out"
    for beside in ({"answer": "a long"}, {"code": "de"}, {"target": "1"}, {"source": "web", "role": "Model"}):
        assert read_row({"text": "a long bill", **beside}, "f:1") == Text("a long bill")


def test_a_turn_that_is_a_row_of_its_own_is_not_learnt_as_a_text_unless_that_is_asked_for():
    row = {"message_id": "1", "parent_id": None, "text": "where?", "role": "prompter"}
    with pytest.raises(
        DataError, match=r"^f:1: the row is one turn of a conversation: write a conversation as one row"
    ):
        read_row(row, "f:1")
    for options in ({"format": "text"}, {"task": "pretrain"}):
        assert read_row(row, "f:1", **options) == Text("where?")


@pytest.mark.parametrize(
    ("row", "task"),
    [
        ({"messages": [ASKED], "metadata": {"score": 1}}, "sft"),
        ({"prompt": "where?", "completion": "", "documents": [{"text": "a mat"}]}, "sft"),
        ({"conversations": [ASKED], "prompt": "where?", "response": "here"}, "sft"),
        ({"text": "where?", "label": -1, "title": "mats"}, "classify"),
    ],
)
def test_a_row_of_a_format_with_a_fault_in_it_is_told_that_fault_alone(row, task):
    with pytest.raises(DataError) as caught:
        read_row(row, "f:1", task=task)
    assert "data.columns" not in str(caught.value)
    assert not any(word in str(caught.value) for word in ("metadata", "documents", "join"))


def test_questions_alone_are_no_dialogue():
    with pytest.raises(DataError) as caught:
        read_row({"turns": ["where?", "and then?"], "question_id": 81}, "f:1")
    assert "messages: turns" not in str(caught.value)


def test_no_place_has_thousands_of_digits():
    with pytest.raises(DataError, match=r"is missing"):
        read_row({"a": ["x"]}, "f:1", columns={"text": f"a.{'9' * 5000}"})


def test_what_a_map_reaches_into_is_not_read_as_a_whole():
    row = {"input": {"text": "where?"}, "output": "on the mat"}
    assert spoken(row, columns={"instruction": "input.text"}) == [("user", "where?"), ("assistant", "on the mat")]


# ---- preferences ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("instruction", [7, ["x"], "rate these"])
def test_conversations_that_are_judged_have_their_own_question_whatever_an_instruction_beside_them_is(instruction):
    good, bad = [ASKED, SAID], [ASKED, {"role": "assistant", "content": "no idea"}]
    for row, task in (({"chosen": good, "rejected": bad}, "dpo"), ({"messages": good, "label": True}, "kto")):
        assert read_row({"instruction": instruction, **row}, "f:1", task=task) == read_row(row, "f:1", task=task)


def test_an_alpaca_question_is_answered_by_a_pair_or_with_a_verdict():
    found = read_row({"instruction": "where?", "input": "a mat", **PAIR}, "f:1", task="dpo")
    asked = {"role": "user", "content": "where?\n\na mat"}
    assert found == Preference(
        *(Chat([asked, {"role": "assistant", "content": PAIR[name]}]) for name in ("chosen", "rejected"))
    )
    row = {"instruction": "where?", "input": "a mat", "completion": "hm", "label": False}
    answer = {"role": "assistant", "content": "hm"}
    assert read_row(row, "f:1", task="kto") == Labelled(Chat([asked, answer]), False)


@pytest.mark.parametrize(
    ("chosen", "rejected", "prompt"),
    [
        (" Hi", " He", "\n\nHuman: x\n\nAssistant:"),
        (" I see", " I do not", "\n\nHuman: x\n\nAssistant:"),
        (" b", " c", "\n\nHuman: x\n\nAssistant: a\n\nHuman: y\n\nAssistant:"),
    ],
)
def test_a_pair_of_dialogues_is_split_behind_the_last_answer_that_both_begin(chosen, rejected, prompt):
    found = read_row({"chosen": prompt + chosen, "rejected": prompt + rejected}, "f:1", task="dpo")
    assert found == Preference(Completion(prompt, chosen), Completion(prompt, rejected))


def test_dialogues_that_differ_before_their_last_turn_are_refused():
    shared, more = "\n\nHuman: x\n\nAssistant:", " a\n\nHuman: so?\n\nAssistant: b"
    with pytest.raises(DataError, match=r"^f:1: chosen and rejected differ before their last turn"):
        read_row({"chosen": shared + more, "rejected": shared + " c"}, "f:1", task="dpo")


def test_a_pair_of_texts_without_what_they_answer_is_refused():
    for row in ({"chosen": "The sky is blue", "rejected": "The sky is red"}, {"frage": "?", **PAIR}):
        with pytest.raises(DataError, match=r"^f:1: chosen is text .* and there is no column 'prompt'"):
            read_row(row, "f:1", task="dpo")


@pytest.mark.parametrize("weight", [0, 0.0])
def test_a_judged_answer_of_weight_zero_is_refused_and_earlier_ones_may_have_it(weight):
    """The answer before it would be learnt with its verdict."""
    silent = {"weight": weight}
    turns = [ASKED, SAID, ASKED, {"role": "assistant", "content": "no idea"}]
    before = [ASKED, SAID | silent, *turns[2:]]
    last = [*turns[:3], turns[3] | silent]
    other = [*turns[:3], {"role": "assistant", "content": "hm"}]
    told = "ends with an answer of weight 0, which is not learnt: take the weight away, or leave the row out$"
    for row, name, task in (
        ({"messages": last, "label": False}, "messages", "kto"),
        ({"prompt": turns[:3], "completion": last[3:], "label": True}, "completion", "kto"),
        ({"chosen": last, "rejected": other}, "chosen", "dpo"),
        ({"prompt": turns[:3], "chosen": other[3:], "rejected": last[3:]}, "rejected", "orpo"),
    ):
        with pytest.raises(DataError, match=rf"^f:1: {name} {told}"):
            read_row(row, "f:1", task=task)
    assert read_row({"messages": before, "label": False}, "f:1", task="kto") == Labelled(Chat(before), False)


@pytest.mark.parametrize("column", [{"system": "be a cat"}, {"system": ""}, {"tools": [tool("clock")]}])
def test_dialogues_as_texts_are_refused_beside_what_only_a_chat_has(column):
    """Else a user would say "Human:", and what the assistant said before."""
    shared = "\n\nHuman: x\n\nAssistant: a\n\nHuman: y\n\nAssistant:"
    (name,) = column
    told = rf"^f:1: chosen and rejected are dialogues in one text, beside {name}, .*: write them as lists of turns$"
    with pytest.raises(DataError, match=told):
        read_row({"chosen": shared + " b", "rejected": shared + " c", **column}, "f:1", task="dpo")


@pytest.mark.parametrize(
    "turns", [["where?", "on the mat"], [{"input": "where?", "output": "on the mat"}]], ids=["texts", "pairs"]
)
def test_texts_that_alternate_and_pairs_are_judged_as_the_turns_that_they_are(turns):
    found = read_row({"messages": turns, "label": True}, "f:1", task="kto")
    assert found == Labelled(Chat(TURNS), True)
    with pytest.raises(DataError, match=r"^f:1: turn 1 is text"):
        read_row({"prompt": "where?", "completion": ["on the mat", "hm"], "label": True}, "f:1", task="kto")


# ---- a single fault ------------------------------------------------------------------------------------------------


def test_a_single_bad_row_is_told_with_what_leaves_it_out(tmp_path):
    path = write(tmp_path / "a.jsonl", {"instruction": "where?", "output": "here"}, {"instruction": "?", "output": ""})
    with pytest.raises(
        DataError, match=r"a.jsonl:2: output is empty: nothing to learn from \(data.on_error=skip leaves"
    ):
        load_rows(path)


def test_a_class_that_is_not_known_is_refused_as_such():
    with pytest.raises(DataError, match=r"'label' is a number \(-1\), .*; -1 often says that the class is not known: "):
        read_row({"text": "a cat", "label": -1}, "f:1", task="classify")


# ---- texts that are joined as they stand ---------------------------------------------------------------------------


def test_a_question_that_runs_into_its_answer_is_told_of_and_one_that_does_not_is_not():
    tokenizer = tokenizer_of(FAMILIES["qwen2.5"])

    def is_told(row, task="sft", **options):
        (encoded,) = encode_turns(read_row(row, "f:1", task=task, **options), tokenizer)
        return any(sequence.odd == ("joined",) for sequence in encoded.sequences)

    asked = {"prompt": "Where is the key?", "completion": "Under the mat."}
    assert is_told(asked)
    assert is_told({"prompt": "钥匙在哪", "completion": "垫子下"})
    assert is_told({"prompt": "Where?", "chosen": "Here", "rejected": " Hm"}, task="dpo")
    assert not is_told(asked, columns={"instruction": "prompt", "output": "completion"})
    assert not is_told(
        {"prompt": "Where?", "chosen": "Here", "rejected": "Hm"}, "dpo", columns={"instruction": "prompt"}
    )
    for prompt, completion in (
        ("Where?", " Here"), ("Where?\n", "Here"), ("f(", "x)"), ("[/INST]", "Here"), ("A:", "B")
    ):  # fmt: skip
        assert not is_told({"prompt": prompt, "completion": completion})


# ---- folders -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("held_out", "is_refused"),
    [
        ("data/test-00000-of-00001.jsonl", True), ("validation.jsonl", True), ("dev/rows.jsonl", True),
        ("Val.jsonl", True), ("testimonials.jsonl", False), ("more.jsonl", False),
    ],
)  # fmt: skip
def test_rows_to_hold_out_are_not_trained_on_because_they_lie_in_the_same_folder(held_out, is_refused, tmp_path):
    for name in ("data/train-00000-of-00001.jsonl", held_out):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write(tmp_path / name, {"text": name})
    if not is_refused:
        assert len(load_rows(tmp_path)) == 2
        return
    with pytest.raises(DataError, match=r"holds rows to train on \(data/train-.*\) and to hold out .*: list the files"):
        load_rows(tmp_path)
    assert load_rows(tmp_path / held_out) == [Text(held_out)]


@pytest.mark.parametrize(
    ("names", "is_refused"),
    [
        (["test-driven/train.jsonl"], False), (["test/train.jsonl"], False), (["train/dev/rows.jsonl"], False),
        (["train-tickets.jsonl", "dev-ops.jsonl"], False), (["train.jsonl", "dev-ops.jsonl"], False),
        (["squad_train.jsonl", "squad_test.jsonl"], False), (["train.jsonl", "test2.jsonl"], False),
        (["train.jsonl", "test-2-cats.jsonl"], False), (["training.jsonl", "test.jsonl"], False),
        (["train.jsonl", "test_1.jsonl"], True), (["train.0.jsonl", "valid.jsonl"], True),
        (["train/a.jsonl", "eval-2/a.jsonl"], True), (["TRAIN.jsonl", "validation-00001-of-00002-a0f3.jsonl"], True),
        (["train/test.jsonl", "test/train.jsonl"], True),
    ],
    ids=str,
)  # fmt: skip
def test_a_split_is_what_a_name_is_alone_or_with_a_number_and_the_nearest_to_the_file_counts(
    names, is_refused, tmp_path
):
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        write(tmp_path / name, {"text": name})
    if not is_refused:
        assert len(load_rows(tmp_path)) == len(names)
        return
    with pytest.raises(DataError, match=r"holds rows to train on .* and to hold out .*: list the files"):
        load_rows(tmp_path)
