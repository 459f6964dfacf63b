"""What an adapter trains in full: whole modules, rows of tokens, a head of its own; quantised embedding and head."""

import copy

import pytest
import tiny
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, Gemma3TextConfig

from qlora_kit.base.formats import Quantization
from qlora_kit.base.freeze import freeze_and_quantize
from qlora_kit.base.load import load_base
from qlora_kit.base.vocabulary import QuantizedEmbedding, QuantizedTable, extend_vocabulary
from qlora_kit.errors import AdapterError, ModelError
from qlora_kit.export import export_merged
from qlora_kit.lora import adapter_parameters, adapters_off, add_lora, combine_adapters, load_adapter, save_adapter
from qlora_kit.lora.layer import bare, carriers

WIDE = {"hidden_size": 64, "vocab_size": 97}
IDS = (5, 17, 96)
FP32 = {"rank": 4, "alpha": 8, "dtype": torch.float32}
PEFT_RTOL = 1e-5  # relative norm, fp32: the two add the same terms in another order


def tied_llama(seed=0):
    return tiny.llama(seed, tie_word_embeddings=True, **WIDE)


def free_llama(seed=0):
    return tiny.llama(seed, **WIDE)


def gemma(seed=0):
    """Its embedding multiplies what is looked up by the root of the width."""
    config = Gemma3TextConfig(
        **WIDE, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=12,
        tie_word_embeddings=True, sliding_window=8, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        max_position_embeddings=64,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return tiny.spread(AutoModelForCausalLM.from_config(config, dtype=torch.float32)).eval()


MAKERS = [tied_llama, free_llama, gemma, tiny.gpt2]


def base_of(make, kind="nf4", *, quantize_head=False, double_quant=True, dtype=torch.float32):
    return freeze_and_quantize(
        make(), Quantization(kind, double_quant), dtype, tiny.CPU, quantize_head=quantize_head
    )  # fmt: skip


def ids_with_tokens():
    ids = tiny.tokens()
    ids[:, (3, 5, 7)] = torch.tensor(IDS)
    return ids


@torch.no_grad()
def shake(model, seed=0):
    """Move everything that an adapter trains, so that it changes what the model says."""
    generator = torch.Generator().manual_seed(seed)
    for _, parameter in adapter_parameters(model):
        parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)


def trained(make=free_llama, base=None, **lora):
    """A base with an adapter that was shaken, and its logits before."""
    model = base_of(make) if base is None else base
    plain = tiny.logits(model, ids_with_tokens())
    add_lora(model, **FP32, **lora)
    shake(model)
    return model.eval(), plain


def dense_twin(make, model):
    """The dense model with the weights that the base decodes to, its embedding and head too."""
    dense = tiny.read_out(make(), model)
    embedding = bare(model.get_input_embeddings())
    if isinstance(embedding, QuantizedEmbedding):
        with torch.no_grad():
            dense.get_input_embeddings().weight.copy_(embedding.table.dense(torch.float32))
    return dense


# --- whole modules ---


@pytest.mark.parametrize("module", ["lm_head", "model.norm", "norm"])
def test_a_whole_module_starts_as_the_bases_trains_and_comes_off_bit_for_bit(module):
    model = base_of(free_llama)
    before, plain = tiny.stored(model), tiny.logits(model)
    add_lora(model, **FP32, also_train=[module])
    assert torch.equal(tiny.logits(model), plain)
    trained_here = {key: p for key, p in adapter_parameters(model) if f"{module}.default" in key or "norm" in key}
    trained_here |= {key: p for key, p in adapter_parameters(model) if "lm_head" in key}
    assert trained_here
    tiny.train_step(model.train(), lr=0.1)
    assert all(p.grad is not None and p.grad.norm() > 0 for p in trained_here.values())
    assert tiny.relative(tiny.logits(model.eval()), plain) > 1e-4
    with adapters_off(model):
        assert torch.equal(tiny.logits(model), plain)
    assert sorted(value for _, value in before.values()) == sorted(value for _, value in tiny.stored(model).values())


