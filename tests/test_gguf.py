"""Claims about GGUF exports: plain transformers reads them back to the same logits, and they say what is in them."""

import math
import sys
from collections import namedtuple

import gguf
import pytest
import tiny
import torch
from test_export import LiveBytes
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from qlora_kit.base import load_base
from qlora_kit.data import Encoded, collate
from qlora_kit.errors import AdapterError, RunError
from qlora_kit.export import compare, merged_tensors
from qlora_kit.export.gguf import check_gguf_request, export, export_gguf, export_gguf_adapter
from qlora_kit.export.gguf.families import context_length, family_of, metadata
from qlora_kit.export.gguf.rope import rope_keys, rope_tensors
from qlora_kit.export.gguf.tensors import place
from qlora_kit.export.stream import SLICE_ELEMENTS
from qlora_kit.lora import adapter_parameters, adapters_off, add_lora, lora_layers
from qlora_kit.storage import sha256_file
from qlora_kit.units import MIB

TEXTS = ["the cat says 123 things", "Naïve café, déjà vu!\n\n  indented\tand 4567", "don't we'll I'VE", "日本語 🦙 ok"]
CORPUS = [*TEXTS, "the cat and the dog and the catalogue", "say what you want to say and say it again"] * 4


def byte_level(pattern=None, *, size=290, ignore_merges=False, **special):
    """A byte-level BPE whose special tokens come last."""
    bpe = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    split = [] if pattern is None else [pre_tokenizers.Split(Regex(pattern), behavior="isolated")]
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [*split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern is None)]
    )
    bpe.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    )
    made = PreTrainedTokenizerFast(tokenizer_object=bpe, **{"eos_token": "</s>", "bos_token": "<s>", **special})
    return made


def trained(model, kind="nf4", **lora):
    """The model quantised, with an adapter that changes what it says."""
    base = tiny.quantized(model, kind)
    add_lora(base, rank=4, alpha=12, **lora)
    tiny.wake(base)
    return base


def held_out(vocab=300):
    ids = tiny.tokens(rows=2, length=17, vocab=vocab).tolist()
    return [collate([Encoded(row, [place > 3 for place in range(len(row))]) for row in ids], pad_id=0)]


def read_with_transformers(folder, **settings):
    return AutoModelForCausalLM.from_pretrained(folder, gguf_file="model.gguf", dtype=torch.float32, **settings)


def ids():
    return tiny.tokens(rows=3, length=23, vocab=300)


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
def test_transformers_reads_a_llama_back_to_the_logits_of_the_model_as_trained(tmp_path, dtype):
    tokenizer = byte_level()
    model = trained(tiny.llama(vocab_size=320))
    expected = tiny.logits(model, ids())
    with adapters_off(model):
        assert tiny.relative(tiny.logits(model, ids()), expected) > 1e-2
    content = export_gguf(model, tokenizer, tmp_path / "out", dtype=dtype, audit_batches=held_out())
    found = tiny.logits(read_with_transformers(tmp_path / "out"), ids())
    # fp32 adds in another order; fp16 keeps 11 bits of a weight and bf16 keeps 8, and errors of weights add up.
    assert tiny.relative(found, expected) < {"f32": 2e-6, "f16": 2e-3, "bf16": 1.5e-2}[dtype]
    numbers = content["comparisons"]["gguf"]
    assert 0 <= numbers["mean_kl"] < {"f32": 1e-6, "f16": 1e-5, "bf16": 1e-3}[dtype]
    assert numbers["loss_export"] == pytest.approx(numbers["loss_as_trained"], rel=1e-2)
    on_disk = {path.name for path in (tmp_path / "out").iterdir()} - {"export.json"}
    assert set(content["files"]) == on_disk == {"model.gguf", "Modelfile", "README.md"}
    assert all(sha256_file(tmp_path / "out" / name) == sha for name, sha in content["files"].items())
    again = AutoTokenizer.from_pretrained(tmp_path / "out", gguf_file="model.gguf")
    assert [again(text).input_ids for text in TEXTS] == [tokenizer(text).input_ids for text in TEXTS]


