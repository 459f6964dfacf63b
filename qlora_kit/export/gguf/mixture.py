"""Which tensor of a GGUF is stored in which type: the mixtures that people know by the names of Ollama's tags.

    q4_k_m, q5_k_m   q4_k or q5_k; q6_k for values and the MLP's way down in about half of the layers, and for the head
    q4_0             q4_0, and q6_k for the head
    q6_k, q8_0       one type for all matrices
    f32, f16, bf16   likewise

Norms, biases and learned positions stay in fp32. A matrix whose rows are no multiple of 256 takes a type of 32 weights
a block in place of a k-quant, and f16 where they are no multiple of 32 either.

Source: what `llama-quantize` of github.com/ggml-org/llama.cpp does without an importance matrix; the mixtures are
the same tensor by tensor.
"""

from dataclasses import dataclass

import gguf
import torch
from gguf import GGMLQuantizationType as Type
from gguf import LlamaFileType
from torch import Tensor

from qlora_kit.errors import RunError
from qlora_kit.export.gguf import kquants

FILE_TYPES = {
    "f32": LlamaFileType.ALL_F32,
    "f16": LlamaFileType.MOSTLY_F16,
    "bf16": LlamaFileType.MOSTLY_BF16,
    "q8_0": LlamaFileType.MOSTLY_Q8_0,
    "q4_0": LlamaFileType.MOSTLY_Q4_0,
    "q4_k_m": LlamaFileType.MOSTLY_Q4_K_M,
    "q5_k_m": LlamaFileType.MOSTLY_Q5_K_M,
    "q6_k": LlamaFileType.MOSTLY_Q6_K,
}
"""What `--dtype` may be, and the number that a file says of it."""

_BASES = {
    "f32": Type.F32,
    "f16": Type.F16,
    "bf16": Type.BF16,
    "q8_0": Type.Q8_0,
    "q4_0": Type.Q4_0,
    "q4_k_m": Type.Q4_K,
    "q5_k_m": Type.Q5_K,
    "q6_k": Type.Q6_K,
}
_PLAIN = {Type.F32: torch.float32, Type.F16: torch.float16, Type.BF16: torch.bfloat16}
_OURS = {Type.Q4_K: kquants.q4_k, Type.Q5_K: kquants.q5_k, Type.Q6_K: kquants.q6_k}
_NARROWER = {Type.Q4_K: Type.Q5_0, Type.Q5_K: Type.Q5_1, Type.Q6_K: Type.Q8_0}
"""In place of a k-quant where rows are no multiple of 256."""

_LARGEST = torch.finfo(torch.float16).max
"""All types but f32 and bf16 hold their weights, or the scales of them, in fp16."""


@dataclass(frozen=True, slots=True)
class Mixture:
    """How the tensors of one model are stored."""

    dtype: str
    """One of `FILE_TYPES`."""
    layers: int
    """Of the model."""
    is_tied: bool
    """Whether the embedding is the head too."""
    is_grouped: bool
    """Whether several queries share a key."""

    def type_of(self, name: str, shape: tuple[int, ...]) -> Type:
        """The type of one tensor, by its name and shape in the file."""
        base = _BASES[self.dtype]
        if len(shape) < 2 or name.endswith("_norm.weight") or name == "position_embd.weight":
            return Type.F32
        if base in _PLAIN:
            return base
        return _fitting(self._wanted(base, name, shape[-1]), shape[-1])

    def _wanted(self, base: Type, name: str, width: int) -> Type:
        if name == "output.weight" or (self.is_tied and name == "token_embd.weight"):
            fits = width % gguf.GGML_QUANT_SIZES[base][0] == 0
            return Type.Q6_K if fits and base != Type.Q8_0 else Type.Q8_0
        if self.dtype not in ("q4_k_m", "q5_k_m"):
            return base
        layer, leaf = (int(part) if part.isdecimal() else part for part in [*name.split("."), ""][1:3])
        is_value = leaf in ("attn_v", "attn_qkv")
        if (is_value or leaf == "ffn_down") and isinstance(layer, int) and _has_more_bits(layer, self.layers):
            return Type.Q6_K
        is_70b = self.layers == 80 and self.is_grouped  # its values are an eighth of its queries
        return Type.Q5_K if is_value and is_70b else base


def _has_more_bits(layer: int, layers: int) -> bool:
    """The first and last eighth of the layers, and of those between every third."""
    eighth = layers // 8
    return layer < eighth or layer >= 7 * layers // 8 or (layer - eighth) % 3 == 2


def _fitting(wanted: Type, width: int) -> Type:
    if width % gguf.GGML_QUANT_SIZES[wanted][0]:
        wanted = _NARROWER.get(wanted, wanted)
    return Type.F16 if width % gguf.GGML_QUANT_SIZES[wanted][0] else wanted


def stored_bytes(shape: tuple[int, ...], kind: Type) -> int:
    """Bytes of a tensor in the file."""
    weights, size = gguf.GGML_QUANT_SIZES[kind]
    return torch.Size(shape).numel() // weights * size


def encode(part: Tensor, kind: Type, name: str) -> Tensor:
    """Some rows as the file holds them.

    Args:
        part: finite, fp32, (rows, columns) or (values,).
        kind: of its tensor.
        name: of its tensor, for the error.

    Returns:
        uint8, (bytes,).

    Raises:
        RunError: a value is beyond what fp16 can hold, and the type is of fp16 or has scales of fp16.
    """
    if kind not in (Type.F32, Type.BF16) and part.numel() and part.abs().max() > _LARGEST:
        raise RunError(
            f"{name} holds {part.abs().max():.3g}, more than fp16 and scales in fp16 can ({_LARGEST:g}); "
            "export with --dtype bf16 or f32"
        )
    if kind in _PLAIN:
        found = part.to(_PLAIN[kind])
    elif kind in _OURS:
        found = _OURS[kind](part)
    else:
        found = torch.from_numpy(gguf.quants.quantize(part.numpy(), kind))
    return found.contiguous().reshape(-1).view(torch.uint8)
