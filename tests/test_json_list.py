"""A JSON list is read row by row from windows of its file, as json reads the whole of it."""

import json
import tracemalloc

import hypothesis
import pytest
from hypothesis import strategies as st

from qlora_kit.data import Chat, json_list, load_rows
from qlora_kit.data.json_list import json_values
from qlora_kit.errors import DataError

TEXT = st.text(st.characters(exclude_categories=["Cs"]))
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXT,
    lambda inner: st.lists(inner) | st.dictionaries(TEXT, inner),
    max_leaves=12,
)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tmp_path_factory.mktemp("list") / "a.json"


@pytest.fixture
def windows(monkeypatch):
    return lambda size: monkeypatch.setattr(json_list, "WINDOW_BYTES", size)


def rows_of(path):
    """The rows, or where and how they end."""
    rows = []
    try:
        rows += json_values(path)
    except DataError as error:
        return str(error)
    return rows


def json_itself(text):
    """The rows, or the line in which they end."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        return error.lineno


@hypothesis.settings(max_examples=100, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture])
@hypothesis.given(
    rows=st.lists(VALUES), indent=st.sampled_from([None, 0, 3]), is_ascii=st.booleans(), size=st.integers(1, 40)
)
def test_windows_of_any_size_give_what_json_gives(path, windows, rows, indent, is_ascii, size):
    windows(size)
    path.write_text(json.dumps(rows, indent=indent, ensure_ascii=is_ascii), "utf-8")
    assert rows_of(path) == rows


@hypothesis.settings(max_examples=150, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture])
@hypothesis.given(
    rows=st.lists(VALUES, min_size=1), indent=st.sampled_from([None, 1]), size=st.integers(1, 40), data=st.data()
)
def test_what_is_malformed_ends_in_one_line_with_the_place_that_json_names(path, windows, rows, indent, size, data):
    text = json.dumps(rows, indent=indent, ensure_ascii=False)
    cut = data.draw(st.integers(1, len(text) - 1))
    broken = text[:cut] + data.draw(st.sampled_from(["", "?", ",", "]", "}", '"', "\\", ":"])) + text[cut + 1 :]
    path.write_bytes(broken.encode())
    windows(size)
    found, wanted = rows_of(path), json_itself(broken)
    hypothesis.assume("appears twice" not in found)  # which json takes for one
    assert found == wanted if isinstance(wanted, list) else found.startswith(f"{path}:{wanted}: not JSON: ")
    assert isinstance(found, list) or len(found.splitlines()) == 1


@pytest.mark.parametrize("text", ["", " \n ", "[]", "[ ]", "\ufeff[]"])
def test_nothing_is_in_it(path, text):
    path.write_text(text, "utf-8")
    assert rows_of(path) == []


@pytest.mark.parametrize("indent", [None, 1])
def test_one_object_is_one_row_however_its_first_line_ends(path, indent):
    row = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    text = json.dumps(row, indent=indent).replace('{\n "messages": [\n', '{"messages": [\n')
    assert text.startswith('{"messages": [')
    path.write_text(text)
    assert load_rows(path) == [Chat(row["messages"])]


def test_one_value_in_place_of_a_list_is_one_row(path, windows):
    windows(3)
    path.write_text('{\n "text": "a"\n}\n')
    assert rows_of(path) == [{"text": "a"}]


@pytest.mark.parametrize(("text", "fault"), [
    ('[{"a": 1} {"a": 2}]', ":1: not JSON: wanted a comma or the end of the list at column 11"),
    ('[{"a": 1},\n {"a": 2}\n', ":3: not JSON: wanted a comma or the end of the list at column 1"),
    ('[1] [2]', ":1: not JSON: extra text after its end at column 5"),
    ('[1,\n]', ":2: not JSON: Expecting value at column 1"),
    ('[{"a": 1, "a": 2}]', ": the key 'a' appears twice (1 and 2): keep one"),
    ('[' + "9" * 5000 + "]", ": not readable JSON: Exceeds the limit"),
    ('[' * 100_000, ": not readable JSON: maximum recursion depth"),
])  # fmt: skip
@pytest.mark.parametrize("size", [1, 2**20])
def test_a_fault_names_its_place_whatever_the_window(path, windows, text, fault, size):
    windows(size)
    path.write_text(text)
    assert rows_of(path).startswith(f"{path}{fault}")


def test_bytes_that_are_no_text_name_their_line_behind_any_window(path, windows):
    windows(7)
    path.write_bytes(b'[{"text": "a"},\n {"text": "\xc3\xa9"},\n {"text": "\xff"}]')
    assert rows_of(path) == f"{path}:3: not UTF-8 (byte 0xff): save the file as UTF-8"


def test_rows_before_a_fault_are_read_and_the_fault_hides_the_others(path, tmp_path):
    listed = tmp_path / "b.json"
    listed.write_text('[{"text": "a"}, {"text": "b"}, {"text" "c"}, {"text": "d"}]')
    read = []
    with pytest.raises(DataError, match=r"b\.json:1: not JSON"):
        read.extend(json_values(listed))
    assert read == [{"text": "a"}, {"text": "b"}]
    with pytest.raises(DataError, match=r"b\.json:1: not JSON"):
        load_rows(listed)


def test_a_long_list_never_stands_in_memory_as_a_whole(path):
    row = {"text": "word " * 400}
    path.write_text(json.dumps([row] * 10_000))
    assert path.stat().st_size > 20e6
    tracemalloc.start()
    try:
        assert sum(each == row for each in json_values(path)) == 10_000
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert most < 5e6, "a window as bytes and as text, and one behind it"
