"""Texts told apart: rows with one class or several, a run from rows to an export that any program reads."""

import json
import shutil

import pytest
import tiny
import torch
from test_cli import assert_mistake, call, write_recipe
from tokenizers.processors import TemplateProcessing
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import (
    AlbertConfig,
    AlbertModel,
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    DebertaV2Config,
    DistilBertConfig,
    LlamaConfig,
    LlamaForSequenceClassification,
    ModernBertConfig,
    RobertaConfig,
)

from qlora_kit.base.architecture import build_model, expected_untrained, read_config
from qlora_kit.base.load import load_base
from qlora_kit.base.record import base_record
from qlora_kit.data import Classes, Encoded, EncodedSet, classes_of, collate_rows, collate_texts, encode_rows, read_row
from qlora_kit.data.examples import Classified
from qlora_kit.data.load import scan
from qlora_kit.data.sources import open_sources
from qlora_kit.errors import DataError
from qlora_kit.export import merge, trained_against
from qlora_kit.lora import adapter_parameters, add_lora, load_start, save_adapter, shaped
from qlora_kit.plan.choose import may_quantize_head
from qlora_kit.plan.depths import count_layers
from qlora_kit.recipe import Lora, read_recipe
from qlora_kit.run.plan import plan_memory
from qlora_kit.run.prepare import gather
from qlora_kit.run.score import score_rows
from qlora_kit.train.classes import classes_in, known_classes, name_classes
from qlora_kit.train.evaluate import f1_score
from qlora_kit.train.forward import whole_logits
from qlora_kit.train.objectives import classification_loss_sum
from qlora_kit.train.tasks import CLASSIFICATION
from qlora_kit.watch import Watch

TEXTS = {
    "cat": ("a cat sat", "the cat", "cats!"),
    "dog": ("a dog ran", "the dog", "dogs?"),
    "owl": ("an owl", "owls fly"),
}


def rows():
    return [{"text": text, "label": label} for label, texts in TEXTS.items() for text in texts]


@pytest.fixture(scope="module")
def bert_folder(tmp_path_factory, model_folder):
    """A two-layer BERT without a classifier's weights, beside the tokenizer of the tiny Llama."""
    folder = tmp_path_factory.mktemp("bert")
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    config = BertConfig(vocab_size=len(tokenizer), hidden_size=48, num_hidden_layers=2, num_attention_heads=4,
                        intermediate_size=80, max_position_embeddings=64, hidden_dropout_prob=0.0,
                        attention_probs_dropout_prob=0.0, pad_token_id=0)  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tiny.spread(BertForSequenceClassification(config)).bert.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def recipe_in(folder, model, given, **train):
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in given))
    return write_recipe(folder, model, task="classify", **{"steps": 12, "lr": 2e-2, **train})


# --- rows -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("label", "labels", "is_multi"),
    [
        ("cat", ("cat",), False),
        (2, ("2",), False),
        (True, ("1",), False),
        (3.0, ("3",), False),
        (" a cat ", ("a cat",), False),
        (["a", "b"], ("a", "b"), True),
        ([], (), True),
    ],
)
def test_a_label_is_a_name_a_number_or_a_list_of_them(label, labels, is_multi):
    assert read_row({"text": "x", "label": label}, "f:1", task="classify") == Classified("x", labels, is_multi)


@pytest.mark.parametrize(
    "label", [None, "", -1, 1.5, float("nan"), float("inf"), ["a", "a "], {"a": 1}, [None], "\ud800"]
)
def test_any_other_label_is_refused_with_its_line(label):
    with pytest.raises(DataError, match="f:1: column 'label'"):
        read_row({"text": "x", "label": label}, "f:1", task="classify")


