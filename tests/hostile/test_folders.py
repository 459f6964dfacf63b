"""Folders of models and adapters from anywhere: nothing of them runs, asks, leads elsewhere or is made up."""

import json
import os
import re
import shutil
import time
from functools import partial

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from qlora_kit.base.architecture import read_config
from qlora_kit.base.files import check_model_folder
from qlora_kit.base.load import load_base
from qlora_kit.base.tokenizer import read_tokenizer
from qlora_kit.data.encoded import token_ids
from qlora_kit.errors import AdapterError, ModelError, QloraKitError, RecipeError, RunError
from qlora_kit.export import merge
from qlora_kit.lora import add_lora, load_adapter, lora_layers, save_adapter
from qlora_kit.lora.peft_config import _is_pattern
from qlora_kit.recipe import read_recipe
from qlora_kit.run.recorded import (
    check_unchanged,
    recorded_classes,
    recorded_data,
    recorded_date,
    recorded_plan,
    recorded_rate,
    recorded_reference,
)
from qlora_kit.run.verify import verify

CONFIG, FILE = "adapter_config.json", "adapter_model.safetensors"
LAYER = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
A, B = LAYER + "A.weight", LAYER + "B.weight"


@pytest.fixture(scope="module")
def base():
    return tiny.quantized(tiny.llama())


@pytest.fixture
def adapter(tmp_path):
    model = tiny.quantized(tiny.llama())
    add_lora(model, rank=2, targets=["q_proj"])
    return save_adapter(model, tmp_path / "adapter")


def refusal(base, adapter):
    start = time.process_time()
    with pytest.raises(AdapterError) as caught:
        load_adapter(base, adapter)
    assert time.process_time() - start < 0.5
    assert not list(lora_layers(base))
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- an adapter's tensors ---------------------------------------------------------------------------------------------


def change_header(adapter, change):
    """Put another header before the same data; `change` takes and gives its text."""
    whole = (adapter / FILE).read_bytes()
    end = 8 + int.from_bytes(whole[:8], "little")
    header = change(whole[8:end].decode().rstrip()).encode()
    (adapter / FILE).write_bytes(len(header).to_bytes(8, "little") + header + whole[end:])


def with_entry(name, **changes):
    def change(text):
        header = json.loads(text)
        header[name] |= changes
        return json.dumps(header)

    return change


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (with_entry(B, data_offsets=[0, 192]), r"tensor .*lora_[AB].weight' overlaps the one before it"),
        (with_entry(A, shape=[2, 49]), r"lora_A.weight', BF16 of shape \[2, 49\], takes 196 bytes.*gives it 192"),
        (with_entry(A, shape=[10**9, 10**9]), r"lora_A.weight'.*takes 2000000000000000000 bytes"),
        (with_entry(A, dtype="F32"), r"lora_A.weight', F32.*takes 384 bytes"),
        (with_entry(A, dtype="I16"), r"lora_A.weight is in torch.int16, which is not a dtype of weights"),
        (with_entry(A, dtype="PICKLE"), r"tensor .*lora_A.weight' in a way that the format does not allow"),
        (lambda text: text[:-1] + f', "{A}": {json.dumps(json.loads(text)[A])}}}', r"lora_A.weight' appears twice"),
    ],
)  # fmt: skip
def test_a_false_header_is_told_by_file_and_tensor(adapter, base, change, said):
    change_header(adapter, change)
    message = refusal(base, adapter)
    assert str(adapter) in message
    assert re.search(said, message), message


@pytest.mark.parametrize("length", [0, 7, 8, 100, -1])
def test_a_file_that_is_cut_is_told_by_name(adapter, base, length):
    (adapter / FILE).write_bytes((adapter / FILE).read_bytes()[:length])
    assert str(adapter / FILE) in refusal(base, adapter)


@pytest.mark.parametrize("name", [CONFIG, FILE])
def test_neither_file_of_an_adapter_is_taken_from_elsewhere(adapter, base, tmp_path, name):
    """What it leads to would be published with what is made of the adapter."""
    (adapter / name).rename(tmp_path / "secret")
    (adapter / name).symlink_to("../secret")
    assert f"{adapter / name} links to {tmp_path / 'secret'}, outside its folder: refused" in refusal(base, adapter)
    (adapter / name).unlink()
    os.mkfifo(adapter / name)
    assert f"{adapter / name} is not a file" in refusal(base, adapter)


