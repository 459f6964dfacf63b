"""What llama.cpp makes of exports: the same tokens, the same greedy text. `make llamacpp` builds it once."""

import pytest
import tiny
import torch
from test_gguf import FAMILIES, TEXTS, byte_level, export_gguf, small, trained
from transformers import PreTrainedTokenizerBase

llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not built: make llamacpp")
pytestmark = pytest.mark.slow


def loaded(folder, **settings):
    more = {"n_ctx": 64, "n_threads": 1, "verbose": False, "logits_all": True, "type_k": 0, "type_v": 0, "seed": 0}
    return llama_cpp.Llama(str(folder / "model.gguf"), **{**more, **settings})


@torch.no_grad()
def greedy(model, prompt, count):
    found = list(prompt)
    for _ in range(count):
        found.append(model(torch.tensor([found]), use_cache=False).logits[0, -1].argmax().item())
    return found[len(prompt) :]


def answered(runtime, prompt, count):
    runtime.reset()
    runtime.eval(prompt)
    found = []
    for _ in range(count):
        found.append(int(runtime.scores[runtime.n_tokens - 1].argmax()))
        runtime.eval(found[-1:])
    return found


def assert_tokenises_alike(runtime, tokenizer: PreTrainedTokenizerBase, texts=TEXTS):
    for text in texts:
        assert runtime.tokenize(text.encode(), add_bos=True, special=True) == tokenizer(text).input_ids, text


@pytest.mark.parametrize("family", [*FAMILIES, "gpt2"])
def test_llamacpp_gives_the_logits_and_the_greedy_text_of_every_family(tmp_path, family):
    tokenizer, model = byte_level(), trained(small(family))
    export_gguf(model, tokenizer, tmp_path / "out", dtype="f32")
    runtime = loaded(tmp_path / "out")
    assert_tokenises_alike(runtime, tokenizer)
    prompt = tiny.tokens(rows=1, length=29, vocab=290)[0].tolist()
    runtime.eval(prompt)
    found = torch.from_numpy(runtime.scores[: len(prompt)].copy())
    # ggml sums in another order, and its tables of GELU and of exponentials are in fp16.
    assert tiny.relative(found, tiny.logits(model, torch.tensor([prompt]))[0]) < 1e-3
    assert answered(runtime, prompt, 20) == greedy(model, prompt, 20)
