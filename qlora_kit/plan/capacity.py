"""Capacity: what an adapter holds beside what its rows tell, and the rank that `lora.rank: auto` stands for.

    held = 2 bits * trained parameters

auto is the least power of two whose adapter holds what the rows tell (`data/information.py`), but no less than 16: a
rank below that may hold enough and still learns more slowly. In LoRA's table 18 the held-out loss of GPT-2 M falls from
rank 1 (1.23) to 16 (1.16) and stays there up to 512. Nor is it above 256, or above the width of the layers, where more
could not be done with it. With alpha / rank as the scale the learning rate need not change with the rank.

Sources: 2 bits a parameter, Allen-Zhu and Li, arXiv 2404.05405, and LoRA Without Regret, doi 10.64434/tml.20250929,
where LoRA falls behind full fine-tuning when the rows tell more than the adapter holds; LoRA, arXiv 2106.09685v2.
"""

from dataclasses import dataclass

from transformers import PretrainedConfig

from qlora_kit.plan.sizes import adapter_size
from qlora_kit.plan.workload import Workload
from qlora_kit.recipe import Recipe, with_adapters
from qlora_kit.units import format_bits

BITS_A_PARAMETER = 2
LEAST_RANK, MOST_RANK = 16, 256


@dataclass(frozen=True, slots=True)
class Capacity:
    """What an adapter holds, and what it is to hold.

    Attributes:
        held_bits: that its parameters hold.
        data_bits: that the rows tell; None where there are no rows to look at.
        reason: for the rank, one sentence with both.
        warning: where the rows tell more than it holds.
    """

    held_bits: int
    data_bits: float | None
    reason: str
    warning: str | None


def with_rank(recipe: Recipe, config: PretrainedConfig, data_bits: float | None) -> Recipe:
    """The recipe with a whole number for `lora.rank: auto`; any other as it is.

    Args:
        recipe: the run.
        config: of the base; its weights are not needed.
        data_bits: that the rows tell; without them auto is the least.
    """
    if recipe.lora.rank != "auto":
        return recipe
    rank, (trained, widths) = LEAST_RANK, _size(recipe, config, LEAST_RANK)
    # A gate with one output has no part in this.
    most = min(MOST_RANK, min((width for width in widths if width >= LEAST_RANK), default=max(widths)))
    while rank > most:
        rank //= 2
    while BITS_A_PARAMETER * trained < (data_bits or 0) and 2 * rank <= most:
        rank *= 2
        trained, _ = _size(recipe, config, rank)
    return _ranked(recipe, rank)


def capacity_of(recipe: Recipe, asked: int | str, trained: int, data_bits: float | None) -> Capacity:
    """What the adapter of a recipe holds, with the reason for its rank.

    Args:
        recipe: as `with_rank` gave it.
        asked: what the user said of the rank.
        trained: parameters.
        data_bits: as `with_rank` takes it.
    """
    rank, held = int(recipe.lora.rank), BITS_A_PARAMETER * trained
    data = "there are no rows to look at" if data_bits is None else f"your data about {format_bits(data_bits)}"
    more = "the least that auto takes" if rank <= LEAST_RANK else f"more than rank {rank // 2} would hold"
    reason = f"rank {rank} holds about {format_bits(held)}, {data}"
    warning = (
        "the data hold more information than the adapter can, and there LoRA falls behind full fine-tuning; a larger "
        "lora.rank or more layers in lora.targets would hold more"
    )
    return Capacity(
        held_bits=held,
        data_bits=data_bits,
        reason=f"{reason}: {more}" if asked == "auto" else reason,
        warning=warning if (data_bits or 0) > held else None,
    )


def _size(recipe: Recipe, config: PretrainedConfig, rank: int) -> tuple[int, list[int]]:
    """As `adapter_size`, at a rank."""
    ranked = _ranked(with_adapters(recipe), rank)
    return adapter_size(config, Workload.of(ranked, micro_batch=1, accumulation=1, tokens=1, activations="recompute"))


def _ranked(recipe: Recipe, rank: int) -> Recipe:
    return recipe.model_copy(update={"lora": recipe.lora.model_copy(update={"rank": rank})})
