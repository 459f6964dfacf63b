"""A trained classifier is asked: `qlora-kit classify`, held against plain transformers on its export."""

import json

import pytest
import torch
from test_classify import TEXTS, bert_folder, recipe_in, rows  # noqa: F401 - a fixture
from test_cli import assert_mistake, call
from transformers import AutoModelForSequenceClassification, AutoTokenizer

SEVERAL = [{"text": row["text"], "label": [name for name in TEXTS if name in row["text"]]} for row in rows()]


@pytest.fixture(scope="module")
def classifiers(tmp_path_factory, bert_folder):  # noqa: F811
    """Runs whose texts have one class (False) or several (True), each with its plain export."""
    made = {}
    for is_multi, given in ((False, rows()), (True, SEVERAL)):
        folder = tmp_path_factory.mktemp("several" if is_multi else "one")
        result = call("train", recipe_in(folder, bert_folder, given), "data.columns={text: text}")
        assert result.exit_code == 0, result.output
        exported = call("export", folder / "run", "--to", "merged", "--dtype", "float32", "--out", folder / "merged")
        assert exported.exit_code == 0, exported.output
        made[is_multi] = folder
    return made


def asked(folder, texts, name="asked.jsonl"):
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in texts))
    return path


@pytest.mark.parametrize("is_multi", [False, True])
def test_every_text_has_the_class_and_probabilities_that_transformers_gives_it_alone_in_the_order_given(
    is_multi, classifiers
):
    folder = classifiers[is_multi]
    texts = ["a cat sat " * 6, "owls", "the dog and the cat", "a", "dogs? " * 3]
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
    assert_mistake(call("classify", folder / "run", "--text", "a cat", "--out", out), "answers.jsonl", "exists already")


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


def test_a_text_file_has_a_text_a_line_and_columns_of_the_run_are_read(classifiers, tmp_path):
    run = classifiers[False] / "run"
    (tmp_path / "texts.txt").write_text("a cat\n\nan owl\r\n")
    lines = call("classify", run, "--texts", tmp_path / "texts.txt").stdout.splitlines()
    assert [json.loads(line)["text"] for line in lines] == ["a cat", "an owl"]
    recipe = run / "recipe.yaml"
    as_it_was = recipe.read_text()
    recipe.write_text(as_it_was.replace("text: text", "text: review"))
    try:
        file = asked(tmp_path, [{"review": "a cat"}, {"text": "an owl"}])
        told = call("classify", run, "--texts", file).stdout.splitlines()
    finally:
        recipe.write_text(as_it_was)
    assert [json.loads(line)["text"] for line in told] == ["a cat", "an owl"]


def test_a_text_beyond_the_positions_is_refused_by_its_place_and_cut_where_the_run_cut_its_rows(classifiers, tmp_path):
    run = classifiers[False] / "run"
    file = asked(tmp_path, [{"text": "a cat"}, {"text": "cats and dogs and owls " * 20}])
    assert_mistake(call("classify", run, "--texts", file), f"{file}:2", "64 positions", "shorten")
    recipe = run / "recipe.yaml"
    as_it_was = recipe.read_text()
    recipe.write_text(as_it_was.replace("over_length: drop", "over_length: truncate"))
    try:
        told = call("classify", run, "--texts", file)
    finally:
        recipe.write_text(as_it_was)
    assert told.exit_code == 0, told.output
    assert len(told.stdout.splitlines()) == 2


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ([{"text": "a"}, {"words": "b"}, {"text": ""}], [":2", "'text'"]),
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
    assert_mistake(call("classify", model_folder, "--text", "a"), "knows no classes", "qlora-kit generate")
    assert_mistake(call("classify", tmp_path / "gone", "--text", "a"), "gone")
    assert_mistake(call("classify", tmp_path, "--text", "a"), "no run folder")