# --- families ---

SMALL = {"vocab_size": 300, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
         "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}  # fmt: skip
GEMMA = {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 8, "tie_word_embeddings": True}
FAMILIES = {
    "llama": {"attention_bias": True, "head_dim": 16},
    "mistral": {"sliding_window": None, "head_dim": 12},
    "qwen2": {},
    "qwen3": {"head_dim": 16},
    "gemma": {"head_dim": 16, "tie_word_embeddings": True},
    "gemma2": GEMMA,
    "gemma3_text": {**GEMMA, "num_hidden_layers": 7},
    "phi3": {},
}


def small(family, **changes):
    if family == "gpt2":
        return tiny.gpt2(vocab_size=300, **changes)
    config = AutoConfig.for_model(family, **{**SMALL, **FAMILIES[family], **changes})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return tiny.spread(AutoModelForCausalLM.from_config(config, dtype=torch.float32)).eval()


@pytest.mark.parametrize("family", [*FAMILIES, "gpt2"])
def test_every_family_comes_back_to_the_logits_of_the_model_as_trained(tmp_path, family):
    model = trained(small(family))
    expected = tiny.logits(model, ids())
    with adapters_off(model):
        assert tiny.relative(tiny.logits(model, ids()), expected) > 1e-3
    content = export_gguf(model, byte_level(), tmp_path / "out", dtype="f32", audit_batches=held_out())
    # The audit reads the file with the package and turns it back with this kit's own code ...
    # A divergence adds 300 terms, each rounded in fp32.
    assert content["comparisons"]["gguf"]["max_kl"] < 1e-6
    if family == "gemma":
        return  # which transformers does not read
    # ... transformers reads it with code of its own; what a file has no key for is left to the config.
    found = read_with_transformers(tmp_path / "out", **({} if family == "mistral" else {"config": model.config}))
    assert tiny.relative(tiny.logits(found, ids()), expected) < 2e-6


def keys_of(folder):
    fields = gguf.GGUFReader(folder / "model.gguf").fields
    return {key: field.contents() for key, field in fields.items()}


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_what_is_read_back_is_what_was_merged(tmp_path, family):
    model = trained(small(family))
    export_gguf(model, byte_level(), tmp_path / "out", dtype="f32")
    merged = {tensor.name: tensor for tensor in merged_tensors(model, torch.float32)}
    places = [place(name, tensor.shape, model.config, family_of(model)) for name, tensor in merged.items()]
    again = {t.name: t for t in export.read_back(tmp_path / "out/model.gguf", places, torch.float32)}
    assert again.keys() == merged.keys()
    for name, tensor in again.items():
        assert tensor.shape == merged[name].shape
        # Gemma's norms lose a bit where 1 is added and taken away again.
        is_shifted = family == "gemma2" and name.endswith("norm.weight")
        torch.testing.assert_close(tensor.read(), merged[name].read(), rtol=0, atol=2e-7 if is_shifted else 0)


SLOW = [pytest.param(dtype, marks=pytest.mark.slow) for dtype in ("q4_0", "q5_k_m", "q6_k")]


@pytest.mark.parametrize("dtype", ["q8_0", "q4_k_m", *SLOW])
def test_the_audit_of_a_quantised_export_says_what_transformers_finds_in_it(tmp_path, dtype):
    model = trained(small("llama", hidden_size=256, intermediate_size=256, head_dim=64))
    content = export_gguf(model, byte_level(), tmp_path / "out", dtype=dtype, audit_batches=held_out())
    found = content["comparisons"]["gguf"]
    other = compare(model, read_with_transformers(tmp_path / "out", config=model.config), held_out())
    # 16 tokens' divergences, each a sum over 300 in fp32.
    assert {key: pytest.approx(value, rel=1e-3, abs=1e-7) for key, value in other.items()} == {
        key: found[key] for key in other
    }
    assert found["computed_in"] == "float32"
    # Random weights bear 4 bits badly; the order of the types is what counts.
    low, high = {"q8_0": (1e-8, 1e-4), "q6_k": (1e-7, 1e-3), "q5_k_m": (1e-6, 3e-3)}.get(dtype, (1e-5, 2e-2))
    assert low < found["mean_kl"] < high


def test_a_gguf_onto_the_original_is_kept_where_its_divergence_may_be_as_large(tmp_path):
    tiny.llama(vocab_size=320).save_pretrained(tmp_path / "base")
    where = {"compute_dtype": "float32", "device": "cpu"}
    model, dense = (load_base(tmp_path / "base", quantization=kind, **where) for kind in ("nf4", "none"))
    for each in (model, dense):
        add_lora(each, rank=4, alpha=12)
    tiny.wake(model)
    for (_, mine), (_, theirs) in zip(adapter_parameters(dense), adapter_parameters(model), strict=True):
        mine.data.copy_(theirs)
    expected = tiny.logits(dense, ids())
    settings = {"onto": "original", "dtype": "f32", "audit_batches": held_out()}
    with pytest.raises(RunError, match=r"the gguf export is \S+ nats .* above 1e-09, and is not kept; .* --force"):
        export_gguf(model, byte_level(), tmp_path / "out", max_kl=1e-9, **settings)
    assert [path.name for path in tmp_path.iterdir()] == ["base"]
    content = export_gguf(model, byte_level(), tmp_path / "out", max_kl=1e-9, force=True, **settings)
    assert content["onto"] == "original"
    assert content["comparisons"]["gguf"]["mean_kl"] > 1e-9
    assert tiny.relative(tiny.logits(read_with_transformers(tmp_path / "out"), ids()), expected) < 2e-6
    assert tiny.relative(tiny.logits(model, ids()), expected) > 1e-2


def test_a_fully_trained_model_is_exported_without_an_adapter(tmp_path):
    model = small("llama")
    content = export_gguf(model, byte_level(), tmp_path / "out", dtype="f32", is_whole=True)
    assert content["trained_in"] == "float32"
    found = read_with_transformers(tmp_path / "out", config=model.config)
    assert tiny.relative(tiny.logits(found, ids()), tiny.logits(model, ids())) < 2e-6
    with pytest.raises(AdapterError, match="no adapter is in use"):
        export_gguf(model, byte_level(), tmp_path / "other", dtype="f32")


def test_a_head_that_was_trained_apart_from_the_embedding_is_written_and_gemma_refuses_it(tmp_path):
    model = trained(small("llama", tie_word_embeddings=True), targets=["q_proj", "lm_head"], untie_head=True)
    export_gguf(model, byte_level(), tmp_path / "out", dtype="f32")
    assert "output.weight" in {tensor.name for tensor in gguf.GGUFReader(tmp_path / "out/model.gguf").tensors}
    found = read_with_transformers(tmp_path / "out", config=None)
    gemma = trained(small("gemma2"), targets=["q_proj", "lm_head"], untie_head=True)
    with pytest.raises(RunError, match=r"lm_head\.weight has no place in a GGUF of the family gemma2"):
        export_gguf(gemma, byte_level(), tmp_path / "gemma", dtype="f32")
    assert not found.config.tie_word_embeddings


def test_rows_of_added_tokens_go_into_the_file_of_a_model_with_a_quantised_head(tmp_path):
    tokenizer = byte_level()
    base = small("llama", vocab_size=len(tokenizer), hidden_size=64, tie_word_embeddings=True)
    base.save_pretrained(tmp_path / "base")
    added = len(tokenizer)
    assert tokenizer.add_tokens(["<call>"]) == 1
    settings = {"quantize_head": True, "vocabulary": len(tokenizer), "compute_dtype": "float32", "device": "cpu"}
    model = load_base(tmp_path / "base", **settings)
    add_lora(model, rank=4, added_tokens=[added])
    model.get_input_embeddings().adapters["default"].rows_KD.data.fill_(0.25)
    content = export_gguf(model, tokenizer, tmp_path / "out", dtype="f32", audit_batches=held_out(added))
    assert content["comparisons"]["gguf"]["max_kl"] < 1e-6
    (table,) = (t for t in gguf.GGUFReader(tmp_path / "out/model.gguf").tensors if t.name == "token_embd.weight")
    assert table.data.shape[0] == len(tokenizer) == added + 1
    assert (table.data[added] == 0.25).all()
    assert keys_of(tmp_path / "out")["tokenizer.ggml.tokens"][added] == "<call>"


def test_an_export_leaves_the_model_as_it_was_and_gives_the_same_bytes_again(tmp_path):
    model = trained(small("llama"))
    before = tiny.stored(model)
    for name in ("one", "two"):
        export_gguf(model, byte_level(), tmp_path / name, dtype="q4_0", audit_batches=held_out())
    assert tiny.stored(model) == before
    one, two = ({p.name: p.read_bytes() for p in (tmp_path / name).iterdir()} for name in ("one", "two"))
    assert one == two


def test_memory_beside_the_model_stays_below_two_tensors():
    """Of an embedding, the largest tensor of most models; numpy's arrays are none of the types that are ours."""
    model = small("llama", vocab_size=12_000, hidden_size=256, head_dim=64)
    (tensor,) = (each for each in merged_tensors(model, torch.float32) if each.name == "model.embed_tokens.weight")
    (stored,) = export._stored(model.config, [tensor], "q4_k_m")
    with LiveBytes(model) as live:
        made_bytes = sum(part.nbytes for part in stored.parts())
    whole = 4 * 12_000 * 256
    assert made_bytes == stored.stored_bytes < whole
    assert 4 * SLICE_ELEMENTS < live.peak < whole + 4 * MIB < 2 * whole + 64 * MIB


def test_llama3s_factors_are_those_that_transformers_divides_by():
    rope = {"rope_type": "llama3", "rope_theta": 500_000.0, "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}  # fmt: skip
    config = AutoConfig.for_model("llama", head_dim=128, rope_parameters=rope, max_position_embeddings=131_072)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = 500_000.0 ** -(torch.arange(0, 128, 2) / 128)
    (factors,) = rope_tensors(config, 128).values()
    assert (factors.min(), factors.max()) == (1, 8)
    # Frequencies are powers taken in fp32.
    torch.testing.assert_close(factors, plain / scaled, rtol=1e-5, atol=0)


LLAMA3_ROPE = {"rope_type": "llama3", "rope_theta": 100.0, "factor": 8.0, "low_freq_factor": 1.0,
               "high_freq_factor": 4.0, "original_max_position_embeddings": 16}  # fmt: skip


def test_llama3s_factors_are_in_the_file(tmp_path):
    model = trained(small("llama", rope_parameters=LLAMA3_ROPE))
    export_gguf(model, byte_level(), tmp_path / "out", dtype="q8_0")
    (found,) = (t for t in gguf.GGUFReader(tmp_path / "out/model.gguf").tensors if t.name == "rope_freqs.weight")
    (wanted,) = rope_tensors(model.config, 16).values()
    assert wanted.max() > wanted.min()
    assert torch.equal(torch.from_numpy(found.data.copy()), wanted.float())


LONG = {"original_max_position_embeddings": 4096, "rope_theta": 1e4}


@pytest.mark.parametrize(
    ("family", "rope", "own"),
    [
        ("phi3", {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4,
                  "partial_rotary_factor": 0.5}, 1),
        ("llama", {"rope_type": "yarn", "factor": 4.0}, 0.1 * math.log(4) + 1),
        ("llama", {"rope_type": "yarn", "factor": 4.0, "attention_factor": 1.5}, 0.1 * math.log(4) + 1),
    ],
)  # fmt: skip
def test_attention_over_a_longer_context_is_scaled_as_transformers_scales_it(family, rope, own):
    """What a file says times what runtimes do of their own, which is YaRN's factor."""
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "max_position_embeddings": 4 * 4096}
    config = AutoConfig.for_model(family, **sizes, rope_parameters=LONG | rope)
    frequencies, wanted = ROPE_INIT_FUNCTIONS[rope["rope_type"]](config, torch.device("cpu"))
    keys = rope_keys(config, 16, [rope["rope_type"]])
    assert keys.get("rope.scaling.attn_factor", 1) * own == pytest.approx(wanted)
    assert wanted > 1.05
    assert keys["rope.dimension_count"] == 2 * len(frequencies)
    assert keys["rope.scaling.original_context_length"] == 4096


def test_the_inner_width_of_a_gpt2_is_the_one_that_it_says_or_four_times_its_own():
    for inner in (None, 100):
        model = small("gpt2", n_inner=inner)
        wanted = inner or 4 * model.config.n_embd
        assert metadata(model.config, family_of(model))["gpt2.feed_forward_length"] == wanted


def test_runtimes_without_a_window_are_told_of_no_more_tokens_than_it_holds():
    windows = {"mistral": 24, "qwen2": 64, "gemma2": 64}
    for family, wanted in windows.items():
        model = small(family, sliding_window=24)
        assert model.config.sliding_window == (None if family == "qwen2" else 24)
        assert context_length(model.config, family_of(model)) == wanted


# --- refusals ---


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (tiny.mixtral, "mixtral, .*; supported: llama, mistral, qwen2, qwen3, gemma, gemma2, gemma3_text, phi3, gpt2$"),
        (lambda: small("qwen2", hidden_act="gelu"), r"the activation gelu \(runtimes compute silu\)"),
        (lambda: small("gemma2", query_pre_attn_scalar=20), r"query_pre_attn_scalar=20 \(runtimes take 16\)"),
        (lambda: small("gemma3_text", layer_types=["full_attention"] * 7), "other layers than every 6th"),
        (lambda: small("gpt2", scale_attn_by_inverse_layer_idx=True), "scale_attn_by_inverse_layer_idx"),
        (lambda: small("llama", rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}), "dynamic"),
        (
            lambda: small("qwen3", rope_parameters=LLAMA3_ROPE),
            "llama3 .* of a qwen3; supported: default, linear, yarn$",
        ),
        # Without the key runtimes of Gemma 2 cap at 50, and those of Gemma 3 never do.
        (lambda: small("gemma2", attn_logit_softcapping=None), "has attn_logit_softcapping=null, which"),
        (lambda: small("gemma3_text", final_logit_softcapping=20.0), "has final_logit_softcapping=20.0, which"),
        (lambda: small("qwen3", attention_bias=True), r"layers\.0\.self_attn\.q_proj\.bias has no place in .* qwen3"),
    ],
)
def test_what_runtimes_would_compute_otherwise_is_refused_in_one_line(tmp_path, made, said):
    with pytest.raises(RunError, match=said) as caught:
        export_gguf(trained(made()), byte_level(), tmp_path / "out", dtype="f32")
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def spoil(model, value):
    layer = next(layer for name, layer in lora_layers(model) if name.endswith("layers.1.mlp.up_proj"))
    layer.adapters["default"].b_OR.data[3, 1] = value