def test_classes_are_sorted_numbers_by_size_and_those_of_a_classifier_keep_its_order():
    def of(*labels, known=()):
        return classes_of(set(labels), False, known).names

    assert of("b", "a", "b") == ("a", "b")
    assert of("3", "2", "0") == ("0", "1", "2", "3")
    assert of("dog", "cat", known=["owl", "dog", "cat"]) == ("owl", "dog", "cat")
    assert of("dog", "fox", known=["owl", "dog", "cat"]) == ("dog", "fox")
    with pytest.raises(DataError, match=r"1 class \(a\)"):
        of("a", "a")
    with pytest.raises(DataError, match="no class"):
        of()


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        (["10001", "7", "200"], ("7", "200", "10001")),
        (["0", "01", "1"], ("0", "01", "1")),
        (["10", "9", "2"], ("2", "9", "10")),
        (["5", "1", "2"], ("0", "1", "2", "3", "4", "5")),
        (["2", "10", "b"], ("10", "2", "b")),
        (["٣", "2"], ("2", "٣")),
        (["9" * 5000, "10"], ("10", "9" * 5000)),
    ],
)
def test_numbers_are_classes_by_their_value_only_where_nearly_all_occur(labels, names):
    assert classes_of(set(labels), False).names == names


def test_numbers_have_gaps_filled_where_no_more_than_half_of_the_classes_are_made_up():
    assert classes_of({"0", "3"}, is_multi=False).names == ("0", "1", "2", "3")
    assert classes_of({"0", "4"}, is_multi=False).names == ("0", "4")


def test_texts_may_have_several_classes_where_one_of_them_has_a_list(tmp_path):
    rows = [{"text": "a", "label": ["x"]}, {"text": "b", "label": "y"}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = scan(open_sources(tmp_path / "rows.jsonl", task="classify"))
    assert (found.is_multi, found.labels) == (True, {"x", "y"})


def test_a_row_with_other_than_one_label_is_a_fault_where_each_has_one(model_folder):
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    given = [
        Classified("a", labels, True, where=f"f:{n}") for n, labels in enumerate([("cat",), ("cat", "dog"), ()], 1)
    ]
    encoded = EncodedSet()
    encode_rows(given, tokenizer, classes=Classes(("cat", "dog"), False), onto=encoded)
    assert [row.target for row in encoded.rows] == [0]
    assert [fault.partition(";")[0] for fault in encoded.faults.shown] == [
        "f:2: it has 2 labels (cat, dog), and every training row has one",
        "f:3: it has no label, and every training row has one",
    ]


def test_a_held_out_label_that_was_never_trained_on_is_a_fault_of_its_row():
    with pytest.raises(DataError, match=r"'cart' is not one of the training rows' labels \(did you mean 'cat'\?\)"):
        Classes(("cat", "dog"), False).target(["cart"])


def test_a_truncated_text_keeps_its_class(model_folder):
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    given = [Classified("a long text about cats", ("cat",), where="f:1"), Classified("dogs", ("dog",), where="f:2")]
    encoded = encode_rows(
        given, tokenizer, max_tokens=5, over_length="truncate", classes=Classes(("cat", "dog"), False)
    )
    assert [(len(row.input_ids), row.target) for row in encoded.rows] == [(5, 0), (4, 1)]
    assert encoded.counts.trained_tokens == 2
    batch = collate_rows([[row] for row in encoded.rows], 0)
    assert (batch.labels.tolist(), batch.count, batch.rows) == ([0, 1], 2, 2)


@pytest.mark.parametrize("form", ["$A", "<s> $A </s>", "$A </s> <s>"])
def test_a_truncated_text_ends_as_its_tokenizer_ends_every_text(form, model_folder):
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    ends = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("<s>", "</s>")]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=form, special_tokens=ends)
    classes = Classes(("cat", "dog"), False)
    for text in ("a long text about cats", "cat"):
        given = [Classified(text, ("cat",), where="f:1")]
        row = encode_rows(given, tokenizer, max_tokens=6, over_length="truncate", classes=classes).rows[0]
        assert row.input_ids == tokenizer(text, truncation=True, max_length=6)["input_ids"]
        assert len(row.trained) == len(row.input_ids)


# --- losses and scores ------------------------------------------------------------------------------------------------


def test_the_loss_of_several_classes_is_transformers_own():
    logits, labels = torch.randn(5, 3, generator=torch.Generator().manual_seed(0)), torch.tensor([[1.0, 0, 1]] * 5)
    wanted = torch.nn.BCEWithLogitsLoss()(logits, labels)  # what transformers takes for multi_label_classification
    assert wanted > 0.1
    assert classification_loss_sum(logits, labels).item() == pytest.approx(5 * wanted.item(), rel=1e-6)


