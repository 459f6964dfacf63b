"""Sources: several of them in the shares that were asked for, whatever they are kept in, and each accounted for."""

import errno
import json
import os
import shutil
import tempfile
import tracemalloc
from collections import Counter
from datetime import date
from pathlib import Path
from types import SimpleNamespace

import hypothesis
import pytest
import yaml
from hypothesis import strategies as st
from test_data import make_tokenizer, write
from transformers import LlamaConfig
from typer.testing import CliRunner

from qlora_kit.cli.app import app
from qlora_kit.data import (
    Completion,
    Encoded,
    EncodedSet,
    Faults,
    RowTable,
    cache,
    encode_rows,
    find_template,
    full_packs,
    lengths_of,
    load_rows,
    open_sources,
    remarks_on,
)
from qlora_kit.errors import DataError, RecipeError
from qlora_kit.recipe import read_recipe
from qlora_kit.run import rows as rows_module
from qlora_kit.run.prepare import prepare
from qlora_kit.run.tokenizer import load_tokenizer
from qlora_kit.run.train import train
from qlora_kit.train import loop
from qlora_kit.watch import Watch

LARGE = [{"prompt": f"say cat {n} ", "completion": f"{n}"} for n in range(24)]
SMALL = [{"prompt": f"say {n} ", "completion": f"cat {n}"} for n in range(6)]


