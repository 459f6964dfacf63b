"""Quantised copies on disk: a base that is taken from one is bit for bit the base that its checkpoint gives."""

import os
import shutil
from collections import namedtuple
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from qlora_kit.base import copies, dense, experts, load_base
from qlora_kit.base.copies import Copy
from qlora_kit.base.header import read_header
from qlora_kit.base.record import base_record
from qlora_kit.errors import ModelError
from qlora_kit.lora import add_lora, load_adapter, save_adapter
from qlora_kit.recipe import read_recipe
from qlora_kit.run.tokenizer import load_tokenizer
from qlora_kit.run.use import load_recipe_base

LOAD = {"device": "cpu", "compute_dtype": "bfloat16"}
WIDE = {"hidden_size": 64}
FAMILIES = {
    "llama, nf4": (tiny.llama, {}),
    "llama, nf4, one layer dense": (tiny.llama, {"double_quant": False, "skip": ["down_proj"]}),
    "gpt2, fp4": (tiny.gpt2, {"quantization": "fp4"}),
    "mixtral, nf4": (tiny.mixtral, {}),
    "gpt-oss, int8": (tiny.gpt_oss, {"quantization": "int8", "attention": "eager"}),
    "tied head, quantised and taller": (
        lambda: tiny.llama(**WIDE, tie_word_embeddings=True),
        {"quantize_head": True, "vocabulary": 101},
    ),
    "own head, quantised": (lambda: tiny.llama(**WIDE), {"quantize_head": True, "quantization": "int8"}),
    "classifier": (tiny.llama, {"head": "classification", "labels": 3, "double_quant": False}),
}


