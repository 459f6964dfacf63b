"""What `train.full_finetune` makes of the rest of a recipe: no adapters, and a base that is held dense and trains."""

from collections.abc import Iterator
from typing import Literal

from qlora_kit.recipe.schema import Base, Lora, Recipe

Method = Literal["qlora", "full_finetune"]
"""What a run does, by its name among the plan's methods."""

_ADAPTERS_ONLY = ("quantization", "double_quant", "block_size", "skip", "quantize_head", "cache")
"""Keys of `base` that say how frozen weights are held."""


def method_of(recipe: Recipe) -> Method:
    """What the recipe's run does."""
    return "full_finetune" if recipe.train.full_finetune else "qlora"


def base_as_held(recipe: Recipe) -> Base:
    """The recipe's base as its run holds it: dense where every weight is trained, whatever `base.quantization` says."""
    if not recipe.train.full_finetune:
        return recipe.base
    return recipe.base.model_copy(update={"quantization": "none", "skip": [], "quantize_head": False})


def with_adapters(recipe: Recipe) -> Recipe:
    """The same recipe with adapters on a quantised base: what full fine-tuning is compared with."""
    return recipe.model_copy(update={"train": recipe.train.model_copy(update={"full_finetune": False})})


def not_read(recipe: Recipe) -> Iterator[str]:
    """Settings that change nothing where every weight is trained, as `key=value`: the base's format, and what differs
    from its default otherwise. Tokens that are added train with the rest, so `lora.added_tokens` is not among them."""
    if recipe.base.quantization != "none":
        yield f"base.quantization={recipe.base.quantization}"
    for section, values, keys in (
        ("base", recipe.base, _ADAPTERS_ONLY[1:]),
        ("lora", recipe.lora, [key for key in Lora.model_fields if key != "added_tokens"]),
    ):
        for key in keys:
            field = type(values).model_fields[key]
            if getattr(values, key) != field.get_default():
                yield f"{section}.{field.alias or key}={getattr(values, key)}"
