"""A trained classifier is asked: `qlora-kit classify`, held against plain transformers on its export."""

import json
import shutil
from importlib import import_module

import pytest
import torch
from test_classify import TEXTS, bert_folder, recipe_in, rows  # noqa: F401 - a fixture
from test_cli import assert_mistake, call
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from qlora_kit.train.forward import whole_logits

SEVERAL = [{"text": row["text"], "label": [name for name in TEXTS if name in row["text"]]} for row in rows()]


@pytest.fixture(scope="module")
def classifiers(tmp_path_factory, bert_folder):  # noqa: F811
    """Runs whose texts have one class (False) or several (True), each with its plain export."""
    made = {}
    for is_multi, given in ((False, rows()), (True, SEVERAL)):
        folder = tmp_path_factory.mktemp("several" if is_multi else "one")
        result = call("train", recipe_in(folder, bert_folder, given), "data.columns={text: text}")
        assert result.exit_code == 0, result.output
        assert f"  ask      qlora-kit classify {folder / 'run'} --text TEXT\n" in result.output
        exported = call("export", folder / "run", "--to", "merged", "--dtype", "float32", "--out", folder / "merged")
        assert exported.exit_code == 0, exported.output
        made[is_multi] = folder
    return made


def asked(folder, texts, name="asked.jsonl"):
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in texts))
    return path


@pytest.fixture
def changed(classifiers, tmp_path):
    """Makes a copy of a run, or of its export, with one text of a file put for another."""

    def change(kind, file, old, new, is_multi=False):
        folder = shutil.copytree(classifiers[is_multi] / kind, tmp_path / f"changed-{kind}")
        content = (folder / file).read_text()
        assert old in content
        (folder / file).write_text(content.replace(old, new))
        return folder

    return change


