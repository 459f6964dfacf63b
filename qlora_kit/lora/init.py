"""How an adapter starts.

    default     A uniform within 1 / sqrt(in), B zero (LoRA Without Regret; PEFT's bound is the same number)
    gaussian    A from N(0, 1 / rank), B zero (the LoRA paper's random Gaussian, with PEFT's spread)
    pissa       scale B A is the best approximation of the stored weight of that rank (PiSSA, arXiv 2404.02948)
    loftq       scale B A is the best approximation of what quantising lost (LoftQ, arXiv 2310.08659, one iteration)

The paper's PiSSA takes the approximation out of the base, which is then quantised; here no byte of the base changes:
the update counts from its start, scale (B A - B0 A0), so that training moves the principal directions and the first
forward pass is the base's. Saved, it is a plain adapter of twice the rank. LoftQ needs the weights from which the base
was made, so these are read again, layer by layer; its first forward pass is closer to them than the base's.

Each layer draws from a generator seeded by its own name, so a layer starts the same whatever else is adapted, and the
global random state does not move.

Axes: I in, O out, R rank.
"""

import math
import zlib
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from qlora_kit.base.dense import QuantizedWeight, decode
from qlora_kit.base.experts import ExpertStack
from qlora_kit.base.load import original_weights
from qlora_kit.base.record import base_record
from qlora_kit.errors import AdapterError
from qlora_kit.lora.layer import Adapter

Init = Literal["default", "gaussian", "pissa", "loftq"]

POWER_ROUNDS = 4
"""Rounds of the power iteration, each with an orthonormal basis (Halko et al., arXiv 0909.4061, algorithm 4.4)."""


class Start:
    """The start of all matrices of one adapter.

    Args:
        model: what the adapter goes on.
        init: default, gaussian, pissa or loftq.
        seed: of the run.
        originals: the dense model that the base was made from, for loftq; None reads it again.

    Raises:
        AdapterError: loftq is asked for, and the base is not quantised.
        ModelError: loftq is asked for, and the weights that the base was made from are not at hand.
    """

    def __init__(self, model: PreTrainedModel, init: Init, seed: int, originals: PreTrainedModel | None = None) -> None:
        self.init, self.seed = init, seed
        self.originals: Any = None
        if init == "loftq":
            if base_record(model).quantization.kind == "none":
                raise AdapterError("lora.init=loftq makes up for what quantising lost, and this base is not quantised")
            self.originals = original_weights(model) if originals is None else originals

    def check(self, layer_name: str, shape: Sequence[int], rank: int) -> None:
        """Refuse what an approximation cannot be.

        Raises:
            AdapterError: the rank is above that of the layer's weight.
        """
        if self.init in ("pissa", "loftq") and rank > min(shape[-2:]):
            raise AdapterError(
                f"lora.init={self.init} needs a rank of at most {min(shape[-2:])} on {layer_name}, found {rank}"
            )

    @torch.no_grad()
    def fill(self, adapter: Adapter, layer_name: str, base: Any) -> None:
        """Give A and B their first values.

        Args:
            adapter: whose matrices are overwritten.
            layer_name: dotted name of its layer.
            base: that layer, frozen.
        """
        # One checksum of both: the CPU generator looks at the low 32 bits of its seed only.
        generator = torch.Generator().manual_seed(zlib.crc32(f"{self.seed} {layer_name}".encode()))
        if self.init in ("default", "gaussian") or (self.init == "loftq" and not isinstance(base, QuantizedWeight)):
            _draw(adapter, self.init, generator)
            return
        is_stack = isinstance(base, ExpertStack)
        for index, stored_OI in enumerate(_stored(base)):
            lost_OI = stored_OI if self.originals is None else self._original(layer_name, base, index) - stored_OI
            left_OR, right_RI = approximation(lost_OI / adapter.scale, adapter.rank, generator)
            (adapter.a_RI[index] if is_stack else adapter.a_RI).copy_(right_RI)
            (adapter.b_OR[index] if is_stack else adapter.b_OR).copy_(left_OR)
        if self.init == "pissa":
            adapter.count_from_here()
        elif adapter.is_dora:
            adapter.take_norms(decode(base, torch.float32))

    def _original(self, layer_name: str, base: Any, index: int) -> Tensor:
        """What a stored matrix was made from, (out, in), fp32."""
        if not isinstance(base, ExpertStack):
            return decode(self.originals.get_submodule(layer_name), torch.float32).to(base.codes.device)
        weight = self.originals.get_parameter(layer_name)[index].detach().to(base.get_buffer("codes").device).float()
        return weight.t() if base.is_transposed else weight


def _stored(base: Any) -> Iterator[Tensor]:
    """The matrices of a layer, (out, in), fp32: one, or one an expert."""
    if isinstance(base, ExpertStack):
        yield from (base.dense(expert, torch.float32) for expert in range(base.experts))
    else:
        yield decode(base, torch.float32)


def approximation(weight_OI: Tensor, rank: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """The best approximation of a matrix that has this rank, as a product whose two factors are equally large.

    Args:
        weight_OI: (out, in), fp32.
        rank: R, at most min(out, in).
        generator: of the random start, on the CPU.

    Returns:
        (out, R) and (R, in). It is found by subspace iteration from twice as many directions, so it is the best up to
        what the spectrum's decay beyond those leaves.
    """
    width = min(2 * rank + 8, *weight_OI.shape)
    start_IQ = torch.randn(weight_OI.shape[1], width, generator=generator).to(weight_OI)
    basis_OQ = torch.linalg.qr(weight_OI @ start_IQ).Q
    for _ in range(POWER_ROUNDS):
        basis_OQ = torch.linalg.qr(weight_OI @ torch.linalg.qr(weight_OI.t() @ basis_OQ).Q).Q
    u, s, vt = torch.linalg.svd(basis_OQ.t() @ weight_OI, full_matrices=False)
    root_R = s[:rank].sqrt()
    return basis_OQ @ u[:, :rank] * root_R, root_R[:, None] * vt[:rank]


def _draw(adapter: Adapter, init: Init, generator: torch.Generator) -> None:
    rank, width = adapter.a_RI.shape[-2:]
    values = torch.empty(adapter.a_RI.shape, dtype=torch.float32)
    if init != "gaussian":
        bound = 1 / math.sqrt(width)
        values.uniform_(-bound, bound, generator=generator)
    else:
        values.normal_(0, 1 / rank, generator=generator)
    adapter.a_RI.copy_(values)
    nn.init.zeros_(adapter.b_OR)
