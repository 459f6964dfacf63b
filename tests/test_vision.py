"""Models that see, too: rows are text, so what sees stays as it was read, costs nothing, and is exported as it was."""

import copy
import json
import warnings

import gguf
import pytest
import tiny
import torch
from peft import PeftModel
from safetensors.torch import load_file
from test_gguf import byte_level, read_with_transformers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    BitsAndBytesConfig,
    Gemma3Config,
    Gemma3TextConfig,
    LlavaConfig,
    Mistral3Config,
    PaliGemmaConfig,
    Qwen2_5_VLConfig,
    Qwen3_5Config,
    Qwen3VLConfig,
    Qwen3VLMoeConfig,
)

import qlora_kit as qk
from qlora_kit.base.architecture import auto_class, read_config
from qlora_kit.base.dense import QuantizedLinear
from qlora_kit.base.prequantized import adopt_layers
from qlora_kit.base.text import text_body, text_modules, text_parameters, unread_parameters
from qlora_kit.base.tokenizer import read_tokenizer
from qlora_kit.data import Batch
from qlora_kit.errors import ModelError
from qlora_kit.export import export_merged, export_quantized
from qlora_kit.export.gguf import export_gguf, export_gguf_adapter
from qlora_kit.lora import lora_layers
from qlora_kit.lora.start import _shape
from qlora_kit.ops import IGNORED
from qlora_kit.recipe import Recipe
from qlora_kit.train.activations import activation_blocks
from qlora_kit.train.forward import loss_sum
from qlora_kit.train.probe import settled_chunk

TEXT = {
    "vocab_size": 300, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 12, "intermediate_size": 64, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2,
    "pad_token_id": 0,
}  # fmt: skip
SEEING = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 2,
          "image_size": 28, "patch_size": 14}  # fmt: skip
QWEN = {"depth": 3, "hidden_size": 32, "intermediate_size": 40, "num_heads": 2, "out_hidden_size": 48}
LINEAR = {"num_value_heads": 4, "num_key_heads": 2, "key_head_dim": 16, "value_head_dim": 16}
ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 2, 2]}
CONFIGS = {
    "gemma3": Gemma3Config(
        text_config=TEXT | {"sliding_window": 8, "query_pre_attn_scalar": 12},
        vision_config=SEEING,
        mm_tokens_per_image=4,
    ),
    "mistral3": Mistral3Config(
        text_config=TEXT | {"model_type": "mistral"}, vision_config=SEEING | {"model_type": "pixtral"}
    ),
    "llava": LlavaConfig(
        text_config=TEXT | {"model_type": "llama"}, vision_config=SEEING | {"model_type": "clip_vision_model"}
    ),
    "qwen2_5_vl": Qwen2_5_VLConfig(text_config=TEXT | {"rope_parameters": ROPE}, vision_config=QWEN),
    "qwen3_vl": Qwen3VLConfig(
        text_config=TEXT | {"rope_parameters": ROPE}, vision_config=QWEN | {"deepstack_visual_indexes": [0]}
    ),
}


