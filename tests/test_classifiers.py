"""Models that read a text and give it one of several labels: quantised bodies, dense classifiers that train whole."""

import copy
from dataclasses import replace
from types import SimpleNamespace

import pytest
import tiny
import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from transformers import (
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    BertConfig,
    ModernBertConfig,
    RobertaConfig,
)

from qlora_kit.base.dense import QuantizedLinear
from qlora_kit.base.freeze import freeze_and_quantize
from qlora_kit.base.load import load_base
from qlora_kit.base.record import base_record
from qlora_kit.data import collate_texts
from qlora_kit.errors import ModelError
from qlora_kit.export import compare, export_merged, export_quantized
from qlora_kit.lora import adapter_parameters, adapters_off, add_lora, load_adapter, lora_layers, save_adapter
from qlora_kit.train.forward import no_phase
from qlora_kit.train.step import accumulate_gradients
from qlora_kit.train.tasks import CLASSIFICATION

COMMON = {"vocab_size": 97, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
          "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
          "num_labels": 3}  # fmt: skip
QUIET = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "intermediate_size": 80}
SPARSE = {"intermediate_size": 80, "classifier_dropout": 0.0, "global_attn_every_n_layers": 2, "local_attention": 8,
          "cls_token_id": 1, "sep_token_id": 2}  # fmt: skip

FAMILIES = {  # configuration, quantised leaves, dense linears of the head
    "bert": (BertConfig(**COMMON, **QUIET), {"query", "key", "value", "dense"}, {"classifier"}),
    "roberta": (
        RobertaConfig(**COMMON, **QUIET),
        {"query", "key", "value", "dense"},
        {"classifier.dense", "classifier.out_proj"},
    ),
    "modernbert": (ModernBertConfig(**COMMON, **SPARSE), {"Wqkv", "Wo", "Wi"}, {"head.dense", "classifier"}),
}  # fmt: skip
PARAMS = [(family, kind) for family in FAMILIES for kind in ("nf4", "int8")]