def test_f1_is_the_mean_over_classes_that_are_said_or_wanted():
    said, wanted = torch.tensor([0, 0, 1, 1, 1]), torch.tensor([0, 1, 1, 1, 0])
    # class 0: precision 1/2, recall 1/2; class 1: precision 2/3, recall 2/3; class 2: neither said nor wanted
    assert f1_score(said, wanted, 3) == pytest.approx((1 / 2 + 2 / 3) / 2)
    assert f1_score(wanted, wanted, 3) == 1
    many = torch.tensor([[1.0, 0], [1, 1]]), torch.tensor([[1.0, 1], [1, 0]])
    assert f1_score(*many, 2) == pytest.approx((1 + 0) / 2)
    none = torch.zeros(3, 2)
    assert f1_score(none, none, 2) == 1, "nothing was wanted, and nothing said"
    assert f1_score(none, torch.tensor([[0.0, 1], [0, 0], [0, 0]]), 2) == 0


def test_a_classification_is_scored_in_one_pass_over_its_rows():
    config = LlamaConfig(**tiny.LLAMA, num_labels=3)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForSequenceClassification(config).eval()
    texts = tiny.tokens(8, 9, vocab=config.vocab_size).tolist()
    held = [Encoded(ids[: 9 - row], [False] * (9 - row), target=row % 3) for row, ids in enumerate(texts)]
    batches = [collate_rows([[row] for row in part], 0) for part in (held[5:][::-1], held[:5][::-1])]  # by length
    passes = []
    model.register_forward_hook(lambda *_: passes.append(1))
    score, words = score_rows(model, None, held, batches, CLASSIFICATION)
    assert len(passes) == len(batches)
    said = [model(torch.tensor([row.input_ids])).logits.argmax().item() for row in held]
    assert words == [str(number) for number in said[:4]]
    wanted = [row.target for row in held]
    assert score.measures["accuracy"] == pytest.approx(sum(a == b for a, b in zip(said, wanted, strict=True)) / 8)
    assert score.measures["f1"] == pytest.approx(f1_score(torch.tensor(said), torch.tensor(wanted), 3))


# --- a run ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", ["bert", pytest.param("llama", marks=pytest.mark.slow)])
def test_a_run_tells_texts_apart_as_planned_and_its_export_does_in_plain_transformers(
    base, tmp_path, bert_folder, model_folder
):
    recipe = recipe_in(tmp_path, bert_folder if base == "bert" else model_folder, rows())
    result = call("train", recipe)
    assert result.exit_code == 0, result.output
    run = tmp_path / "run"
    scores = json.loads((run / "scores.json").read_text())
    assert scores["adapter"]["loss"] < scores["base"]["loss"] - 0.1
    assert scores["adapter"]["accuracy"] > scores["base"]["accuracy"]
    assert 0 < scores["adapter"]["f1"] <= 1
    assert "perplexity" not in scores["adapter"]
    assert {sample["reference"] for sample in scores["samples"]} <= set(TEXTS)
    memory = json.loads((run / "memory.json").read_text())
    assert abs(memory["error"]["peak"]) < 0.01
    assert json.loads((run / "data.json").read_text())["classes"] == ["cat", "dog", "owl"]
    found = json.loads(call("eval", run, "--json").stdout)
    assert {key: found[key] for key in ("accuracy", "f1")} == {
        key: scores["adapter"][key] for key in ("accuracy", "f1")
    }
    assert found["rows"] == len(rows())
    assert f"rows             {len(rows())}\n" in call("eval", run).stdout
    assert_mistake(call("generate", run, "--prompt", "a cat"), "is a classifier", "qlora-kit classify")
    exported = call("export", run, "--to", "merged", "--dtype", "float32", "--out", tmp_path / "merged")
    assert exported.exit_code == 0, exported.output
    assert "same label 100.00%" in exported.output
    audit = json.loads((tmp_path / "merged/export.json").read_text())["comparisons"]["merged"]
    assert (audit["texts"], audit["top1_agreement"]) == (len(rows()), 1.0)
    assert audit["mean_kl"] < 1e-8
    assert audit["loss_export"] == pytest.approx(scores["adapter"]["loss"], abs=1e-5)
    quantized = json.loads(call("export", run, "--to", "quantized", "--out", tmp_path / "nf4", "--json").stdout)
    assert quantized["quantization"]["calibration_rows"] == len(rows())
    assert 1e-8 < quantized["comparisons"]["quantized"]["mean_kl"] < 0.1
    found = json.loads(call("eval", tmp_path / "merged", "--data", tmp_path / "rows.jsonl", "--json").stdout)
    assert {key: found[key] for key in ("accuracy", "f1")} == {
        key: scores["adapter"][key] for key in ("accuracy", "f1")
    }
    assert_mistake(call("generate", tmp_path / "merged", "--prompt", "a cat"), "is a classifier", "qlora-kit classify")
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert plain.config.id2label == {0: "cat", 1: "dog", 2: "owl"}
    texts = [row["text"] for row in rows()]
    with torch.no_grad():
        said = [plain(**tokenizer(text, return_tensors="pt")).logits.argmax().item() for text in texts]
    right = sum(plain.config.id2label[number] == row["label"] for number, row in zip(said, rows(), strict=True))
    assert right / len(texts) == pytest.approx(scores["adapter"]["accuracy"])