def checkpoint_of(config, folder):
    """As transformers writes it."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = tiny.spread(AutoModelForImageTextToText.from_config(config, dtype=torch.float32))
    model.save_pretrained(folder)
    return model


def checkpoint(family, place):
    checkpoint_of(copy.deepcopy(CONFIGS[family]), place / family / "base")
    return place / family / "base"


def experts_config():
    text = TEXT | {"rope_parameters": ROPE, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 40}
    return Qwen3VLMoeConfig(text_config=text, vision_config=QWEN | {"deepstack_visual_indexes": [0]})


@pytest.fixture(params=CONFIGS)
def folder(request, tmp_path):
    return checkpoint(request.param, tmp_path)


def loaded(folder, **settings):
    return qk.load_base(folder, **{"compute_dtype": "float32", "device": "cpu"} | settings)


def dense(folder):
    return AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)


def test_text_alone_is_quantised_and_adapted_and_what_sees_stays_on_its_file(folder):
    model, theirs = loaded(folder), dense(folder)
    body = text_body(model)
    assert body is model.get_decoder()
    report = qk.add_lora(model, rank=2)
    names = [name for name, _ in lora_layers(model)]
    assert len(names) == 2 * 7 == len(report.matched)
    assert all(".language_model." in f".{name}." for name in names)
    assert list(activation_blocks(model)) == [f"model.language_model.layers.{layer}" for layer in range(2)]
    unread = set(unread_parameters(model))
    seeing = {name: each for name, each in model.named_parameters() if each in unread}
    assert sum(each.numel() for each in seeing.values()) > 5_000
    originals = dict(theirs.named_parameters())
    assert all(torch.equal(each, originals[name]) and not each.requires_grad for name, each in seeing.items())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    wanted = sum(each.numel() for each in text_parameters(theirs).values())
    assert (report.total, report.trainable) == (wanted, trained)


@pytest.mark.parametrize("chunk", [None, 64])
def test_loss_and_gradients_are_those_of_peft_on_the_whole_model(folder, chunk, tmp_path):
    model = loaded(folder)
    qk.add_lora(model, rank=2, dtype=torch.float32)
    tiny.wake(model)
    qk.save_adapter(model, tmp_path / "adapter")
    theirs = PeftModel.from_pretrained(
        tiny.read_out(dense(folder), model), tmp_path / "adapter", is_trainable=True
    ).eval()
    ids = tiny.tokens(rows=2)
    assert settled_chunk(model, ids[0].tolist(), 64) == (64, None)
    labels = torch.where(torch.arange(ids.shape[1]) < 3, IGNORED, ids)
    rows = Batch(ids, labels, lengths=(11, 11), trained_tokens=16, rows=2, count=16)
    loss = loss_sum(model.train(), rows, loss_chunk=chunk)
    loss.backward()
    wanted = theirs(input_ids=ids, labels=labels).loss * 16
    wanted.backward()
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-5)  # fp32, sums in another order
    gradients = {name: p.grad for name, p in theirs.named_parameters() if p.requires_grad}
    assert len(gradients) == 2 * 14
    for name, layer in lora_layers(model):
        adapter = layer.adapter("default")
        for theirs_name, ours in (("lora_A", adapter.a_RI), ("lora_B", adapter.b_OR)):
            found = gradients[f"base_model.model.{name}.{theirs_name}.default.weight"]
            assert tiny.relative(ours.grad, found) < 1e-4, name


def test_a_start_from_an_adapter_on_experts_too_is_of_all_its_layers(tmp_path):
    checkpoint_of(experts_config(), tmp_path / "base")
    model = loaded(tmp_path / "base")
    matched = qk.add_lora(model, rank=2).matched
    qk.save_adapter(model, tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert isinstance(config["target_modules"], str)
    again = loaded(tmp_path / "base")
    assert sorted(qk.add_lora(again, rank=2, targets=_shape(config)["targets"]).matched) == sorted(matched)


def test_an_adapter_on_experts_alone_names_no_layers(tmp_path):
    checkpoint_of(experts_config(), tmp_path / "base")
    model = loaded(tmp_path / "base")
    qk.add_lora(model, rank=2, targets="mlp")
    tiny.wake(model)
    qk.save_adapter(model, tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["target_modules"] == []
    assert len(config["target_parameters"]) == 2 * 2
    theirs = PeftModel.from_pretrained(tiny.read_out(dense(tmp_path / "base"), model), tmp_path / "adapter")
    assert tiny.relative(tiny.logits(theirs), tiny.logits(model)) < 1e-5


def test_peft_puts_an_adapter_on_the_layers_that_read_and_on_no_others(folder, tmp_path):
    model = loaded(folder)
    qk.add_lora(model, rank=2)
    tiny.wake(model)
    qk.save_adapter(model, tmp_path / "adapter")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Found missing adapter keys")
        theirs = PeftModel.from_pretrained(dense(folder), tmp_path / "adapter")
    wrapped = {name.removeprefix("base_model.model.").rpartition(".lora_A")[0] for name, _ in theirs.named_parameters()
               if ".lora_A." in name}  # fmt: skip
    assert wrapped == {name for name, _ in lora_layers(model)}
    again = loaded(folder)
    qk.load_adapter(again, tmp_path / "adapter")
    assert torch.equal(tiny.logits(again), tiny.logits(model))


def test_a_merged_export_still_sees_and_has_the_names_of_its_base(folder, tmp_path):
    model = loaded(folder)
    qk.add_lora(model, rank=2)
    tiny.wake(model)
    export_merged(model, None, tmp_path / "out", dtype="float32")
    base, out = load_file(folder / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert {name: each.shape for name, each in out.items()} == {name: each.shape for name, each in base.items()}
    same = [name for name in base if torch.equal(base[name], out[name])]
    sight = [name for name in base if "vis" in name or "multi_modal" in name]
    assert len(sight) > 20
    assert set(sight) <= set(same)
    assert len(same) <= len(base) - 14
    export = dense(tmp_path / "out")
    assert tiny.relative(tiny.logits(export), tiny.logits(model)) < 1e-5
    assert tiny.relative(tiny.logits(export), tiny.logits(dense(folder))) > 1e-2


def test_a_merged_export_of_one_with_experts_has_the_tensors_of_its_base(tmp_path):
    # Whose rules compare a tensor with the parameter of the model, and the kit has other ones there.
    made = checkpoint_of(experts_config(), tmp_path / "base")
    model = loaded(tmp_path / "base")
    qk.add_lora(model, rank=2)
    tiny.wake(model)
    export_merged(model, None, tmp_path / "out", dtype="float32")
    base, out = (load_file(tmp_path / which / "model.safetensors") for which in ("base", "out"))
    assert {name: each.shape for name, each in out.items()} == {name: each.shape for name, each in base.items()}
    assert sum(".experts." in name and not torch.equal(base[name], out[name]) for name in base) == 2 * 2
    export = dense(tmp_path / "out")
    assert tiny.relative(tiny.logits(export), tiny.logits(model)) < 1e-5
    assert tiny.relative(tiny.logits(export), tiny.logits(made)) > 1e-2


@pytest.mark.parametrize("to", ["merged", "quantized"])
def test_an_export_brings_what_turns_pictures_into_numbers(folder, tmp_path, to):
    kept = {"preprocessor_config.json": {"size": {"height": 28}}, "processor_config.json": {"image_seq_length": 4}}
    for name, said in kept.items():
        (folder / name).write_text(json.dumps(said))
    model = loaded(folder)
    qk.add_lora(model, rank=2)
    {"merged": export_merged, "quantized": export_quantized}[to](model, None, tmp_path / "out")
    for name, said in kept.items():
        assert json.loads((tmp_path / "out" / name).read_text()) == said


def test_a_quantised_export_leaves_what_sees_as_it_was(folder, tmp_path):
    model = loaded(folder)
    qk.add_lora(model, rank=2)
    tiny.wake(model)
    export_quantized(model, None, tmp_path / "out", dtype="float32")
    export, info = AutoModelForImageTextToText.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    packed = [name for name, module in export.named_modules() if type(module).__name__ == "Linear4bit"]
    assert sorted(packed) == sorted(name for name, _ in lora_layers(model))
    base = dict(dense(folder).named_parameters())
    unread = set(unread_parameters(model))
    sight = [name for name, each in model.named_parameters() if each in unread]
    assert all(torch.equal(export.get_parameter(name), base[name]) for name in sight)


def test_what_sees_is_moved_to_no_device_where_bitsandbytes_stored_it(folder, tmp_path):
    stored = AutoModelForImageTextToText.from_pretrained(
        folder, quantization_config=BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    )
    stored.save_pretrained(tmp_path / "stored")
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "stored")
    adopt_layers(model, torch.float32, torch.device("meta"))
    read = set(text_modules(model))
    layers = [module for module in model.modules() if isinstance(module, QuantizedLinear)]
    assert {(module in read, module.codes.device.type) for module in layers} == {(True, "meta"), (False, "cpu")}


def test_weights_that_see_keep_the_dtype_of_the_file_and_do_not_decide_the_model_s(folder):
    weights = load_file(folder / "model.safetensors")
    assert {each.dtype for each in weights.values()} == {torch.float32}
    model = loaded(folder, compute_dtype="bfloat16")
    assert {each.dtype for each in unread_parameters(model)} == {torch.float32}
    assert {each.dtype for each in text_parameters(model).values()} == {torch.bfloat16}
    assert model.dtype == torch.bfloat16


PLAIN = {"mistral3": "mistral", "llava": "llama", "qwen2_5_vl": "qwen2", "qwen3_vl": "qwen3", "gemma3": "gemma3_text"}


def test_a_gguf_is_that_of_the_family_without_sight(folder, tmp_path):
    model = loaded(folder)
    qk.add_lora(model, rank=2, dtype=torch.float32)
    tiny.wake(model)
    batches = [Batch(tiny.tokens(2), tiny.tokens(2), lengths=(11, 11), trained_tokens=20, rows=2, count=20)]
    content = export_gguf(model, byte_level(), tmp_path / "out", dtype="f32", audit_batches=batches)
    # A divergence adds 300 terms, each rounded in fp32.
    assert content["comparisons"]["gguf"]["max_kl"] < 1e-6
    # transformers reads the file as the plain family, whatever the config of the model said.
    family = PLAIN[folder.parent.name]
    plain = AutoConfig.for_model(**model.config.get_text_config().to_dict() | {"model_type": family})
    found = read_with_transformers(tmp_path / "out", **({} if family == "mistral" else {"config": plain}))
    assert "language_model" not in dict(found.named_modules())
    assert tiny.relative(tiny.logits(found), tiny.logits(model)) < 1e-5  # fp32, the adapter apart and merged


def test_a_gguf_adapter_names_the_file_with_sight_as_its_base(folder, tmp_path):
    model = loaded(folder)
    qk.add_lora(model, rank=2)
    export_gguf_adapter(model, tmp_path / "out")
    read = gguf.GGUFReader(tmp_path / "out" / "adapter.gguf")
    wanted = {"mistral3": "llama", "llava": "llama", "qwen2_5_vl": "qwen2vl", "qwen3_vl": "qwen3vl", "gemma3": "gemma3"}
    assert read.fields["general.architecture"].contents() == wanted[folder.parent.name]
    assert len(read.tensors) == 2 * 14
    assert all(tensor.name.startswith("blk.") for tensor in read.tensors)


def test_the_template_of_an_older_processor_is_the_tokenizer_s(tmp_path):
    tiny.save_model(tmp_path)
    assert read_tokenizer(tmp_path).chat_template is None
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "{{ messages }}"}))
    assert read_tokenizer(tmp_path).chat_template == "{{ messages }}"
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": 3}))
    with pytest.raises(ModelError, match="whose chat_template is not text"):
        read_tokenizer(tmp_path)


def test_a_family_that_transformers_reads_without_its_sight_is_told_of(tmp_path):
    linear = {f"linear_{what}": size for what, size in LINEAR.items()}
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 0], "partial_rotary_factor": 0.25}
    text = TEXT | linear | {"head_dim": 16, "rope_parameters": rope}
    config = Qwen3_5Config(text_config=text, vision_config=QWEN)
    with torch.random.fork_rng():
        AutoModelForImageTextToText.from_config(config, dtype=torch.float32).save_pretrained(tmp_path)
    model = loaded(tmp_path)
    assert not unread_parameters(model)
    notes = qk.add_lora(model, rank=2).notes
    assert any(note.endswith("no place for, left out: all of a qwen3_5 but its qwen3_5_text") for note in notes)


def test_a_model_is_made_as_transformers_makes_it_and_one_that_reads_only_is_refused(tmp_path):
    for config in CONFIGS.values():
        auto = auto_class(config, "causal")
        is_causal = type(config) in AutoModelForCausalLM._model_mapping
        assert auto is (AutoModelForCausalLM if is_causal else AutoModelForImageTextToText)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "siglip"}))
    with pytest.raises(ModelError, match=r"holds a siglip, which is not a causal language model$"):
        read_config(tmp_path)


@pytest.mark.parametrize(
    "config",
    [
        PaliGemmaConfig(text_config=TEXT | {"model_type": "gemma"}, vision_config=SEEING, projection_dim=48),
        Gemma3TextConfig(**TEXT | {"sliding_window": 8, "query_pre_attn_scalar": 12}, use_bidirectional_attention=True),
    ],
    ids=lambda config: config.model_type,
)
def test_a_model_in_which_tokens_see_those_behind_them_is_refused(config, tmp_path):
    # Each place would be shown the token that it is asked for.
    made = auto_class(config, "causal").from_config(config, dtype=torch.float32).eval()
    ids = tiny.tokens(rows=1)
    changed = torch.cat((ids[:, :-1], ids[:, -1:] + 1), dim=1)
    assert (tiny.logits(made, changed) - tiny.logits(made, ids))[:, :-1].abs().max() > 1e-4
    config.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=f"holds a {config.model_type} that reads in both directions; give a causal"):
        read_config(tmp_path)


@pytest.mark.parametrize("full", [pytest.param(False, marks=pytest.mark.slow), True])
@pytest.mark.parametrize("family", [pytest.param("gemma3", marks=pytest.mark.slow), "qwen3_vl"])
def test_a_run_takes_what_was_planned_and_leaves_what_sees_alone(family, full, tmp_path):
    base = checkpoint(family, tmp_path)
    tiny.save_tokenizer(base)
    rows = [{"prompt": f"say {number}", "completion": f" cat {number}"} for number in range(20)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    recipe = Recipe.model_validate(
        {
            "base": {"model": str(base), "compute_dtype": "float32", "device": "cpu"},
            "lora": {"rank": 2},
            "data": {"train": str(tmp_path / "rows.jsonl"), "max_tokens": 48},
            "train": {"steps": 2, "micro_batch": 4, "optimizer": "adamw", "full_finetune": full},
            "output": str(tmp_path / "run"),
        }
    )
    assert qk.train(recipe).finished
    memory = json.loads((tmp_path / "run" / "memory.json").read_text())
    planned = memory["planned"]
    large = [name for name, size in planned["by_category"].items() if size > 0.01 * planned["peak_bytes"]]
    assert {"base_weights", "activations", "optimizer_state"} <= {*large}
    # Some scalars and allocations of a few bytes: 400 KiB in all.
    assert all(abs(memory["error"][name]) < 0.005 for name in large)
    plan = json.loads((tmp_path / "run" / "plan.json").read_text())
    # Of the micro-batches of a step, whose tokens, labels and positions are the other bytes, a rehearsal holds one.
    held = 3 * 8 * plan["tokens"] * plan["micro_batch"] * (plan["accumulation"] - 1)
    rest = [memory[kind]["peak_bytes"] - memory[kind]["by_category"]["other"] for kind in ("planned", "measured")]
    assert rest[0] == pytest.approx(rest[1], rel=0.001)
    assert plan["layout"] == "joined" or abs(memory["error"]["peak"]) < 0.001
    assert 0 <= memory["planned"]["by_category"]["other"] - memory["measured"]["by_category"]["other"] <= held
    theirs = dense(base)
    assert plan["parameters"]["total"] == sum(each.numel() for each in text_parameters(theirs).values())
    if full:
        out = dense(tmp_path / "run" / "model")
        moved = {name for name, each in theirs.named_parameters() if not torch.equal(each, out.get_parameter(name))}
        assert moved == set(text_parameters(theirs))
