"""Mixture-of-experts weights: stored quantised expert by expert, and read one expert at a time.

transformers 5 keeps the experts of a layer in 3-D parameters, (experts, out, in) or in some families (experts, in,
out), which no quantiser of linear layers sees; but it lets their computation be replaced by name. So each such
parameter becomes an `ExpertStack`, and the computation becomes `experts_forward`, one loop for every family:

    y_t = sum over the chosen experts e of p_te * down_e(gate(up_e(x_t)))

Axes: T tokens, K experts a token, E experts, I in, O out.
"""

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.modules.module import register_module_parameter_registration_hook
from transformers import PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from qlora_kit.base.dense import STORED, Kept, Lent, QuantizedWeight, nothing_kept
from qlora_kit.base.fingerprint import Placeholder, pieces
from qlora_kit.base.formats import Quantization, quantize
from qlora_kit.base.pages import let_go, let_go_of_clean_files
from qlora_kit.ops import Decode, lora_linear

IMPLEMENTATION = "qlora_kit"
"""The name under which transformers finds `experts_forward`."""


class ExpertStack(QuantizedWeight):
    """The frozen weights of one projection of all experts of a layer.

    Args:
        weight_EOI: dense, (experts, out, in); with `is_transposed` as it comes, (experts, in, out). It is not kept
            unless `quantization` is `none`.
        quantization: the format.
        dtype: of weights that stay dense.
        device: where the codes are made and kept.
        is_transposed: whether the family stores (in, out), so that an export gives the weights back so.
    """

    def __init__(
        self,
        weight_EOI: Tensor,
        quantization: Quantization,
        dtype: torch.dtype,
        device: torch.device,
        *,
        is_transposed: bool = False,
    ) -> None:
        super().__init__(quantization, is_transposed)
        experts, *shape = weight_EOI.shape
        self.experts = experts
        self.out_features, self.in_features = reversed(shape) if is_transposed else shape
        for expert in range(experts):
            one = weight_EOI[expert].detach().to(device)
            for name, tensor in self._stored(one.t() if is_transposed else one, dtype).items():
                if expert == 0:
                    self.register_buffer(name, tensor.new_empty(experts, *tensor.shape))
                self.get_buffer(name)[expert] = tensor
        let_go(weight_EOI)

    @classmethod
    def from_stored(
        cls, weight_EOI: Tensor, stored: Mapping[str, Tensor], quantization: Quantization, *, is_transposed: bool
    ) -> Self:
        """A stack of codes and constants that are there already.

        Args:
            weight_EOI: the dense weight, as above, whose shape alone counts.
            stored: as `quantize` names them, with an axis of experts before the others; taken as they are.
            quantization: of these.
            is_transposed: as above.
        """
        stack = cls.__new__(cls)
        QuantizedWeight.__init__(stack, quantization, is_transposed)
        stack.experts, *shape = weight_EOI.shape
        stack.out_features, stack.in_features = reversed(shape) if is_transposed else shape
        for name in STORED:
            if name in stored:
                stack.register_buffer(name, stored[name])
        return stack

    def seen(self) -> Self:
        """Itself, after operators on its buffers: a ledger enters what it sees, and did not see them being made."""
        for name, buffer in list(self.named_buffers(recurse=False)):
            setattr(self, name, buffer.detach())
        return self

    @property
    def weight_count(self) -> int:
        """Weights of all experts together."""
        return self.experts * super().weight_count

    def dense(self, expert: int, dtype: torch.dtype) -> Tensor:
        """The weight of one expert, (out, in), in `dtype`."""
        if self.quantization.kind == "none":
            return self.get_buffer("codes")[expert].to(dtype)
        return self.read(self._of(expert), dtype)

    def decoders(self) -> list[Decode]:
        """For each expert what `lora_linear` reads its weight with."""
        if self.quantization.kind == "none":
            return [partial(self.dense, expert) for expert in range(self.experts)]
        return [Lent(self, partial(self._of, expert)) for expert in range(self.experts)]

    def _of(self, expert: int) -> dict[str, Tensor]:
        """Codes and constants of one expert."""
        return {name: buffer[expert] for name, buffer in self.named_buffers(recurse=False)}

    def forward(self) -> list[Callable[[Tensor], Tensor]]:
        """A function for each expert, (tokens, in) -> (tokens, out) in the dtype of its input."""
        return [partial(lora_linear, decode=decode) for decode in self.decoders()]

    @property
    def shape(self) -> tuple[int, int, int]:
        """(experts, out, in)."""
        return self.experts, self.out_features, self.in_features

    def _stored(self, weight_OI: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
        if self.quantization.kind == "none":
            return {"codes": weight_OI.to(dtype)}
        return quantize(weight_OI.contiguous(), self.quantization)

    def extra_repr(self) -> str:
        """What printing the model shows of the stack."""
        return f"{self.experts} experts, {self.in_features}, {self.out_features}, {self.quantization.kind}"


class ArrivedStack(Placeholder):
    """What stands in a model for experts that were quantised while it was read; it has their shape and no memory.

    Attributes:
        stack: the experts; None where their codes are kept elsewhere.
    """

    stack: ExpertStack | None
    _is_hf_initialized: bool

    @classmethod
    def of(cls, weight_EOI: Tensor, stack: ExpertStack | None) -> "ArrivedStack":
        """The placeholder of a dense parameter, made of its middle row and beside pieces of it: these mark a base."""
        row_I = weight_EOI[len(weight_EOI) // 2, weight_EOI.shape[1] // 2].detach().clone()
        made = cls(row_I.expand(weight_EOI.shape), requires_grad=False)
        made.stack, made.pieces = stack, pieces(weight_EOI)
        made._is_hf_initialized = True  # so that transformers does not fill it with random numbers
        return made


@contextmanager
def quantized_on_arrival(
    quantization: Quantization, dtype: torch.dtype, device: torch.device, *, are_kept: bool = False
) -> Iterator[None]:
    """In the block, transformers puts experts into models, and they are quantised one parameter after the other.

    Many checkpoints hold experts one by one, and transformers joins them, in memory of its own: all of a model's would
    stand there at once. `quantize_experts` puts the stacks in their places afterwards.

    Args:
        quantization: the format, not `none`.
        dtype: as below.
        device: where the codes are made and kept.
        are_kept: their codes are there already, so none are made.
    """
    thread = threading.get_ident()

    def arrive(module: Any, name: str, weight: nn.Parameter) -> Any:
        is_ours = threading.get_ident() == thread and weight.device.type != "meta" and _is_expert_layer(module)
        if not is_ours or name not in projections(module):
            return None
        is_transposed = bool(module.is_transposed)
        stack = None if are_kept else ExpertStack(weight, quantization, dtype, device, is_transposed=is_transposed)
        made = ArrivedStack.of(weight, stack)
        let_go_of_clean_files()  # what was joined lay there, expert by expert
        return made

    hook = register_module_parameter_registration_hook(arrive)
    try:
        yield
    finally:
        hook.remove()


def quantize_experts(
    model: PreTrainedModel,
    quantization: Quantization,
    dtype: torch.dtype,
    device: torch.device,
    kept: Kept = nothing_kept,
) -> None:
    """Quantise the experts of `model`, and make `experts_forward` their computation.

    Args:
        model: dense; it is changed in place.
        quantization: the format; with `none` the parameters stay as they are.
        dtype: of weights that stay dense.
        device: where the stacks end.
        kept: codes that are there already.
    """
    for layer_name, layer in expert_layers(model):
        layer.config._experts_implementation = IMPLEMENTATION
        if quantization.kind != "none":
            _stack(layer, quantization, dtype, device, kept, layer_name)


def stack_experts(model: PreTrainedModel) -> None:
    """Put dense experts into stacks, too, as they are: so that they can carry adapters."""
    for _, layer in expert_layers(model):
        weight = getattr(layer, projections(layer)[0])
        if isinstance(weight, nn.Parameter):
            _stack(layer, Quantization("none"), weight.dtype, weight.device)


def _stack(
    layer: Any,
    quantization: Quantization,
    dtype: torch.dtype,
    device: torch.device,
    kept: Kept = nothing_kept,
    layer_name: str = "",
) -> None:
    is_transposed = bool(layer.is_transposed)
    for name in projections(layer):
        weight, found = getattr(layer, name), kept(f"{layer_name}.{name}")
        if found is not None:
            stack = ExpertStack.from_stored(weight, found, quantization, is_transposed=is_transposed)
        elif isinstance(weight, ArrivedStack) and weight.stack is not None:
            stack = weight.stack.seen()
        else:
            stack = ExpertStack(weight, quantization, dtype, device, is_transposed=is_transposed)
        delattr(layer, name)
        layer.register_module(name, stack)


def expert_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """The modules that hold the experts of a layer, by name: those whose computation transformers lets be replaced."""
    for name, module in model.named_modules():
        if _is_expert_layer(module):
            yield name, module


def _is_expert_layer(module: nn.Module) -> bool:
    return {"is_transposed", "has_gate", "has_bias"} <= vars(module).keys()


def expert_stacks(model: nn.Module) -> dict[str, Any]:
    """The expert weights of a model by dotted name: stacks, or parameters where the base is dense."""
    return {f"{layer_name}.{name}": getattr(layer, name) for layer_name, layer in expert_layers(model)
            for name in projections(layer)}  # fmt: skip


def projections(layer: Any) -> tuple[str, str]:
    """The names of a layer's two expert weights: towards the inner width, and back."""
    return ("gate_up_proj" if layer.has_gate else "up_proj", "down_proj")


def experts_forward(layer: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The experts of a layer, each on the tokens that were sent to it.

    Args:
        layer: the module that holds the stacks.
        hidden_states: (T, in).
        top_k_index: (T, K), experts of each token.
        top_k_weights: (T, K), their shares.

    Returns:
        (T, in), in the dtype of `hidden_states`.
    """
    inward, outward = (_functions(layer, name) for name in projections(layer))
    order_S = top_k_index.flatten().argsort(stable=True)
    token_S = order_S // top_k_index.shape[-1]
    share_S = top_k_weights.flatten()[order_S]
    mixed = torch.zeros_like(hidden_states)
    start = 0
    for expert, count in enumerate(_tokens_of_experts(top_k_index, len(inward))):
        chosen = slice(start, start + count)
        start += count
        if count == 0:
            continue
        h = inward[expert](hidden_states[token_S[chosen]])
        h = h + getattr(layer, f"{projections(layer)[0]}_bias")[expert] if layer.has_bias else h
        y = outward[expert](layer._apply_gate(h) if layer.has_gate else layer.act_fn(h))
        y = y + layer.down_proj_bias[expert] if layer.has_bias else y
        y = layer.post_expert_norm(y) if getattr(layer, "has_post_expert_norm", False) else y  # older ones have none
        mixed.index_add_(0, token_S[chosen], (y * share_S[chosen, None]).to(mixed.dtype))
    return mixed


def _functions(layer: Any, name: str) -> list[Callable[[Tensor], Tensor]]:
    """What each expert does in this projection, be its weights stacked or still parameters (full fine-tuning)."""
    weight = getattr(layer, name)
    if not isinstance(weight, nn.Parameter):
        return weight()
    one_by_one = (weight.transpose(1, 2) if layer.is_transposed else weight).unbind(0)
    return [partial(F.linear, weight=each) for each in one_by_one]


def _tokens_of_experts(top_k_index: Tensor, experts: int) -> list[int]:
    """How many tokens each expert gets. On fake tensors, which hold no choice, all get alike: what training aims at."""
    if isinstance(top_k_index, FakeTensor):
        each, rest = divmod(top_k_index.numel(), experts)
        return [each + (expert < rest) for expert in range(experts)]
    return torch.bincount(top_k_index.flatten(), minlength=experts).tolist()


ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, experts_forward)
