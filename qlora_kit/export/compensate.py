"""Codes and constants that make up for each other: weights are rounded so that a layer's outputs stay, not each weight.

    min over codes and constants of  tr((W - Q) H (W - Q)^T),   H = X^T X   of the layer's inputs X

Input by input: what rounding the weights of one has lost is taken up by those that are not rounded yet, as far as the
inputs go together. The strongest inputs come first.

The constant of a block, in int8 of a row, is chosen before, among shrunk ranges: what lies beyond is cut off, and the
rest gets finer steps. A loss counts by what is left of it once later inputs have taken up what they can. Constants are
those that can be stored, double quantisation included, so every weight is rounded to what will be read. One that is of
inputs outside of a part, too, stays that of plain rounding.

H is formed of some inputs at a time, which take up each other's losses alone, and weights are rounded tile by tile; a
whole weight and codes wait on a shelf of files.

Source: Frantar et al. 2022, arXiv 2210.17323 (GPTQ), algorithm 1, in the form that needs no inverse: the nearest plane
of Babai, as Chen et al. 2025, arXiv 2507.18553, found it to be.

Axes: I in, O out, P inputs of a part, R outputs of a tile, C inputs of a batch of them, K blocks of a tile's row, W
weights of a block.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from qlora_kit.base.formats import Grid, Quantization, quantize
from qlora_kit.export.shelf import Shelf
from qlora_kit.export.stream import row_slices

DAMPING = 0.01
"""Added to the diagonal of H, as a share of its mean: a sound inverse. From 0.001 to 0.1 the audit tells no difference
(quickstart, one seed)."""

COLUMNS = 128
"""Inputs whose losses reach those behind them in one product."""

PART = 2048
"""Inputs at most of which H is formed at one time: 16 MiB, and 32 twice over while it is factored."""

TILE_ELEMENTS = 2**22
"""Weights that are rounded at one time: 16 MiB."""

RANGES = [share / 40 for share in range(39, 27, -1)]
"""Shares of a block's range, 0.975 to 0.7, that are tried for its constant. With larger and smaller ones, too, the
outputs come out the same within 1 % (quickstart)."""

SEARCH_ELEMENTS = 2**16
"""Weights whose constants are chosen at one time: 256 KiB, a few of which stay in a core's cache."""

Stored = dict[str, Tensor]
"""Codes and constants of a matrix, as `quantize` names them."""


@torch.no_grad()
def compensated(
    weights: Sequence[Tensor],
    gram: Callable[[slice], Tensor],
    quantization: Quantization,
    shelf: Shelf,
    device: torch.device,
) -> list[Stored]:
    """Codes and constants of matrices for inputs that go together in a known way.

    Args:
        weights: of layers with the same inputs, (out, in) each, fp32, contiguous.
        gram: gives H of some neighbouring inputs, (P, P), fp32, to be written over.
        quantization: the format.
        shelf: where the codes are kept.
        device: on which it is computed.

    Returns:
        of each what `quantize` gives, with other codes, and other constants where a part's rows are whole blocks.
    """
    chosen = [_Choice(w_OI, quantization, shelf, device) for w_OI in weights]
    for inputs in _parts(weights[0].shape[1]):
        order_P, shares_PP, costs_P = _shares(gram(inputs))
        for each in chosen:
            each.shrink(inputs, costs_P)
            each.choose(inputs, order_P, shares_PP)
    return [each.stored() for each in chosen]


def quantized_onto(shelf: Shelf, w_OI: Tensor, quantization: Quantization) -> Stored:
    """Codes and constants of a matrix, each weight rounded for itself."""
    return {name: shelf.keep(each) for name, each in quantize(w_OI, quantization).items()}


