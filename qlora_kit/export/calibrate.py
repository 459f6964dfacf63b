"""Codes and constants of a model's layers, chosen on calibration rows (`compensate.py` is how).

Layers go in the order in which they run, and X is what the layers before, re-quantised already, hand on: they make up
for those, too. The model runs a block at a time, on rows of its training; the rows of the audit are others. When a
block is done, nothing of it has changed.

Memory beside the model does not grow with it: what a block is given on all calibration rows waits on a shelf of files;
a piece of those rows is as much as runs through a block at once.

Axes: P inputs of a part, B sequences, T tokens, S all of their tokens.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from transformers import PreTrainedModel

from qlora_kit.base.dense import Linear, QuantizedLinear, device_of, is_transposed, linear_shape
from qlora_kit.base.formats import Quantization
from qlora_kit.base.text import text_body
from qlora_kit.data.collate import Batch
from qlora_kit.errors import RunError
from qlora_kit.export.compensate import Stored, compensated, quantized_onto
from qlora_kit.export.shelf import Shelf
from qlora_kit.export.stream import row_slices
from qlora_kit.lora.layer import LoraLinear, bare
from qlora_kit.train.activations import activation_blocks
from qlora_kit.train.evaluate import evaluation_mode

PIECE_TOKENS = 512
"""Tokens that go through a block together."""

_More = tuple[tuple[Any, ...], dict[str, Any]]
"""What a block is given beside its input: arguments by place, and by name."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Calibration rows that go through a block together."""

    input_ids: Tensor
    """(B, T), int64."""
    lengths: tuple[int, ...]
    """Tokens of each row without padding."""
    is_masked: bool
    """Whether the model reads both ways, and is to be told what is padding."""

    @property
    def structure(self) -> dict[str, Tensor]:
        """What the model must be told beside the tokens."""
        return {"attention_mask": self.is_real.view(self.input_ids.shape)} if self.is_masked else {}

    @property
    def is_real(self) -> Tensor:
        """Which places hold a token and no padding, (B * T,)."""
        return (torch.arange(self.input_ids.shape[1]) < torch.tensor(self.lengths)[:, None]).view(-1)


def calibration_pieces(batches: Iterable[Batch]) -> list[Piece]:
    """Rows in pieces of at most `PIECE_TOKENS` tokens; of a longer row the beginning."""
    pieces = []
    for batch in batches:
        ids = batch.input_ids[:, :PIECE_TOKENS]
        lengths = [min(length, PIECE_TOKENS) for length in batch.lengths]
        for rows in row_slices(ids.shape, PIECE_TOKENS):
            longest, is_masked = max(lengths[rows]), batch.attention_mask is not None
            pieces.append(Piece(ids[rows, :longest], tuple(lengths[rows]), is_masked))
    return pieces