ENDLESS = ("(a+)+$", "(.*)*X", "(.*){9}X", ".*.*.*.*.*.*.*.*X", ".?" * 40 + "X", "a{99999999999999}", "(" * 5000,
           "(?x)(.+) +!", "(?x:(.+) +!)", "(?x)(.+) {2,}!", "(?#[)(.+)+!(?#])", "(?:(?:.+){2}|a)!", "(?i)q_proj",
           r"(.+)\1+!")  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"r": 10**9}, "wanted"),
        ({"r": 10**400}, "wanted"),
        ({"rank_pattern": {"q_proj": 10**9}}, "wanted"),
        ({"lora_alpha": 10**400}, "impossible value: lora_alpha"),
        ({"lora_alpha": float("nan")}, "impossible value: lora_alpha"),
        ({"lora_dropout": float("inf")}, "impossible value: lora_dropout"),
        ({"trainable_token_indices": [10**30]}, "no tensors for"),
        *(({"target_modules": pattern}, "impossible value: target_modules") for pattern in ENDLESS),
        *(({"rank_pattern": {pattern: 2}}, "impossible value: rank_pattern") for pattern in ENDLESS),
        *(({"exclude_modules": pattern}, "impossible value: exclude_modules") for pattern in ENDLESS[:2]),
    ],
)
def test_a_config_that_would_take_all_memory_or_time_is_refused_at_once(adapter, base, changes, said):
    config = json.loads((adapter / CONFIG).read_text())
    (adapter / CONFIG).write_text(json.dumps(config | changes))
    assert said in refusal(base, adapter)


@pytest.mark.parametrize("pattern", ENDLESS)
def test_a_recipe_has_no_such_pattern_either(base, pattern):
    start = time.process_time()
    for key in ("targets=re:{}", "rank_pattern={{'re:{}': 4}}"):
        with pytest.raises(RecipeError, match=r"lora\.(targets|rank_pattern)"):
            read_recipe("default", ["base.model=a/b", "data.train=c.jsonl", "lora." + key.format(pattern)])
    with pytest.raises(AdapterError, match="regular expression"):
        add_lora(base, targets=f"re:{pattern}")
    assert time.process_time() - start < 0.5


@pytest.mark.parametrize("pattern", [
    r".*\.(q|v)_proj", r"(?P<name>layers)\.\d+\.(?!mlp)(self_attn)?.*", r"(?i:Q)_proj", r".*\.[(+*)]_proj",
    r".*?(?:language|text).*?(?:self_attn|mlp).*?(?:q_proj|k_proj|up_proj).*?",
    r"(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|attention)\.(?:(?:q_proj|k_proj)))",
])  # fmt: skip
def test_the_patterns_of_programs_around_peft_are_read(pattern):
    assert _is_pattern(pattern)


# --- what transformers would do by itself -----------------------------------------------------------------------------


@pytest.fixture
def asked(monkeypatch):
    """Questions that were put to a person."""
    questions = []
    monkeypatch.setattr("builtins.input", lambda *words: questions.append(words) or "y")
    return questions


def change(file, **changes):
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_code_of_a_folder_neither_runs_nor_is_asked_about(model_folder, adapter, asked, tmp_path):
    folder = shutil.copytree(model_folder, tmp_path / "model")
    (folder / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    change(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["own.Own", None]}, tokenizer_class="Own")
    for read in (lambda: read_tokenizer(folder), lambda: merge(adapter, folder, tmp_path / "out", force=True)):
        with pytest.raises(ModelError, match="custom code"):
            read()
    code = {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own"}
    change(folder / "config.json", auto_map=code, model_type="own")
    for read in (read_config, lambda folder: load_base(folder, device="cpu")):
        with pytest.raises(ModelError, match="custom code"):
            read(folder)
    assert asked == []
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("key", ["trust_remote_code", "base.trust_remote_code", "base.auto_map"])
def test_no_recipe_and_no_override_asks_for_code(key):
    with pytest.raises(RecipeError, match=f"{key} is not a key"):
        read_recipe("default", ["base.model=a/b", "data.train=c.jsonl", f"{key}=true"])


def test_an_adapter_beside_a_base_does_not_put_another_base_in_its_place(tmp_path):
    tiny.llama(seed=1).save_pretrained(tmp_path / "other")
    tiny.llama().save_pretrained(tmp_path / "model")
    named = {"peft_type": "LORA", "base_model_name_or_path": str(tmp_path / "other"), "target_modules": ["q_proj"]}
    (tmp_path / "model" / CONFIG).write_text(json.dumps(named))
    with pytest.raises(ModelError, match=r"an adapter .* beside a base model: put each in a folder of its own"):
        load_base(tmp_path / "model", device="cpu")


def test_a_stored_checkpoint_without_one_of_its_tensors_is_refused(tmp_path):
    tiny.llama().save_pretrained(tmp_path / "dense")
    four_bit = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    AutoModelForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=four_bit).save_pretrained(
        tmp_path / "a"
    )
    file = tmp_path / "a" / "model.safetensors"
    whole = load_file(file)
    for lost in [name for name in whole if "layers.0.mlp.up_proj" in name] + ["model.norm.weight"]:
        save_file({name: tensor for name, tensor in whole.items() if name != lost}, file, metadata={"format": "pt"})
        with pytest.raises(ModelError):
            load_base(tmp_path / "a", double_quant=False, device="cpu")


