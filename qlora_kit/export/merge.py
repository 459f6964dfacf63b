"""The merged weights of a model, one tensor at a time and none of them kept.

    W' = decode(Wq) + scale B A        formed in fp32, rounded once to the dtype of the export; DoRA scales its rows

The base is the quantised one that the adapter was trained on, read back: so W' is the weight that training saw. Nothing
in the model changes. A matrix leaves in slices of rows, in its stored orientation; what stands in memory beside the
model is the decoded weight of one quantised layer in fp32, and about three slices.

Not here: merging into the original 16-bit weights, which is another model (it drops the noise that the adapter learned
to live with).

Axes: I in, O out, R rank.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from qlora_kit.base.dense import Linear, QuantizedLinear, decode, is_transposed, linear_shape
from qlora_kit.base.experts import ExpertStack
from qlora_kit.errors import AdapterError, ModelError
from qlora_kit.export.stream import StreamedTensor, row_slices, streamed, tensor_slices
from qlora_kit.lora.layer import Adapter, LoraLayer


def merged_tensors(model: nn.Module, dtype: torch.dtype) -> Iterator[StreamedTensor]:
    """What a plain transformers checkpoint of this model holds, with the adapters in use merged.

    Args:
        model: a frozen base, quantised or not, with or without adapters; it is not changed.
        dtype: of every floating-point parameter; buffers keep theirs.

    Yields:
        tensors in the order and under the names of the dense model's state dict. A matrix of a GPT-2 `Conv1D` comes as
        (in, out). A head tied to the embedding comes once, as the embedding, unless it carries an adapter of its own.

    Raises:
        AdapterError: while a tensor is read: its layer carries an adapter, and a merged value is NaN or infinite.
        ModelError: while a tensor is read: the same, where the value is the base's own.
    """
    persistent = model.state_dict().keys()
    seen: set[Tensor] = set()
    for name, module in _owners(model):
        base, adapter = _parts(module)
        if isinstance(base, ExpertStack):
            yield _stack(name, base, adapter, dtype)
            continue
        if isinstance(base, QuantizedLinear) or adapter is not None:
            yield _matrix(_join(name, "weight"), base, adapter, dtype)
            own = {} if base.bias is None else {"bias": base.bias}
        else:
            buffers = base.named_buffers(recurse=False)
            own = dict(base.named_parameters(recurse=False))
            own |= {leaf: buffer for leaf, buffer in buffers if _join(name, leaf) in persistent}
        for leaf, tensor in own.items():
            if tensor not in seen:
                seen.add(tensor)
                yield _as_stored(_join(name, leaf), tensor, dtype)


def adapters_in_use(model: nn.Module) -> dict[str, Adapter]:
    """The adapter of every layer that has one switched on, by the layer's dotted name."""
    parts = ((name, _parts(module)[1]) for name, module in _owners(model))
    return {name: adapter for name, adapter in parts if adapter is not None}


def _owners(module: nn.Module, name: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Modules in the order of the state dict; an adapted layer is one module, whatever it is made of."""
    yield name, module
    if not isinstance(module, LoraLayer):
        for leaf, child in module.named_children():
            yield from _owners(child, _join(name, leaf))


def _parts(module: nn.Module) -> tuple[Any, Adapter | None]:
    """A module without its wrapping, and the adapter in use on it."""
    if not isinstance(module, LoraLayer):
        return module, None
    if module.active is None:
        return module.base, None
    return module.base, cast(Adapter, module.adapters[module.active])


def _matrix(name: str, base: Linear, adapter: Adapter | None, dtype: torch.dtype) -> StreamedTensor:
    """The weight of a layer that is quantised, adapted or both."""
    out, width = linear_shape(base)
    shape = (width, out) if is_transposed(base) else (out, width)
    fault = ModelError if adapter is None else AdapterError
    return StreamedTensor(name, shape, dtype, partial(_finite, partial(_merged, base, adapter, dtype), name, fault))


def _stack(name: str, stack: ExpertStack, adapter: Adapter | None, dtype: torch.dtype) -> StreamedTensor:
    """The weights of all experts of one projection, one expert at a time."""
    shape = (stack.in_features, stack.out_features) if stack.is_transposed else (stack.out_features, stack.in_features)

    def slices() -> Iterator[Tensor]:
        for expert in range(stack.experts):
            weight = stack.dense(expert, torch.float32)
            if adapter is not None:
                update = adapter.b_OR[expert].detach().float() @ adapter.a_RI[expert].detach().float()
                weight = weight.add(update, alpha=adapter.scale)
            yield from tensor_slices(weight.t() if stack.is_transposed else weight, dtype)

    fault = ModelError if adapter is None else AdapterError
    return StreamedTensor(name, (stack.experts, *shape), dtype, partial(_finite, slices, name, fault))


def _merged(base: Linear, adapter: Adapter | None, dtype: torch.dtype) -> Iterator[Tensor]:
    """Slices of decode(Wq) + scale B A, in the orientation in which a checkpoint stores them."""
    # A dense weight needs no decoding: it is read where it lies, and only its slices are widened to fp32.
    weight = decode(base, torch.float32 if isinstance(base, QuantizedLinear) else base.weight.dtype)
    factors_O = None if adapter is None else adapter.row_factors(weight)
    weight = weight.t() if is_transposed(base) else weight
    if adapter is None:
        yield from tensor_slices(weight, dtype)
        return
    left, right = adapter.b_OR.detach().float(), adapter.a_RI.detach().float()
    if is_transposed(base):
        left, right = right.t(), left.t()
    for rows in row_slices(weight.shape):
        part = (left[rows] @ right).mul_(adapter.scale).add_(weight[rows])
        if factors_O is not None:
            part.mul_(factors_O if is_transposed(base) else factors_O[rows, None])
        yield part.to(dtype)


def _as_stored(name: str, tensor: Tensor, dtype: torch.dtype) -> StreamedTensor:
    """A parameter in the dtype of the export, or a buffer in its own."""
    if not isinstance(tensor, nn.Parameter) or not tensor.is_floating_point():
        return streamed(name, tensor)
    plain = streamed(name, tensor, dtype)
    return replace(plain, slices=partial(_finite, plain.slices, name, ModelError))


def _finite(
    slices: Callable[[], Iterator[Tensor]], name: str, fault: type[AdapterError] | type[ModelError]
) -> Iterator[Tensor]:
    """The same slices, each looked through before it leaves."""
    for part in slices():
        if not torch.isfinite(part).all():
            raise fault(f"{name} holds NaN or infinity as {str(part.dtype).removeprefix('torch.')}; it is not exported")
        yield part


def _join(name: str, leaf: str) -> str:
    return f"{name}.{leaf}" if name else leaf
