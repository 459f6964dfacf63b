"""Sources: several of them in the shares that were asked for, whatever they are kept in, and each accounted for."""

import json
from collections import Counter

import pytest
import yaml
from test_data import write
from typer.testing import CliRunner

from qlora_kit.cli.app import app
from qlora_kit.data import load_rows
from qlora_kit.errors import DataError
from qlora_kit.recipe import read_recipe
from qlora_kit.run.prepare import prepare
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
    times = Counter(seen[4:])  # the first batch is the rehearsal's
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
    assert line.endswith("; 1 left out as faulty; 1 left out as too long; weight 2, 12 rows an epoch")
    alone = call("preview", recipe, f"data.train={recipe.parent}/large.jsonl").stdout
    assert f"{recipe.parent}/large.jsonl: " not in alone, "one source is the whole"


def test_a_weight_that_cannot_be_meant_is_refused_by_its_line(recipe):
    recipe.write_text(recipe.read_text().replace("weight: 2", "weight: 2000"))
    assert "data.train[1].weight must be a number above 0, at most 1000" in call("preview", recipe).stderr


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


def test_why_a_hub_data_set_cannot_be_had_is_one_line_with_a_way_out(recipe, monkeypatch):
    datasets = pytest.importorskip("datasets")
    from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError

    broken = DatasetGenerationError("An error occurred while generating the dataset")
    broken.__cause__ = ValueError("row 3:\n broken")
    failures = [
        (ConnectionError("Couldn't reach 'a/b' on the Hub (X)"), "Couldn't reach 'a/b' on the Hub", "is a network"),
        (DatasetNotFoundError("Dataset 'a/b' doesn't exist on the Hub."), "doesn't exist on the Hub;", "mend the name"),
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
