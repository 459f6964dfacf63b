"""What llama.cpp makes of exports: the same tokens, the same greedy text. `make llamacpp` builds it once."""

import ctypes

import gguf
import pytest
import tiny
import torch
from test_gguf import FAMILIES, TEXTS, byte_level, export_gguf, read_with_transformers, small, trained
from test_gguf_vocabulary import WORDS, named, sentencepiece, smollm
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerBase

from qlora_kit.export.gguf import export_gguf_adapter
from qlora_kit.export.gguf.mixture import FILE_TYPES
from qlora_kit.lora import lora_layers

llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not built: make llamacpp")
pytestmark = pytest.mark.slow
PROMPT = tiny.tokens(rows=1, length=29, vocab=290)


@pytest.fixture(autouse=True)
def as_stored(monkeypatch):
    """Weights are multiplied as they lie in the file: repacked for AMX, q8_0 ends in a segmentation fault within
    llama.cpp (llama-cpp-python 0.3.36 on its own, two tokens and more)."""
    module = llama_cpp.llama_cpp
    defaults = module.llama_model_default_params

    def plain():
        settings = defaults()
        settings.use_extra_bufts = False
        return settings

    monkeypatch.setattr(module, "llama_model_default_params", plain)


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
    prompt = PROMPT[0].tolist()
    runtime.eval(prompt)
    found = torch.from_numpy(runtime.scores[: len(prompt)].copy())
    # ggml sums in another order, and its tables of GELU and of exponentials are in fp16.
    assert tiny.relative(found, tiny.logits(model, PROMPT)[0]) < 1e-3
    assert answered(runtime, prompt, 20) == greedy(model, prompt, 20)


def quantised_by_llamacpp(source, out, file_type):
    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype, settings.nthread = int(file_type), 1
    code = llama_cpp.llama_model_quantize(str(source).encode(), str(out).encode(), ctypes.byref(settings))
    assert code == 0
    return {tensor.name: tensor for tensor in gguf.GGUFReader(out).tensors}


def squared_errors(tensors, exact):
    """By type: squared error against the fp32 file."""
    found = {}
    for name, tensor in tensors.items():
        error = gguf.dequantize(tensor.data, tensor.tensor_type) - gguf.dequantize(exact[name].data, 0)
        kind = tensor.tensor_type.name
        found[kind] = found.get(kind, 0.0) + float((error.astype("float64") ** 2).sum())
    return found


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 9}),
        ("llama", {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 32}),
        ("llama", {"hidden_size": 96, "intermediate_size": 176, "head_dim": 16, "tie_word_embeddings": True}),
        ("phi3", {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 8}),
        ("gpt2", {"n_embd": 256}),
        ("gemma2", {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64, "query_pre_attn_scalar": 64}),
    ],
)
def test_every_tensor_has_the_type_that_llamacpp_gives_it_and_no_larger_error(tmp_path, family, changes):
    model = trained(small(family, **changes), kind="none")
    export_gguf(model, byte_level(), tmp_path / "f32", dtype="f32")
    exact = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "f32/model.gguf").tensors}
    for dtype in ("q8_0", "q4_0", "q4_k_m", "q5_k_m", "q6_k"):
        export_gguf(model, byte_level(), tmp_path / dtype, dtype=dtype)
        ours = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / dtype / "model.gguf").tensors}
        theirs = quantised_by_llamacpp(tmp_path / "f32/model.gguf", tmp_path / f"{dtype}.gguf", FILE_TYPES[dtype])
        kinds = {name: tensor.tensor_type for name, tensor in ours.items()}
        assert kinds == {name: tensor.tensor_type for name, tensor in theirs.items()}
        found, wanted = squared_errors(ours, exact), squared_errors(theirs, exact)
        # The older types are rounded in the same way; a tie in fp32 may fall to the other side.
        assert all(found[kind] <= wanted[kind] * (1 if kind.endswith("_K") else 1.001) for kind in found)


@pytest.mark.parametrize("dtype", ["f16", "bf16", "q8_0", "q4_0", "q4_k_m", "q5_k_m", "q6_k"])
def test_llamacpp_computes_with_every_mixture_what_the_audit_said_that_it_holds(tmp_path, dtype):
    model = trained(small("llama", hidden_size=256, intermediate_size=512, head_dim=64))
    export_gguf(model, byte_level(), tmp_path / "out", dtype=dtype)
    held = tiny.logits(read_with_transformers(tmp_path / "out", config=model.config), PROMPT)[0]
    runtime = loaded(tmp_path / "out")
    runtime.eval(PROMPT[0].tolist())
    found = torch.from_numpy(runtime.scores[: PROMPT.shape[1]].copy())
    as_trained = tiny.logits(model, PROMPT)[0]
    # Kernels of quantised types round activations to 8 bits, those of f16 and bf16 to 16.
    assert tiny.relative(found, held) < {"f16": 2e-3, "bf16": 1e-2}.get(dtype, 3e-2)
    assert tiny.relative(found, as_trained) < 0.25