SPOILED = {
    "tokenizer.json": (b"", b"{}", b"[]", b"[" * 100_000, b"\xff", b'{"version": "9.0", "model": {"type": "New"}}'),
    "tokenizer_config.json": (b"null", b'{"tokenizer_class": 3}', b'{"added_tokens_decoder": {"x": {}}}',
                              b'{"chat_template": 3}', b'{"chat_template": [{"name": "default", "template": 3}]}',
                              b'{"extra_special_tokens": 7}', b'{"model_max_length": "x"}'),
}  # fmt: skip


@pytest.mark.parametrize("name", SPOILED)
def test_a_tokenizer_that_is_none_is_a_line(model_folder, tmp_path, name):
    for content in SPOILED[name]:
        folder = shutil.copytree(model_folder, tmp_path / "model", dirs_exist_ok=True)
        (folder / name).write_bytes(content)
        with pytest.raises(ModelError, match="tokenizer") as caught:
            read_tokenizer(folder)
        assert "\n" not in str(caught.value)


PANICS = {"type": "Precompiled", "precompiled_charsmap": "AAAA"}, {"type": "Replace", "pattern": {"Regex": ""},
                                                                    "content": "aaa"}  # fmt: skip


@pytest.mark.parametrize(("key", "value"), [
    *(("normalizer", value) for value in PANICS),
    ("model", {"type": "WordLevel", "vocab": {"a": 0, "</s>": 1}, "unk_token": "zz"}),
])  # fmt: skip
def test_a_tokenizer_that_breaks_off_when_it_is_read_or_reads_is_a_line(model_folder, tmp_path, key, value):
    """The library beneath ends in what is no `Exception`, or in one of no kind."""
    folder = shutil.copytree(model_folder, tmp_path / "model")
    change(folder / "tokenizer.json", **{key: value})
    with pytest.raises(QloraKitError, match="tokenizer") as caught:
        token_ids("say cat", read_tokenizer(folder))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["chat_template.jinja", "additional_chat_templates/a.jinja"])
def test_no_template_is_taken_from_elsewhere_into_an_export(model_folder, adapter, tmp_path, name):
    """A link in a folder that was cloned would put a file of its reader into what the reader publishes."""
    (tmp_path / "secret").write_text("{{ 'secret' }}")
    shutil.copytree(model_folder, adapter, dirs_exist_ok=True, ignore=lambda *_: ["config.json", "model.safetensors"])
    (adapter / name).parent.mkdir(exist_ok=True)
    (adapter / name).symlink_to(tmp_path / "secret")
    with pytest.raises(ModelError, match=f"{name} links to .*secret, outside its folder: refused"):
        read_tokenizer(adapter)
    shutil.copytree(adapter, tmp_path / "base", symlinks=True, ignore=lambda *_: [CONFIG, FILE])
    (tmp_path / "base" / "config.json").write_bytes((model_folder / "config.json").read_bytes())
    with pytest.raises(ModelError, match="links to"):
        check_model_folder(tmp_path / "base", weights=False)


WORDPIECE = {"model": {"type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##",
                       "max_input_chars_per_word": 9}}  # fmt: skip