@pytest.mark.parametrize("is_multi", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_every_text_has_the_class_and_probabilities_that_transformers_gives_it_alone_in_the_order_given(
    is_multi, classifiers
):
    folder = classifiers[is_multi]
    texts = ["a cat sat " * 6, "owls", "the dog and the cat", "a", "dogs? " * 3, "!?" * 9]
    file = asked(folder, [{"text": text} for text in texts])
    answers = json.loads(call("classify", folder / "run", "--texts", file, "--json").stdout)["answers"]
    assert [answer["text"] for answer in answers] == texts
    plain = AutoModelForSequenceClassification.from_pretrained(folder / "merged").eval()
    tokenizer = AutoTokenizer.from_pretrained(folder / "merged")
    names = list(plain.config.id2label.values())
    for answer in answers:
        with torch.no_grad():
            logits = plain(**tokenizer(answer["text"], return_tensors="pt")).logits[0]
        likely = logits.sigmoid() if is_multi else logits.softmax(0)
        # Six decimals are told, and a merged model rounds its sums in another order.
        assert list(answer["probabilities"].values()) == pytest.approx(likely.tolist(), abs=1e-5)
        told = [name for name, p in zip(names, likely, strict=True) if p > 0.5]
        assert answer["label"] == (told if is_multi else names[int(likely.argmax())])
    exported = json.loads(call("classify", folder / "merged", "--texts", file, "--json").stdout)["answers"]
    assert [answer["label"] for answer in exported] == [answer["label"] for answer in answers]


def test_a_label_that_a_file_has_is_the_reference_and_the_answers_agree_with_the_accuracy_of_eval(classifiers):
    folder = classifiers[False]
    out = folder / "answers.jsonl"
    assert call("classify", folder / "run", "--texts", folder / "rows.jsonl", "--out", out).exit_code == 0
    answers = [json.loads(line) for line in out.read_text().splitlines()]
    assert [answer["reference"] for answer in answers] == [row["label"] for row in rows()]
    right = sum(answer["label"] == answer["reference"] for answer in answers) / len(answers)
    accuracy = json.loads(call("eval", folder / "run", "--json").stdout)["accuracy"]
    assert 1 / len(TEXTS) < right == pytest.approx(accuracy)
    assert_mistake(call("classify", folder / "run", "--text", "a cat", "--out", out), "answers.jsonl", "already exists")


def test_texts_go_in_batches_whose_answers_are_told_and_kept_as_they_come(classifiers, changed, tmp_path, monkeypatch):
    run = changed("run", "recipe.yaml", "eval_tokens: auto", "eval_tokens: 1")
    file = asked(tmp_path, [{"text": "a" * (1 + 7 * number % 20)} for number in range(20)])
    at_once, done = call("classify", classifiers[False] / "run", "--texts", file, "--json"), []
    room = import_module("qlora_kit.run.classify")

    def interrupted(model, rows):
        if len(done) == 12:
            raise KeyboardInterrupt
        done.append(rows)
        return whole_logits(model, rows)

    out, part = tmp_path / "answers.jsonl", tmp_path / "answers.jsonl.part"
    with monkeypatch.context() as patch:
        patch.setattr(room, "whole_logits", interrupted)
        stopped = call("classify", run, "--texts", file, "--out", out)
    assert stopped.exit_code == 130
    assert {len(rows.input_ids) for rows in done} == {1}
    assert f"stopped: {part} has 12 answers" in stopped.stderr
    assert "answered 12 of 20" in stopped.stderr
    part.unlink()
    assert call("classify", run, "--texts", file, "--out", out).stdout == f"20 answers in {out}\n"
    answers, wanted = [json.loads(line) for line in out.read_text().splitlines()], json.loads(at_once.stdout)["answers"]
    assert [answer["text"] for answer in answers] == [answer["text"] for answer in wanted]
    for answer, other in zip(answers, wanted, strict=True):  # alone, and beside others with padding
        assert answer["probabilities"] == pytest.approx(other["probabilities"], abs=1e-5)


def test_the_least_likely_of_many_classes_are_counted_and_a_name_forges_no_line():
    answer = {"probabilities": {f"a\n99.00%  {number}": number / 78 for number in range(13)}}
    lines = import_module("qlora_kit.cli.classify")._likeliest(answer).splitlines()
    assert len(lines) == 11
    assert lines[0].startswith(" 15.38%  a")
    assert lines[0].endswith("12")
    assert lines[-1] == "and 3 more, less likely"


def test_one_text_is_answered_by_its_classes_the_likeliest_first(classifiers):
    run = classifiers[False] / "run"
    lines = call("classify", run, "--text", "a cat sat").stdout.splitlines()
    shares = [float(line.split("%")[0]) for line in lines]
    assert sorted(line.split()[-1] for line in lines) == ["cat", "dog", "owl"]
    assert shares == sorted(shares, reverse=True)
    assert sum(shares) == pytest.approx(100, abs=0.02)
    answer = json.loads(call("classify", run, "--text", "a cat sat", "--json").stdout)["answers"][0]
    assert lines[0].split()[-1] == answer["label"]


def test_a_checkpoint_can_be_asked_and_the_best_one_says_what_its_run_does(classifiers):
    run = classifiers[False] / "run"
    early, late = sorted((run / "checkpoints").iterdir())
    said = {
        folder: json.loads(call("classify", folder, "--text", "a cat sat", "--json").stdout)["answers"]
        for folder in (run, early, late)
    }
    assert said[early] != said[late]
    assert said[run] in (said[early], said[late])


def test_a_text_file_has_a_text_a_line_and_columns_of_the_run_are_read(classifiers, changed, tmp_path):
    run = classifiers[False] / "run"
    (tmp_path / "texts.txt").write_text("a cat\n\nan owl\r\n")
    lines = call("classify", run, "--texts", tmp_path / "texts.txt").stdout.splitlines()
    assert [json.loads(line)["text"] for line in lines] == ["a cat", "an owl"]
    run = changed("run", "recipe.yaml", "text: text", "text: review")
    file = asked(tmp_path, [{"review": "a cat"}, {"text": "an owl"}])
    told = call("classify", run, "--texts", file).stdout.splitlines()
    assert [json.loads(line)["text"] for line in told] == ["a cat", "an owl"]


def test_a_text_beyond_the_positions_is_refused_by_its_place_and_cut_where_the_run_cut_its_rows(
    classifiers, changed, tmp_path
):
    run = classifiers[False] / "run"
    file = asked(tmp_path, [{"text": "a cat"}, {"text": "cats and dogs and owls " * 20}])
    assert_mistake(call("classify", run, "--texts", file), f"{file}:2", "64 positions", "shorten")
    told = call(
        "classify", changed("run", "recipe.yaml", "over_length: drop", "over_length: truncate"), "--texts", file
    )
    assert told.exit_code == 0, told.output
    assert len(told.stdout.splitlines()) == 2


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (
            [{"text": "a"}, {"words": "b"}, {"text": " "}],
            [":2: missing 'text'", "expected: text (", ":3: the text is empty"],
        ),
        ([{"text": "a", "label": "\ud800"}], [":1", "half of a surrogate pair"]),
        ([{"text": "a", "label": float("nan")}], [":1", "column 'label'"]),
        ([{"text": "a"}, {"text": 3}], [":2", "text"]),
        ([["a"]], [":1", "wanted an object"]),
        ([], ["no texts"]),
    ],
)
def test_rows_that_are_no_texts_are_refused_with_their_lines(given, words, classifiers, tmp_path):
    result = call("classify", classifiers[False] / "run", "--texts", asked(tmp_path, given))
    assert result.exit_code == 2
    for word in words:
        assert word in result.stderr