class Compensation:
    """Codes and constants of a model's layers, asked for by name in the order in which they run.

    Args:
        model: as trained; it is unchanged whenever nothing is being asked.
        weight: gives what is to be stored of a layer, (out, in), fp32, contiguous, in no memory of the model's.
        names: of the layers that will be asked for.
        quantization: the format.
        pieces: calibration rows.
        shelf: where what waits is kept.

    Raises:
        RunError: the model's blocks do not hand their output on to each other.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        weight: Callable[[str], Tensor],
        names: Collection[str],
        quantization: Quantization,
        pieces: Sequence[Piece],
        shelf: Shelf,
    ) -> None:
        self.model, self.weight, self.names, self.quantization = model, weight, names, quantization
        self.shelf, self._pieces = shelf, pieces
        with evaluation_mode(model):
            self._inputs, self._more = _record(model, pieces, shelf)
        self._done: dict[str, Stored] = {}

    def __call__(self, name: str) -> Stored:
        """Codes and constants of one layer; plainly rounded if it is in no block, or nothing comes in."""
        while any(name.startswith(f"{block}.") for block in self._more):
            self._done = self._block(next(iter(self._more)))
        if name in self._done:
            return self._done.pop(name)
        return quantized_onto(self.shelf, self.weight(name).to(self.model.device), self.quantization)

    def _block(self, name: str) -> dict[str, Stored]:
        """All layers of a block; what it makes of its inputs with them becomes the inputs of the next."""
        block, made = self.model.get_submodule(name), dict[str, Stored]()
        leaves = [each.removeprefix(f"{name}.") for each in self.names if each.startswith(f"{name}.")]
        more = self._more.pop(name)
        with evaluation_mode(self.model), _alone(block), ExitStack() as swapped:
            for group in _groups(block, leaves, lambda: self._run(block, 0, more)):
                gram = partial(self._gram, block, name, group[0], more)
                weights = [self.weight(f"{name}.{leaf}") for leaf in group]
                chosen = compensated(weights, gram, self.quantization, self.shelf, self.model.device)
                for leaf, stored in zip(group, chosen, strict=True):
                    swapped.enter_context(_in_place(block, leaf, stored, self.quantization))
                    made[f"{name}.{leaf}"] = stored
            for number in range(len(self._inputs)):
                self._inputs[number] = self.shelf.keep(self._run(block, number, more))
        return made

    def _run(self, block: nn.Module, number: int, more: Sequence[_More]) -> Tensor:
        """What a block makes of its input on one piece."""
        x, args, kwargs = tree_map_only(
            Tensor, lambda each: each.to(self.model.device), (self._inputs[number], *more[number])
        )
        return _first(block(x, *args, **kwargs))

    def _gram(self, block: nn.Module, name: str, leaf: str, more: Sequence[_More], inputs: slice) -> Tensor:
        """H of some inputs of a layer over the tokens of all pieces, without padding."""
        layer, device, width = block.get_submodule(leaf), self.model.device, inputs.stop - inputs.start
        gram_PP = torch.zeros(width, width, device=device)

        def add(is_real_S: Tensor, x: Tensor) -> None:
            x_SP = x.flatten(0, -2)[:, inputs].float()
            x_SP = x_SP[is_real_S] if len(x_SP) == len(is_real_S) else x_SP
            gram_PP.addmm_(x_SP.t(), x_SP)

        for number, piece in enumerate(self._pieces):
            with _before(layer, partial(add, piece.is_real.to(device))):
                self._run(block, number, more)
        if not torch.isfinite(gram_PP).all():
            raise RunError(f"{name}.{leaf} gets NaN or infinite inputs on the calibration rows")
        return gram_PP


def _record(
    model: PreTrainedModel, pieces: Sequence[Piece], shelf: Shelf
) -> tuple[list[Tensor], dict[str, list[_More]]]:
    """What goes into the first block, piece by piece; and by block, what else each is given."""
    inputs: list[Tensor] = []
    more: dict[str, list[_More]] = {}
    for piece in pieces:
        noted = _Noted(shelf)
        with ExitStack() as hooks:
            for name, block in activation_blocks(model).items():
                hooks.callback(block.register_forward_hook(partial(noted.see, name), with_kwargs=True).remove)
            told = {name: each.to(model.device) for name, each in piece.structure.items()}
            text_body(model)(input_ids=piece.input_ids.to(model.device), **told, use_cache=False)
        if not noted.is_chain or noted.first is None:
            raise RunError(
                f"the blocks of a {model.config.model_type} do not pass their output to the next block, so codes "
                "cannot be chosen block by block; export with --calibration-rows 0, which rounds each weight on its own"
            )
        inputs.append(noted.first)
        for name, each in noted.more.items():
            more.setdefault(name, []).append(each)
    return inputs, more


class _Noted:
    """What the blocks are given in one pass; of their outputs only the last is held."""

    def __init__(self, shelf: Shelf) -> None:
        self.shelf, self.is_chain = shelf, True
        self.first: Tensor | None = None
        self.more: dict[str, _More] = {}
        self._last: Tensor | None = None
        self._kept: dict[Tensor, Tensor] = {}

    def see(self, name: str, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """A forward hook of the block of that name."""
        self.is_chain &= bool(args) and name not in self.more and (self._last is None or args[0] is self._last)
        if self.first is None and args:
            self.first = self.shelf.keep(args[0])
        self.more[name] = tree_map_only(Tensor, self._keep, (args[1:], kwargs))
        self._last = _first(output)

    def _keep(self, given: Tensor) -> Tensor:
        """Positions and masks are the same for all blocks, and kept once."""
        if given not in self._kept:
            self._kept[given] = self.shelf.keep(given)
        return self._kept[given]


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
    held = {name: each.to(device_of(base)) for name, each in stored.items()}
    twin = QuantizedLinear.from_stored(
        linear_shape(base), held, base.bias, quantization, is_transposed=is_transposed(base)
    )
    block.set_submodule(leaf, twin)
    try:
        yield
    finally:
        block.set_submodule(leaf, layer)
