"""Codes that make up for each other: weights are rounded so that a layer's outputs stay, not each weight.

    min over codes of  tr((W - Q) H (W - Q)^T),   H = X^T X   of the layer's inputs X on calibration rows

Column by column: what rounding one input's weights loses is taken up by the weights that are not rounded yet, as far as
the inputs go together. The constants are those of plain rounding, double quantisation included, so every weight is
rounded to what will be read. Columns with the strongest inputs come first.

Layers go in the order in which they run, and X is what the layers before, re-quantised already, hand on: they make up
for those, too. The model runs a block at a time, on rows of its training; the rows of the audit are others. When a
block is done, nothing of it has changed.

In memory beside the model: of one matrix its weight three times in fp32, and H, which for a wide input is larger, twice
in fp32 and twice in fp64; the codes of one block; the inputs of one block on all calibration rows.

Source: Frantar et al. 2022, arXiv 2210.17323 (GPTQ), algorithm 1.

Axes: I in, O out, C columns of a part, B sequences, T tokens, S all of their tokens.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from qlora_kit.base.dense import Linear, QuantizedLinear, is_transposed, linear_shape
from qlora_kit.base.formats import Grid, Quantization, quantize
from qlora_kit.data.collate import Batch
from qlora_kit.errors import RunError
from qlora_kit.lora.layer import LoraLinear, bare
from qlora_kit.train.activations import activation_blocks
from qlora_kit.train.evaluate import evaluation_mode

DAMPING = 0.01
"""Added to the diagonal of H, as a share of its mean: a sound inverse. From 0.001 to 0.1 the audit tells no difference
(quickstart, one seed)."""

COLUMNS = 128
"""Columns whose errors reach those behind them in one product."""

Stored = dict[str, Tensor]
"""Codes and constants of a matrix, as `quantize` names them."""

_More = tuple[tuple[Any, ...], dict[str, Any]]
"""What a block is given beside its input: arguments by place, and by name."""


@torch.no_grad()
def compensated(w_OI: Tensor, gram_II: Tensor, quantization: Quantization) -> Stored:
    """Codes and constants of a matrix for inputs that go together in a known way.

    Args:
        w_OI: the weight, (out, in), fp32.
        gram_II: H, the sum of x^T x over inputs x, (in, in), fp32.
        quantization: the format.

    Returns:
        the constants that `quantize` gives, with other codes.
    """
    stored = quantize(w_OI.contiguous(), quantization)
    if not gram_II.diagonal().any():
        return stored  # nothing came in, so nothing comes out wrong
    grid = Grid(stored, w_OI.shape, quantization)
    order = gram_II.diagonal().argsort(descending=True, stable=True).tolist()
    factor_II, left_OI = _factor(gram_II[order][:, order]), w_OI[:, order]
    codes_OI = torch.empty(w_OI.shape, dtype=stored["codes"].dtype, device=w_OI.device)
    for begin in range(0, len(order), COLUMNS):
        end = min(begin + COLUMNS, len(order))
        errors_OC = left_OI.new_empty(len(left_OI), end - begin)
        for column in range(begin, end):
            codes_OI[:, order[column]], read_O = grid.nearest(left_OI[:, column], order[column])
            error_O = errors_OC[:, column - begin] = (left_OI[:, column] - read_O) / factor_II[column, column]
            left_OI[:, column:end].addr_(error_O, factor_II[column, column:end], alpha=-1)
        left_OI[:, end:].addmm_(errors_OC, factor_II[begin:end, end:], alpha=-1)
    return {**stored, "codes": grid.packed(codes_OI)}


def _factor(gram_II: Tensor) -> Tensor:
    """The upper triangle U with U^T U = (H + damping)^-1, fp32; each step is written over the last."""
    factor_II = gram_II.double()
    factor_II.diagonal().add_(DAMPING * factor_II.diagonal().mean())
    torch.linalg.cholesky(factor_II, out=factor_II)
    torch.cholesky_inverse(factor_II, out=factor_II)
    return torch.linalg.cholesky(factor_II, upper=True, out=factor_II).float()


class Compensation:
    """Codes and constants of a model's layers, asked for by name in the order in which they run.

    Args:
        model: as trained; it is unchanged whenever nothing is being asked.
        weight: gives what is to be stored of a layer, (out, in), fp32.
        names: of the layers that will be asked for.
        quantization: the format.
        batches: calibration rows.

    Raises:
        RunError: the model's blocks do not hand their output on to each other.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        weight: Callable[[str], Tensor],
        names: Collection[str],
        quantization: Quantization,
        batches: Sequence[Batch],
    ) -> None:
        self.model, self.weight, self.names, self.quantization = model, weight, names, quantization
        self._padding = [_is_real(batch).to(model.device) for batch in batches]
        with evaluation_mode(model):
            self._inputs, self._more = _record(model, batches)
        self._done: dict[str, Stored] = {}

    def __call__(self, name: str) -> Stored:
        """Codes and constants of one layer; plainly rounded if it is in no block, or nothing comes in."""
        while any(name.startswith(f"{block}.") for block in self._more):
            self._done = self._block(next(iter(self._more)))
        return self._done.pop(name) if name in self._done else quantize(self.weight(name), self.quantization)

    def _block(self, name: str) -> dict[str, Stored]:
        """All layers of a block; what it makes of its inputs with them becomes the inputs of the next."""
        block, made = self.model.get_submodule(name), dict[str, Stored]()
        leaves = [each.removeprefix(f"{name}.") for each in self.names if each.startswith(f"{name}.")]
        more = self._more.pop(name)
        with evaluation_mode(self.model), _alone(block), ExitStack() as swapped:
            for group in _groups(block, leaves, partial(_run, block, more[:1], self._inputs[:1])):
                gram_II = self._gram(block, group[0], more)
                if not torch.isfinite(gram_II).all():
                    raise RunError(f"{name}.{group[0]} gets NaN or infinite inputs on the calibration rows")
                for leaf in group:
                    stored = compensated(self.weight(f"{name}.{leaf}"), gram_II, self.quantization)
                    swapped.enter_context(_in_place(block, leaf, stored, self.quantization))
                    made[f"{name}.{leaf}"] = stored
            self._inputs = _run(block, more, self._inputs)
        return made

    def _gram(self, block: nn.Module, leaf: str, more: Sequence[_More]) -> Tensor:
        """H of a layer over the tokens of all batches, without padding."""
        layer = block.get_submodule(leaf)
        width = linear_shape(bare(layer))[1]
        gram_II = torch.zeros(width, width, device=self.model.device)

        def add(is_real_S: Tensor, x: Tensor) -> None:
            x_SI = x.reshape(-1, width).float()
            x_SI = x_SI[is_real_S] if len(x_SI) == len(is_real_S) else x_SI
            gram_II.addmm_(x_SI.t(), x_SI)

        for x, is_real_S, each in zip(self._inputs, self._padding, more, strict=True):
            with _before(layer, partial(add, is_real_S)):
                _run(block, [each], [x])
        return gram_II