def test_a_trained_head_has_the_gradient_of_a_plain_one():
    model, dense = base_of(free_llama, "none"), free_llama()
    add_lora(model, **FP32, also_train=["lm_head"])
    tiny.train_step(model)
    dense.requires_grad_(False)
    dense.lm_head.requires_grad_(True)
    tiny.train_step(dense)
    found = dict(adapter_parameters(model))["lm_head.weight"].grad
    assert dense.lm_head.weight.grad.norm() > 0
    assert tiny.relative(found, dense.lm_head.weight.grad) < 1e-6


@pytest.mark.parametrize(("changes", "message"), [
    ({"also_train": ["lm_haed"]}, "did you mean lm_head"),
    ({"also_train": ["q_proj"], "targets": "mlp"}, "quantised.*base.skip"),
    ({"also_train": ["lm_head"], "targets": ["head", "q_proj"]}, "lora.targets and in lora.also_train"),
    ({"also_train": ["act_fn"]}, "no weights"),
    ({"added_tokens": [5], "also_train": ["embed_tokens"]}, "rows cannot be trained"),
    ({"added_tokens": [5], "targets": "head"}, "rows cannot be trained"),
    ({"added_tokens": [97]}, "the id 97.*97 rows"),
    ({"added_tokens": [-1]}, "the id -1"),
])  # fmt: skip
def test_what_cannot_be_trained_whole_is_refused_and_leaves_the_model_as_it_was(changes, message):
    model = base_of(free_llama)
    before = tiny.stored(model)
    with pytest.raises(AdapterError, match=message):
        add_lora(model, **FP32, **changes)
    assert tiny.stored(model) == before
    assert not list(adapter_parameters(model))


def test_a_part_in_the_body_may_be_dense_and_train_whole():
    model = freeze_and_quantize(free_llama(), Quantization(), torch.float32, tiny.CPU, skip=["down_proj"])
    report = add_lora(model, **FP32, targets="attention", also_train=["down_proj"])
    assert not any("down_proj" in name for name in report.matched)
    assert sum("down_proj" in key for key, _ in adapter_parameters(model)) == 2


# --- rows of tokens ---


@pytest.mark.parametrize("quantize_head", [False, True])
@pytest.mark.parametrize("make", [tied_llama, free_llama, gemma])
def test_trained_rows_are_those_of_a_dense_model_whose_rows_were_changed(make, quantize_head):
    model, plain = trained(make, base_of(make, quantize_head=quantize_head), added_tokens=IDS, targets="attention")
    rows = [p for key, p in adapter_parameters(model) if key.endswith("rows_KD")]
    assert len(rows) == (2 if make is free_llama else 1)
    for name, carrier in carriers(model):
        carrier.active = None if "attn" in name else carrier.active  # rows alone
    dense = dense_twin(make, model)
    with torch.no_grad():
        dense.get_input_embeddings().weight[list(IDS)] = rows[0]
        dense.get_output_embeddings().weight[list(IDS)] = rows[-1]
    found = tiny.logits(model, ids_with_tokens())
    assert tiny.relative(found, plain) > 0.01
    assert tiny.relative(found, tiny.logits(dense, ids_with_tokens())) < 1e-6


@pytest.mark.parametrize("make", MAKERS)
def test_rows_are_looked_up_for_a_part_of_longer_rows_without_a_warning(make, recwarn):
    model = base_of(make)
    add_lora(model, **FP32, added_tokens=list(IDS))
    part = ids_with_tokens()[:, :8]
    assert not part.is_contiguous()
    torch.set_warn_always(True)  # torch says it once a process
    try:
        found = tiny.logits(model, part)
    finally:
        torch.set_warn_always(False)
    assert not [str(each.message) for each in recwarn if "contiguous" in str(each.message)]
    assert torch.equal(found, tiny.logits(model, part.contiguous()))


@pytest.mark.parametrize("make", MAKERS)
def test_rows_start_as_the_bases_train_and_come_off_bit_for_bit(make):
    model = base_of(make)
    plain = tiny.logits(model, ids_with_tokens())
    add_lora(model, **FP32, added_tokens=IDS)
    assert tiny.relative(tiny.logits(model, ids_with_tokens()), plain) < 1e-6  # the head's rows are multiplied anew
    ids = ids_with_tokens()
    model(ids, labels=ids, use_cache=False).loss.backward()
    for key, parameter in adapter_parameters(model):
        assert not key.endswith("rows_KD") or (parameter.grad.norm(dim=1) > 0).all(), key
    shake(model)
    assert tiny.relative(tiny.logits(model, ids_with_tokens()), plain) > 0.01
    with adapters_off(model):
        assert torch.equal(tiny.logits(model, ids_with_tokens()), plain)


