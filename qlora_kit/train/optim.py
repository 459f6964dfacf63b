"""The optimizer of the trained parameters: bitsandbytes' 8-bit, 32-bit and paged kinds, or torch's own.

bf16 has 8 bits of precision, so an update of 1e-5 to a weight of 1/64 is rounded away: computed, 94 % of the elements
of A do not move at a rate of 1e-5. So the step is taken on fp32 copies, which are
- kept from step to step (`fp32`: master weights), 4 bytes a parameter; or
- made for each step and rounded back up or down at random, in proportion (`stochastic`), which is right on average.

In full fine-tuning the copies are the difference between 12 bytes a parameter (as the QLoRA paper counts: 2 of weight,
2 of gradient, 8 of fp32 moments) and 16, so `auto` rounds stochastically there. Parameters are stepped some at a time,
so that their gradients never stand in both precisions; each is stepped by itself, so that changes no bit.

Sources: 8-bit optimizers, arXiv 2110.02861; paged ones, QLoRA section 3; stochastic rounding, Gupta et al., arXiv
1502.02551.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Literal

import bitsandbytes.optim as bnb
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily

MasterWeights = Literal["fp32", "stochastic", "none"]

_PAGED_ELEMENTS = 100_000
"""bitsandbytes pages no smaller state (`Optimizer8bit.get_state_buffer`, 0.50)."""

_BETAS = (0.9, 0.999)  # QLoRA's released scripts

_Pairs = list[tuple[nn.Parameter, nn.Parameter]]


def effective_kind(kind: str, device: torch.device) -> str:
    """What an optimizer is on a device: none but CUDA pages its state."""
    return kind if device.type == "cuda" else kind.removeprefix("paged_")


class AdapterOptimizer:
    """Steps a list of parameters and holds all the state that a resumed run needs.

    Args:
        parameters: (name, parameter) pairs; those whose name ends in `b_OR` get `lr_ratio` times the rate (LoRA+).
        kind: a name of `train.optimizer`. Paged state needs CUDA; elsewhere it is plain (see `effective_kind`).
        master_weights: how bf16 and fp16 parameters are stepped; fp32 ones are stepped directly.
        lr_ratio: rate of B over that of A, arXiv 2402.12354.
        weight_decay: decoupled.
        seed: of the stochastic rounding.
    """

    def __init__(
        self,
        parameters: Sequence[tuple[str, nn.Parameter]],
        kind: str,
        *,
        master_weights: MasterWeights = "fp32",
        lr_ratio: float = 1.0,
        weight_decay: float = 0.0,
        seed: int = 0,
    ) -> None:
        self.names = [name for name, _ in parameters]
        self.parameters = [parameter for _, parameter in parameters]
        device = self.parameters[0].device
        self.kind = kind
        self.effective_kind = effective_kind(kind, device)
        self.master_weights = master_weights
        self._generator = torch.Generator(device).manual_seed(seed)
        self._stepped = [self._stepped_form(parameter) for parameter in self.parameters]
        self._stepped_together = _cut(list(zip(self.parameters, self._stepped, strict=True)))
        self._ratios = [lr_ratio if name.endswith("b_OR") else 1.0 for name in self.names]
        groups = [
            {"params": [p for p, r in zip(self._stepped, self._ratios, strict=True) if r == ratio], "ratio": ratio}
            for ratio in dict.fromkeys(self._ratios)
        ]
        with unset_fake_temporarily():  # bitsandbytes builds its code tables here, from real numbers
            self.inner = _build(self.effective_kind, groups, weight_decay)
        with self._own_card():
            self._allocate()

    def step(self, lr: float) -> None:
        """Move the parameters by one step at the rate `lr` and let their gradients go."""
        for group in self.inner.param_groups:
            group["lr"] = lr * group["ratio"]
        with self._own_card():
            for pairs in self._stepped_together:
                self._lift(pairs)
                self.inner.step()  # passes over parameters without a gradient: those that are not lifted
                self._lower(pairs)

    def rehearse(self) -> None:
        """Everything that a step allocates, without its arithmetic: for the dry run, where there are no values.

        bitsandbytes' `step` reads a number off a tensor, which fake tensors do not have.
        """
        for pairs in self._stepped_together:
            self._lift(pairs)
            self._lower(pairs)

    def state_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor that outlives a step, named by parameter and role; not the tables that bitsandbytes shares."""
        for name, parameter, stepped in zip(self.names, self.parameters, self._stepped, strict=True):
            if stepped is not parameter and self.master_weights == "fp32":
                yield f"{name}/master", stepped
            for key, value in self.inner.state[stepped].items():
                if isinstance(value, Tensor) and not key.startswith("qmap"):
                    yield f"{name}/{key}", value
        yield "rounding", self._generator.get_state()

    def pageable(self) -> Iterator[Tensor]:
        """State that paged kinds keep in memory which may move to the host: that of all but small matrices."""
        if self.kind.startswith("paged_"):
            for stepped in self._stepped:
                if stepped.numel() >= _PAGED_ELEMENTS:
                    yield from (value for key, value in self.inner.state[stepped].items() if key.startswith("state"))

    def state_numbers(self) -> dict[str, int | float]:
        """What is kept beside the tensors: each parameter's step count, named like them."""
        return {
            f"{name}/{key}": value
            for name, stepped in zip(self.names, self._stepped, strict=True)
            for key, value in self.inner.state[stepped].items()
            if isinstance(value, int | float)
        }

    @torch.no_grad()
    def restore(self, tensors: Mapping[str, Tensor], numbers: Mapping[str, int | float]) -> None:
        """Take over a saved state, bit for bit.

        Raises:
            KeyError: it is the state of another optimizer, told by names, shapes and dtypes; nothing was taken over.
        """
        own = dict(self.state_tensors())
        if _forms(own) != _forms(tensors) or self.state_numbers().keys() != numbers.keys():
            raise KeyError(next((n for n, _ in _forms(own).items() ^ _forms(tensors).items()), "step counts"))
        self._generator.set_state(tensors["rounding"])
        for name, tensor in own.items():
            tensor.copy_(tensors[name])
        for name, stepped in zip(self.names, self._stepped, strict=True):
            state = self.inner.state[stepped]
            state.update({key: numbers[f"{name}/{key}"] for key in state if f"{name}/{key}" in numbers})

    def _own_card(self) -> AbstractContextManager[None]:
        """A block in which the card of the parameters is the current one, on which bitsandbytes makes paged state, and
        for which it waits, whichever card they lie on."""
        return torch.cuda.device_of(self.parameters[0])

    def _stepped_form(self, parameter: nn.Parameter) -> nn.Parameter:
        """The tensor that the inner optimizer moves: the parameter itself, or its fp32 copy."""
        if parameter.dtype == torch.float32 or self.master_weights == "none":
            return parameter
        if self.master_weights == "fp32":
            return nn.Parameter(parameter.detach().float())
        return nn.Parameter(torch.empty(parameter.shape, dtype=torch.float32, device=parameter.device))

    @torch.no_grad()
    def _lift(self, pairs: _Pairs) -> None:
        for parameter, stepped in pairs:
            if stepped is not parameter and parameter.grad is not None:
                if self.master_weights == "stochastic":
                    stepped.data = parameter.float()
                stepped.grad = parameter.grad.float()
                parameter.grad = None  # one by one, so that both precisions never stand in full

    @torch.no_grad()
    def _lower(self, pairs: _Pairs) -> None:
        for parameter, stepped in pairs:
            if stepped is not parameter and stepped.grad is not None:
                if self.master_weights == "stochastic":
                    round_stochastically(stepped.data, parameter.data, self._generator)
                    stepped.data = stepped.new_empty(0)
                else:
                    parameter.copy_(stepped)
            stepped.grad = parameter.grad = None

    def _allocate(self) -> None:
        """Make the optimizer's state now instead of in the first step, so that memory shows it from the start."""
        for index, group in enumerate(self.inner.param_groups):
            for position, stepped in enumerate(group["params"]):
                if self.effective_kind == "adamw":
                    zeros = {key: torch.zeros_like(stepped) for key in ("exp_avg", "exp_avg_sq")}
                    self.inner.state[stepped] = {"step": torch.zeros((), device=stepped.device), **zeros}
                elif self.effective_kind != "sgd":
                    self.inner.init_state(group, stepped, index, position)
        if self.master_weights == "stochastic":
            for parameter, stepped in zip(self.parameters, self._stepped, strict=True):
                if stepped is not parameter:
                    stepped.data = stepped.new_empty(0)  # it stands only while a step is taken


