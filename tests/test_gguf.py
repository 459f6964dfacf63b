"""Claims about GGUF exports: plain transformers reads them back to the same logits, and they say what is in them."""

import gguf
import pytest
import tiny
import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from qlora_kit.data import Encoded, collate
from qlora_kit.export.gguf import export_gguf
from qlora_kit.lora import add_lora, adapters_off
from qlora_kit.storage import sha256_file

TEXTS = ["the cat says 123 things", "Naïve café, déjà vu!\n\n  indented\tand 4567", "don't we'll I'VE", "日本語 🦙 ok"]
CORPUS = [*TEXTS, "the cat and the dog and the catalogue", "say what you want to say and say it again"] * 4


def byte_level(pattern=None, *, size=300, ignore_merges=False, **special):
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
    assert 0 <= numbers["mean_kl"] < {"f32": 1e-10, "f16": 1e-5, "bf16": 1e-3}[dtype]
    assert numbers["loss_export"] == pytest.approx(numbers["loss_as_trained"], rel=1e-2)
    on_disk = {path.name for path in (tmp_path / "out").iterdir()} - {"export.json"}
    assert set(content["files"]) == on_disk == {"model.gguf", "Modelfile", "README.md"}
    assert all(sha256_file(tmp_path / "out" / name) == sha for name, sha in content["files"].items())
    again = AutoTokenizer.from_pretrained(tmp_path / "out", gguf_file="model.gguf")
    assert [again(text).input_ids for text in TEXTS] == [tokenizer(text).input_ids for text in TEXTS]