@pytest.mark.parametrize("make", [tied_llama, free_llama])
def test_the_gradient_of_the_rows_is_that_of_a_plain_embedding(make):
    model, dense = base_of(make, "none"), make()
    add_lora(model, **FP32, added_tokens=IDS)
    ids = ids_with_tokens()
    model(ids, labels=ids, use_cache=False).loss.backward()
    dense(ids, labels=ids, use_cache=False).loss.backward()
    rows = dict(adapter_parameters(model))
    for key, matrix in (("embed_tokens", dense.get_input_embeddings()), ("lm_head", dense.get_output_embeddings())):
        found = [p.grad for name, p in rows.items() if key in name and name.endswith("rows_KD")]
        assert len(found) == (0 if make is tied_llama and key == "lm_head" else 1)
        for grad in found:
            assert tiny.relative(grad, matrix.weight.grad[list(IDS)]) < 1e-6


@pytest.mark.parametrize("make", [tied_llama, free_llama, tiny.gpt2])
def test_a_longer_vocabulary_keeps_the_old_rows_and_gives_the_new_ones_their_mean(make):
    model, old = make(), make()
    extend_vocabulary(model, 101)
    extend_vocabulary(model, 50)  # never shorter
    for before, after in ((old.get_input_embeddings(), model.get_input_embeddings()),
                          (old.get_output_embeddings(), model.get_output_embeddings())):  # fmt: skip
        assert after.weight.shape == (101, before.weight.shape[1])
        assert torch.equal(after.weight[:97], before.weight)
        torch.testing.assert_close(after.weight[97:], before.weight.mean(0).expand(4, -1), rtol=1e-6, atol=1e-7)
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == (make is not free_llama)
    assert model.config.vocab_size == 101
    assert torch.equal(tiny.logits(model)[..., :97], tiny.logits(old))


def test_a_base_with_more_tokens_is_still_the_same_base(tmp_path):
    free_llama().save_pretrained(tmp_path / "model")
    model = load_base(tmp_path / "model", compute_dtype="float32", device="cpu", vocabulary=99, quantize_head=True)
    assert model.get_output_embeddings().out_features == 99
    add_lora(model, **FP32, added_tokens=[97, 98])
    save_adapter(model, tmp_path / "adapter")
    load_adapter(load_base(tmp_path / "model", device="cpu", vocabulary=99), tmp_path / "adapter")
    short = load_base(tmp_path / "model", device="cpu")
    with pytest.raises(AdapterError, match=r"the id 97.*97 rows"):
        load_adapter(short, tmp_path / "adapter")


# --- a head that is tied ---


def test_an_adapter_on_a_tied_head_leaves_the_embedding_alone(tmp_path):
    model, plain = trained(tied_llama, targets=["head"], untie_head=True)
    hidden = model.model(tiny.tokens()).last_hidden_state
    assert torch.equal(hidden, base_of(tied_llama).model(tiny.tokens()).last_hidden_state)
    assert tiny.relative(tiny.logits(model, ids_with_tokens()), plain) > 0.01
    save_adapter(model, tmp_path / "adapter")
    theirs = PeftModel.from_pretrained(dense_twin(tied_llama, model), tmp_path / "adapter")
    assert tiny.relative(tiny.logits(model), tiny.logits(theirs)) < PEFT_RTOL
    again = base_of(tied_llama)
    load_adapter(again, tmp_path / "adapter")
    assert torch.equal(tiny.logits(again), tiny.logits(model))


@pytest.mark.parametrize("module", ["lm_head", "embed_tokens"])
def test_a_tied_matrix_is_trained_whole_only_if_the_tie_may_be_cut(module, tmp_path):
    with pytest.raises(AdapterError, match="untie_head=true"):
        add_lora(base_of(tied_llama), **FP32, also_train=[module])
    model, _ = trained(tied_llama, also_train=[module], untie_head=True)
    export_merged(model, None, tmp_path / "out", dtype="float32")
    export = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert export.lm_head.weight is not export.model.embed_tokens.weight
    assert tiny.relative(tiny.logits(export), tiny.logits(model)) < 1e-5


