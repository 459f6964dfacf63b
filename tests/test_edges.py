"""Where parts of the core meet: odd files, mixed adapters, failures in the middle, other kinds of checkpoint."""

import copy

import pytest
import tiny
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from test_trained import IDS, base_of, dense_twin, free_llama, ids_with_tokens, shake, tied_llama, trained
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BitsAndBytesConfig,
    Llama4TextConfig,
)

from qlora_kit.base.dense import QuantizedLinear
from qlora_kit.base.load import load_base
from qlora_kit.base.record import base_record
from qlora_kit.base.vocabulary import QuantizedTable
from qlora_kit.errors import AdapterError, DataError, ModelError
from qlora_kit.export import export_adapter, export_merged, merge
from qlora_kit.lora import (
    adapter_parameters,
    adapters_off,
    add_lora,
    delete_adapter,
    load_adapter,
    lora_layers,
    save_adapter,
)
from qlora_kit.lora.layer import Carrier, carriers

FP32 = {"rank": 4, "alpha": 8, "dtype": torch.float32}
LOAD = {"compute_dtype": "float32", "device": "cpu"}


def peft_file(base, make, folder, **settings):
    """An adapter that PEFT saved, every trained part of it moved, and PEFT's own logits."""
    theirs = get_peft_model(dense_twin(make, base), LoraConfig(**{"r": 4, "lora_alpha": 8, **settings})).eval()
    tiny.shake_peft(theirs)
    theirs.save_pretrained(folder)
    return tiny.logits(theirs, ids_with_tokens())


def is_bare(model):
    return not any(isinstance(module, Carrier) for module in model.modules())


# --- files of PEFT ---


def test_rows_of_another_embedding_are_not_taken_for_those_of_words(tmp_path):
    base = base_of(tiny.gpt2)
    peft_file(base, tiny.gpt2, tmp_path, target_modules=["c_attn"], trainable_token_indices={"wpe": [1, 5]})
    with pytest.raises(AdapterError, match="wpe, neither embedding nor head"):
        load_adapter(base, tmp_path)
    assert is_bare(base)


@pytest.mark.parametrize("rows", [{"embed_tokens": [5, 17], "lm_head": [96]}, {"lm_head": [96]},
                                  {"embed_tokens": [5, 17], "lm_head": [5, 17]}])  # fmt: skip
def test_a_tied_head_may_have_rows_of_its_own(rows, tmp_path):
    base = base_of(tied_llama)
    wanted = peft_file(base, tied_llama, tmp_path / "a", target_modules=["q_proj"], trainable_token_indices=rows)
    load_adapter(base, tmp_path / "a")
    assert tiny.relative(tiny.logits(base, ids_with_tokens()), wanted) < 1e-5
    export_merged(base, None, tmp_path / "out", dtype="float32")
    export = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert tiny.relative(tiny.logits(export, ids_with_tokens()), wanted) < 1e-5