def test_what_cannot_be_classified_is_one_line(classifiers, model_folder, tmp_path):
    run = classifiers[False] / "run"
    assert_mistake(call("classify", run), "--text TEXT", "--texts FILE")
    assert_mistake(call("classify", run, "--text", "a", "--texts", "b"), "--text TEXT", "--texts FILE")
    assert_mistake(call("classify", run, "--text", " "), "text")
    assert_mistake(call("classify", run, "--texts", tmp_path / "gone.jsonl"), "gone.jsonl", "no such file")
    assert_mistake(call("classify", model_folder, "--text", "a"), "is not a classifier", "qlora-kit generate")
    assert_mistake(call("classify", tmp_path / "gone", "--text", "a"), "gone")
    assert_mistake(call("classify", tmp_path, "--text", "a"), "not a run folder")


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ('"1": "dog"', '"1": "cat"', ["names a class 'cat'", "id2label"]),
        ('"1": "dog"', '"1": "\\ud800"', ["names a class '\\ud800'", "id2label"]),
        ("single_label_classification", "regression", ["is a regression model, not a classifier"]),
    ],
)
def test_a_model_whose_classes_are_none_is_one_line(old, new, words, changed):
    assert_mistake(call("classify", changed("merged", "config.json", old, new), "--text", "a cat"), *words)


def test_a_class_may_be_called_anything_since_no_text_is_given_its_name(changed):
    folder = changed("merged", "config.json", '"1": "dog"', '"1": " 2.5 "')
    answer = json.loads(call("classify", folder, "--text", "a cat", "--json").stdout)["answers"][0]
    assert " 2.5 " in answer["probabilities"]


def test_an_answer_that_is_no_number_is_no_class(classifiers, monkeypatch):
    room = import_module("qlora_kit.run.classify")
    monkeypatch.setattr(room, "whole_logits", lambda *given: whole_logits(*given) * float("nan"))
    assert_mistake(call("classify", classifiers[False] / "run", "--text", "a cat"), "the text", "not finite")


def test_a_text_of_which_the_tokenizer_makes_nothing_is_refused(classifiers, monkeypatch):
    monkeypatch.setattr("qlora_kit.data.template.tokenised", lambda text, tokenizer, **_: {"input_ids": []})
    assert_mistake(call("classify", classifiers[False] / "run", "--text", "a cat"), "the text: ", "no token")
