"""The LoRA layer: y = x W^T + scale (x A^T) B^T around a frozen linear layer, with named adapters and a switch.

    scale = alpha / rank (standard)        alpha / sqrt(rank) (rsLoRA, arXiv 2312.03732)

DoRA (arXiv 2402.09353) adds a trained norm m for every row of the merged weight: W' = m (W + scale B A) / ||.||.

Where the start of A and B is to change nothing although their product is not zero (PiSSA), they count from there:
scale (B A - B0 A0), which is the update [B - B0, B0] [A; A - A0] of twice the rank. So written it is zero, to the bit,
as long as nothing has moved.

The experts of a layer carry one adapter each, (experts, ...) in front; which of them runs is the base's business.

Axes: I in, O out, R rank; E experts, where the layer has them.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qlora_kit.base.dense import Linear, decode, device_of, linear_shape, reader
from qlora_kit.base.experts import ExpertStack
from qlora_kit.lora.siblings import NAMES, Siblings
from qlora_kit.ops import Decode, Update, dora_linear, lora_linear, row_norms

Scaling = Literal["standard", "rslora"]

LARGEST_ALPHA = 1e9
"""Above it a scale is a mistake, and the update no number any more."""


class Adapter(nn.Module):
    """One low-rank update of one layer.

    Args:
        shape: (out, in) of the layer, or (experts, out, in).
        rank: R.
        alpha: numerator of the scale.
        scaling: what alpha is divided by.
        dropout: share of x's entries zeroed on the adapter's path while training.
        square_O: squared norms of the base weight's rows, (out,), fp32, which make it a DoRA; None for plain LoRA.
        dtype: of A and B; DoRA's norms are fp32, since in bf16 they would not be those of the base.
        device: of A and B.
    """

    square_O: Tensor | None
    magnitude_O: nn.Parameter | None
    a0_RI: Tensor | None
    b0_OR: Tensor | None

    def __init__(
        self,
        shape: tuple[int, ...],
        rank: int,
        alpha: float,
        *,
        scaling: Scaling = "standard",
        dropout: float = 0.0,
        square_O: Tensor | None = None,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        self.rank, self.alpha, self.scaling, self.dropout = rank, alpha, scaling, dropout
        self.scale = alpha / (math.sqrt(rank) if scaling == "rslora" else rank)
        *experts, out, width = shape
        self.a_RI = nn.Parameter(torch.empty(*experts, rank, width, dtype=dtype, device=device))
        self.b_OR = nn.Parameter(torch.zeros(*experts, out, rank, dtype=dtype, device=device))
        self.register_buffer("a0_RI", None)
        self.register_buffer("b0_OR", None)
        self.register_buffer("square_O", square_O, persistent=False)
        self.register_parameter("magnitude_O", None if square_O is None else nn.Parameter(square_O.sqrt()))

    @property
    def is_dora(self) -> bool:
        """Whether the rows of the merged weight have trained norms."""
        return self.magnitude_O is not None

    @property
    def matrices(self) -> tuple[Tensor, Tensor]:
        """A and B of the update: the trained ones, or what they make of those from which they count."""
        if self.a0_RI is None or self.b0_OR is None:
            return self.a_RI, self.b_OR
        return (
            torch.cat((self.a_RI, self.a_RI - self.a0_RI), dim=-2),
            torch.cat((self.b_OR - self.b0_OR, self.b0_OR), dim=-1),
        )

    @property
    def stored_rank(self) -> int:
        """Rank of the update as a plain adapter."""
        return self.rank if self.a0_RI is None else 2 * self.rank

    @property
    def stored_alpha(self) -> float:
        """With which a plain adapter of the stored rank has the same scale."""
        if self.a0_RI is None:
            return self.alpha
        return self.scale * (math.sqrt(self.stored_rank) if self.scaling == "rslora" else self.stored_rank)

    def stored(self) -> dict[str, Tensor]:
        """The update as a plain adapter, by the names of its tensors."""
        a_RI, b_OR = self.matrices
        plain = {"a_RI": a_RI, "b_OR": b_OR}
        return plain if self.magnitude_O is None else plain | {"magnitude_O": self.magnitude_O}

    def count_from_here(self) -> None:
        """Let the update be what A and B have become since now."""
        self.a0_RI, self.b0_OR = self.a_RI.detach().clone(), self.b_OR.detach().clone()

    @torch.no_grad()
    def take_norms(self, weight_OI: Tensor) -> None:
        """Let DoRA's trained norms be those of W + scale B A as they are now; `weight_OI` is W, fp32."""
        cast(Tensor, self.magnitude_O).copy_((weight_OI + self.delta()).norm(dim=1))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Adapter":
        """Follow `.to(device)`; a change of dtype reaches A and B and not DoRA's norms."""
        before = self.square_O, self.magnitude_O
        norms = None if before[1] is None else before[1].detach().clone()
        super()._apply(fn, recurse)
        if self.square_O is not None and self.magnitude_O is not None and self.square_O.dtype != torch.float32:
            self.square_O = cast(Tensor, before[0]).to(self.square_O.device)
            self.magnitude_O.data = cast(Tensor, norms).to(self.magnitude_O.device)
        return self

    def forward(self, x: Tensor, decode: Decode, bias: Tensor | None) -> Tensor:
        """What the adapted layer makes of x, (..., in) -> (..., out).

        Args:
            x: the layer's input.
            decode: reads the frozen weight.
            bias: of the frozen layer.
        """
        a_RI, b_OR = self.matrices
        if self.magnitude_O is None or self.square_O is None:
            return self._update(x, decode, bias, a_RI, b_OR)
        dropped = self._dropped(x)
        return dora_linear(x, decode, bias, a_RI, b_OR, self.scale, self.magnitude_O, self.square_O, dropped)

    def each(self, decoders: Sequence[Decode]) -> list[Callable[[Tensor], Tensor]]:
        """The same for every expert of a layer: functions of its tokens.

        Args:
            decoders: read the frozen weights of the experts.
        """
        # Cut once: a gradient is then put together once, and not added up expert by expert in its full size.
        pairs = zip(decoders, *(matrix.unbind(0) for matrix in self.matrices), strict=True)
        return [partial(self._update, decode=decode, bias=None, a_RI=a, b_OR=b) for decode, a, b in pairs]

    def _update(self, x: Tensor, decode: Decode, bias: Tensor | None, a_RI: Tensor, b_OR: Tensor) -> Tensor:
        return lora_linear(x, decode, bias, a_RI, b_OR, self.scale, self._dropped(x))

    def _dropped(self, x: Tensor) -> Tensor | None:
        return F.dropout(x, self.dropout) if self.training and self.dropout > 0 else None

    @torch.no_grad()
    def delta(self) -> Tensor:
        """The update of the weight before DoRA's norms, scale B A, (out, in), formed in fp32."""
        a_RI, b_OR = self.matrices
        return self.scale * (b_OR.float() @ a_RI.float())

    @torch.no_grad()
    def row_factors(self, weight_OI: Tensor, square_O: Tensor | None = None) -> Tensor | None:
        """What DoRA multiplies the rows of W + scale B A by, (out,), fp32; None for plain LoRA.

        Args:
            weight_OI: the frozen weight.
            square_O: squared norms of its rows, (out,), fp32; by default those of the base that the adapter is on.
        """
        if self.magnitude_O is None or self.square_O is None:
            return None
        a_RI, b_OR = self.matrices
        aw_RO = F.linear(a_RI.float(), weight_OI.float())
        square_O = self.square_O if square_O is None else square_O
        return self.magnitude_O / row_norms(square_O, aw_RO, a_RI, b_OR, self.scale)


