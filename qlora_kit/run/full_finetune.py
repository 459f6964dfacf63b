"""A run that trains every weight of its base: what it refuses or ignores, said before any weight is read."""

import torch
from transformers import PretrainedConfig

from qlora_kit.base.architecture import brings_code
from qlora_kit.base.device import resolve_device, resolve_dtype
from qlora_kit.base.prequantized import stored_quantization
from qlora_kit.errors import ModelError
from qlora_kit.recipe import Recipe, not_read
from qlora_kit.watch import Watch


def check_full_finetune(recipe: Recipe, config: PretrainedConfig, watch: Watch) -> None:
    """See that every weight of a base can be trained and written, and note once which settings say nothing then.

    Args:
        recipe: the run; one with adapters passes.
        config: of the base.
        watch: is given the note.

    Raises:
        ModelError: the weights are stored quantised, would be trained in float16, or need code of their own.
    """
    if not recipe.train.full_finetune:
        return
    base, instead = recipe.base, "or leave out train.full_finetune"
    if stored_quantization(config) is not None:
        raise ModelError(
            f"{base.model} is stored quantised, and codes cannot be trained; give the 16-bit model that it was made "
            f"from, {instead}"
        )
    if resolve_dtype(base.compute_dtype, resolve_device(base.device)) == torch.float16:
        raise ModelError(
            "train.full_finetune trains the weights in base.compute_dtype, which is float16 here and has no room for "
            f"small gradients and updates; set base.compute_dtype=float32 or bfloat16, {instead}"
        )
    if brings_code(config):
        raise ModelError(
            f"{base.model} runs code of its own, which the trained model would have to include: not supported yet; "
            "leave out train.full_finetune"
        )
    settings = ", ".join(not_read(recipe))
    if settings:
        watch.note(
            "train.full_finetune trains every weight, unquantised; these settings have no effect except in the plan's "
            f"comparison with QLoRA: {settings}"
        )