@pytest.mark.parametrize("where", ["absolute", "from where the program runs", "from the folder"])
@pytest.mark.parametrize("file", ["tokenizer_config.json", "special_tokens_map.json", "tokenizer.json"])
def test_no_file_of_the_reader_becomes_the_vocabulary_of_a_tokenizer(model_folder, tmp_path, monkeypatch, file, where):
    """It would be published in the tokenizer.json of an export."""
    folder = shutil.copytree(model_folder, tmp_path / "model", ignore=lambda *_: ["tokenizer.json"])
    (tmp_path / "secret").write_text("[UNK]\npassword\n")
    monkeypatch.chdir(tmp_path)
    name = {"absolute": str(tmp_path / "secret"), "from the folder": "../secret"}.get(where, "secret")
    change(folder / "tokenizer_config.json", tokenizer_class="BertTokenizer")
    said = WORDPIECE["model"] | {"vocab": name}
    tables = {"added_tokens": []} if file == "tokenizer.json" else {}
    if not (folder / file).exists():
        (folder / file).write_text(json.dumps(tables))
    change(folder / file, **({"version": "1.0", "model": said} if tables else {"vocab": name}))
    if where != "from the folder":  # transformers reads none so; a key of a later version might
        assert "password" in AutoTokenizer.from_pretrained(folder).get_vocab()
    with pytest.raises(ModelError, match=f"{file} names '.*secret', which is not a file in its folder") as told:
        read_tokenizer(folder)
    assert "\n" not in str(told.value)


def test_a_pipe_that_a_tokenizer_names_is_not_waited_for(model_folder, tmp_path):
    folder = shutil.copytree(model_folder, tmp_path / "model")
    os.mkfifo(folder / "pipe")
    change(folder / "tokenizer_config.json", vocab="pipe")
    with pytest.raises(ModelError, match="names 'pipe', which is not a"):
        read_tokenizer(folder)


@pytest.mark.parametrize("key", ["fast_tokenizer_files", "gguf_file"])
def test_no_other_file_takes_the_place_of_the_one_that_was_looked_at(model_folder, tmp_path, key):
    folder = shutil.copytree(model_folder, tmp_path / "model")
    change(folder / "tokenizer_config.json", **{key: ["../tokenizer.4.0.0.json"]})
    with pytest.raises(ModelError, match=f"says {key}=.*, wanted only tokenizer.json"):
        read_tokenizer(folder)


def test_names_of_its_writers_files_and_tokens_like_names_of_files_are_no_fault_of_a_tokenizer(
    model_folder, tmp_path, monkeypatch
):
    """Old tokenizer_config.json name the cache that they came from, and transformers reads nothing from there."""
    folder = shutil.copytree(model_folder, tmp_path / "model")
    elsewhere = tmp_path / "elsewhere.json"
    elsewhere.write_text("no tokenizer")
    written = dict.fromkeys(("special_tokens_map_file", "tokenizer_file", "name_or_path"), str(elsewhere))
    tokens = {"additional_special_tokens": ["/", ".", "\0"], "chat_template": "a" * 10_000}
    change(folder / "tokenizer_config.json", **written, **tokens)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a").write_text("a file, and a token of tokenizer.json")
    assert read_tokenizer(folder).get_vocab() == read_tokenizer(model_folder).get_vocab() | {"\0": 260}


@pytest.mark.parametrize(
    ("key", "value"),
    [("num_hidden_layers", 1_000_000), ("num_hidden_layers", 10**400), ("vocab_size", 10**15), ("hidden_size", 10**9),
     ("intermediate_size", 1e30), ("num_attention_heads", 10**8), ("max_position_embeddings", 10**12),
     ("text_config", {"num_local_experts": 10**9})],
)  # fmt: skip
def test_a_model_that_is_larger_than_any_is_a_line_at_once(model_folder, tmp_path, key, value):
    folder = shutil.copytree(model_folder, tmp_path / "model")
    assert read_config(folder).num_hidden_layers == 2
    change(folder / "config.json", **{key: value})
    start = time.process_time()
    with pytest.raises(ModelError, match=r"config.json says .*=.*; no model has more than [\d,]+") as told:
        read_config(folder)
    assert time.process_time() - start < 0.5
    assert "\n" not in str(told.value)