def test_an_adapter_says_which_classes_it_tells_apart_to_whoever_merges_it(tmp_path, model_folder):
    settings = {"head": "classification", "labels": 3, "device": "cpu", "compute_dtype": "float32"}
    model = load_base(model_folder, **settings)
    name_classes(model.config, Classes(("cat", "dog", "größe"), True), 7)
    add_lora(model, rank=2)
    save_adapter(model, tmp_path / "adapter", provenance=trained_against(model))
    merge(tmp_path / "adapter", model_folder, tmp_path / "merged", device="cpu")
    merged = AutoConfig.from_pretrained(tmp_path / "merged")
    for key in ("id2label", "label2id", "problem_type", "pad_token_id", "num_labels"):
        assert getattr(merged, key) == getattr(model.config, key), key
    assert merged.id2label == {0: "cat", 1: "dog", 2: "größe"}


SIZE = {"vocab_size": 400, "hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4,
        "intermediate_size": 80, "max_position_embeddings": 64, "pad_token_id": 0}  # fmt: skip


@pytest.mark.parametrize("kind", [DistilBertConfig, DebertaV2Config, ModernBertConfig])
@pytest.mark.parametrize("depth", ["the blocks", pytest.param("the plan", marks=pytest.mark.slow)])
def test_a_model_that_reads_both_ways_is_planned_within_a_budget(depth, kind, tmp_path, model_folder):
    AutoTokenizer.from_pretrained(model_folder).save_pretrained(tmp_path)
    config = kind(**SIZE)
    config.save_pretrained(tmp_path)
    settings = ["memory.budget=64MiB", "base.quantize_head=auto", "base.attention=eager"]
    recipe = read_recipe(recipe_in(tmp_path, tmp_path, rows()), settings)
    if depth == "the blocks":
        assert may_quantize_head(recipe, config)
        assert count_layers(config, "classification") == 4
    else:
        plan = plan_memory(recipe)
        assert plan["needs_bytes"] <= plan["budget"]


def test_an_adapter_of_another_task_starts_a_classifier_whose_new_head_is_trained_and_saved(tmp_path, model_folder):
    settings = {"device": "cpu", "compute_dtype": "float32"}
    model = load_base(model_folder, **settings)
    add_lora(model, rank=2)
    tiny.wake(model)
    save_adapter(model, tmp_path / "sft")
    model = load_base(model_folder, head="classification", labels=3, **settings)
    load_start(model, shaped(Lora.model_validate({"from": str(tmp_path / "sft")})), has_reference=False)
    head = [parameter for name, parameter in adapter_parameters(model) if name.startswith("score.")]
    assert [tuple(parameter.shape) for parameter in head] == [(3, 48)]
    assert head[0].requires_grad
    model(input_ids=tiny.tokens()).logits.sum().backward()
    assert head[0].grad is not None, "the copy that is trained is the one in use"
    with torch.no_grad():
        head[0].fill_(0.5)
    save_adapter(model, tmp_path / "classifier", provenance=trained_against(model))
    again = load_base(model_folder, head="classification", labels=3, **settings)
    load_start(again, shaped(Lora.model_validate({"from": str(tmp_path / "classifier")})), has_reference=False)
    assert torch.equal(again(input_ids=tiny.tokens()).logits, model(input_ids=tiny.tokens()).logits)


