"""One optimizer step on fake tensors: the very code of the real step, with a ledger, no weights and no accelerator.

Real and fake differ in three places, each a seam of its own:
- where weights come from: a model built from its configuration, instead of a checkpoint;
- the optimizer's arithmetic: bitsandbytes reads values, so `AdapterOptimizer.rehearse` does all but that;
- values: nothing here asks whether a loss is finite, and that rows are not packed is told, not read (`_unpacked`).

Layers are alike, so a deep model is planned from two shallow ones: every number is a straight line in the depth.
"""

import copy
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PretrainedConfig, PreTrainedModel, masking_utils
from transformers.initialization import no_init_weights

from qlora_kit.base.dense import QuantizedWeight, parameter_count
from qlora_kit.base.formats import Quantization
from qlora_kit.base.load import build_model, freeze_and_quantize, resolve_device, resolve_dtype
from qlora_kit.lora import adapter_parameters, add_recipe_lora
from qlora_kit.memory import Ledger
from qlora_kit.recipe import Lora, Recipe
from qlora_kit.train.activations import Policy, set_activation_policy
from qlora_kit.train.optim import AdapterOptimizer, MasterWeights, definite_masters
from qlora_kit.train.step import accumulate_gradients

SHALLOW = (2, 4)
"""Depths from which deeper models are extrapolated."""


@dataclass(frozen=True, slots=True)
class Workload:
    """What one planned step works on.

    Attributes:
        quantization: of the base.
        lora: that section of the recipe, or None for full fine-tuning.
        dtype: of everything dense.
        attention: its implementation.
        micro_batch: rows in one forward pass.
        tokens: of the longest row.
        accumulation: micro-batches in one step; above 1 the gradients of the first stand through the second.
        activations: keep or recompute.
        optimizer: a name of `train.optimizer`.
        master_weights: fp32, stochastic or none.
        skip: linear layers that stay dense.
        quantize_head: whether embedding and head are quantised, too.
        loss_chunk: tokens whose logits stand at one time; None for whole logits.
    """

    quantization: Quantization
    lora: Lora | None
    dtype: torch.dtype
    attention: str
    micro_batch: int
    tokens: int
    accumulation: int
    activations: Policy
    optimizer: str
    master_weights: MasterWeights
    skip: tuple[str, ...] = ()
    quantize_head: bool = False
    loss_chunk: int | None = None

    @classmethod
    def of(
        cls,
        recipe: Recipe,
        *,
        micro_batch: int,
        accumulation: int,
        tokens: int,
        activations: Policy,
        loss_chunk: int | None = None,
    ) -> "Workload":
        """The step that a recipe asks for, once its batch and its longest row are known."""
        base = recipe.base
        return cls(
            quantization=Quantization(base.quantization, base.double_quant, base.block_size),
            lora=recipe.lora,
            dtype=resolve_dtype(base.compute_dtype, resolve_device(base.device)),
            attention=base.attention,
            micro_batch=micro_batch,
            tokens=tokens,
            accumulation=accumulation,
            activations=activations,
            optimizer=recipe.train.optimizer,
            master_weights=definite_masters(recipe.train.master_weights),
            skip=tuple(base.skip),
            quantize_head=base.quantize_head,
            loss_chunk=loss_chunk,
        )


@dataclass(slots=True)
class _FakeRows:
    input_ids: Tensor
    labels: Tensor


def dry_run(config: PretrainedConfig, work: Workload) -> dict[str, Any]:
    """Run one step on fake tensors and tell what it took.

    Args:
        config: of the model; all that is needed of it.
        work: what the step works on.

    Returns:
        `peak_bytes`, `resident_bytes`, `by_category`, `peak_by_phase` as the run folder's plan.json has them, and
        `parameters` {total, trainable, quantized}.
    """
    depth = getattr(config, "num_hidden_layers", 0)
    if depth <= SHALLOW[1] + 2 or not _is_uniform(config):
        return _step_on_fake_tensors(config, work)
    low, high = (_step_on_fake_tensors(_with_depth(config, shallow), work) for shallow in SHALLOW)
    return _extrapolate(low, high, (depth - SHALLOW[0]) / (SHALLOW[1] - SHALLOW[0]))


