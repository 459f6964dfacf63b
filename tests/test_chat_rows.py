"""Chats in rows: whatever form turns, calls and tools come in, templates get the one that they are written for."""

import pyarrow
import pytest
from chat_templates import FAMILIES, tokenizer_of
from pyarrow import parquet
from test_data import write

from qlora_kit.data import Faults, encode_turns, load_rows, read_row
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
    with pytest.raises(DataError, match=r"^f:1: objects and lists stand in each other too deep"):
        read_row({"messages": [ASKED, called("clock", {"zone": deep})]}, "f:1")


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
        f"{path}:2: column {column!r} holds half of a surrogate pair ('a\\ud800b'), which is no character"
    )
    faults = Faults()
    assert len(load_rows(path, faults=faults)) == faults.count == 1


def test_half_a_character_in_a_column_that_is_not_read_is_nobodys_business():
    assert read_row({"text": "the cat", "id": HALF}, "f:1").text == "the cat"