@pytest.mark.parametrize(
    ("value", "dtype", "fault", "said"),
    [
        (float("nan"), "q4_k_m", AdapterError, r"layers\.1\.mlp\.up_proj\.weight holds NaN or infinity"),
        (1e7, "q8_0", RunError, r"blk\.1\.ffn_up\.weight holds .* more than fp16 .* --dtype bf16 or f32"),
        (1e7, "f16", RunError, "more than fp16"),
    ],
)
def test_a_value_that_no_file_can_hold_is_refused_with_nothing_left_behind(tmp_path, value, dtype, fault, said):
    model = trained(small("llama"))
    spoil(model, value)
    with pytest.raises(fault, match=said):
        export_gguf(model, byte_level(), tmp_path / "out", dtype=dtype)
    assert list(tmp_path.iterdir()) == []


def test_a_stopped_export_leaves_nothing(tmp_path, monkeypatch):
    seen, encode = [], export.encode

    def stop(part, kind, name):
        seen.extend(path.name for path in tmp_path.rglob("*.gguf"))
        if len(seen) > 5:
            raise KeyboardInterrupt
        return encode(part, kind, name)

    monkeypatch.setattr(export, "encode", stop)
    with pytest.raises(KeyboardInterrupt):
        export_gguf(trained(small("llama")), byte_level(), tmp_path / "out", dtype="q8_0")
    assert len(seen) > 5
    assert list(tmp_path.iterdir()) == []