@pytest.mark.parametrize(
    ("names", "known", "called"),
    [
        (("LABEL_0", "LABEL_1", "LABEL_2"), [], ("0", "1", "2")),
        (("LABEL_1", "LABEL_0"), ["LABEL_1", "LABEL_0"], ("LABEL_1", "LABEL_0")),
        (("LABEL_0", "cat"), ["LABEL_0", "cat"], ("LABEL_0", "cat")),
    ],
)
def test_outputs_that_transformers_numbered_have_no_names_and_all_others_do(names, known, called):
    config = LlamaConfig(id2label=dict(enumerate(names)), label2id={name: at for at, name in enumerate(names)})
    assert known_classes(config) == known
    assert classes_in(config).names == called
    assert LlamaConfig(num_labels=3).id2label[2] == "LABEL_2", "as transformers does"


def test_a_classifier_goes_on_with_the_classes_of_its_adapter_and_with_no_others(tmp_path, model_folder):
    model = load_base(model_folder, head="classification", labels=3, device="cpu", compute_dtype="float32")
    name_classes(model.config, Classes(("owl", "dog", "cat"), False), 0)
    add_lora(model, rank=2)
    save_adapter(model, tmp_path / "adapter", provenance=trained_against(model))
    start = [f"lora.from={tmp_path / 'adapter'}", "lora.rank=2"]
    recipe = recipe_in(tmp_path, model_folder, rows())
    prepared = gather(read_recipe(recipe, start), Watch(), weights=False)
    assert classes_in(prepared.config).names == ("owl", "dog", "cat")
    recipe = recipe_in(tmp_path, model_folder, [*rows(), {"text": "a fox", "label": "fox"}])
    assert_mistake(call("train", recipe, *start), "owl, dog, cat", "fox", "lora.from")
    assert_mistake(call("train", recipe, *start, "train.task=sft"), "owl, dog, cat", "train.task=classify")


def test_a_new_pooler_that_is_a_linear_layer_itself_is_trained_and_not_quantised(tmp_path):
    AlbertModel(AlbertConfig(**SIZE, embedding_size=64), add_pooling_layer=False).save_pretrained(tmp_path)
    model = load_base(tmp_path, head="classification", device="cpu")
    add_lora(model, rank=2)
    assert {"albert.pooler.adapters.default.weight", "classifier.adapters.default.weight"} <= {
        name for name, parameter in model.named_parameters() if parameter.requires_grad
    }