@pytest.fixture
def recipe(tmp_path, model_folder):
    """A recipe of two sources: half of the first an epoch, and the second twice."""
    write(tmp_path / "large.jsonl", *LARGE)
    write(tmp_path / "small.jsonl", *SMALL)
    content = {
        "base": {"model": str(model_folder), "compute_dtype": "float32", "device": "cpu"},
        "lora": {"rank": 2},
        "data": {
            "train": [{"path": "large.jsonl", "weight": 0.5}, {"path": "small.jsonl", "weight": 2}],
            "eval": None,
            "max_tokens": 64,
        },
        "train": {"epochs": 2, "micro_batch": 4, "accumulation": 1},
        "output": str(tmp_path / "run"),
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def call(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def prepared(recipe, *overrides):
    return prepare(read_recipe(str(recipe), overrides), Watch(), weights=False)


# ---- weights -------------------------------------------------------------------------------------------------------


def test_a_run_trains_on_each_row_as_often_as_the_weight_of_its_source_says(recipe, monkeypatch):
    seen = []

    def watched(packs, pad_id, collate=loop.collate_rows):
        seen.extend(row.where for pack in packs for row in pack)
        return collate(packs, pad_id)

    monkeypatch.setattr(loop, "collate_rows", watched)
    train(read_recipe(str(recipe)))
    run = recipe.parent / "run"
    pace = json.loads((run / "plan.json").read_text())
    assert pace["steps"] == 12, "two epochs of 12 + 12 rows, four a step"
    times = Counter(where for where in seen if where)  # those that a rehearsal cuts have no place
    assert times == {
        **{f"{recipe.parent}/large.jsonl:{n}": 1 for n in range(1, 25)},  # one half an epoch, then the other
        **{f"{recipe.parent}/small.jsonl:{n}": 4 for n in range(1, 7)},
    }
    data = json.loads((run / "data.json").read_text())
    large, small = data["sources"]
    assert [(part["weight"], part["rows_an_epoch"]) for part in (large, small)] == [(0.5, 12), (2, 12)]
    assert [part["counts"]["rows"] for part in (large, small)] == [24, 6]
    assert large["name"].endswith("large.jsonl")
    for count in ("rows", "tokens", "trained_tokens"):
        assert data["train"][count] == large["counts"][count] + small["counts"][count] > 0


def test_weights_move_no_row_to_the_other_side_and_hold_none_out_twice(recipe):
    sides = []
    for large, small in ((1, 1), (0.5, 2), (3, 0.1)):
        sources = [{"path": str(recipe.parent / "large.jsonl"), "weight": large},
                   {"path": str(recipe.parent / "small.jsonl"), "weight": small}]  # fmt: skip
        found = prepared(recipe, "data.eval=auto", f"data.train={json.dumps(sources)}")
        sides.append([[row.where for row in rows.rows] for rows in (found.train, found.eval)])
        assert found.train.epoch.rows == sum(
            max(1, round(weight * part.counts.rows))
            for weight, part in zip((large, small), found.train.parts, strict=True)
        )
    assert sides[0] == sides[1] == sides[2]
    kept, held = sides[0]
    assert len(held) == 1
    assert sorted(kept + held) == sorted({*kept, *held}), "no row twice"
    assert len(kept) == len(LARGE) + len(SMALL) - 1


def test_weights_keep_the_order_where_all_are_one_and_a_mean_of_tokens_is_by_what_is_seen(recipe):
    files = [str(recipe.parent / name) for name in ("large.jsonl", "small.jsonl")]
    plain = prepared(recipe, f"data.train={json.dumps(files)}")
    ones = prepared(recipe, f"data.train={json.dumps([{'path': file, 'weight': 1} for file in files])}")
    assert plain.pace == ones.pace
    assert [row.where for row in plain.train.rows] == [row.where for row in ones.train.rows]
    weighted = prepared(recipe)
    means = [part.counts.tokens / part.counts.rows for part in weighted.train.parts]
    assert means[0] != means[1], "otherwise no weight could move the mean"
    assert weighted.pace.tokens == pytest.approx(2 * 12 * sum(means), abs=2)  # rounded to whole tokens twice
    trained = [part.counts.trained_tokens / part.counts.rows for part in weighted.train.parts]
    assert weighted.pace.trained_tokens == pytest.approx(2 * 12 * sum(trained), abs=2)
    assert plain.train.epoch == plain.train.epoch.__class__(
        rows=30, tokens=plain.train.counts.tokens, trained_tokens=plain.train.counts.trained_tokens
    )


def test_a_preview_says_what_each_source_gave_and_what_became_of_the_rest(recipe):
    write(recipe.parent / "small.jsonl", *SMALL, {"prompt": "say ", "completion": "cat " * 80}, {"prompt": 3})
    assert "small.jsonl:8: missing 'completion'" in call("preview", recipe).stderr
    found = json.loads(call("preview", recipe, "data.on_error=skip", "--json").stdout)
    assert [source["counts"]["dropped"] for source in found["sources"]] == [0, 1]
    assert [source["counts"]["faults"] for source in found["sources"]] == [0, 1]
    assert found["train"]["faults"] == 1
    shown = call("preview", recipe, "data.on_error=skip").stdout
    (line,) = [line for line in shown.splitlines() if "small.jsonl: " in line and "weight" in line]
    assert line.strip().startswith(f"{recipe.parent}/small.jsonl: 6 rows, ")
    assert line.endswith("; 1 left out as faulty; 1 left out as too long; weight 2, 12 rows per epoch")
    alone = call("preview", recipe, f"data.train={recipe.parent}/large.jsonl").stdout
    assert f"{recipe.parent}/large.jsonl: " not in alone, "one source is the whole"


def test_a_weight_that_cannot_be_meant_is_refused_by_its_line(recipe):
    recipe.write_text(recipe.read_text().replace("weight: 2", "weight: 2000"))
    assert "data.train[1].weight must be a number above 0, at most 1000" in call("preview", recipe).stderr


def test_pretraining_learns_prompts_too(recipe):
    learnt, answers = (prepared(recipe, f"train.task={task}").train.rows for task in ("pretrain", "sft"))
    assert all(all(row.trained[1:]) for row in learnt)
    assert not any(all(row.trained[1:]) for row in answers)


def test_held_out_rows_that_are_given_and_all_too_long_are_an_error(recipe):
    long = recipe.parent / "long.jsonl"
    long.write_text(json.dumps({"prompt": "say " * 40, "completion": "cat"}) + "\n")
    with pytest.raises(DataError, match=r"no row is left .* of 1, 1 have more than data.max_tokens=64 tokens"):
        prepared(recipe, f"data.eval={long}")


# ---- folders, and the hub ------------------------------------------------------------------------------------------


def test_held_out_rows_may_be_a_folder(recipe):
    folder = recipe.parent / "held"
    (folder / "more").mkdir(parents=True)
    write(folder / "a.jsonl", *SMALL[:2])
    write(folder / "more" / "b.json", *SMALL[2:5])
    found = prepared(recipe, f"data.eval={folder}")
    assert [row.where for row in found.eval.rows] == [
        *(f"{folder}/a.jsonl:{n}" for n in (1, 2)),
        *(f"{folder}/more/b.json:{n}" for n in (1, 2, 3)),
    ]
    assert len(found.train.rows) == 30


def test_files_of_a_folder_that_are_not_read_are_named(recipe):
    folder = recipe.parent / "rows"
    (folder / "more").mkdir(parents=True)
    write(folder / "a.jsonl", *SMALL)
    for verb in ("preview", "plan"):
        assert "not read" not in call(verb, recipe, f"data.train={folder}").output
    for name in ("b.jsonl.gz", "more/rows", ".hidden"):
        (folder / name).write_text("rows")
    note = (
        f"note: {folder}: 2 files not read, with an ending other than .jsonl, .json, .csv, .tsv, .parquet, .txt, .md: "
    )
    for verb in ("preview", "plan"):
        assert call(verb, recipe, f"data.train={folder}").output.count(f"{note}b.jsonl.gz, more/rows\n") == 1


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The library as it is, with a folder for the hub: what was asked of it is in the list."""
    datasets = pytest.importorskip("datasets")
    files = {"train": str(write(tmp_path / "hub.jsonl", *LARGE)), "test": str(write(tmp_path / "test.jsonl", *SMALL))}
    asked, load_dataset = [], datasets.load_dataset

    def from_folder(*name, split):
        asked.append((*name, split))
        return load_dataset("json", data_files=files, split=split, cache_dir=str(tmp_path / "cache"))

    monkeypatch.setattr(datasets, "load_dataset", from_folder)
    return asked


def test_splits_of_a_hub_data_set_and_parts_of_them_are_what_is_trained_on(recipe, hub):
    sources = [
        {"path": "owner/name:fine", "split": "train[:25%]", "weight": 2},
        {"path": "owner/name", "split": "test"},
    ]
    found = prepared(recipe, f"data.train={json.dumps(sources)}", "data.eval=auto")
    assert (found.train.counts.rows, found.eval.counts.rows) == (11, 1)
    places = {row.where for row in found.train.rows} | {row.where for row in found.eval.rows}
    assert places == {*(f"owner/name:fine row {n}" for n in range(1, 7)), *(f"owner/name row {n}" for n in range(1, 7))}
    assert hub == [("owner/name", "fine", "train[:25%]"), ("owner/name", "test")], "read twice and asked for once"
    rows = load_rows({"path": "owner/name", "split": "train[:25%]"})
    assert [row.completion for row in rows] == [row["completion"] for row in LARGE[:6]]
    with pytest.raises(
        DataError, match=r"^owner/name \(split nope\) cannot be read: Unknown split \"nope\"\. Should be"
    ):
        load_rows({"path": "owner/name", "split": "nope"})


def test_held_out_rows_come_from_several_sources_and_splits_and_have_no_weights(recipe, hub, tmp_path):
    held = [str(write(tmp_path / "held.jsonl", *SMALL[:2])), {"path": "owner/name", "split": "test"}]
    found = prepared(recipe, "data.train=owner/name", f"data.eval={json.dumps(held)}")
    assert [row.where for row in found.eval.rows] == [
        *(f"{tmp_path}/held.jsonl:{n}" for n in (1, 2)),
        *(f"owner/name row {n}" for n in range(1, len(SMALL) + 1)),
    ]
    assert found.train.counts.rows == len(LARGE), "none is taken from what is trained on"
    with pytest.raises(RecipeError, match=r"data.eval\[0\].weight is not a key"):
        prepared(recipe, "data.eval=[{path: owner/name, weight: 2}]")


def test_why_a_hub_data_set_cannot_be_had_is_one_line_with_a_way_out(recipe, monkeypatch):
    datasets = pytest.importorskip("datasets")
    from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError

    broken = DatasetGenerationError("An error occurred while generating the dataset")
    broken.__cause__ = ValueError("row 3:\n broken")
    failures = [
        (
            ConnectionError("Couldn't reach 'a/b' on the Hub (X)"),
            "Couldn't reach 'a/b' on the Hub",
            "check the network",
        ),
        (
            DatasetNotFoundError("Dataset 'a/b' doesn't exist on the Hub."),
            "doesn't exist on the Hub;",
            "correct the name",
        ),
        (DatasetNotFoundError("Dataset 'a/b' is a gated dataset on the Hub."), "is a gated", "hf auth login"),
        (RuntimeError("Dataset scripts are no longer supported, but found b.py"), "no longer supported", "b.py"),
        (ValueError("Config name is missing.\nPick one of: ['x', 'y']"), "missing. Pick one of", "['x', 'y']"),
        (broken, "cannot be read: row 3: broken", "row 3"),
    ]
    for failure, said, way_out in failures:

        def refuse(*name, split, failure=failure):
            raise failure

        monkeypatch.setattr(datasets, "load_dataset", refuse)
        result = call("preview", recipe, "data.train=a/b")
        assert result.exit_code == 2
        assert len(result.stderr.strip().splitlines()) == 1
        assert result.stderr.startswith("error: a/b (split train) cannot be read: ")
        assert said in result.stderr, result.stderr
        assert way_out in result.stderr, result.stderr


# ---- rows in a file ------------------------------------------------------------------------------------------------

IDS = st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=9)


@st.composite
def rows(draw, other=None):
    """Rows of every kind."""
    ids = draw(IDS)
    return Encoded(
        ids,
        draw(st.lists(st.booleans(), min_size=len(ids), max_size=len(ids))),
        draw(st.none() | IDS | st.just([])),
        draw(st.none() | st.text(st.characters(), max_size=5)),  # halves of surrogate pairs as well
        draw(st.text(max_size=5)),
        None if other is None else draw(other),
        draw(st.none() | st.booleans()),
        draw(st.none() | st.integers(0, 9) | st.tuples(st.floats(0, 1), st.floats(0, 1))),
    )


@hypothesis.given(given=st.lists(rows(other=st.none() | rows()), max_size=6), more=st.lists(rows(), max_size=3))
def test_a_table_gives_back_the_rows_it_was_given(given, more):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows"
        table = RowTable(path, add=given)
        assert list(table) == given
        for row in more:
            table.append(row)
        whole = given + more
        assert (list(table), len(table), table[1:-1]) == (whole, len(whole), whole[1:-1])
        table.flush()
        path.rename(path.with_name("renamed"))
        again = RowTable(path.with_name("renamed"), table.ends, table.lengths)
        assert list(again) == whole
        assert list(lengths_of(again)) == list(lengths_of(whole)) == [row.longest for row in whole]
        if whole:
            assert again[-1] == whole[-1]
        with pytest.raises(IndexError):
            again[len(whole)]


def test_rows_in_a_table_take_no_memory_by_their_number(tmp_path):
    """Of Python's own objects: pages of the file are the system's, which takes them back."""
    examples = [Completion("the cat", f" sat on the mat {n}" * 40) for n in range(300)]
    tokenizer, taken = make_tokenizer(), {}
    for name, onto in (("list", EncodedSet()), ("table", EncodedSet(rows=RowTable(tmp_path / "rows")))):
        tracemalloc.start()
        encode_rows(examples, tokenizer, onto=onto)
        assert len(onto.rows) == 300
        taken[name] = tracemalloc.get_traced_memory()[0]
        tracemalloc.stop()
    tokens = onto.counts.tokens
    assert taken["list"] > 15 * tokens, "a pointer for each id and each mark"
    # Left are two numbers for the table, and what the first of the rows brought in.
    assert taken["table"] < 2 * tokens


def test_a_table_of_text_is_read_row_by_row_and_takes_no_memory_by_its_size(tmp_path):
    cell, taken = "the cat sat on the mat " * 40, {}
    for rows in (10, 3000):
        path = write(tmp_path / f"{rows}.csv", "text\n", *[f'"{cell}\n{n}"\n' for n in range(rows)])
        tracemalloc.start()
        (reader,) = open_sources(path)
        assert sum(1 for _ in reader.read(Faults())) == rows
        taken[rows] = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert path.stat().st_size > 2_000_000
    assert taken[3000] < taken[10] + 200_000


# ---- the cache -----------------------------------------------------------------------------------------------------


@pytest.fixture
def kept(tmp_path, monkeypatch):
    """The folder of the cache, for which every set is large; it tells how often rows were encoded."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setattr(cache, "LARGE_BYTES", 1)
    folder = tmp_path / "xdg" / "qlora_kit" / "data"
    encoded = []

    def counted(examples, tokenizer, encode=rows_module.encode_rows, **how):
        encoded.append(how["onto"])
        return encode(examples, tokenizer, **how)

    monkeypatch.setattr(rows_module, "encode_rows", counted)
    return SimpleNamespace(folder=folder, encoded=encoded, entries=lambda: sorted(folder.glob("*")))


def facts_of(found):
    """All that a run knows of its rows."""
    return [
        (list(each.rows), each.parts, each.has_chats, vars(each.faults), dict(each.places), list(each.lengths_given))
        for each in (found.train, found.eval)
    ] + [found.pace, found.date, remarks_on(found.train, found.eval, found.tokenizer)]


ODD = [{"prompt": "say ", "completion": "cat " * 90}, {"prompt": "say cat 3 ", "completion": "3"}, {"prompt": 3}]


@pytest.mark.parametrize("choice", ["drop", "truncate", "split"])
def test_rows_from_the_cache_are_those_that_were_encoded_with_all_that_is_known_of_them(recipe, kept, choice):
    write(recipe.parent / "small.jsonl", *SMALL, *ODD)
    asked = "data.eval=auto", "data.on_error=skip", f"data.over_length={choice}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QLORA_KIT_CACHE", "0")
        plain = prepared(recipe, *asked)
    assert (type(plain.train.rows), kept.entries()) == (list, [])
    first, times = prepared(recipe, *asked), len(kept.encoded)
    second = prepared(recipe, *asked)
    assert len(kept.encoded) == times, "nothing was encoded the second time"
    assert type(second.train.rows) is type(first.train.rows) is RowTable
    assert facts_of(first) == facts_of(second) == facts_of(plain)
    assert plain.train.counts.faults == 1
    befallen = {fate for fate, where in plain.train.places.items() if where}
    assert befallen == {{"drop": "dropped", "truncate": "truncated"}.get(choice, choice)}
    (entry,) = kept.entries()
    assert {file.name for file in entry.iterdir()} == {"train.rows", "eval.rows", "index.safetensors", "set.json"}


def test_whatever_decides_the_rows_names_another_entry_and_nothing_else_does(recipe, kept, model_folder, monkeypatch):
    def entries(*overrides):
        prepared(recipe, *overrides)
        return len(kept.entries())

    large, small = recipe.parent / "large.jsonl", recipe.parent / "small.jsonl"
    assert entries() == 1
    assert entries("train.seed=3", "train.epochs=1", "lora.rank=4", "data.packing=true") == 1
    assert entries("data.template=plain") == 1, "the one that there is without a word"
    own = recipe.parent / "own.jinja"
    own.write_text("{{ messages[0].content }}")
    weights = [{"path": str(large), "weight": 3}, {"path": str(small)}]
    assert entries(f"data.train={json.dumps(weights)}") == 1
    assert prepared(recipe, f"data.train={json.dumps(weights)}").train.epoch.rows == 3 * 24 + 6
    twice = dict.fromkeys(("prompt", "completion"), "completion")
    changes = [
        "data.max_tokens=63", "data.over_length=split", "data.eval=auto", f"data.eval={small}", "data.loss_on=all",
        "data.thinking=strip", f"data.template={own}", "data.format=completion", "data.on_error=skip",
        "train.task=pretrain", f"data.train={large}", "lora.added_tokens=[cat]",
        f"data.train={json.dumps([str(small), str(large)])}",
        f"data.train={json.dumps([{'path': str(large), 'columns': twice}, str(small)])}",
    ]  # fmt: skip
    for number, change in enumerate(changes, 2):
        assert entries(change) == number, change
    now = len(kept.entries())
    large.write_text(large.read_text().replace("say cat 3 ", "say cat 4 "))
    assert entries() == now + 1
    monkeypatch.setattr(cache, "_CODE", cache._CODE[1:])
    assert entries() == now + 2


@pytest.mark.parametrize("many", [False, True])
def test_what_is_wrong_with_few_rows_is_told_at_once_whether_reading_or_encoding_finds_it(many, recipe, monkeypatch):
    chat = {"messages": [{"role": "user", "content": "say cat "}, {"role": "assistant", "content": "cat"}]}
    calls = {**chat, "tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}]}
    path = write(recipe.parent / "mixed.jsonl", chat, {"prompt": 3}, calls, chat)
    template = recipe.parent / "toolless.jinja"
    template.write_text("{% if tools %}{{ raise_exception('no form for tools') }}{% endif %}" + find_template("plain"))
    monkeypatch.setattr(rows_module, "_FEW_ROWS", 0 if many else 10)
    with pytest.raises(DataError) as told:
        prepared(recipe, f"data.train={path}", f"data.template={template}")
    assert f"{path}:2: " in str(told.value)
    assert (f"{path}:3: " in str(told.value)) == (not many)
    assert str(told.value).startswith("2 rows cannot be used (data.on_error=skip leaves them out)") == (not many)


def test_a_fault_of_few_rows_does_not_wait_for_many_that_are_held_out(recipe, monkeypatch):
    path = write(recipe.parent / "bad.jsonl", *SMALL, {"prompt": 3})
    monkeypatch.setattr(rows_module, "_FEW_ROWS", 10)
    monkeypatch.setattr(rows_module, "encode_rows", lambda *_, **__: pytest.fail("rows are encoded"))
    with pytest.raises(DataError, match=r"bad.jsonl:7: "):
        prepared(recipe, f"data.train={path}", f"data.eval={recipe.parent / 'large.jsonl'}")


def test_special_tokens_are_a_part_of_what_rows_are_kept_by(recipe, kept):
    tokenizer, readers = prepared(recipe).tokenizer, open_sources(str(recipe.parent / "small.jsonl"))
    key, code = cache.cache_key(readers, tokenizer, {}), tokenizer.backend_tokenizer.to_str()
    assert cache.cache_key(readers, tokenizer, {}) == key
    tokenizer._special_tokens_map["eos_token"] = tokenizer.convert_ids_to_tokens(5)
    assert tokenizer.eos_token_id == 5
    assert tokenizer.backend_tokenizer.to_str() == code, "nothing else is another"
    assert cache.cache_key(readers, tokenizer, {}) != key


def test_chats_that_are_only_held_out_settle_the_template_and_its_date(recipe, model_folder):
    chat = {"messages": [{"role": "user", "content": "say cat "}, {"role": "assistant", "content": "cat"}]}
    write(recipe.parent / "chats.jsonl", chat)
    dated = recipe.parent / "dated.jinja"
    dated.write_text("{{ strftime_now('%Y') }}{% for m in messages %}{{ m.content }}{% endfor %}")

    def read(*overrides):
        given = read_recipe(str(recipe), [f"data.template={dated}", *overrides])
        tokenizer, then = load_tokenizer(model_folder, given), date(2001, 2, 3)
        return tokenizer, *rows_module.read_rows(given, tokenizer, LlamaConfig(), today=then)

    tokenizer, train_rows, eval_rows, when = read(f"data.eval={recipe.parent / 'chats.jsonl'}")
    assert (train_rows.has_chats, eval_rows.has_chats) == (False, True)
    assert when == date(2001, 2, 3)
    assert tokenizer.decode(eval_rows.rows[0].input_ids).startswith("2001"), "and not the year of the clock"
    assert read()[3] is None


def test_a_damaged_entry_is_made_again(recipe, kept):
    whole = facts_of(prepared(recipe, "data.eval=auto"))
    (entry,) = kept.entries()

    def cut(file):
        file.write_bytes(file.read_bytes()[:-3])

    def flip(file):
        contents = bytearray(file.read_bytes())
        contents[len(contents) // 2] ^= 4
        file.write_bytes(contents)

    def other_json(file):
        file.write_text('{"schema": 1, "sha256": {}}')

    damages = [(name, damage) for name in cache._FILES for damage in (cut, flip, Path.unlink)]
    for name, damage in [*damages, ("set.json", cut), ("set.json", Path.unlink), ("set.json", other_json)]:
        times = len(kept.encoded)
        damage(entry / name)
        assert facts_of(prepared(recipe, "data.eval=auto")) == whole, (name, damage)
        assert len(kept.encoded) > times, (name, damage)
        assert [each.name for each in kept.entries()] == [entry.name]


def test_what_stops_a_run_leaves_no_entry_and_what_cannot_be_kept_stops_none(recipe, kept, monkeypatch):
    whole = facts_of(prepared(recipe))
    shutil.rmtree(kept.folder)
    for text, overrides in (('{"prompt": 3}', ()), ("", ("data.max_tokens=2",))):
        with (recipe.parent / "small.jsonl").open("a") as file:
            file.write(text)
        with pytest.raises(DataError):
            prepared(recipe, *overrides)
        assert kept.entries() == []
        write(recipe.parent / "small.jsonl", *SMALL)

    def full(*_):
        raise OSError(errno.ENOSPC, "no space left on device")

    for step in ("append", "flush"):
        with monkeypatch.context() as patch:
            patch.setattr(RowTable, step, full)
            found = prepared(recipe)
        assert facts_of(found) == whole
        assert type(found.train.rows) is list
        assert list(kept.folder.iterdir()) == [], "nothing half made either"
    kept.folder.chmod(0o777)  # any other user could put rows there
    assert facts_of(prepared(recipe)) == whole
    assert kept.entries() == []


def test_small_sets_leave_nothing_behind(recipe, kept, monkeypatch):
    monkeypatch.setattr(cache, "LARGE_BYTES", 4 * 2**20)
    assert type(prepared(recipe).train.rows) is list
    assert not kept.folder.exists()


def test_the_entries_that_were_used_least_lately_make_room(recipe, kept, monkeypatch):
    for length in (40, 41, 42):
        prepared(recipe, f"data.max_tokens={length}")
        for entry in kept.entries():  # as if a minute had passed
            os.utime(entry, (entry.stat().st_atime - 60, entry.stat().st_mtime - 60))
    sizes = [sum(file.stat().st_size for file in entry.iterdir()) for entry in kept.entries()]
    assert len(sizes) == 3
    prepared(recipe, "data.max_tokens=40")  # the oldest of them is used again
    monkeypatch.setattr(cache, "MOST_BYTES", 3 * max(sizes))
    prepared(recipe, "data.max_tokens=43")
    assert len(kept.entries()) == 3
    times = len(kept.encoded)
    for length in (40, 42, 43):
        prepared(recipe, f"data.max_tokens={length}")
    assert len(kept.encoded) == times
    monkeypatch.setattr(cache, "MOST_BYTES", 1)
    prepared(recipe, "data.max_tokens=44")
    assert len(kept.entries()) == 1, "the newest stays"


def test_a_hub_data_set_is_cached_by_the_files_that_it_lies_in(recipe, hub, kept):
    found = [prepared(recipe, "data.train=owner/name") for _ in range(2)]
    assert len(kept.encoded) == 2, "train and held out, once"
    assert facts_of(found[0]) == facts_of(found[1])
    parts = json.dumps([{"path": "owner/name", "split": "train[:50%]"}])
    assert prepared(recipe, f"data.train={parts}").train.counts.rows == 12


DATED = "{% for m in messages %}{{ m.role + strftime_now(' %d ') + m.content + eos_token }}{% endfor %}" + (
    "{% if add_generation_prompt %}{{ 'assistant' + strftime_now(' %d ') }}{% endif %}"
)


def write_chats(recipe):
    turns = [
        [{"role": "user", "content": f"say {n}"}, {"role": "assistant", "content": f"cat {n}" * (n % 5 + 1)}]
        for n in range(24)
    ]
    write(recipe.parent / "large.jsonl", *({"messages": each} for each in turns))


def test_an_evaluation_finds_the_rows_of_its_run_though_the_template_is_settled_by_then(recipe, kept):
    write_chats(recipe)
    (recipe.parent / "dated.jinja").write_text(DATED)
    asked = read_recipe(str(recipe), ("data.eval=auto", f"data.template={recipe.parent}/dated.jinja"))
    found = prepare(asked, Watch(), weights=False, today=date(2024, 5, 6))
    times = len(kept.encoded)
    assert found.date == date(2024, 5, 6)
    assert "strftime_now(format)" in found.tokenizer.chat_template, "the template is no longer what it was"
    held = rows_module.held_out_rows(asked, found.tokenizer, found.config, None)
    assert (len(kept.encoded), held.rows) == (times, found.eval.rows)
    prepare(asked, Watch(), weights=False, today=date(2024, 5, 7))
    assert len(kept.encoded) > times, "another day, other words"
    assert len(kept.entries()) == 2


def test_a_rehearsal_takes_the_same_rows_of_a_table(recipe, kept):
    found = prepared(recipe)
    assert type(found.train.rows) is RowTable
    assert full_packs(found.train.rows, 3, 50) == full_packs(list(found.train.rows), 3, 50)


@pytest.mark.slow
@pytest.mark.parametrize("packing", ["false", pytest.param("true", marks=pytest.mark.long)])
def test_training_on_rows_of_a_table_is_training_on_rows_in_memory_and_its_evaluation_encodes_nothing(
    recipe, kept, packing, monkeypatch
):
    write_chats(recipe)
    asked = "data.eval=auto", f"data.packing={packing}", "base.attention=eager", "data.template=plain"
    metrics = []
    for name, switch in (("memory", "0"), ("table", "1")):
        monkeypatch.setenv("QLORA_KIT_CACHE", switch)
        train(read_recipe(str(recipe), (*asked, f"output={recipe.parent / name}")))
        lines = (recipe.parent / name / "metrics.jsonl").read_text().splitlines()
        timed = {"tokens_per_s", "peak_bytes"}
        metrics.append([{key: value for key, value in json.loads(line).items() if key not in timed} for line in lines])
    assert len(kept.entries()) == 1
    assert len({row["loss"] for row in metrics[0] if "loss" in row}) > 3
    assert metrics[0] == metrics[1]
    times = len(kept.encoded)
    result = call("eval", recipe.parent / "table", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["rows"] == 1
    assert len(kept.encoded) == times
