"""What marks a base: every part of another one tells, nothing of how the same one is held does, and old marks count."""

import json

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from qlora_kit.base.load import load_base
from qlora_kit.base.record import BaseRecord, base_record
from qlora_kit.errors import AdapterError
from qlora_kit.lora import add_lora, load_adapter, save_adapter

LOAD = {"device": "cpu", "compute_dtype": "float32", "attention": "eager"}
UP = "model.layers.1.mlp.up_proj.weight"
STORED = {
    "nf4": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True),
    "int8": BitsAndBytesConfig(load_in_8bit=True),
}


def change_tensors(folder, name, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors[name])
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def change_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


OTHERS = {
    "head": (lambda folder: change_tensors(folder, "lm_head.weight", lambda weight: weight.add_(0.1)), ["head"]),
    "first rows of a matrix": (lambda folder: change_tensors(folder, UP, lambda w: w[:2].add_(0.1)), ["body"]),
    "last rows of a matrix": (lambda folder: change_tensors(folder, UP, lambda w: w[-2:].add_(0.1)), ["body"]),
    "all of a matrix": (lambda folder: change_tensors(folder, UP, lambda w: w.add_(0.1)), ["weights", "body"]),
    "epsilon": (lambda folder: change_config(folder, rms_norm_eps=1e-5), ["config"]),
    "activation": (lambda folder: change_config(folder, hidden_act="gelu"), ["config"]),
}


@pytest.mark.parametrize("what", OTHERS)
def test_another_head_another_row_and_another_setting_are_another_base(what, tmp_path):
    change, wanted = OTHERS[what]
    tiny.llama().save_pretrained(tmp_path)
    first = load_base(tmp_path, **LOAD)
    add_lora(first, rank=2, targets=["q_proj"])
    save_adapter(first, tmp_path / "adapter")
    assert load_adapter(load_base(tmp_path, **LOAD), tmp_path / "adapter").matched
    change(tmp_path)
    other = load_base(tmp_path, **LOAD)
    assert base_record(other).differences(base_record(first).mark) == wanted
    with pytest.raises(AdapterError, match=rf"another base \(other {', '.join(wanted)}\)"):
        load_adapter(other, tmp_path / "adapter")


@pytest.mark.parametrize("kind", STORED)
def test_other_codes_of_a_stored_base_are_another_base(kind, tmp_path):
    tiny.llama().save_pretrained(tmp_path / "dense")
    folder = tmp_path / "stored"
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=STORED[kind])
    dense.save_pretrained(folder)
    before = base_record(load_base(folder, quantization=kind, **LOAD))
    change_tensors(folder, UP, lambda codes: codes.copy_(codes.flip(0)))
    assert base_record(load_base(folder, quantization=kind, **LOAD)).differences(before.mark) == ["body"]


@pytest.mark.parametrize("make", [tiny.llama, tiny.gpt2, tiny.mixtral, tiny.gpt_oss])
def test_how_a_base_is_held_read_and_named_tells_nothing(make, tmp_path):
    make().save_pretrained(tmp_path / "a")
    make().save_pretrained(tmp_path / "b")
    change_config(tmp_path / "b", use_cache=False, pad_token_id=3, _name_or_path="x")
    wanted = base_record(make())
    assert {name.partition("-")[0] for name in wanted.marks} >= {"fingerprint", "weights", "body", "config"}
    held = [
        tiny.quantized(make(), kind, dtype=dtype) for kind, dtype in (("int8", torch.float16), ("nf4", torch.float32))
    ]
    read = [load_base(tmp_path / name, quantization=kind, **LOAD) for name in "ab" for kind in ("nf4", "none")]
    assert all(base_record(model).marks == wanted.marks for model in [*held, *read])


def test_a_stored_base_is_the_dense_one_that_it_was_made_of(tmp_path):
    tiny.llama().save_pretrained(tmp_path / "dense")
    stored = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=STORED["nf4"])
    stored.save_pretrained(tmp_path / "stored")
    dense, stored = (base_record(load_base(tmp_path / name, **LOAD)) for name in ("dense", "stored"))
    assert "body-nf4" in stored.marks
    assert "body" in dense.marks
    assert not dense.differences(stored.mark)
    assert not stored.differences(dense.mark)


def test_a_mark_of_an_older_version_and_one_of_another_transformers_are_compared_as_far_as_they_go():
    marks = {"fingerprint": "sha256:a", "weights": "sha256:b", "body": "sha256:c", "config-5.23.0": "sha256:d"}
    record = BaseRecord(None, torch.float32, marks)
    assert record.mark == "sha256:a sha256:b body=sha256:c config-5.23.0=sha256:d"
    for told in ("", "sha256:a", "sha256:a sha256:b", record.mark, "sha256:a config-9.0=sha256:x body-nf4=sha256:y"):
        assert not record.differences(told)
    assert record.differences("sha256:x") == ["fingerprint"]
    assert record.differences("sha256:a sha256:x") == ["weights"]
    assert record.differences("sha256:a sha256:b config-5.23.0=sha256:x body=sha256:y") == ["config", "body"]
