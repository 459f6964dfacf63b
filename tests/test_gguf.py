"""Claims about GGUF exports: plain transformers reads them back to the same logits, and they say what is in them."""

import gguf
import pytest
import tiny
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from qlora_kit.data import Encoded, collate
from qlora_kit.export.gguf import export_gguf
from qlora_kit.lora import add_lora, adapters_off
from qlora_kit.storage import sha256_file

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

SMALL = {"vocab_size": 300, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "max_position_embeddings": 64, "tie_word_embeddings": False, "bos_token_id": 1,
         "eos_token_id": 2, "pad_token_id": 0}  # fmt: skip
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
