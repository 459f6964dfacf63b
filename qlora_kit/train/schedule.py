"""Learning rates: the rate of a step as a pure function of its number."""

import math
from typing import Literal

from qlora_kit.units import format_count

Schedule = Literal["constant", "linear", "cosine", "wsd"]

WSD_DECAY_SHARE = 0.2
"""Share of the steps in which a warmup-stable-decay schedule falls (arXiv 2404.06395 uses 10 to 20 %)."""

LARGE_MODEL = 20_000_000_000
"""Parameters between QLoRA's 13B, tuned at 2e-4, and its 33B, tuned at 1e-4."""


def learning_rate(step: int, steps: int, peak: float, schedule: Schedule, warmup: float) -> float:
    """The rate of step `step` (counted from 1) of `steps`.

    It rises in a straight line over the first `warmup` share of the steps, then stays (constant), falls in a straight
    line to zero (linear), falls along half a cosine (cosine), or stays and falls over the last fifth (wsd).

    >>> [learning_rate(s, 10, 1.0, "linear", 0.2) for s in (1, 2, 6, 10)]
    [0.5, 1.0, 0.625, 0.125]
    """
    rising = math.ceil(warmup * steps)
    if step <= rising:
        return peak * step / rising
    left = (steps - step + 1) / max(1, steps - rising)
    if schedule == "constant":
        return peak
    if schedule == "linear":
        return peak * left
    if schedule == "cosine":
        return peak * 0.5 * (1 - math.cos(math.pi * left))
    return peak * min(1.0, (steps - step + 1) / max(1, math.ceil(WSD_DECAY_SHARE * steps)))


def automatic_rate(parameters: int, full_finetune: bool) -> tuple[float, str]:
    """What `train.lr: auto` means, and why.

    2e-4 up to 13B and 1e-4 above are the rates of QLoRA's released scripts (arXiv 2305.14314); full fine-tuning wants a
    tenth of LoRA's (LoRA Without Regret).
    """
    rate = 1e-4 if parameters > LARGE_MODEL else 2e-4
    reason = f"QLoRA's rate for a model of {format_count(parameters)} parameters"
    return (rate / 10, f"a tenth of {reason}") if full_finetune else (rate, reason)