@pytest.mark.parametrize("scheme", ["always", "first", "never"])
def test_llamacpp_tokenises_chats_as_a_tokenizer_with_a_space_of_its_own_does(tmp_path, scheme):
    tokenizer = sentencepiece(scheme=scheme)
    tokenizer.chat_template = "{{ bos_token }}{% for m in messages %}<|user|>{{ m.content }}</s>{% endfor %}"
    export_gguf(trained(small("llama", vocab_size=400)), tokenizer, tmp_path / "out", dtype="f16")
    runtime = loaded(tmp_path / "out", vocab_only=True, logits_all=False)
    text = tokenizer.apply_chat_template([{"role": "user", "content": "say the cat"}] * 2, tokenize=False)
    wanted = tokenizer(text, add_special_tokens=False).input_ids
    assert wanted[:2] == tokenizer.convert_tokens_to_ids(["<s>", "<|user|>"])
    assert runtime.tokenize(text.removeprefix("<s>").encode(), add_bos=True, special=True) == wanted


CHAT = "<s>the cat<call>says</s> and 12345 dogs, it's  two   spaces\n\n\tand"


@pytest.mark.parametrize("name", [*WORDS, "smollm", "sentencepiece", "gemma"])
def test_llamacpp_tokenises_as_the_tokenizer_does(tmp_path, name):
    made = {"smollm": smollm, "sentencepiece": sentencepiece, "gemma": lambda: sentencepiece(prefix=False, gemma=True)}
    tokenizer = made[name]() if name in made else named(name)
    tokenizer.add_tokens([AddedToken("<call>", normalized=False)])
    export_gguf(trained(small("llama", vocab_size=400)), tokenizer, tmp_path / "out", dtype="f16")
    runtime = loaded(tmp_path / "out", vocab_only=True, logits_all=False)
    # Where a space is put before a text, it is put before each piece between special tokens, by both.
    assert_tokenises_alike(runtime, tokenizer, [*TEXTS, CHAT])


ORIGINAL = 16
LONG = {
    "llama3": ("llama", {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}),
    "linear": ("llama", {"rope_type": "linear", "factor": 4.0}),
    "yarn": ("qwen2", {"rope_type": "yarn", "factor": 4.0}),
    "yarn, other attention": ("qwen2", {"rope_type": "yarn", "factor": 4.0, "attention_factor": 1.3}),
    "longrope": ("phi3", {"rope_type": "longrope", "long_factor": [1.0, 2.0, 4.0, 6.0, 7.0, 8.0],
                          "short_factor": [1.0, 1.0, 1.1, 1.2, 1.3, 1.4]}),
}  # fmt: skip


@pytest.mark.parametrize("name", LONG)
def test_positions_beyond_the_original_length_are_turned_as_transformers_turns_them(tmp_path, name):
    family, rope = LONG[name]
    rope = {**rope, "rope_theta": 100.0, "original_max_position_embeddings": ORIGINAL}
    more = {"original_max_position_embeddings": ORIGINAL} if family == "phi3" else {}
    changes = {"rope_parameters": rope, "max_position_embeddings": 64, "initializer_range": 0.2, **more}
    model = trained(small(family, **changes))
    ids = tiny.tokens(rows=1, length=48, vocab=290)
    expected = tiny.logits(model, ids)[0]
    plain = small(family, initializer_range=0.2, rope_parameters={"rope_type": "default", "rope_theta": 100.0})
    assert tiny.relative(tiny.logits(trained(plain), ids)[0], expected) > 1e-2
    export_gguf(model, byte_level(), tmp_path / "out", dtype="f32")
    runtime = loaded(tmp_path / "out")
    runtime.eval(ids[0].tolist())
    found = torch.from_numpy(runtime.scores[: ids.shape[1]].copy())
    assert tiny.relative(found, expected) < 2e-3


@pytest.mark.parametrize("family", ["llama", "qwen3", "phi3", "gpt2"])
def test_a_gguf_adapter_on_the_gguf_of_its_base_answers_as_the_model_as_trained(tmp_path, family):
    model = trained(small(family), kind="none", scaling="rslora", rank_pattern={"re:.*(v_proj|qkv_proj|c_fc)": 7})
    expected = tiny.logits(model, PROMPT)[0]
    export_gguf_adapter(model, tmp_path / "adapter")
    for _, layer in lora_layers(model):
        for adapter in layer.adapters.values():
            adapter.b_OR.data.zero_()
    bare = tiny.logits(model, PROMPT)[0]
    assert tiny.relative(bare, expected) > 1e-2
    export_gguf(model, byte_level(), tmp_path / "out", dtype="f32")
    for more, wanted in (({"lora_path": str(tmp_path / "adapter/adapter.gguf")}, expected), ({}, bare)):
        runtime = loaded(tmp_path / "out", **more)
        runtime.eval(PROMPT[0].tolist())
        assert tiny.relative(torch.from_numpy(runtime.scores[: PROMPT.shape[1]].copy()), wanted) < 1e-3
