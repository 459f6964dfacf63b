"""Tiny random models and the small things that every test does with them. Nothing here reads the network.

The widths are chosen to hurt: 176 is a multiple of 16 and not of 64, and 48 x 176 elements leave a last half-filled
block for blocks above 256.
"""

import os
import sys
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GptOssConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3MoeConfig,
)

from qlora_kit.base.dense import QuantizedLinear, decode, is_linear
from qlora_kit.base.experts import expert_stacks
from qlora_kit.base.formats import Quantization
from qlora_kit.base.freeze import freeze_and_quantize
from qlora_kit.lora import lora_layers
from qlora_kit.lora.layer import bare
from qlora_kit.ops import triton

CPU = torch.device("cpu")
LLAMA = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 176,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def llama(seed: int = 0, **changes: object) -> LlamaForCausalLM:
    """A dense fp32 Llama whose norms are not all one, so that no two of different seeds look alike."""
    config = LlamaConfig(**{**LLAMA, **changes})
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return spread(LlamaForCausalLM(config)).eval()


def gpt2(seed: int = 0, **changes: object) -> GPT2LMHeadModel:
    """A dense fp32 GPT-2: Conv1D layers with biases, and a head tied to the embedding."""
    settings = {
        "vocab_size": 97, "n_positions": 64, "n_embd": 48, "n_layer": 2, "n_head": 4, "bos_token_id": 1,
        "eos_token_id": 2, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0,
    }  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return spread(GPT2LMHeadModel(GPT2Config(**{**settings, **changes}))).eval()


EXPERTS = {"num_hidden_layers": 2, "hidden_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2,
           "num_experts_per_tok": 2, "head_dim": 12, "vocab_size": 97, "max_position_embeddings": 64,
           "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "tie_word_embeddings": False}  # fmt: skip


def _mixture(config: PretrainedConfig, seed: int) -> PreTrainedModel:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return spread(AutoModelForCausalLM.from_config(config, dtype=torch.float32)).eval()


def mixtral(seed: int = 0) -> PreTrainedModel:
    """A dense fp32 Mixtral of four experts, (experts, out, in), whose choice of experts is far from even."""
    return _mixture(MixtralConfig(**EXPERTS, intermediate_size=32, num_local_experts=4), seed)


def qwen3_moe(seed: int = 0) -> PreTrainedModel:
    """A dense fp32 Qwen3-MoE of five experts."""
    return _mixture(Qwen3MoeConfig(**EXPERTS, moe_intermediate_size=40, num_experts=5, mlp_only_layers=[]), seed)


def gpt_oss(seed: int = 0) -> PreTrainedModel:
    """A dense fp32 gpt-oss: experts stored as (experts, in, out), with biases and a gate of its own."""
    config = GptOssConfig(**EXPERTS, intermediate_size=32, num_local_experts=4, attn_implementation="eager")
    return _mixture(config, seed)


def quantized(
    model: PreTrainedModel, kind: str = "nf4", *, double_quant: bool = True, block_size: int = 64,
    dtype: torch.dtype = torch.float32, skip: tuple[str, ...] = (),
) -> PreTrainedModel:  # fmt: skip
    """The model itself, frozen and quantised in place."""
    return freeze_and_quantize(model, Quantization(kind, double_quant, block_size), dtype, CPU, skip)


def save_tokenizer(folder: Path) -> int:
    """A byte-level tokenizer, saved as a user would have it; gives the number of its tokens."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe.train_from_iterator(
        ["say cat"],
        trainers.BpeTrainer(vocab_size=260, special_tokens=["</s>"], initial_alphabet=alphabet, show_progress=False),
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="</s>")
    tokenizer.save_pretrained(folder)
    return len(tokenizer)


def save_model(folder: Path) -> Path:
    """A two-layer Llama with random weights beside it."""
    llama(vocab_size=save_tokenizer(folder), eos_token_id=0).save_pretrained(folder)
    return folder


def tokens(rows: int = 3, length: int = 11, seed: int = 0, vocab: int = 97) -> Tensor:
    """Random token ids, (rows, length)."""
    return torch.randint(3, vocab, (rows, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits(model: nn.Module, ids: Tensor | None = None) -> Tensor:
    """What the model says to `ids`, (rows, length, vocab), with no cache."""
    return model(tokens() if ids is None else ids, use_cache=False).logits


def train_step(model: nn.Module, lr: float = 0.0, seed: int = 0) -> float:
    """One step of plain gradient descent on random tokens; gradients stay where they are. Returns the loss."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    for parameter in trainable:
        parameter.grad = None
    ids = tokens(seed=seed)
    loss = model(ids, labels=ids, use_cache=False).loss
    loss.backward()
    with torch.no_grad():
        for parameter in trainable:
            if parameter.grad is not None:
                parameter.sub_(lr * parameter.grad)
    return loss.item()


@torch.no_grad()
def wake(model: nn.Module, spread: float = 0.1, seed: int = 0, name: str = "default") -> None:
    """Fill every B of an adapter with N(0, spread^2), so that it changes what the model says."""
    generator = torch.Generator().manual_seed(seed)
    for _, layer in lora_layers(model):
        if name in layer.adapters:
            b_OR = layer.adapters[name].b_OR
            b_OR.copy_(torch.randn(b_OR.shape, generator=generator) * spread)


@torch.no_grad()
def wake_peft(model: nn.Module) -> None:
    """The same for a model of PEFT, whose own start of B depends on the width."""
    for key, parameter in model.named_parameters():
        if "lora_B" in key:
            parameter.normal_(std=0.1)


@torch.no_grad()
def shake_peft(model: nn.Module) -> None:
    """Move everything that a model of PEFT trains, whole modules and rows too."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)


@torch.no_grad()
def read_out(dense: PreTrainedModel, base: PreTrainedModel) -> PreTrainedModel:
    """Give linear layers and experts of `dense` the weights that `base` decodes to: the oracle without quantisation."""
    for name, module in list(dense.named_modules()):
        if is_linear(module):
            source = base
            for part in name.split("."):
                source = bare(source.get_submodule(part))
            weight = decode(source, torch.float32)
            module.weight.copy_(weight if isinstance(module, nn.Linear) else weight.t())
    for name, source in expert_stacks(base).items():
        stack = bare(source)
        weights = torch.stack([stack.dense(expert, torch.float32) for expert in range(stack.experts)])
        dense.get_parameter(name).copy_(weights.transpose(1, 2) if stack.is_transposed else weights)
    return dense


def stored(model: nn.Module) -> dict[str, tuple[torch.dtype, bytes]]:
    """Dtype and bytes of everything frozen: codes, constants, norms, embeddings, heads, buffers."""
    frozen = {name: p for name, p in model.named_parameters() if not p.requires_grad}
    frozen |= dict(model.named_buffers())
    return {
        name: (t.dtype, t.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        for name, t in frozen.items()
    }


def quantized_layers(model: nn.Module) -> dict[str, QuantizedLinear]:
    """The quantised layers of a model by dotted name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantizedLinear)}