def dense_model(family, auto=AutoModelForSequenceClassification, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = auto.from_config(copy.deepcopy(FAMILIES[family][0]), dtype=torch.float32)
        return tiny.spread(model).eval()


@torch.no_grad()
def answers(model):
    return model(input_ids=tiny.tokens()).logits


def step(model, lr=0.0):
    trainable = [p for p in model.parameters() if p.requires_grad]
    loss = model(input_ids=tiny.tokens(), labels=torch.tensor([0, 1, 2])).loss
    loss.backward()
    with torch.no_grad():
        for parameter in trainable:
            parameter.sub_(lr * parameter.grad)
    return loss.item()


@pytest.fixture(params=PARAMS, ids=lambda pair: "-".join(pair))
def tuned(request):
    """A quantised classifier with an adapter and a classifier that have taken a step, and its answers before."""
    family, kind = request.param
    model = tiny.quantized(dense_model(family), kind)
    base = answers(model)
    add_lora(model, rank=4, alpha=8, dtype=torch.float32, also_train=["classifier"])
    assert torch.equal(answers(model), base)
    tiny.wake(model)
    step(model.train(), lr=0.05)
    return family, model.eval(), base


def test_the_body_is_quantised_and_the_classifier_stays_dense(tuned):
    family, model, base = tuned
    leaves = {name.rpartition(".")[2] for name, layer in lora_layers(model) if isinstance(layer.base, QuantizedLinear)}
    dense = {name.replace(".base", "") for name, module in model.named_modules()
             if isinstance(module, torch.nn.Linear) and ".adapters." not in name}  # fmt: skip
    assert leaves == FAMILIES[family][1]
    assert dense == FAMILIES[family][2]
    assert all(p.grad is not None and p.grad.norm() > 0 for _, p in adapter_parameters(model))
    assert any(key.startswith("classifier") for key, _ in adapter_parameters(model))
    assert tiny.relative(answers(model), base) > 0.01
    with adapters_off(model):
        assert torch.equal(answers(model), base)


def test_peft_says_the_same(tuned, tmp_path):
    family, model, base = tuned
    save_adapter(model, tmp_path / "adapter")
    theirs = PeftModel.from_pretrained(tiny.read_out(dense_model(family), model), tmp_path / "adapter")
    assert theirs.peft_config["default"].task_type == "SEQ_CLS"
    assert tiny.relative(answers(model), base) > 0.01
    assert tiny.relative(answers(theirs), answers(model)) < 1e-5  # fp32, in another order


def test_the_merged_model_says_the_same_in_plain_transformers(tuned, tmp_path):
    _, model, _ = tuned
    export_merged(model, None, tmp_path / "out", dtype="float32")
    export, info = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "out", dtype="auto", output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert tiny.relative(answers(export), answers(model)) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("is_multi", [False, True])
def test_an_audit_compares_the_classes_of_texts_as_float64_does(is_multi):
    ours, export = dense_model("bert"), dense_model("bert", seed=1)
    targets = [(1.0, 0.0, 1.0), (0.0, 0.0, 1.0), (1.0, 1.0, 0.0)] if is_multi else [2, 0, 1]
    batches = [collate_texts([[5, 6, 7, 8], [9, 10]], targets[:2], 0), collate_texts([[11, 12, 13]], targets[2:], 0)]
    found = compare(ours, export, batches)
    texts = [[5, 6, 7, 8], [9, 10], [11, 12, 13]]  # each alone, so that no padding is
    p, q = (
        torch.cat([each(input_ids=torch.tensor([text])).logits for text in texts]).double() for each in (ours, export)
    )
    # (texts, questions, answers): three questions with two answers each, or one with three
    p, q = ((torch.stack([x.sigmoid(), 1 - x.sigmoid()], -1) if is_multi else x.softmax(1)[:, None]) for x in (p, q))
    kl = (p * (p / q).log()).sum((1, 2))
    assert kl.min() > 1e-4
    assert found["mean_kl"] == pytest.approx(kl.mean().item(), rel=1e-3)
    assert found["max_kl"] == pytest.approx(kl.max().item(), rel=1e-3)
    assert found["top1_agreement"] == (p.argmax(-1) == q.argmax(-1)).all(1).double().mean()
    right = 1 - torch.tensor(targets).long() if is_multi else torch.tensor(targets)[:, None]
    for said, name in ((p, "loss_as_trained"), (q, "loss_export")):
        loss = -said.gather(2, right[..., None]).log().mean()
        assert found[name] == pytest.approx(loss.item(), rel=1e-4)
    assert found["texts"] == 3
    assert "tokens" not in found


@pytest.mark.parametrize("family", FAMILIES)
def test_a_classifier_is_quantised_again_block_by_block(family, tmp_path):
    model = tiny.quantized(dense_model(family))
    add_lora(model, rank=4, alpha=8, dtype=torch.float32, also_train=["classifier"])
    tiny.wake(model)
    torch.manual_seed(3)
    texts = [torch.randint(3, 97, (5 + row % 9,)).tolist() for row in range(48)]
    states, bodies = {}, {"trained": model}
    for name, rows in (("plain", ()), ("chosen", [collate_texts(texts[:24], [row % 3 for row in range(24)], 0)])):
        export_quantized(model, None, tmp_path / name, calibration=rows, dtype="float32")
        bodies[name] = load_base(tmp_path / name, head="classification", compute_dtype="float32", device="cpu")
    for name, body in bodies.items():
        with torch.no_grad():
            held = [body.base_model(input_ids=torch.tensor([text]))[0][0] for text in texts[24:]]
        states[name] = torch.cat(held)
    plain, found = (tiny.relative(states[name], states["trained"]) for name in ("plain", "chosen"))
    assert plain > 1e-3
    assert found < 0.8 * plain, (found, plain)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "chosen")
    assert sum(type(each).__name__ == "Linear4bit" for each in loaded.modules()) == len(list(lora_layers(model)))


