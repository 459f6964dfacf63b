"""Freeze: a dense model, in place, becomes a frozen one whose linear layers and experts are quantised.

Everything linear inside the body that reads text is quantised and nothing else: heads (the output embedding, a
classifier) lie outside of it, embeddings, norms and routers are no linear layers. Experts are quantised, too; embedding
and output head where that is asked for. Other senses of a model, such as a vision tower, stay as they were read.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from qlora_kit.base.dense import Kept, QuantizedLinear, QuantizedWeight, nothing_kept, quantize_linear, share_workspace
from qlora_kit.base.experts import quantize_experts
from qlora_kit.base.formats import Quantization
from qlora_kit.base.fuse import fuse
from qlora_kit.base.pages import copy_off
from qlora_kit.base.record import base_record, keep_record
from qlora_kit.base.text import put_text_first, text_body, text_body_name, text_modules
from qlora_kit.base.vocabulary import quantize_vocabulary
from qlora_kit.errors import ModelError


def freeze_and_quantize(
    model: PreTrainedModel,
    quantization: Quantization,
    dtype: torch.dtype,
    device: torch.device,
    skip: Sequence[str] = (),
    *,
    quantize_head: bool = False,
    quantize_body: bool = True,
    kept: Kept = nothing_kept,
) -> PreTrainedModel:
    """Quantise the linear layers and experts of a dense model in place, move it to `device`, and freeze it.

    Args:
        model: dense, on the CPU or on fake tensors.
        quantization: the format.
        dtype: of everything that stays dense.
        device: where the model ends.
        skip: linear layers to leave dense.
        quantize_head: quantise the output head and the input embedding, too.
        quantize_body: False leaves the body as it is: it was stored so.
        kept: codes that are there already, of this very model in this very format.

    Raises:
        ModelError: an entry of `skip` names nothing, or the head cannot be quantised.
    """
    skipped = _resolve_skip(model, skip)
    keep_record(model, quantization, dtype)
    new = tuple(f"{name}." for name in base_record(model).untrained)
    skipped |= {name for name, _ in body_linears(model) if f"{name}.".startswith(new)}  # they are trained whole
    if quantization.kind != "none" and quantize_body:
        for name, module in list(body_linears(model)):
            if name not in skipped:
                model.set_submodule(name, quantize_linear(module, quantization, dtype, device, kept(name)))
    quantize_experts(model, quantization if quantize_body else Quantization("none"), dtype, device, kept)
    if quantize_head and quantization.kind != "none":
        quantize_vocabulary(model, quantization, dtype, device, kept)
    _settle_dense(text_modules(model), dtype, device)
    put_text_first(model)
    share_workspace(model)
    fuse(text_body(model))
    model.requires_grad_(False)
    return model.eval()


def _resolve_skip(model: PreTrainedModel, skip: Sequence[str]) -> set[str]:
    names = [name for name, _ in body_linears(model)]
    found: set[str] = set()
    for entry in skip:
        matches = {name for name in names if name == entry or name.rpartition(".")[2] == entry}
        if not matches:
            leaves = ", ".join(sorted({name.rpartition(".")[2] for name in names}))
            raise ModelError(f"base.skip names {entry!r}, which is not a linear layer of this model; it has: {leaves}")
        found |= matches
    return found


def _settle_dense(modules: Iterable[nn.Module], dtype: torch.dtype, device: torch.device) -> None:
    """Bring what is left dense to `dtype` and `device`, as copies that no longer point into the checkpoint's file.

    Buffers keep their dtype (rotary frequencies are fp32 for a reason), and tied parameters stay tied.
    """
    moved: dict[nn.Parameter, nn.Parameter] = {}
    for module in modules:
        if isinstance(module, QuantizedWeight):
            continue
        for name, parameter in module.named_parameters(recurse=False):
            if parameter not in moved:
                moved[parameter] = nn.Parameter(copy_off(parameter.detach(), dtype, device), requires_grad=False)
            setattr(module, name, moved[parameter])
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = buffer.to(device)


def body_linears(model: PreTrainedModel) -> Iterator[tuple[str, Any]]:
    """The linear layers inside the model's body, with their dotted names; heads are not among them.

    Subclasses of `nn.Linear` are left out: they exist because something reads their weight directly. Falcon's is none
    of these, it adds its bias in a step of its own.
    """
    body, head = text_body_name(model), model.get_output_embeddings()
    prefix = f"{body}." if body else ""
    heads = set() if head is None else set(head.modules())  # where a model is its own body, its head is in it
    for name, module in model.get_submodule(body).named_modules():
        if _is_plain_linear(module) and module not in heads and ".adapters." not in name:
            yield prefix + name, module


def _is_plain_linear(module: nn.Module) -> bool:
    return type(module) in (nn.Linear, Conv1D, QuantizedLinear) or type(module).__name__ == "FalconLinear"


def left_dense(model: PreTrainedModel) -> dict[str, nn.Parameter]:
    """The matrices of the body that no rule quantises, by dotted name: not linear layers, experts or embeddings.

    Such are stacks of weights in classes that transformers does not let be replaced, and subclasses of `nn.Linear`.
    """
    return {
        f"{name}.{leaf}": parameter
        for name, module in text_body(model).named_modules()
        if not _is_plain_linear(module) and not isinstance(module, nn.Embedding) and ".adapters." not in name
        for leaf, parameter in module.named_parameters(recurse=False)
        if parameter.ndim > 1
    }