def _record(model: PreTrainedModel, batches: Sequence[Batch]) -> tuple[list[Tensor], dict[str, list[_More]]]:
    """What goes into the first block, batch by batch; and by block, what else each is given."""
    inputs: list[Tensor] = []
    more: dict[str, list[_More]] = {}
    for batch in batches:
        calls: list[tuple[str, tuple[Any, ...], dict[str, Any], Any]] = []
        with ExitStack() as hooks:
            for name, block in activation_blocks(model).items():
                note = partial(_note, calls, name)
                hooks.callback(block.register_forward_hook(note, with_kwargs=True).remove)
            model.base_model(input_ids=batch.input_ids.to(model.device), use_cache=False)
        given = [args[:1] for _, args, _, _ in calls]
        made = [_first(output) for *_, output in calls]
        if not all(given) or any(x is not y for (x,), y in zip(given[1:], made, strict=False)) or not calls:
            raise RunError(
                f"the blocks of a {model.config.model_type} do not hand on what they make, so codes cannot be chosen "
                "block by block; export with --calibration-rows 0, which rounds each weight for itself"
            )
        inputs.append(given[0][0])
        for name, args, kwargs, _ in calls:
            more.setdefault(name, []).append((args[1:], kwargs))
    return inputs, more


def _note(calls: list[Any], name: str, _: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
    calls.append((name, args, kwargs, output))


def _run(block: nn.Module, more: Sequence[_More], inputs: Sequence[Tensor]) -> list[Tensor]:
    """What a block makes of its inputs, batch by batch."""
    return [_first(block(x, *args, **kwargs)) for x, (args, kwargs) in zip(inputs, more, strict=True)]


def _first(output: Any) -> Tensor:
    """What a block hands on: some give it beside other things."""
    first: Tensor = output[0] if isinstance(output, tuple) else output
    return first


def _groups(block: nn.Module, leaves: Sequence[str], run: Callable[[], object]) -> list[list[str]]:
    """The layers that a run calls, in order; those called with one input, one after another, are a group."""
    calls: dict[str, Tensor] = {}
    with ExitStack() as hooks:
        for leaf in leaves:
            hooks.enter_context(_before(block.get_submodule(leaf), partial(calls.setdefault, leaf)))
        run()
    groups: list[list[str]] = []
    last: Tensor | None = None
    for leaf, x in calls.items():
        if x is last:
            groups[-1].append(leaf)
        else:
            groups.append([leaf])
        last = x
    return groups


def _is_real(batch: Batch) -> Tensor:
    """Which places of a batch hold a token and no padding, (B * T,)."""
    return (torch.arange(batch.input_ids.shape[1]) < torch.tensor(batch.lengths)[:, None]).view(-1)


@contextmanager
def _before(layer: nn.Module, see: Callable[[Tensor], object]) -> Iterator[None]:
    """In the block, show the input of each call of a layer."""

    def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
        see(args[0])

    handle = layer.register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _alone(block: nn.Module) -> Iterator[None]:
    """In the block, each layer takes its own products: those that it shares them with may have been replaced."""
    joined = {layer: layer.siblings for layer in block.modules() if isinstance(layer, LoraLinear)}
    for layer in joined:
        layer.siblings = None
    try:
        yield
    finally:
        for layer, siblings in joined.items():
            layer.siblings = siblings


@contextmanager
def _in_place(block: nn.Module, leaf: str, stored: Stored, quantization: Quantization) -> Iterator[None]:
    """In the block, a layer as it will be read, in the place of the one that was trained."""
    layer = block.get_submodule(leaf)
    base: Linear = bare(layer)
    twin = QuantizedLinear.from_stored(
        linear_shape(base), stored, base.bias, quantization, is_transposed=is_transposed(base)
    )
    block.set_submodule(leaf, twin)
    try:
        yield
    finally:
        block.set_submodule(leaf, layer)