def test_the_largest_models_there_are_are_read(tmp_path):
    """Layers of Llama 405B, experts of Kimi, vocabulary of Gemma, positions of Llama 4, a theta for millions."""
    tiny.llama().save_pretrained(tmp_path)
    change(tmp_path / "config.json", num_hidden_layers=126, vocab_size=262_208, hidden_size=16_384, num_experts=384,
           intermediate_size=53_248, max_position_embeddings=10_485_760, rope_theta=45_168_893_440)  # fmt: skip
    assert read_config(tmp_path).num_hidden_layers == 126


def test_weights_that_only_the_config_names_are_not_read(model_folder, tmp_path):
    folder = shutil.copytree(model_folder, tmp_path / "model")
    change(folder / "config.json", transformers_weights="other.safetensors")
    with pytest.raises(ModelError, match=r"names weights of its own \(transformers_weights\)"):
        load_base(folder, device="cpu")


@pytest.mark.parametrize("dtype", [torch.int32, torch.int8, torch.bool, torch.complex64])
def test_weights_of_a_base_that_are_no_fractions_are_refused(tmp_path, dtype):
    tiny.llama().save_pretrained(tmp_path)
    file, name = tmp_path / "model.safetensors", "model.layers.0.mlp.up_proj.weight"
    weights = load_file(file)
    save_file(weights | {name: weights[name].to(dtype)}, file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match="up_proj"):
        load_base(tmp_path, device="cpu")


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("name", ["model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.experts.gate_up_proj"])
def test_weights_in_8_bits_whose_scales_nothing_names_are_refused(tmp_path, dtype, name):
    """transformers casts them and leaves the scales beside them out."""
    tiny.llama().save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    narrow = {name: torch.ones(176, 48, dtype=dtype), f"{name}_scale_inv": torch.ones(1, 1)}
    save_file(load_file(file) | narrow, file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=rf"{name}' is in F8_E.*says nothing about quant") as told:
        load_base(tmp_path, device="cpu")
    assert "\n" not in str(told.value)


PLANNED = {"rank": 16, "quantize_head": False, "micro_batch": 2, "accumulation": 8,
           "pace": {"lr": 1e-3, "lr_reason": "the recipe"}}  # fmt: skip


@pytest.mark.parametrize(("name", "said"), [
    ("data.json", {"date": 5}), ("data.json", {"date": "2026-99-99"}), ("data.json", {"classes": 7}),
    ("data.json", {"fingerprints": [1]}), ("data.json", {"reference": 3}), ("data.json", {"chats": "x"}),
    ("plan.json", {}), ("plan.json", PLANNED | {"pace": None}), ("plan.json", PLANNED | {"rank": "wide"}),
    ("plan.json", PLANNED | {"pace": {"lr": "x", "lr_reason": ""}}), ("plan.json", PLANNED | {"micro_batch": 0}),
    ("plan.json", PLANNED | {"accumulation": 1.5}), ("plan.json", PLANNED | {"loss_chunk": "all"}),
    ("plan.json", PLANNED | {"eval_tokens": -1}), ("plan.json", PLANNED | {"added_tokens": 7}),
])  # fmt: skip
def test_what_a_run_says_of_itself_is_taken_or_a_line(tmp_path, name, said):
    (tmp_path / name).write_text(json.dumps(said))
    recall = (
        [recorded_rate, recorded_plan]
        if name == "plan.json"
        else [recorded_date, recorded_classes, recorded_reference, recorded_data]
    )
    for recorded in (*recall, *([partial(check_unchanged, found={"base": "x"})] if name == "data.json" else [])):
        with pytest.raises(RunError, match=rf"\A[^\n]*{name}: [^\n]*(, wanted|is missing)[^\n]*\Z"):
            recorded(tmp_path)


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "a/../../secret", "a\nb", "\ud800"])
def test_no_manifest_has_files_elsewhere_read(tmp_path, name):
    (tmp_path / "export").mkdir()
    (tmp_path / "export" / "export.json").write_text(json.dumps({"files": {name: "00"}}))
    found = verify(tmp_path / "export")
    assert len(found.faults) == 1
    assert "refused" in found.faults[0]
    assert found.faults[0].isprintable()


def test_a_pipe_in_place_of_a_manifest_is_a_fault_and_not_waited_for(tmp_path):
    (tmp_path / "recipe.yaml").touch()
    manifest = tmp_path / "checkpoints" / "step-000001" / "manifest.json"
    manifest.parent.mkdir(parents=True)
    os.mkfifo(manifest)
    assert verify(tmp_path).faults == [f"{manifest} cannot be read as JSON: it is not a regular file"]