def relative(found: Tensor, wanted: Tensor) -> float:
    """Norm of the difference over the norm of `wanted`, in float64."""
    return ((found.double() - wanted.double()).norm() / wanted.double().norm()).item()


@torch.no_grad()
def spread(model: PreTrainedModel) -> PreTrainedModel:
    """Move the parameters that start as all ones or all zeros."""
    for parameter in model.parameters():
        if parameter.ndim == 1 or not parameter.any():
            parameter.add_(torch.randn(parameter.shape) * 0.1)
    return model


def told(monkeypatch, *losses):
    """Let the evaluations of a training loop say these losses, one after the other."""
    left = iter(losses)
    monkeypatch.setattr(
        "qlora_kit.train.loop.evaluate_loss", lambda *_, **__: SimpleNamespace(loss=next(left), measures={})
    )


@contextmanager
def defaults(dtype=torch.float32, device="cpu", threads=1):
    """A block with other defaults of torch."""
    before = torch.get_default_dtype(), torch.get_num_threads()
    torch.set_default_dtype(dtype)
    torch.set_num_threads(threads)
    try:
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(before[0])
        torch.set_num_threads(before[1])


def uncompiled(monkeypatch):
    """Let operators run by torch's own, which give the bits of transformers' modules."""
    for name in ("rms_norm", "gated", "rotary", "softmax_gradient"):
        monkeypatch.setattr(sys.modules[f"qlora_kit.ops.{name}"], "typed_kernel", lambda *_: None)
    monkeypatch.setattr(sys.modules["qlora_kit.ops.attention"], "_is_compiled", lambda: False)


def by_triton(monkeypatch):
    """Let operators do on a CPU what they do on a CUDA device, by Triton's interpreter; which cuts bfloat16 off where
    devices and torch round it to the nearest."""
    pytest.importorskip("triton", reason="Triton is not installed: it is in the test extra on Linux")
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("Triton is not interpreted where there is a CUDA device: make gpu")
    from triton import language
    from triton.runtime import interpreter

    def rounded(values, source, target, mode):
        if (source, target) != (language.float32, language.bfloat16):
            return cut_off(values, source, target, mode)
        return torch.from_numpy(np.array(values)).bfloat16().view(torch.uint16).numpy()

    uncompiled(monkeypatch)
    cut_off = interpreter._convert_float
    monkeypatch.setattr(interpreter, "_convert_float", rounded)
    monkeypatch.setattr(triton, "serves", lambda device: True)
    for name, directions in (
        ("rms_norm", ("_forward", "_backward")),
        ("gated", ("_forward", "_backward")),
        ("rotary", ("_rotary",)),
    ):
        op = sys.modules[f"qlora_kit.ops.{name}"]
        for direction in directions:
            monkeypatch.setattr(op, direction, getattr(op, f"{direction}_cuda"))


def one_by_one(model: nn.Module) -> nn.Module:
    """Let layers with one input take their low-rank products each on its own."""
    for _, layer in lora_layers(model):
        layer.siblings = None
    return model


def dead_process() -> int:
    """The number of a process that is over."""
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)
    return child
