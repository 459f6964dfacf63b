"""The merged weights of a model, one tensor at a time and none of them kept.

    W' = decode(Wq) + scale B A        formed in fp32, rounded once to the dtype of the export; DoRA scales its rows

The base is the quantised one that the adapter was trained on, read back: so W' is the weight that training saw. Nothing
in the model changes. A matrix leaves in slices of rows, in its stored orientation; what stands in memory beside the
model is the weight of one quantised layer in fp32, decoded into the model's workspace and added to there, and a slice.

    W' = W + scale B A                 where the dense weights from which the base was quantised are given

That is another model: it drops the noise that the adapter learned to live with. Its weights are the checkpoint's mapped
pages, given back tensor by tensor, and only the slices are memory.

Axes: I in, O out, R rank.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from qlora_kit.base.dense import (
    Linear,
    QuantizedLinear,
    QuantizedWeight,
    device_of,
    is_transposed,
    linear_shape,
    reader,
)
from qlora_kit.base.experts import ExpertStack
from qlora_kit.base.pages import let_go_of_clean_files
from qlora_kit.base.vocabulary import QuantizedEmbedding, QuantizedTable, row_count, row_width
from qlora_kit.errors import AdapterError, ModelError
from qlora_kit.export.stream import StreamedTensor, row_slices, streamed
from qlora_kit.lora.layer import Adapter, Carrier, carriers
from qlora_kit.lora.vocabulary import TokenRows
from qlora_kit.lora.whole import WholeModule


def merged_tensors(model: nn.Module, dtype: torch.dtype, original: nn.Module | None = None) -> Iterator[StreamedTensor]:
    """What a plain transformers checkpoint of this model holds, with the adapters in use merged.

    Args:
        model: a frozen base, quantised or not, with or without adapters; it is not changed.
        dtype: of every floating-point parameter; buffers keep theirs.
        original: the dense twin of the base, of the same names, that takes its place: all that was not trained comes
            from there.

    Yields:
        tensors in the order and under the names of the dense model's state dict. A matrix of a GPT-2 `Conv1D` comes as
        (in, out). A head tied to the embedding comes once, as the embedding, unless an adapter changes one of the two.

    Raises:
        AdapterError: while a tensor is read: its layer carries an adapter, and a merged value is NaN or infinite.
        ModelError: while a tensor is read: the same, where the value is the base's own.
    """
    for tensor in _merged_tensors(model, dtype, original):
        yield tensor if original is None else replace(tensor, slices=partial(_without_pages, tensor.slices))


def _merged_tensors(model: nn.Module, dtype: torch.dtype, original: nn.Module | None) -> Iterator[StreamedTensor]:
    seen: set[tuple[object, nn.Module | None]] = set()
    for name, module, twin in _owners(model, original):
        base, part = _parts(module)
        base = base if twin is None else twin
        if isinstance(base, ExpertStack):
            yield _stack(name, base, cast(Adapter | None, part), dtype)
            continue
        own = dict(base.named_parameters(recurse=False))
        if isinstance(base, QuantizedLinear | QuantizedEmbedding) or part is not None:
            own.pop("weight", None)
            base = base.table if isinstance(base, QuantizedEmbedding) else base
            matrix = (base if isinstance(base, QuantizedLinear) else base.weight, part)
            if matrix not in seen or isinstance(part, Adapter):
                seen.add(matrix)
                yield _matrix(_join(name, "weight"), base, part, dtype)
        else:
            buffers = base.named_buffers(recurse=False)
            own |= {leaf: buffer for leaf, buffer in buffers if leaf not in base._non_persistent_buffers_set}
        for leaf, tensor in own.items():
            if (tensor, None) not in seen:
                seen.add((tensor, None))
                yield _as_stored(_join(name, leaf), tensor, dtype)


def rehearse_merge(model: nn.Module) -> None:
    """Form merged weights as an export does, and forget them: on fake tensors, what that allocates.

    Of each the first two slices, which are as large as any: one stands while the next is made. The audit that follows
    is planned as an evaluation: what it loads of the export are pages of its files, or on a card what has room beside.
    """
    with empty_workspaces(model):
        for tensor in merged_tensors(model, torch.bfloat16):
            for _slice in islice(tensor.slices(), 2):
                pass


@contextmanager
def empty_workspaces(model: nn.Module) -> Iterator[None]:
    """Form merged weights in the block: no idle memory of another dtype stands beside theirs, nor theirs after it."""
    spaces = [module.workspace for module in model.modules() if isinstance(module, QuantizedWeight)]
    for space in filter(None, spaces):
        space.release()
    try:
        yield
    finally:
        for space in filter(None, spaces):
            space.release()


def parts_in_use(model: nn.Module) -> dict[str, nn.Module]:
    """What adapters have switched on, by the dotted name of the layer or module that carries it."""
    return {name: carrier.adapters[carrier.active] for name, carrier in carriers(model) if carrier.active is not None}


def _owners(
    module: nn.Module, twin: nn.Module | None, name: str = ""
) -> Iterator[tuple[str, nn.Module, nn.Module | None]]:
    """Modules in the order of the state dict; what carries a part of an adapter is one module, or the copy in use.

    Beside each stands its twin in the original, where there is one: a copy that was trained whole has none.
    """
    if isinstance(module, WholeModule):
        is_trained = module.active is not None
        chosen = module.adapters[cast(str, module.active)] if is_trained else module.base
        yield from _owners(chosen, None if is_trained else twin, name)
        return
    yield name, module, twin
    if not isinstance(module, Carrier | QuantizedEmbedding):
        for leaf, child in module.named_children():
            yield from _owners(child, None if twin is None else twin.get_submodule(leaf), _join(name, leaf))


def _without_pages(slices: Callable[[], Iterator[Tensor]]) -> Iterator[Tensor]:
    """The same slices, of a mapped file whose pages are given back after the last."""
    yield from slices()
    let_go_of_clean_files()


def _parts(module: nn.Module) -> tuple[Any, nn.Module | None]:
    """A module without its wrapping, and what an adapter in use puts on it."""
    if not isinstance(module, Carrier):
        return module, None
    return module.base, None if module.active is None else module.adapters[module.active]


def _matrix(name: str, base: Any, part: nn.Module | None, dtype: torch.dtype) -> StreamedTensor:
    """The weight of a layer that is quantised, or on which an adapter puts something, or both."""
    fault = ModelError if part is None else AdapterError
    if isinstance(part, TokenRows):
        slices, shape = partial(_with_rows, base, part, dtype), (row_count(base), row_width(base))
    else:
        slices, shape = partial(_merged, base, cast(Adapter | None, part), dtype), linear_shape(base)
    shape = (shape[1], shape[0]) if is_transposed(base) else shape
    return StreamedTensor(name, shape, dtype, partial(_finite, slices, name, fault))


def _with_rows(base: Any, trained: TokenRows, dtype: torch.dtype) -> Iterator[Tensor]:
    """Slices of an embedding or a head with the trained rows in the place of the base's."""
    for rows, part in _pieces(base):
        if _has_values(part):
            inside = (trained.ids_K >= rows.start) & (trained.ids_K < rows.stop)
            chosen_KD = trained.rows_KD.detach()[inside].to(part)
            part[(trained.ids_K[inside] - rows.start).to(part.device)] = chosen_KD
        yield part.to(dtype, copy=True)