class Carrier(nn.Module):
    """Something frozen that carries what adapters put beside it or in its place; at most one of them is in use.

    Args:
        base: what is frozen.
    """

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base: Any = base
        self.adapters = nn.ModuleDict()
        self.active: str | None = None


class LoraLayer(Carrier):
    """Something frozen that carries low-rank updates."""

    def adapter(self, name: str) -> Adapter:
        """The adapter of that name; a `KeyError` if this layer has none."""
        return cast(Adapter, self.adapters[name])

    @property
    def shape(self) -> tuple[int, ...]:
        """(out, in), or (experts, out, in)."""
        return weight_shape(self.base)

    def new_adapter(
        self, rank: int, alpha: float, *, scaling: Scaling, dropout: float, is_dora: bool, dtype: torch.dtype
    ) -> Adapter:
        """An adapter of this layer's shape, where its weight lies; the layer does not carry it yet.

        The arguments are those of `Adapter`; with `is_dora` it is a DoRA, whose norms start as those of the base.
        """
        return Adapter(
            self.shape,
            rank,
            alpha,
            scaling=scaling,
            dropout=dropout,
            square_O=row_squares(self.base) if is_dora else None,
            dtype=dtype,
            device=device_of(self.base),
        )


class LoraExperts(LoraLayer):
    """The experts of a layer with their adapters; its base is an `ExpertStack`."""

    def forward(self) -> list[Callable[[Tensor], Tensor]]:
        """A function for each expert, as the stack itself gives them."""
        return self.base() if self.active is None else self.adapter(self.active).each(self.base.decoders())