# --- a quantised head and embedding ---


@pytest.mark.parametrize("make", [tied_llama, free_llama, gemma])
@pytest.mark.parametrize(("kind", "double_quant"), [("nf4", True), ("nf4", False), ("fp4", True), ("int8", True)])
def test_a_quantised_head_and_embedding_are_read_as_one_matrix_each(kind, double_quant, make):
    model = base_of(make, kind, double_quant=double_quant, quantize_head=True)
    head, table = model.get_output_embeddings(), model.get_input_embeddings().table
    assert type(head) is QuantizedTable
    assert (table is head) == (make is not free_llama)
    assert not any(isinstance(module, nn.Embedding | nn.Linear) for module in model.modules())
    ids = torch.tensor([0, 96, 5, 5, 33])
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert torch.equal(table.rows(ids, dtype), table.dense(dtype)[ids])
    twin = dense_twin(make, model)
    assert tiny.relative(tiny.logits(twin), tiny.logits(make())) > 1e-3, "quantising must change something"
    assert tiny.relative(tiny.logits(model), tiny.logits(twin)) < 1e-6


def test_a_quantised_head_takes_the_bytes_that_its_format_says():
    plain, small = (sum(len(v) for _, v in tiny.stored(base_of(tied_llama, quantize_head=q)).values()) for q in (0, 1))
    weights, constants = 97 * 64 // 2, 97 + 4 + 4  # codes; one byte a block, one fp32 scale, the offset
    assert plain - small == 4 * 97 * 64 - weights - constants


def test_a_block_that_would_reach_over_two_rows_is_refused():
    with pytest.raises(ModelError, match="divide the embedding's width of 64; 128 does not"):
        freeze_and_quantize(free_llama(), Quantization("nf4", True, 128), torch.float32, tiny.CPU, quantize_head=True)


@pytest.mark.parametrize("make", [tied_llama, free_llama])
def test_a_model_with_a_quantised_head_trains_generates_and_keeps_its_bytes(make):
    model = base_of(make, quantize_head=True, dtype=torch.bfloat16)
    add_lora(model, rank=4)
    before = tiny.stored(model)
    losses = [tiny.train_step(model.train(), lr=0.05) for _ in range(4)]
    assert losses[-1] < losses[0]
    model.eval().generate(tiny.tokens(1, 4), max_new_tokens=3, do_sample=False)
    assert tiny.stored(model) == before
    moved = copy.deepcopy(model).to(torch.float16).to(torch.bfloat16)
    assert torch.equal(moved.get_output_embeddings().codes, model.get_output_embeddings().codes)
    assert moved.get_input_embeddings().table is not model.get_input_embeddings().table


# --- files, PEFT, exports, together with all of the above ---

PARTS = {
    "head": (free_llama, {"also_train": ["lm_head"]}),
    "norms": (tied_llama, {"also_train": ["input_layernorm", "model.norm"]}),
    "rows, tied": (tied_llama, {"added_tokens": IDS}),
    "rows, free": (free_llama, {"added_tokens": IDS}),
    "rows, scaled": (gemma, {"added_tokens": IDS}),
    "rows, gpt2": (tiny.gpt2, {"added_tokens": IDS}),
    "rows and norm": (free_llama, {"added_tokens": IDS, "also_train": ["model.norm"]}),
    "tied head": (tied_llama, {"targets": ["head", "attention"], "untie_head": True}),
}


@pytest.fixture(params=PARTS)
def parts(request):
    make, lora = PARTS[request.param]
    return make, *trained(make, **lora)


def test_it_comes_back_bit_for_bit(parts, tmp_path):
    make, model, plain = parts
    save_adapter(model, tmp_path / "adapter")
    again = base_of(make)
    report = load_adapter(again, tmp_path / "adapter")
    ids = ids_with_tokens()
    assert tiny.relative(tiny.logits(model, ids), plain) > 0.001
    assert torch.equal(tiny.logits(again, ids), tiny.logits(model, ids))
    assert report.trainable == sum(p.numel() for _, p in adapter_parameters(model))