@pytest.mark.parametrize("family", FAMILIES)
def test_what_peft_saves_of_a_classifier_we_load_with_the_same_answers(family, tmp_path):
    base = tiny.quantized(dense_model(family))
    config = LoraConfig(task_type=TaskType.SEQ_CLS, r=4, lora_alpha=8, target_modules=sorted(FAMILIES[family][1])[:1])
    theirs = get_peft_model(tiny.read_out(dense_model(family), base), config).eval()
    tiny.shake_peft(theirs)
    theirs.save_pretrained(tmp_path)
    plain = answers(base)
    load_adapter(base, tmp_path)
    assert tiny.relative(answers(base), plain) > 0.01
    assert tiny.relative(answers(base), answers(theirs)) < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_a_new_classifier_on_a_masked_language_model_trains_without_being_named(family, tmp_path):
    masked = dense_model(family, AutoModelForMaskedLM)
    if family == "bert":  # the published ones have a pooler, which a bare masked model has not
        dense_model(family).save_pretrained(tmp_path)
        drop(tmp_path, "classifier.")
    else:
        masked.save_pretrained(tmp_path)
    load = {"compute_dtype": "float32", "device": "cpu", "head": "classification", "labels": 5}
    first, second = (load_base(tmp_path, **load) for _ in range(2))
    assert base_record(first).untrained == ("classifier",)
    assert answers(first).shape == (3, 5)
    assert torch.equal(answers(first), answers(second)), "the start must not be of chance"
    report = add_lora(first, rank=2, dtype=torch.float32)
    assert any(key.startswith("classifier") for key, _ in adapter_parameters(first))
    assert report.trainable == sum(p.numel() for p in first.parameters() if p.requires_grad)
    step_labels = torch.tensor([0, 3, 4])
    first.train()(input_ids=tiny.tokens(), labels=step_labels).loss.backward()
    assert all(p.grad is not None for _, p in adapter_parameters(first))


def drop(folder, prefix):
    from safetensors.torch import load_file, save_file

    path = folder / "model.safetensors"
    kept = {key: value for key, value in load_file(path).items() if not key.startswith(prefix)}
    save_file(kept, path, metadata={"format": "pt"})


def test_a_body_that_is_incomplete_is_refused_under_a_new_classifier_too(tmp_path):
    dense_model("bert").save_pretrained(tmp_path)
    drop(tmp_path, "bert.encoder.layer.1.output.dense")
    with pytest.raises(ModelError, match=r"no tensor for bert\.encoder\.layer\.1\.output\.dense"):
        load_base(tmp_path, device="cpu", head="classification")


def test_a_llama_becomes_a_classifier_too(tmp_path):
    tiny.llama().save_pretrained(tmp_path)
    model = load_base(tmp_path, compute_dtype="float32", device="cpu", head="classification", labels=2)
    assert base_record(model).untrained == ("score",)
    add_lora(model, rank=2, dtype=torch.float32)
    tiny.wake(model)
    save_adapter(model, tmp_path / "adapter")
    again = load_base(tmp_path, compute_dtype="float32", device="cpu", head="classification", labels=2)
    load_adapter(again, tmp_path / "adapter")
    assert torch.equal(answers(again), answers(model))


def test_a_masked_model_is_no_causal_one_and_an_unknown_head_is_named(tmp_path):
    dense_model("bert", AutoModelForMaskedLM).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="reads in both directions"):
        load_base(tmp_path, device="cpu")
    with pytest.raises(ModelError, match="choose one of causal, classification"):
        load_base(tmp_path, device="cpu", head="regression")


def test_a_quantised_embedding_serves_a_classifier(tmp_path):
    config = FAMILIES["bert"][0].to_dict() | {"hidden_size": 64}
    model = AutoModelForSequenceClassification.from_config(BertConfig(**config), dtype=torch.float32).eval()
    plain = answers(model)
    small = freeze_and_quantize(
        copy.deepcopy(model), base_record(tiny.quantized(tiny.llama())).quantization, torch.float32, tiny.CPU,
        quantize_head=True,
    )  # fmt: skip
    assert not small.get_input_embeddings().is_tied
    assert 0 < tiny.relative(answers(small), plain) < 1


# --- the step ---------------------------------------------------------------------------------------------------------