@pytest.fixture
def kept(tmp_path, monkeypatch):
    """The folder of copies, where a file counts as settled at once."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(copies, "SETTLED_NS", -(2**62))
    return tmp_path / "cache" / "qlora_kit" / "bases"


@pytest.fixture
def checkpoint(tmp_path):
    tiny.llama().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def loaded(folder, **settings):
    """The base, and what was told."""
    told = []
    return load_base(folder, **LOAD, **settings, cache=True, notify=told.append), told


def loaded_by(folder, monkeypatch, **settings):
    """The base, and whether it was taken from a copy, which is said: then nothing is quantised."""
    made = []
    with monkeypatch.context() as patch:
        for room in (dense, experts):
            quantize = room.quantize
            patch.setattr(room, "quantize", lambda *given, quantize=quantize: made.append(1) or quantize(*given))
        model, told = loaded(folder, **settings)
    (line,) = told
    assert ("are read from the quantised copy" in line) == (not made)
    return model, "checkpoint" if made else "copy"


def facts(model):
    """Everything that tells one base from another."""
    modules = {name: (type(module), sorted(vars(module))) for name, module in model.named_modules()}
    state = {name: (t.dtype, t.shape) for name, t in model.state_dict().items()}
    ends = model.get_input_embeddings(), model.get_output_embeddings()
    ties = ends[1] is not None and getattr(ends[0], "weight", None) is getattr(ends[1], "weight", 0)
    config = model.config.to_dict()
    return tiny.stored(model), modules, list(state.items()), ties, config, base_record(model), model.training


@pytest.mark.parametrize("family", FAMILIES)
def test_a_base_from_a_copy_is_bit_for_bit_the_one_from_the_checkpoint(family, kept, tmp_path, monkeypatch):
    make, settings = FAMILIES[family]
    make().to(torch.bfloat16).save_pretrained(tmp_path / "model")
    plain = load_base(tmp_path / "model", **LOAD, **settings)
    assert not kept.exists(), "nothing is kept that nobody asked for"
    for source in ("checkpoint", "copy"):
        model, found = loaded_by(tmp_path / "model", monkeypatch, **settings)
        assert found == source
        assert facts(model) == facts(plain)
        assert torch.equal(tiny.logits(model), tiny.logits(plain))
    assert len(list(kept.iterdir())) == 1
    assert kept.stat().st_mode & 0o777 == 0o700


def test_an_adapter_made_on_either_is_the_same_on_the_other(kept, checkpoint, tmp_path):
    first, second = (loaded(checkpoint)[0] for _ in range(2))
    add_lora(first, rank=4, alpha=8)
    tiny.wake(first)
    save_adapter(first, tmp_path / "adapter")
    load_adapter(second, tmp_path / "adapter")
    assert torch.equal(tiny.logits(first), tiny.logits(second))


def test_a_changed_checkpoint_is_not_served_from_the_copy_of_what_it_was(kept, checkpoint, monkeypatch):
    monkeypatch.setattr("qlora_kit.base.fingerprint._PIECE", 1)  # the larger ones of all matrices cover a tiny model
    before, _ = loaded(checkpoint)
    weights = checkpoint / "model.safetensors"
    status, entry = weights.stat(), read_header(weights)["model.layers.1.mlp.up_proj.weight"]
    with weights.open("r+b") as file:
        file.seek(entry.begin + 4)  # the second number, in no piece and not in the middle row
        file.write(np.float32(5).tobytes())
    os.utime(weights, ns=(status.st_atime_ns, status.st_mtime_ns))
    after, source = loaded_by(checkpoint, monkeypatch)
    now = weights.stat()
    assert (now.st_ino, now.st_size, now.st_mtime_ns) == (status.st_ino, status.st_size, status.st_mtime_ns)
    assert source == "checkpoint"
    assert base_record(after).mark == base_record(before).mark, "the marks alone would not have told"
    assert tiny.stored(after) != tiny.stored(before)


def test_each_setting_that_decides_a_code_has_a_copy_of_its_own(kept, tmp_path, monkeypatch):
    tiny.llama(**WIDE).save_pretrained(tmp_path / "model")
    head = {"quantize_head": True}
    asked = (
        {},
        {"double_quant": False},
        {"skip": ["down_proj"]},
        head,
        {**head, "vocabulary": 101},
        {"quantization": "int8"},
    )
    assert [loaded_by(tmp_path / "model", monkeypatch, **settings)[1] for settings in asked] == ["checkpoint"] * 6
    assert len(list(kept.iterdir())) == 6


def test_a_checkpoint_that_changes_while_it_is_read_leaves_no_copy(kept, checkpoint):
    @contextmanager
    def changing(_):
        (checkpoint / "config.json").touch()
        yield

    loaded(checkpoint, watching=changing)
    assert list(kept.iterdir()) == []
    loaded(checkpoint)
    assert len(list(kept.iterdir())) == 1


def test_a_checkpoints_own_code_and_the_libraries_that_read_it_are_part_of_what_a_copy_is_of(
    kept, checkpoint, monkeypatch
):
    def place():
        return copies.copy_place(checkpoint, "nf4", pytest.fail)

    plain = place()
    assert place() == plain
    (checkpoint / "modeling_own.py").write_text("FACTOR = 2\n")
    own = place()
    monkeypatch.setattr(copies, "version", lambda library: "0.0")
    assert len({plain, own, place()}) == 3


def test_a_base_with_other_marks_than_its_copy_is_read_again(kept, tmp_path, monkeypatch):
    for seed in (0, 1):
        tiny.mixtral(seed).save_pretrained(tmp_path / f"{seed}")
    monkeypatch.setattr(copies, "_stamp", lambda file: (file.name, 0))  # as if no time told of the change
    loaded(tmp_path / "0")
    model, source = loaded_by(tmp_path / "1", monkeypatch)
    assert source == "checkpoint"
    assert tiny.stored(model) == tiny.stored(load_base(tmp_path / "1", **LOAD))
    assert loaded_by(tmp_path / "1", monkeypatch)[1] == "copy", "that of the weights that lie there now"


def flip(place):
    path = place / "00001.safetensors"
    data = bytearray(path.read_bytes())
    data[-7] ^= 1
    path.write_bytes(data)


def cut(place):
    os.truncate(place / "00001.safetensors", 2000)


def link(place):
    outside = place.parent.parent / "elsewhere"
    shutil.move(place / "00001.safetensors", outside)
    (place / "00001.safetensors").symlink_to(outside)


def unmark(place):
    (place / "copy.json").write_text('{"files": {}}')


def link_wholly(place):
    shutil.move(place, place.parent.parent / "elsewhere")
    place.symlink_to(place.parent.parent / "elsewhere")


@pytest.mark.parametrize("damage", [flip, cut, link, unmark, link_wholly])
def test_a_damaged_copy_is_made_anew(damage, kept, checkpoint, monkeypatch):
    plain, _ = loaded(checkpoint)
    (place,) = kept.iterdir()
    damage(place)
    model, told = loaded(checkpoint)
    assert len(told) == 2
    assert told[0].startswith("a quantised copy is damaged and is made again: ")
    assert tiny.stored(model) == tiny.stored(plain)
    assert loaded_by(checkpoint, monkeypatch)[1] == "copy"


def test_without_room_for_a_copy_or_leave_to_write_one_the_base_is_loaded_and_says_so_once(
    kept, checkpoint, monkeypatch
):
    usage = namedtuple("usage", "total used free")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda place: usage(10, 10, 0))
        _, told = loaded(checkpoint)
    assert len(told) == 1
    assert told[0].startswith("no quantised copy is kept: a quantised copy needs ")
    assert list(kept.iterdir()) == []
    kept.chmod(0o777)  # any other user could put weights there
    _, told = loaded(checkpoint)
    assert told == [f"no quantised copy of {checkpoint} is kept: others can write to {kept}"]
    kept.chmod(0o700)
    monkeypatch.setattr(copies, "SETTLED_NS", 10**12)
    _, told = loaded(checkpoint)
    assert told == [f"{checkpoint} was written just now: a quantised copy is kept when it is loaded again"]
    monkeypatch.setenv("QLORA_KIT_CACHE", "0")
    assert loaded(checkpoint)[1] == []
    assert list(kept.iterdir()) == []


def test_what_is_dense_or_stored_quantised_already_gets_no_copy(kept, checkpoint, tmp_path):
    assert loaded(checkpoint, quantization="none")[1] == []
    how = BitsAndBytesConfig(load_in_8bit=True)
    AutoModelForCausalLM.from_pretrained(checkpoint, quantization_config=how).save_pretrained(tmp_path / "stored")
    assert loaded(tmp_path / "stored", quantization="int8")[1] == []
    assert not kept.exists()


def test_the_recipe_asks_for_a_copy_which_serves_other_compute_dtypes_too(kept, model_folder, tmp_path):
    settings = [f"base.model={model_folder}", "data.train=rows.jsonl", f"output={tmp_path / 'run'}", "base.device=cpu"]
    for more, entries in (([], 0), (["base.cache=true"], 1), (["base.cache=true", "base.compute_dtype=float32"], 1)):
        recipe = read_recipe("default", tuple(settings + more))
        load_recipe_base(recipe, model_folder, load_tokenizer(model_folder, recipe))
        assert (len(list(kept.iterdir())) if kept.exists() else 0) == entries


def test_a_copy_that_is_read_is_not_mapped(kept, checkpoint):
    loaded(checkpoint)
    (place,) = kept.iterdir()
    copy = Copy(place, "")
    codes = copy.read("model.layers.0.mlp.up_proj", tiny.CPU)
    assert set(codes) == {"codes", "absmax", "absmax_scale", "absmax_offset"}
    assert copy.read("lm_head", tiny.CPU) is None
    assert str(place) not in Path("/proc/self/maps").read_text()
    shutil.rmtree(place)
    with pytest.raises(ModelError, match=r"was changed while the base was loaded from it .*; load it again"):
        copy.read("model.layers.0.mlp.up_proj", tiny.CPU)