def _stack(name: str, stack: ExpertStack, adapter: Adapter | None, dtype: torch.dtype) -> StreamedTensor:
    """The weights of all experts of one projection, one expert at a time."""
    shape = (stack.in_features, stack.out_features) if stack.is_transposed else (stack.out_features, stack.in_features)

    def slices() -> Iterator[Tensor]:
        for expert in range(stack.experts):
            yield from _expert(stack, adapter, expert, dtype)

    fault = ModelError if adapter is None else AdapterError
    return StreamedTensor(name, (stack.experts, *shape), dtype, partial(_finite, slices, name, fault))


def _expert(stack: ExpertStack, adapter: Adapter | None, expert: int, dtype: torch.dtype) -> Iterator[Tensor]:
    """Slices of one expert; its weight is let go with them, before the next is decoded into the same memory."""
    weight_OI = stack.decoders()[expert](torch.float32)
    update = None if adapter is None else _update(adapter, stack.is_transposed, weight_OI.device, expert)
    is_own = stack.quantization.kind != "none"
    for rows, part in _spans(weight_OI.t() if stack.is_transposed else weight_OI, is_own=is_own):
        yield (part if update is None else update(part, rows)).to(dtype, copy=True)


def _merged(base: Linear, adapter: Adapter | None, dtype: torch.dtype) -> Iterator[Tensor]:
    """Slices of decode(Wq) + scale B A, in the orientation in which a checkpoint stores them."""
    update = factors_O = None
    if adapter is not None:
        update = _update(adapter, is_transposed(base), device_of(base))
        factors_O = _row_factors(adapter, base) if adapter.is_dora else None
    for rows, part in _pieces(base):
        if update is not None:
            update(part, rows)
        if factors_O is not None:
            part.mul_(factors_O if is_transposed(base) else factors_O[rows, None])
        yield part.to(dtype, copy=True)