def test_a_disk_without_room_is_refused_before_anything_is_written_and_the_audits_copy_counts(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")(10**9, 10**9 - 5000, 5000)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    model, said = trained(small("llama", vocab_size=20_000)), []
    for batches in (None, held_out()):
        with pytest.raises(RunError, match=r"needs \d+\.\d MiB on the disk of .* has 4\.88 KiB free") as caught:
            export_gguf(model, byte_level(), tmp_path / "deep/out", dtype="f32", audit_batches=batches)
        said.append(float(str(caught.value).split("needs ")[1].split(" MiB")[0]) - 64)
    assert said[1] == pytest.approx(2 * said[0], rel=0.1)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_holds_something_and_an_unknown_type_are_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(RunError, match="is not empty"):
        check_gguf_request(tmp_path, "q4_0")
    with pytest.raises(RunError, match=r"--dtype q3_k .* use one of f32, f16, .* q6_k"):
        check_gguf_request(tmp_path / "new", "q3_k")


def test_without_the_package_one_line_says_how_to_get_it(monkeypatch):
    for name in [name for name in sys.modules if name.startswith("qlora_kit.export.gguf")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(RunError, match=r"pip install 'gguf>=0\.19'"):
        __import__("qlora_kit.export.gguf")


# --- adapters ---


def test_a_gguf_adapter_holds_scale_b_a_of_every_layer(tmp_path):
    model = trained(small("qwen2"), scaling="rslora", rank_pattern={"up_proj": 7})
    content = export_gguf_adapter(model, tmp_path / "out")
    assert content["kind"] == "gguf-adapter"
    assert content["files"]["adapter.gguf"] == sha256_file(tmp_path / "out/adapter.gguf")
    reader = gguf.GGUFReader(tmp_path / "out/adapter.gguf")
    assert reader.fields["general.type"].contents() == "adapter"
    alpha = reader.fields["adapter.lora.alpha"].contents()
    tensors = {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in reader.tensors}
    layers = dict(lora_layers(model))
    assert len(tensors) == 2 * len(layers) == 28
    for leaf, name in {"attn_q": "self_attn.q_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}.items():
        a, b = (tensors[f"blk.1.{leaf}.weight.lora_{which}"] for which in "ab")
        adapter = layers[f"model.layers.1.{name}"].adapters["default"]
        wanted = adapter.scale * (adapter.b_OR.float() @ adapter.a_RI.float())
        assert tiny.relative(alpha / len(a) * (b @ a), wanted) < 1e-6
    assert len({len(tensors[f"blk.0.{leaf}.weight.lora_a"]) for leaf in ("attn_q", "ffn_up")}) == 2


def test_an_adapter_on_a_tied_head_is_refused_since_no_gguf_of_the_base_has_that_head(tmp_path):
    head = {"targets": ["q_proj", "lm_head"]}
    with pytest.raises(RunError, match=r"tied to the embedding, .* export --to gguf, which merges it$"):
        export_gguf_adapter(
            trained(small("llama", tie_word_embeddings=True), **head, untie_head=True), tmp_path / "out"
        )
    assert list(tmp_path.iterdir()) == []
    export_gguf_adapter(trained(small("llama"), **head), tmp_path / "out")
    names = {tensor.name for tensor in gguf.GGUFReader(tmp_path / "out/adapter.gguf").tensors}
    assert {"output.weight.lora_a", "output.weight.lora_b"} < names


def test_an_adapter_that_is_more_than_two_matrices_a_layer_is_refused(tmp_path):
    for more in ({"dora": True}, {"also_train": ["norm"]}):
        with pytest.raises(RunError, match="as a plain LoRA pair"):
            export_gguf_adapter(trained(small("llama"), **more), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