def _parts(width: int) -> Iterator[slice]:
    """Inputs in parts of about one size, none above `PART`, that cut as few blocks as can be."""
    step = -(-width // -(-width // PART))
    step += -step % COLUMNS if step < width else 0
    for begin in range(0, width, step):
        yield slice(begin, min(begin + step, width))


def _shares(gram_PP: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """In which order inputs are rounded, and how much each is to take up of what rounding the ones before has lost.

    With H = U U^T, U upper triangular, what is lost at all outputs is |(W - Q) U|^2; its column of one input is zero
    where that takes up U[before, input] / U[input, input] of theirs.

    Returns:
        order (P,), shares (P before, P), fp32, and U[input, input]^2, what a loss of one costs in the end, in the order
        of the inputs (P,), fp32; nothing where nothing comes in.
    """
    diagonal_P = gram_PP.diagonal().clone()
    order_P = diagonal_P.argsort(descending=True, stable=True)
    gram_PP.diagonal().add_(DAMPING * diagonal_P.mean() if diagonal_P.any() else 1)
    # A Cholesky factor is a lower triangle: so it is taken backwards. Each copy is gone before the next is made.
    gram_PP = gram_PP[order_P.flip(0)]
    gram_PP = gram_PP[:, order_P.flip(0)]
    factor_PP = gram_PP.double().t()  # the library works on columns, and on these in place
    del gram_PP
    torch.linalg.cholesky(factor_PP, out=factor_PP)
    lengths_P = factor_PP.diagonal().clone()
    factor_PP /= lengths_P
    shares_PP = factor_PP.float()
    del factor_PP
    costs_P = torch.zeros_like(diagonal_P)
    if diagonal_P.any():
        costs_P[order_P.flip(0)] = lengths_P.square().float()
    return order_P, shares_PP.flip(0, 1).contiguous(), costs_P


class _Choice:
    """Codes and constants of one matrix while they are chosen, some inputs after others."""

    def __init__(self, w_OI: Tensor, quantization: Quantization, shelf: Shelf, device: torch.device) -> None:
        self.w_OI, self.shelf = w_OI, shelf
        self.constants = quantize(w_OI.to(device), quantization)
        plain = self.constants.pop("codes")
        self.grid = Grid(self.constants, w_OI.shape, quantization)
        self.codes_OI = shelf.empty(w_OI.shape, plain.dtype)

    def shrink(self, inputs: slice, costs_P: Tensor) -> None:
        """Choose the constants of the weights in a part: of some ranges that which is estimated to cost least."""
        for rows in row_slices((len(self.w_OI), len(costs_P)), SEARCH_ELEMENTS):
            blocks_RK = self.grid.blocks(rows, inputs)
            if blocks_RK is None:
                return
            w_RKW = self.w_OI[rows, inputs].to(costs_P.device).unflatten(1, (blocks_RK.shape[1], -1))
            costs_KW = costs_P.view(blocks_RK.shape[1], -1)
            widest_RK, best_RK = w_RKW.abs().amax(2), self.grid.constants[blocks_RK]
            least_RK = self._cost(w_RKW, best_RK, costs_KW)
            for share in RANGES:
                constants_RK = self.grid.constants_near(share * widest_RK, blocks_RK)
                cost_RK = self._cost(w_RKW, constants_RK, costs_KW)
                is_less_RK = cost_RK < least_RK
                best_RK = torch.where(is_less_RK, constants_RK, best_RK)
                least_RK = torch.where(is_less_RK, cost_RK, least_RK)
            self.grid.put(best_RK, blocks_RK)

    def _cost(self, w_RKW: Tensor, constants_RK: Tensor, costs_KW: Tensor) -> Tensor:
        """Of rounding each weight of a block for itself, by block."""
        lost_RKW = self.grid.about(w_RKW, constants_RK[..., None]).sub_(w_RKW)
        return lost_RKW.square_().mul_(costs_KW).sum(2)

    def choose(self, inputs: slice, order_P: Tensor, shares_PP: Tensor) -> None:
        """Choose those of the inputs in a part, as many outputs at a time as a tile holds."""
        device = shares_PP.device
        for rows in row_slices((len(self.w_OI), len(order_P)), TILE_ELEMENTS):
            w_PR = self.w_OI[rows, inputs].t().to(device)[order_P]
            codes_PR = self._tile(w_PR, rows, (order_P + inputs.start).tolist(), shares_PP)
            self.codes_OI[rows, inputs] = codes_PR[order_P.argsort()].t().cpu()

    def _tile(self, w_PR: Tensor, rows: slice, columns: list[int], shares_PP: Tensor) -> Tensor:
        """Codes, one a byte; in the place of the weights stands then what each has lost."""
        codes_PR = torch.empty(w_PR.shape, dtype=self.codes_OI.dtype, device=w_PR.device)
        for begin in range(0, len(columns), COLUMNS):
            end = min(begin + COLUMNS, len(columns))
            wanted_CR = torch.addmm(w_PR[begin:end], shares_PP[:begin, begin:end].t(), w_PR[:begin])
            for place in range(begin, end):
                wanted_R = wanted_CR[place - begin]
                wanted_R.addmv_(w_PR[begin:place].t(), shares_PP[begin:place, place])
                codes_PR[place], read_R = self.grid.nearest(wanted_R, columns[place], rows)
                w_PR[place] -= read_R
        return codes_PR

    def stored(self) -> Stored:
        """All of them, with the constants."""
        kept = {name: self.shelf.keep(each) for name, each in self.constants.items()}
        return {**kept, "codes": self.shelf.keep(self.grid.packed(self.codes_OI))}