CLASSES = [0, 2, 1, 2]
LENGTHS = (11, 4, 7, 11)


def texts():
    return [ids[:length] for ids, length in zip(tiny.tokens(4).tolist(), LENGTHS, strict=True)]


def loss_of(model, batch):
    return CLASSIFICATION.begun(model, [batch], None)(model, batch, no_phase, None, 1).value.item()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_loss_of_a_step_is_transformers_own(family):
    """Times the texts, since transformers takes the mean; both softmaxes are fp32."""
    model = dense_model(family)
    batch = collate_texts(texts(), CLASSES, pad_id=0)
    assert batch.attention_mask.tolist() == [[t < length for t in range(11)] for length in LENGTHS]
    own = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask.long(), labels=torch.tensor(CLASSES))
    assert own.loss > 0.1
    assert loss_of(model, batch) == pytest.approx(4 * own.loss.item(), rel=1e-6)
    assert loss_of(model, replace(batch, attention_mask=None)) != pytest.approx(4 * own.loss.item(), rel=1e-5)
    ignored = replace(batch, labels=torch.tensor([0, -100, 1, 2]))
    without = F.cross_entropy(own.logits[1:2], torch.tensor([2])).item()
    assert loss_of(model, ignored) == pytest.approx(4 * own.loss.item() - without, rel=1e-6)


def test_a_text_of_several_classes_is_told_right_where_each_of_them_is():
    logits = torch.tensor([[0.3, -0.3], [0.3, 0.3], [-9.0, -9.0], [9.0, 9.0]])
    batch = collate_texts([[5, 6]] * 4, [(1.0, 0.0), (1.0, 0.0), (0.0, 0.0), (0.0, 0.0)], pad_id=0)
    model = lambda **_: SimpleNamespace(logits=logits)  # noqa: E731
    loss = CLASSIFICATION.begun(model, [batch], None)(model, batch, no_phase, None, 4)
    assert loss.measures["accuracy"].item() == 0.5
    assert loss.said.tolist() == [[1, 0], [1, 1], [0, 0], [1, 1]]


def test_texts_of_one_length_get_no_mask_as_in_the_plan():
    assert collate_texts([[5, 6, 7], [8, 9, 3]], [0, 1], pad_id=0).attention_mask is None
    assert collate_texts([[5, 6, 7], [8, 9]], [0, 1], pad_id=0).attention_mask is not None


@pytest.mark.parametrize("family", FAMILIES)
def test_the_loss_of_a_step_on_texts_of_several_classes_is_transformers_own(family):
    model = dense_model(family)
    model.config.problem_type = "multi_label_classification"
    several = [
        tuple(float((number + place) % 3 == 0) for place in range(model.config.num_labels)) for number in range(4)
    ]
    batch = collate_texts(texts(), several, pad_id=0)
    own = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask.long(), labels=batch.labels)
    assert own.loss > 0.1
    assert loss_of(model, batch) == pytest.approx(4 * own.loss.item(), rel=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_texts_side_by_side_have_the_loss_and_gradients_of_texts_alone(family):
    model = tiny.quantized(dense_model(family))
    add_lora(model, rank=4, alpha=8, dtype=torch.float32, also_train=["classifier"])
    tiny.wake(model)

    def gradients(groups):
        for _, parameter in adapter_parameters(model):
            parameter.grad = None
        batches = [collate_texts([texts()[i] for i in group], [CLASSES[i] for i in group], 0) for group in groups]
        loss = accumulate_gradients(model.train(), batches, 4, CLASSIFICATION).value
        assert [batch.attention_mask is None for batch in batches] == [len(group) == 1 for group in groups]
        return loss.item(), torch.cat([parameter.grad.flatten() for _, parameter in adapter_parameters(model)])

    alone, wanted = gradients([[0], [1], [2], [3]])
    together, found = gradients([[0, 1, 2, 3]])
    assert alone > 0.1
    assert wanted.norm() > 0.01
    assert together == pytest.approx(alone, rel=1e-6)
    assert tiny.relative(found, wanted) < 2e-6