def test_peft_loads_it_with_the_same_logits(parts, tmp_path):
    make, model, plain = parts
    save_adapter(model, tmp_path / "adapter")
    theirs = PeftModel.from_pretrained(dense_twin(make, model), tmp_path / "adapter")
    ids = ids_with_tokens()
    assert tiny.relative(tiny.logits(model, ids), plain) > 0.001
    assert tiny.relative(tiny.logits(theirs, ids), tiny.logits(model, ids)) < PEFT_RTOL


def test_the_merged_model_says_the_same(parts, tmp_path):
    _, model, plain = parts
    export_merged(model, None, tmp_path / "out", dtype="float32")
    export, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    ids = ids_with_tokens()
    assert tiny.relative(tiny.logits(export, ids), tiny.logits(model, ids)) < 1e-5
    assert tiny.relative(tiny.logits(model, ids), plain) > 0.001


@pytest.mark.parametrize("make", [tied_llama, free_llama])
def test_a_quantised_head_is_exported_and_shared_as_any_other_layer(make, tmp_path):
    model, _ = trained(make, base_of(make, quantize_head=True), added_tokens=IDS)
    ids = ids_with_tokens()
    save_adapter(model, tmp_path / "adapter")
    theirs = PeftModel.from_pretrained(dense_twin(make, model), tmp_path / "adapter")
    assert tiny.relative(tiny.logits(theirs, ids), tiny.logits(model, ids)) < PEFT_RTOL
    again = base_of(make, quantize_head=True)
    load_adapter(again, tmp_path / "adapter")
    assert torch.equal(tiny.logits(again, ids), tiny.logits(model, ids))
    export_merged(model, None, tmp_path / "out", dtype="float32")
    export = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert tiny.relative(tiny.logits(export, ids), tiny.logits(model, ids)) < 1e-5
    assert (export.lm_head.weight is export.model.embed_tokens.weight) == (make is tied_llama)


THEIRS = [
    (free_llama, {"modules_to_save": ["lm_head"]}),
    (tied_llama, {"modules_to_save": ["lm_head"]}),
    (tied_llama, {"modules_to_save": ["norm"]}),
    (tied_llama, {"trainable_token_indices": [17, 5]}),
    (free_llama, {"trainable_token_indices": [17, 5]}),
    (free_llama, {"trainable_token_indices": {"embed_tokens": [5, 17], "lm_head": [96]}}),
    (gemma, {"trainable_token_indices": [96, 5, 17]}),
    (tied_llama, {"target_modules": ["q_proj", "lm_head"]}),
]


@pytest.mark.parametrize(("make", "settings"), THEIRS)
def test_what_peft_saves_we_load_with_the_same_logits(make, settings, tmp_path):
    base = base_of(make)
    config = LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], **settings})
    theirs = get_peft_model(dense_twin(make, base), config).eval()
    tiny.shake_peft(theirs)
    theirs.save_pretrained(tmp_path)
    ids = ids_with_tokens()
    plain = tiny.logits(base, ids)
    load_adapter(base, tmp_path)
    assert tiny.relative(tiny.logits(base, ids), plain) > 0.001
    assert tiny.relative(tiny.logits(base, ids), tiny.logits(theirs, ids)) < PEFT_RTOL
    with adapters_off(base):
        assert torch.equal(tiny.logits(base, ids), plain)


def test_two_adapters_have_heads_of_their_own(tmp_path):
    model, plain = trained(free_llama, also_train=["lm_head"])
    first = tiny.logits(model)
    report = add_lora(model, **FP32, also_train=["lm_head"], name="second")
    assert report.trainable > 97 * 64
    assert torch.equal(tiny.logits(model, ids_with_tokens()), plain)
    with pytest.raises(AdapterError, match="whole modules or rows"):
        combine_adapters(model, {"default": 0.5, "second": 0.5}, "both")
    save_adapter(model, tmp_path / "adapter")
    again = base_of(free_llama)
    load_adapter(again, tmp_path / "adapter")
    assert torch.equal(tiny.logits(again), first)