def _row_factors(adapter: Adapter, base: Linear) -> Tensor:
    """What DoRA multiplies the rows of this base's W + scale B A by, (out,), where that base lies."""
    weight_OI = reader(base)(torch.float32).to(adapter.a_RI.device)
    # The norms that the adapter knows are those of the base on which it was trained.
    square_O = None if isinstance(base, QuantizedLinear) else weight_OI.square().sum(1)
    return cast(Tensor, adapter.row_factors(weight_OI, square_O)).to(device_of(base))


def _update(adapter: Adapter, as_in_out: bool, device: torch.device, *expert: int) -> Callable[[Tensor, slice], Tensor]:
    """What adds its rows of scale B A to some rows of a weight, in place."""
    right, left = (matrix.detach()[expert].to(device, torch.float32) for matrix in adapter.matrices)
    if as_in_out:
        left, right = right.t(), left.t()
    return lambda part, rows: part.addmm_(left[rows], right, alpha=adapter.scale)


def _pieces(base: Any) -> Iterator[tuple[slice, Tensor]]:
    """Rows of a frozen weight as a checkpoint stores them, in fp32, to be written over and let go before the next."""
    if isinstance(base, QuantizedTable) and base.rows_are_whole:
        for rows in row_slices(linear_shape(base)):
            yield rows, base.rows(torch.arange(rows.start, rows.stop, device=base.codes.device), torch.float32)
    elif isinstance(base, QuantizedLinear):
        weight_OI = base.lent(torch.float32)
        yield from _spans(weight_OI.t() if base.is_transposed else weight_OI, is_own=True)
    else:
        yield from _spans(base.weight.detach(), is_own=False)


def _spans(weight: Tensor, *, is_own: bool) -> Iterator[tuple[slice, Tensor]]:
    """The same of a weight that is there; only its slices are widened to fp32, and copied unless it may be written."""
    for rows in row_slices(weight.shape):
        yield rows, weight[rows].to(torch.float32, copy=not is_own)


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
        # Least and largest are NaN where any value is, and infinite where one is; asking each takes 27 times as long.
        if _has_values(part) and part.numel() and not torch.isfinite(torch.stack(part.aminmax())).all():
            raise fault(f"{name} holds NaN or infinity as {str(part.dtype).removeprefix('torch.')}; it is not exported")
        yield part


def _has_values(tensor: Tensor) -> bool:
    """Whether this is an export, and not its rehearsal on fake tensors."""
    return not isinstance(tensor, FakeTensor)


def _join(name: str, leaf: str) -> str:
    return f"{name}.{leaf}" if name else leaf