def test_whole_numbers_are_no_weights(tmp_path):
    model, _ = trained(free_llama, also_train=["lm_head"], added_tokens=())
    save_adapter(model, tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    key = next(key for key in tensors if key.endswith("lm_head.weight"))
    save_file(tensors | {key: tensors[key].to(torch.int64)}, path, metadata={"format": "pt"})
    with pytest.raises(AdapterError, match=r"lm_head.weight is in torch.int64"):
        load_adapter(base_of(free_llama), tmp_path)


def test_a_wider_half_of_an_adapter_is_not_cut_to_the_narrower(tmp_path):
    model, _ = trained(free_llama)
    save_adapter(model, tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    half = {key: value.half() if "lora_A" in key else value for key, value in load_file(path).items()}
    save_file(half, path, metadata={"format": "pt"})
    again = base_of(free_llama)
    load_adapter(again, tmp_path)
    for key, parameter in adapter_parameters(again):
        assert parameter.dtype == torch.float32
        stem = key.removesuffix(".a_RI").removesuffix(".b_OR")
        name = f"base_model.model.{stem}.lora_{'A' if key.endswith('a_RI') else 'B'}.weight"
        assert torch.equal(parameter.detach(), half[name].float())


def test_the_whole_embedding_in_a_file_is_called_what_it_is(tmp_path):
    model, _ = trained(free_llama)
    save_adapter(model, tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    extra = {"base_model.model.model.embed_tokens.weight": torch.randn(97, 64)}
    save_file(load_file(path) | extra, path, metadata={"format": "pt"})
    with pytest.raises(AdapterError, match=r"all of a matrix of its base .*resized"):
        load_adapter(base_of(free_llama), tmp_path)


# --- several adapters of different parts ---


def test_an_adapter_that_came_while_all_were_off_is_off_afterwards():
    model = base_of(free_llama)
    add_lora(model, **FP32, targets="attention")
    with adapters_off(model):
        add_lora(model, **FP32, targets="mlp", name="second")
    assert {carrier.active for _, carrier in carriers(model)} == {"default", None}


@pytest.mark.parametrize("first", [{"added_tokens": IDS}, {"also_train": ["lm_head"]}])
def test_an_adapter_that_does_not_fit_beside_another_is_refused_and_leaves_it_alone(first, tmp_path):
    head, _ = trained(free_llama, targets=["head", "q_proj"])
    save_adapter(head, tmp_path)
    model, _ = trained(free_llama, **first)
    before = tiny.logits(model, ids_with_tokens())
    with pytest.raises(AdapterError, match="lm_head is trained whole, or by rows"):
        load_adapter(model, tmp_path, name="second")
    with pytest.raises(AdapterError, match="lm_head is trained whole, or by rows"):
        add_lora(model, **FP32, targets=["head"], name="second")
    assert torch.equal(tiny.logits(model, ids_with_tokens()), before)


KINDS = [{"added_tokens": IDS}, {"also_train": ["lm_head"]}, {"targets": ["head"]}]


@pytest.mark.parametrize("second", KINDS)
@pytest.mark.parametrize("first", KINDS)
def test_a_deleted_adapter_bars_no_other_kind(first, second):
    model = base_of(free_llama)
    plain = tiny.logits(model)
    add_lora(model, **FP32, **first)
    delete_adapter(model, "default")
    assert is_bare(model)
    assert torch.equal(tiny.logits(model), plain)
    add_lora(model, **FP32, **second)


def test_the_inside_of_a_module_that_is_trained_whole_gets_no_update():
    model = base_of(free_llama, "none")
    add_lora(model, **FP32, targets="attention", also_train=["mlp"])
    report = add_lora(model, **FP32, name="second")
    assert report.matched
    assert not any("mlp" in name for name in report.matched)


# --- failures in the middle ---


def test_what_fails_in_the_middle_leaves_nothing(monkeypatch):
    model = base_of(free_llama)
    add_lora(model, **FP32, targets="attention", name="first")
    shake_first = tiny.logits(model)
    calls = []

    def fail(*arguments, **keywords):
        calls.append(1)
        if len(calls) == 9:
            raise RuntimeError("no memory")
        return torch.zeros(1)

    with monkeypatch.context() as patch:
        patch.setattr("qlora_kit.lora.inject.Start.fill", fail)
        with pytest.raises(RuntimeError, match="no memory"):
            add_lora(model, **FP32, name="second")
    assert {name for _, layer in lora_layers(model) for name in layer.adapters} == {"first"}
    assert torch.equal(tiny.logits(model), shake_first)
    add_lora(model, **FP32, name="second")


@pytest.mark.parametrize(("settings", "message"), [
    ({"alpha": "8"}, "alpha must be a number"),
    ({"dropout": "x"}, "dropout must be"),
    ({"targets": 5}, "targets must be a name"),
    ({"added_tokens": ["<a>"]}, "ids of tokens"),
    ({"added_tokens": [5.5]}, "ids of tokens"),
    ({"rank_pattern": {"q_proj": "8"}}, "whole number above 0"),
    ({"rank_pattern": {"q_proj": True}}, "whole number above 0"),
    ({"alpha_pattern": {"q_proj": "x"}}, "number above 0"),
    ({"dtype": torch.int8}, "dtype must be a floating one"),
    ({"also_train": "lm_haed"}, "'lm_haed'.*did you mean lm_head"),
    ({"also_train": ["mlp", "down_proj"], "targets": "attention"}, "a part of it"),
    ({"alpha": 1e300}, "alpha must be a number"),
])  # fmt: skip
def test_a_setting_of_a_wrong_kind_is_one_line_and_leaves_the_model_alone(settings, message):
    model = base_of(free_llama, "none")
    with pytest.raises(AdapterError, match=message):
        add_lora(model, **{**FP32, **settings})
    assert is_bare(model)


# --- dtypes ---


def test_the_norms_of_a_dora_do_not_follow_a_change_of_dtype():
    model = base_of(free_llama)
    add_lora(model, rank=4, dora=True)
    norms = {key: p.detach().clone() for key, p in adapter_parameters(model) if key.endswith("magnitude_O")}
    model.to(torch.bfloat16)
    assert norms
    for key, parameter in adapter_parameters(model):
        if key in norms:
            assert parameter.dtype == torch.float32
            assert torch.equal(parameter.detach(), norms[key])
    assert all(layer.adapter("default").square_O.dtype == torch.float32 for _, layer in lora_layers(model))


def test_a_quantised_embedding_follows_a_change_of_dtype_and_says_so():
    model = base_of(tied_llama, quantize_head=True).to(torch.bfloat16)
    embedding = model.get_input_embeddings()
    assert embedding.weight.dtype == torch.bfloat16
    assert embedding(tiny.tokens()).dtype == torch.bfloat16
    assert tiny.logits(model).dtype == torch.bfloat16
    with pytest.raises(IndexError):
        embedding(torch.tensor([[-1]]))


# --- other checkpoints ---


def stored_folder(tmp_path, kept_dense, make=free_llama):
    """A checkpoint that bitsandbytes quantised, but for some layers."""
    make().save_pretrained(tmp_path / "dense")
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
                                llm_int8_skip_modules=kept_dense)  # fmt: skip
    stored = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=config, dtype=torch.float32)
    stored.save_pretrained(tmp_path / "stored")
    return tmp_path / "stored"


def test_what_a_stored_checkpoint_left_dense_stays_dense(tmp_path):
    model = load_base(stored_folder(tmp_path, ["down_proj", "lm_head"]), **LOAD)
    assert type(model.model.layers[0].mlp.down_proj) is torch.nn.Linear
    assert isinstance(model.model.layers[0].mlp.up_proj, QuantizedLinear)
    assert torch.equal(model.model.layers[0].mlp.down_proj.weight, free_llama().model.layers[0].mlp.down_proj.weight)


def test_a_stored_checkpoint_with_a_quantised_head_trains_rows_and_grows_not(tmp_path):
    folder = stored_folder(tmp_path, [])
    model = load_base(folder, **LOAD)
    assert type(model.get_output_embeddings()) is QuantizedTable
    plain = tiny.logits(model, ids_with_tokens())
    add_lora(model, **FP32, added_tokens=IDS)
    assert tiny.relative(tiny.logits(model, ids_with_tokens()), plain) < 1e-6
    shake(model)
    assert tiny.relative(tiny.logits(model, ids_with_tokens()), plain) > 0.01
    with pytest.raises(ModelError, match="head is quantised"):
        load_base(folder, **LOAD, vocabulary=101)


def test_a_model_that_is_its_own_body_keeps_its_head_dense():
    config = Llama4TextConfig(
        vocab_size=97, hidden_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=12,
        intermediate_size=80, intermediate_size_mlp=80, num_local_experts=4, pad_token_id=0, tie_word_embeddings=False,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    assert model.base_model is model
    model = tiny.quantized(model)
    assert type(model.lm_head) is torch.nn.Linear
    assert tiny.quantized_layers(model)
    add_lora(model, rank=2, added_tokens=[5])


def test_an_adapter_of_a_merged_export_is_a_stranger_to_the_first_base(tmp_path):
    """Norms and embedding are the same there: what differs are the linear layers."""
    free_llama().save_pretrained(tmp_path / "first")
    model, _ = trained(free_llama, load_base(tmp_path / "first", **LOAD))
    export_merged(model, None, tmp_path / "second", dtype="float32")
    first, second = (load_base(tmp_path / name, **LOAD) for name in ("first", "second"))
    assert base_record(first).fingerprint == base_record(second).fingerprint
    add_lora(second, rank=2)
    save_adapter(second, tmp_path / "adapter")
    with pytest.raises(AdapterError, match="another base"):
        load_adapter(first, tmp_path / "adapter")
    load_adapter(first, tmp_path / "adapter", force=True)
    load_adapter(load_base(tmp_path / "second", quantization="int8", compute_dtype="bfloat16", device="cpu"),
                 tmp_path / "adapter")  # fmt: skip


def test_a_base_of_which_only_the_experts_are_quantised_is_merged_as_it_was_trained(tmp_path):
    tiny.mixtral().save_pretrained(tmp_path / "base")
    model = load_base(tmp_path / "base", **LOAD, skip=["q_proj", "k_proj", "v_proj", "o_proj"])
    add_lora(model, **FP32, targets=["experts"])
    tiny.wake(model)
    export_adapter(model, tmp_path / "adapter")
    merge(tmp_path / "adapter", tmp_path / "base", tmp_path / "out", dtype="float32")
    export = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert tiny.relative(tiny.logits(export), tiny.logits(model)) < 1e-5


@pytest.mark.parametrize("settings", [{"also_train": ["embed_tokens", "lm_head"]}, {"targets": ["head"]}])
def test_a_longer_vocabulary_is_remembered_whatever_was_trained(settings, tmp_path):
    free_llama().save_pretrained(tmp_path / "base")
    model, _ = trained(free_llama, load_base(tmp_path / "base", **LOAD, vocabulary=101), **settings)
    export_adapter(model, tmp_path / "adapter")
    merge(tmp_path / "adapter", tmp_path / "base", tmp_path / "out", dtype="float32")
    export = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert tiny.relative(tiny.logits(export), tiny.logits(model)) < 1e-5


def test_loftq_knows_a_longer_vocabulary(tmp_path):
    free_llama().save_pretrained(tmp_path)
    model = load_base(tmp_path, **LOAD, vocabulary=101, quantize_head=True)
    add_lora(model, **FP32, targets=["q_proj", "head"], init="loftq")
    assert model.lm_head.adapter("default").delta().norm() > 0


# --- classifiers ---


def classifier(folder):
    config = BertConfig(vocab_size=97, hidden_size=48, num_hidden_layers=2, num_attention_heads=4, num_labels=3,
                        intermediate_size=80, max_position_embeddings=64, pad_token_id=0)  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tiny.spread(AutoModelForSequenceClassification.from_config(config)).save_pretrained(folder)
    return copy.deepcopy(config)


def test_a_classifiers_adapter_is_merged_from_its_folder(tmp_path):
    classifier(tmp_path / "base")
    model = load_base(tmp_path / "base", **LOAD, head="classification")
    add_lora(model, **FP32, also_train=["classifier"])
    tiny.wake(model)
    export_adapter(model, tmp_path / "adapter")
    merge(tmp_path / "adapter", tmp_path / "base", tmp_path / "out", dtype="float32")
    export = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out", dtype="auto")
    with torch.no_grad():
        found, wanted = (each(input_ids=tiny.tokens()).logits for each in (export.eval(), model.eval()))
    assert tiny.relative(found, wanted) < 1e-5
    assert "text-classification" in (tmp_path / "out" / "README.md").read_text()
    with pytest.raises(DataError, match="no labelled token"):
        export_merged(model, None, tmp_path / "audited", audit_batches=[])


def test_a_bert_without_a_pooler_gets_one_that_trains(tmp_path):
    config = classifier(tmp_path / "unused")
    AutoModelForMaskedLM.from_config(config).save_pretrained(tmp_path / "masked")
    model = load_base(tmp_path / "masked", **LOAD, head="classification", labels=2)
    assert base_record(model).untrained == ("classifier", "bert.pooler")
    assert not any("pooler" in name for name in tiny.quantized_layers(model))
    report = add_lora(model, **FP32)
    assert {key.split(".")[1] for key, _ in adapter_parameters(model) if "pooler" in key} == {"pooler"}
    assert report.matched
    tiny.wake(model)
    with torch.no_grad():
        for key, parameter in adapter_parameters(model):
            if "pooler" in key:
                parameter.add_(0.1)
    save_adapter(model, tmp_path / "adapter")
    again = load_base(tmp_path / "masked", **LOAD, head="classification", labels=2)
    load_adapter(again, tmp_path / "adapter")
    ids = tiny.tokens()
    found, wanted = (each.eval()(input_ids=ids).logits for each in (again, model))
    assert torch.equal(found, wanted)
    dense = AutoModelForSequenceClassification.from_pretrained(tmp_path / "masked", num_labels=2)
    peft = PeftModel.from_pretrained(tiny.read_out(dense, again), tmp_path / "adapter").eval()
    assert tiny.relative(peft(input_ids=ids).logits, wanted) < 1e-5, "PEFT reads the file so, too"


def test_impossible_labels_are_one_line(tmp_path):
    classifier(tmp_path)
    with pytest.raises(ModelError, match="labels must be at least 1, found 0"):
        load_base(tmp_path, **LOAD, head="classification", labels=0)
    with pytest.raises(ModelError, match=r"different shapes than its config.json says \(with 5 labels\)"):
        load_base(tmp_path, **LOAD, head="classification", labels=5)