def test_a_pad_token_that_the_model_has_not_is_one_line_and_may_be_added(tmp_path, model_folder):
    shutil.copytree(model_folder, tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(tmp_path / "model")
    recipe = recipe_in(tmp_path, tmp_path / "model", rows())
    assert_mistake(call("train", recipe), "'[PAD]'", "260", "lora.added_tokens")
    prepared = gather(read_recipe(recipe, ["lora.added_tokens=['[PAD]']"]), Watch(), weights=False)
    assert prepared.config.pad_token_id == 260


def test_a_plan_with_a_new_head_warns_of_nothing(recwarn):
    config = BertConfig(**{**SIZE, "num_hidden_layers": 1})
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = build_model(config, torch.float32, "sdpa", "classification")
        add_lora(model, also_train="classifier")
    assert [str(warning.message) for warning in recwarn if "FakeTensor" in str(warning.message)] == []


@pytest.mark.parametrize("has_pooler", [True, False])
def test_a_plan_knows_which_parts_of_a_classifier_are_new(has_pooler, tmp_path):
    body = BertModel(BertConfig(**SIZE), add_pooling_layer=has_pooler)
    body.save_pretrained(tmp_path)
    planned = build_model(read_config(tmp_path, head="classification"), torch.float32, "sdpa", "classification")
    found = base_record(load_base(tmp_path, head="classification", device="cpu")).untrained
    assert expected_untrained(planned) == found == (("classifier",) if has_pooler else ("classifier", "bert.pooler"))
    (tmp_path / "model.safetensors").unlink()  # as from the hub, before the weights are fetched
    assert expected_untrained(planned) == ("classifier",)
    planned.config.architectures = ["BertForSequenceClassification"]
    assert expected_untrained(planned) == ()


@pytest.mark.slow
def test_a_text_may_have_several_classes(tmp_path, bert_folder):
    given = [
        {"text": text, "label": [name for name in TEXTS if name in text]} for row in rows() for text in [row["text"]]
    ]
    given.append({"text": "a cat and a dog", "label": ["dog", "cat"]})
    result = call("train", recipe_in(tmp_path, bert_folder, given, steps=16))
    assert result.exit_code == 0, result.output
    scores = json.loads((tmp_path / "run" / "scores.json").read_text())
    assert scores["adapter"]["loss"] < scores["base"]["loss"] - 0.05
    assert call("export", tmp_path / "run", "--to", "merged", "--out", tmp_path / "merged").exit_code == 0
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert config["problem_type"] == "multi_label_classification"
    audit = json.loads((tmp_path / "merged/export.json").read_text())["comparisons"]["merged"]
    assert audit["texts"] == len(given)
    assert 0 <= audit["mean_kl"] < 1e-3


def test_a_preview_counts_the_classes_and_names_those_of_each_row(tmp_path, bert_folder):
    given = [*rows(), {"text": "another cat", "label": "cat"}]
    shown = call("preview", recipe_in(tmp_path, bert_folder, given), "--rows", "4").stdout
    assert "classes   cat 4, dog 3, owl 2\n" in shown
    assert f"{tmp_path / 'rows.jsonl'}:4, dog  " in shown
    assert "brackets" not in shown
    given.append({"text": "a cat and a dog", "label": ["dog", "cat"]})
    recipe = recipe_in(tmp_path, bert_folder, given)
    told = json.loads(call("preview", recipe, "--rows", "10", "--json").stdout)
    assert told["classes"] == {"cat": 5, "dog": 4, "owl": 2}
    assert told["rows"][-1]["sides"][0]["name"] == "cat, dog"


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["data.packing=true"], ["data.packing"]),
        (["train.sample_every=2"], ["train.sample_every"]),
        (["data.max_tokens=500"], ["positions", "64"]),
        (["train.task=sft"], ["bert", "causal"]),
    ],
)
def test_what_a_classification_cannot_do_is_one_line(settings, words, tmp_path, bert_folder):
    assert_mistake(call("train", recipe_in(tmp_path, bert_folder, rows()), *settings), *words)


def test_classes_are_those_of_all_rows_that_are_split_and_of_a_held_out_file_none_is_new(tmp_path, bert_folder):
    given = [{"text": f"text {number}", "label": f"class {number}"} for number in range(12)]
    recipe = recipe_in(tmp_path, bert_folder, given)
    prepared = gather(read_recipe(recipe, ["data.eval=auto"]), Watch(), weights=False)
    assert len(prepared.eval.rows) == 1, "its class is no training row's"
    assert classes_in(prepared.config).names == tuple(sorted(row["label"] for row in given))
    (tmp_path / "held.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in (given[0], {"text": "x", "label": "clas 3"}))
    )
    result = call("train", recipe, f"data.eval={tmp_path / 'held.jsonl'}")
    assert_mistake(result, f"{tmp_path / 'held.jsonl'}:2: label 'clas 3' is not one", "did you mean 'class 3'")


def test_a_batch_of_texts_of_several_lengths_gives_each_what_transformers_says_of_it_alone(tmp_path):
    tiny.llama(pad_token_id=7).save_pretrained(tmp_path)
    config = read_config(tmp_path, head="classification")
    name_classes(config, Classes(("cat", "dog"), False), 0)
    model = LlamaForSequenceClassification(config).eval()
    texts = [[1, 5, 9, 11], [1, 7], [1, 8, 7, 3, 4, 7], [1]]
    batch = collate_texts(texts, [0, 1, 0, 1], 0)
    with torch.no_grad():
        alone = torch.cat([model(torch.tensor([text])).logits for text in texts])
        assert tiny.relative(whole_logits(model, batch), alone) < 1e-5  # fp32, in another order
    roberta = RobertaConfig(pad_token_id=1)  # whose positions are counted from it
    name_classes(roberta, Classes(("cat", "dog"), False), 0)
    assert roberta.pad_token_id == 1