def definite_masters(
    setting: Literal["auto", "fp32", "stochastic", "none"], *, full_finetune: bool = False
) -> MasterWeights:
    """What `train.master_weights` means. auto is fp32 for adapters, the most accurate, for 4 bytes a parameter; in full
    fine-tuning it is stochastic, which takes none."""
    if setting != "auto":
        return setting
    return "stochastic" if full_finetune else "fp32"


def round_stochastically(source: Tensor, target: Tensor, generator: torch.Generator) -> None:
    """Write fp32 `source` into bf16 `target`, rounding up with the probability of the part that is cut off.

    The expectation of the result is the source. fp16 targets are rounded to nearest: their step is finer.
    """
    if target.dtype != torch.bfloat16:
        target.copy_(source)
        return
    bits = source.view(torch.int32)
    noise = torch.randint(0, 1 << 16, bits.shape, dtype=torch.int32, device=bits.device, generator=generator)
    target.copy_(((bits + noise) & ~0xFFFF).view(torch.float32))
    # A card's NaN has all bits set but the first, and with the noise it runs over into -0.
    target.masked_fill_(source.isnan(), torch.nan)


def _cut(pairs: _Pairs) -> list[_Pairs]:
    """Those that are stepped directly, then the others, as many at a time as have no more elements than the largest.

    So what stands in fp32 is the same however many layers there are, and two depths tell it of all (`plan/depths`).
    """
    direct = [(parameter, stepped) for parameter, stepped in pairs if stepped is parameter]
    lifted = [(parameter, stepped) for parameter, stepped in pairs if stepped is not parameter]
    most = elements = max((parameter.numel() for parameter, _ in lifted), default=0)
    cuts = [direct] if direct else []
    for parameter, stepped in lifted:
        elements += parameter.numel()
        if elements > most:
            cuts.append([])
            elements = parameter.numel()
        cuts[-1].append((parameter, stepped))
    return cuts


def _forms(tensors: Mapping[str, Tensor]) -> dict[str, tuple[torch.Size, torch.dtype]]:
    return {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}


def _build(kind: str, groups: Any, weight_decay: float) -> Any:
    paged, name = kind.startswith("paged_"), kind.removeprefix("paged_")
    # The rate is set before every step; the constructors only want some number.
    if name == "adamw":
        return torch.optim.AdamW(groups, lr=0.0, betas=_BETAS, weight_decay=weight_decay, fused=True)
    if name == "sgd":
        return torch.optim.SGD(groups, lr=0.0, weight_decay=weight_decay)
    family, _, bits = name.partition("_")
    options: dict[str, Any] = {
        "weight_decay": weight_decay,
        "optim_bits": int(bits.removesuffix("bit")),
        "is_paged": paged,
    }
    if family == "adamw":
        return bnb.AdamW(groups, lr=0.0, betas=_BETAS, **options)
    if family == "lion":
        return bnb.Lion(groups, lr=0.0, **options)
    return bnb.AdEMAMix(groups, lr=0.0, **options)