class LoraLinear(LoraLayer):
    """A linear layer with its adapters.

    Attributes:
        siblings: the layers that have the same input.
    """

    siblings: Siblings | None = None

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out), in the dtype of x; with no adapter in use it is the base, bit for bit."""
        read = reader(self.base)
        bias: Tensor | None = self.base.bias
        if self.active is None:
            return lora_linear(x, read, bias)
        shared = None if self.siblings is None else self.siblings.take(self, x)
        if shared is not None:
            return shared.product(x, bias)
        return self.adapter(self.active).forward(x, read, bias)

    def plain_update(self) -> Update | None:
        """The update in use, A (rank, in) and B (out, rank); None where there is none, or it is more than their product
        with the input (DoRA, dropout)."""
        adapter = None if self.active is None else self.adapter(self.active)
        if adapter is None or adapter.is_dora or (adapter.training and adapter.dropout > 0):
            return None
        return Update(reader(self.base), *adapter.matrices, adapter.scale)


def join_siblings(model: nn.Module) -> None:
    """Let the layers of a model that have one input know of each other."""
    for parent in model.modules():
        for names in NAMES:
            children = (parent._modules.get(name) for name in names)
            layers = [child for child in children if isinstance(child, LoraLinear)]
            siblings = Siblings(layers) if len(layers) > 1 else None
            for layer in layers:
                layer.siblings = siblings


def weight_shape(base: Any) -> tuple[int, ...]:
    """(out, in) of a linear layer, (experts, out, in) of a stack of experts."""
    return base.shape if isinstance(base, ExpertStack) else linear_shape(base)


def carriers(model: nn.Module) -> Iterator[tuple[str, Carrier]]:
    """All that carries a part of an adapter, with its dotted name."""
    for name, module in model.named_modules():
        if isinstance(module, Carrier):
            yield name, module


def lora_layers(model: nn.Module) -> Iterator[tuple[str, LoraLayer]]:
    """Every layer of the model that carries low-rank updates, with its dotted name."""
    for name, carrier in carriers(model):
        if isinstance(carrier, LoraLayer):
            yield name, carrier


def bare(module: Any) -> Any:
    """A module without what it carries."""
    return bare(module.base) if isinstance(module, Carrier) else module


@torch.no_grad()
def row_squares(base: Linear) -> Tensor:
    """||W_o||^2 of every row of a frozen layer's weight, (out,), fp32."""
    return decode(base, torch.float32).square().sum(1)


def adapter_parameters(model: nn.Module, name: str = "default") -> Iterator[tuple[str, nn.Parameter]]:
    """What one adapter trains with dotted names, each once, in the order of the model's layers."""
    seen: set[nn.Parameter] = set()
    for layer_name, carrier in carriers(model):
        if name in carrier.adapters:
            for leaf, parameter in carrier.adapters[name].named_parameters():
                if parameter not in seen:
                    seen.add(parameter)
                    yield f"{layer_name}.{leaf}", parameter


def adapter_constants(model: nn.Module, name: str = "default") -> Iterator[tuple[str, Tensor]]:
    """What one adapter counts from and does not train, with dotted names: without it the adapter means nothing."""
    for layer_name, layer in lora_layers(model):
        if name in layer.adapters:
            for leaf in ("a0_RI", "b0_OR"):
                tensor = getattr(layer.adapter(name), leaf)
                if tensor is not None:
                    yield f"{layer_name}.{leaf}", tensor
