"""The only place that knows the kinds of linear layer: how each stores its weight, and how that weight is read.

A linear layer of a base is one of
- `QuantizedLinear` (ours): codes and constants as buffers, never changed after they are made;
- `torch.nn.Linear`, weight (out, in);
- transformers' `Conv1D` (GPT-2), weight (in, out).
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Self

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from qlora_kit.base.formats import Quantization, dequantize, quantize
from qlora_kit.base.multiply import can_multiply, multiply_stored
from qlora_kit.base.pages import let_go
from qlora_kit.base.text import text_body, text_modules, text_parameters
from qlora_kit.errors import ModelError
from qlora_kit.ops import Decode, Stored, Workspace, lora_linear

STORED = ("codes", "absmax", "absmax_scale", "absmax_offset")
"""What `quantize` gives, in the order in which it gives it; the last two are for double quantisation alone."""

Kept = Callable[[str], Mapping[str, Tensor] | None]
"""Codes and constants by the dotted name of a layer, as `quantize` names them; None where they are to be made."""


def nothing_kept(name: str) -> None:
    """Of no layer."""


class QuantizedWeight(nn.Module):
    """What keeps a frozen weight quantised: codes and constants as buffers, of a format that is never forgotten.

    Args:
        quantization: the format.
        is_transposed: whether a checkpoint of the family stores the weight as (in, out).

    Attributes:
        workspace: of the model that the weight is part of; None alone.
    """

    out_features: int
    in_features: int

    def __init__(self, quantization: Quantization, is_transposed: bool) -> None:
        super().__init__()
        self.quantization, self.is_transposed = quantization, is_transposed
        self.workspace: Workspace | None = None

    @property
    def weight_count(self) -> int:
        """Weights that the codes stand for."""
        return self.out_features * self.in_features

    def read(
        self,
        stored: Mapping[str, Tensor | None],
        dtype: torch.dtype,
        *,
        lent: bool = False,
        rows: int | None = None,
    ) -> Tensor:
        """A matrix, (out, in), in `dtype`, from its codes and constants; its memory is its own while it is held.

        Args:
            stored: as `quantize` names them.
            dtype: to read it in.
            lent: in memory of the model's workspace, if it has one: for a multiplication, after which it is let go.
            rows: how many there are, if not all of the matrix.
        """
        codes = stored["codes"]
        if codes is None or stored.get("absmax") is None:
            raise ModelError(f"a {type(self).__name__} has lost its codes or constants; load the base again")
        shape = (self.out_features if rows is None else rows, self.in_features)
        out_OI = self._memory(shape, dtype, codes) if lent else torch.empty(shape, dtype=dtype, device=codes.device)
        return dequantize(stored, self.quantization, out_OI)

    def multiply(
        self, stored: Mapping[str, Tensor | None], x: Tensor, bias: Tensor | None, *, is_back: bool
    ) -> Tensor | None:
        """A product with a matrix as it is stored; None where it has to be read for it.

        Args:
            stored: as `quantize` names them.
            x: as `Stored.multiply` is given it, like the rest.
        """
        shape, codes = (self.out_features, self.in_features), stored["codes"]
        if codes is None or stored.get("absmax") is None:
            return None
        if not can_multiply(x, shape, self.quantization, is_back=is_back):
            return None
        # As if to decode into: a card's plan is then the same on all processors.
        space = self._memory(shape, x.dtype, codes)
        return multiply_stored(x, stored, self.quantization, space, bias=bias, is_back=is_back)

    def _memory(self, shape: tuple[int, int], dtype: torch.dtype, like: Tensor) -> Tensor:
        """For a matrix that is let go after a multiplication."""
        if self.workspace is None:
            return torch.empty(shape, dtype=dtype, device=like.device)
        return self.workspace.lend(shape, dtype, like)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "QuantizedWeight":
        """Follow `.to(device)`, but not a change of dtype: constants cut to bf16 would change every weight."""
        constants = {name: buffer for name, buffer in self._buffers.items() if buffer is not None}
        super()._apply(fn, recurse)
        for name, before in constants.items():
            after = self._buffers[name]
            if after is not None and after.dtype != before.dtype:
                self._buffers[name] = before.to(after.device)
        return self

    def get_extra_state(self) -> Tensor:
        """The format, as bytes: it travels in the state dict beside the codes that mean nothing without it."""
        return torch.tensor(list(repr(self.quantization).encode()), dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        """Refuse the codes of another format.

        Raises:
            ModelError: the state dict was made by a layer of another format; its numbers are in this layer by then.
        """
        if not torch.equal(state.cpu(), self.get_extra_state()):
            found = bytes(state.tolist()).decode(errors="replace")
            raise ModelError(f"the state dict holds a layer in {found}, this one is in {self.quantization}")


class Lent(Stored):
    """A quantised matrix for products: multiplied as it is stored, or read into lent memory.

    Args:
        weight: that it is, or is part of.
        stored: gives its codes and constants, as `quantize` names them.
    """

    def __init__(self, weight: QuantizedWeight, stored: Callable[[], Mapping[str, Tensor | None]]) -> None:
        self._weight, self._stored = weight, stored

    def __call__(self, dtype: torch.dtype) -> Tensor:
        """The weight, (out, in)."""
        return self._weight.read(self._stored(), dtype, lent=True)

    def multiply(self, x: Tensor, bias: Tensor | None = None, *, is_back: bool = False) -> Tensor | None:
        """x W^T + bias, or with `is_back` x W; None where the weight has to be read for it."""
        return self._weight.multiply(self._stored(), x, bias, is_back=is_back)


class QuantizedLinear(QuantizedWeight):
    """A frozen linear layer whose weight is stored quantised; its forward pass is differentiable in x.

    Args:
        weight_OI: the dense weight, (out, in); it is not kept.
        bias: (out,) or None; kept as it is, frozen.
        quantization: the format, not `none`.
        is_transposed: whether the layer came from a `Conv1D`, so that an export gives the weight back as (in, out).
    """

    codes: Tensor
    absmax: Tensor
    absmax_scale: Tensor | None
    absmax_offset: Tensor | None
    bias: Tensor | None

    def __init__(
        self, weight_OI: Tensor, bias: Tensor | None, quantization: Quantization, *, is_transposed: bool = False
    ) -> None:
        super().__init__(quantization, is_transposed)
        self._take(weight_OI.shape, quantize(weight_OI.contiguous(), quantization), bias)

    @classmethod
    def from_stored(
        cls,
        shape: tuple[int, int],
        stored: Mapping[str, Tensor],
        bias: Tensor | None,
        quantization: Quantization,
        *,
        is_transposed: bool = False,
    ) -> Self:
        """A layer of codes and constants that are there already.

        Args:
            shape: (out, in).
            stored: as `quantize` names them; they are taken as they are.
            bias: as above, like the rest.
        """
        layer = cls.__new__(cls)
        QuantizedWeight.__init__(layer, quantization, is_transposed)
        layer._take(shape, stored, bias)
        return layer

    def _take(self, shape: tuple[int, ...], stored: Mapping[str, Tensor], bias: Tensor | None) -> None:
        self.out_features, self.in_features = shape
        for name in STORED:
            self.register_buffer(name, stored.get(name))
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias, requires_grad=False))

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The stored weight, (out, in), in `dtype`; a new tensor at every call."""
        return self.read(self._buffers, dtype)

    @property
    def lent(self) -> Lent:
        """The same for products: called, in memory of the model's workspace, to be multiplied and let go."""
        return Lent(self, self._own)

    def _own(self) -> Mapping[str, Tensor | None]:
        return self._buffers

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out), in the dtype of x."""
        return lora_linear(x, self.lent, self.bias)

    def extra_repr(self) -> str:
        """What printing the model shows of the layer."""
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, {self.quantization.kind}"


Linear = QuantizedLinear | nn.Linear | Conv1D


def is_linear(module: nn.Module) -> bool:
    """Whether `module` is a linear layer that can be quantised or carry an adapter."""
    return isinstance(module, QuantizedLinear | nn.Linear | Conv1D)


def linear_shape(module: Linear) -> tuple[int, int]:
    """(out, in) of a linear layer, whatever way it stores its weight."""
    if isinstance(module, Conv1D):
        return module.weight.shape[1], module.weight.shape[0]
    return module.out_features, module.in_features


def is_transposed(module: Linear) -> bool:
    """Whether a checkpoint stores the weight of this layer as (in, out)."""
    return module.is_transposed if isinstance(module, QuantizedLinear) else isinstance(module, Conv1D)


def parameter_count(model: PreTrainedModel) -> int:
    """Parameters that text goes through, by their true shapes: a packed weight as the matrix it stands for, a tied one
    once."""
    quantized = sum(module.weight_count for module in text_modules(model) if isinstance(module, QuantizedWeight))
    return quantized + sum(parameter.numel() for parameter in text_parameters(model).values())


def decode(module: Linear, dtype: torch.dtype) -> Tensor:
    """The frozen weight of a linear layer, (out, in), in `dtype`; not always a copy, so not to be written to."""
    if isinstance(module, QuantizedLinear):
        return module.dense(dtype)
    weight = module.weight.detach().to(dtype)
    return weight.t() if isinstance(module, Conv1D) else weight


def reader(module: Linear) -> Decode:
    """What `lora_linear` reads the frozen weight of a linear layer with."""
    return module.lent if isinstance(module, QuantizedLinear) else partial(decode, module)


def device_of(module: nn.Module) -> torch.device:
    """Where the tensors of a module lie."""
    return next(tensor.device for tensor in (*module.buffers(), *module.parameters()))


def share_workspace(model: PreTrainedModel) -> None:
    """Give the quantised weights of a model's body one workspace, and let go of its memory where the body ends.

    A head has none: its matrix is the largest by far, and would stand beside the loss.
    """
    workspace = Workspace()
    body = text_body(model)
    for module in body.modules():
        if isinstance(module, QuantizedWeight):
            module.workspace = workspace
    body.register_forward_hook(workspace.release)


def quantize_linear(
    module: nn.Linear | Conv1D,
    quantization: Quantization,
    dtype: torch.dtype,
    device: torch.device,
    stored: Mapping[str, Tensor] | None = None,
) -> QuantizedLinear:
    """The quantised twin of a dense linear layer, made and kept on `device`, its bias in the compute dtype `dtype`.

    The dense weight is not to be read again: its pages, if it is mapped from a checkpoint, are let go. Codes and
    constants that are there already, `stored`, are taken as they are.
    """
    bias = None if module.bias is None else module.bias.detach().to(device, dtype, copy=True)
    is_transposed = isinstance(module, Conv1D)
    if stored is None:
        weight = module.weight.detach().to(device)
        made = QuantizedLinear(weight.t() if is_transposed else weight, bias, quantization, is_transposed=is_transposed)
        let_go(module.weight)
    else:
        shape = linear_shape(module)
        made = QuantizedLinear.from_stored(shape, stored, bias, quantization, is_transposed=is_transposed)
    return made