def _step_on_fake_tensors(config: PretrainedConfig, work: Workload) -> dict[str, Any]:
    with _quiet(), _unpacked(), FakeTensorMode(allow_non_fake_inputs=True):
        model, parameters = _build(config, work)
        optimizer = AdapterOptimizer(parameters, work.optimizer, master_weights=work.master_weights)
        ledger = Ledger(model)
        ledger.own("optimizer_state", (tensor for _, tensor in optimizer.state_tensors()))
        with ledger:
            for _ in range(2):  # a second step finds what the first one left behind
                _step(model, parameters, optimizer, work, ledger)
        summary = ledger.summary()
    trainable = sum(parameter.numel() for _, parameter in parameters)
    total = parameter_count(model) - (trainable if work.lora is not None else 0)
    quantized = sum(module.weight_count for module in model.modules() if isinstance(module, QuantizedWeight))
    return {**summary, "parameters": {"total": total, "trainable": trainable, "quantized": quantized}}


def _build(config: PretrainedConfig, work: Workload) -> tuple[PreTrainedModel, list[tuple[str, torch.nn.Parameter]]]:
    with no_init_weights():
        model = build_model(config, work.dtype, work.attention)
    cpu = torch.device("cpu")
    freeze_and_quantize(model, work.quantization, work.dtype, cpu, work.skip, quantize_head=work.quantize_head)
    if work.lora is None:
        model.requires_grad_(True)
        parameters = list(model.named_parameters())
    else:
        # What is weighed is how many tokens are added, and not which; and no values are at hand that loftq would read.
        lora = work.lora.model_copy(update={"init": "default"}) if work.lora.init == "loftq" else work.lora
        add_recipe_lora(model, lora, token_ids=range(len(lora.added_tokens)))
        parameters = list(adapter_parameters(model))
    set_activation_policy(model, work.activations)
    return model.train(), parameters


def _step(
    model: PreTrainedModel,
    parameters: list[tuple[str, torch.nn.Parameter]],
    optimizer: AdapterOptimizer,
    work: Workload,
    ledger: Ledger,
) -> None:
    shape = (work.micro_batch, work.tokens)
    rows = [
        _FakeRows(torch.zeros(shape, dtype=torch.int64), torch.zeros(shape, dtype=torch.int64))
        for _ in range(min(2, work.accumulation))
    ]
    trained = shape[0] * shape[1]
    accumulate_gradients(model, rows, trained, phase=ledger.phase, loss_chunk=work.loss_chunk)
    with ledger.phase("optimizer"):
        torch.nn.utils.clip_grad_norm_([parameter for _, parameter in parameters], 1.0)
        optimizer.rehearse()


def _extrapolate(low: Any, high: Any, factor: float) -> Any:
    """low + factor * (high - low) through nested numbers."""
    if isinstance(low, dict):
        return {key: _extrapolate(low.get(key, 0), value, factor) for key, value in high.items()}
    return round(low + factor * (high - low))


def _with_depth(config: PretrainedConfig, depth: int) -> PretrainedConfig:
    shallow = copy.deepcopy(config)
    shallow.num_hidden_layers = depth
    if getattr(shallow, "layer_types", None) is not None:
        shallow.layer_types = shallow.layer_types[:depth]
    return shallow


def _is_uniform(config: PretrainedConfig) -> bool:
    """Whether all layers are of one kind, so that two depths tell the rest."""
    kinds = getattr(config, "layer_types", None)
    return (kinds is None or len(set(kinds)) == 1) and not getattr(config, "is_encoder_decoder", False)


@contextmanager
def _unpacked() -> Iterator[None]:
    """transformers reads off the positions whether a row holds several sequences. It cannot on fake tensors, takes the
    worst, and builds a mask with which attention keeps more than in the real step: so the answer is given here."""
    ask = masking_utils.find_packed_sequence_indices
    masking_utils.find_packed_sequence_indices = lambda position_ids: None
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = ask


@contextmanager
def _quiet() -> Iterator[None]:
    """transformers warns of missing weights and of what it thinks of a fake device; none of it concerns a plan."""
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
