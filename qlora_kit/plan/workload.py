"""What a planned step works on: the recipe's step, once its batch and its longest row are known."""

from dataclasses import dataclass

import torch

from qlora_kit.base.device import resolve_device, resolve_dtype
from qlora_kit.base.formats import Quantization
from qlora_kit.recipe import Layout, Lora, Recipe, base_as_held
from qlora_kit.train.activations import Blocks, Policy
from qlora_kit.train.optim import MasterWeights, definite_masters
from qlora_kit.train.pace import gradients_stand
from qlora_kit.train.tasks import has_reference


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
        accumulation: micro-batches in one step, as planned.
        activations: of all blocks, or how many have which policy.
        optimizer: a name of `train.optimizer`.
        master_weights: fp32, stochastic or none.
        skip: linear layers that stay dense.
        quantize_head: whether embedding and head are quantised, too.
        eval_shape: rows and tokens of the largest batch that is evaluated; None where none is.
        on_card: whether the device is a card: what lies in the host's memory is counted by itself then.
        layout: how rows lie; where they are packed, `tokens` are those of the fullest sequence.
        task: of `train.task`; where that takes pairs of answers, a row is two sequences.
        has_reference: whether a frozen copy of the adapter stands beside it.
        is_padded: of a classification: whether texts of one batch differ in length, so that there is a mask.
        loss_chunk: tokens whose logits stand at one time; None for whole logits.
    """

    quantization: Quantization
    lora: Lora | None
    dtype: torch.dtype
    attention: str
    micro_batch: int
    tokens: int
    accumulation: int
    activations: Policy | Blocks
    optimizer: str
    master_weights: MasterWeights
    skip: tuple[str, ...] = ()
    quantize_head: bool = False
    eval_shape: tuple[int, int] | None = None
    on_card: bool = False
    layout: Layout = "apart"
    task: str = "sft"
    has_reference: bool = False
    is_padded: bool = False
    loss_chunk: int | None = None

    @property
    def gradients_stand(self) -> bool:
        """Whether the gradients of one micro-batch stand through the next."""
        return gradients_stand(self.micro_batch, self.accumulation, is_packed=self.layout != "apart")

    @classmethod
    def of(
        cls,
        recipe: Recipe,
        *,
        micro_batch: int,
        accumulation: int,
        tokens: int,
        activations: Policy | Blocks,
        loss_chunk: int | None = None,
    ) -> "Workload":
        """The step that a recipe asks for, once its batch and its longest row are known."""
        base, is_full = base_as_held(recipe), recipe.train.full_finetune
        return cls(
            quantization=Quantization(base.quantization, base.double_quant, base.block_size),
            lora=None if is_full else recipe.lora,
            dtype=resolve_dtype(base.compute_dtype, resolve_device(base.device)),
            attention=base.attention,
            micro_batch=micro_batch,
            tokens=tokens,
            accumulation=accumulation,
            activations=activations,
            optimizer=recipe.train.optimizer,
            master_weights=definite_masters(recipe.train.master_weights, full_finetune=is_full),
            skip=tuple(base.skip),
            quantize_head=base.quantize_head is True,
            task=recipe.train.task,
            is_padded=recipe.train.task == "classify" and micro_batch > 1,
            has_reference=has_reference(recipe),
            loss_chunk=loss_chunk,
        )
