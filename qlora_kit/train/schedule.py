"""Learning rates: the rate of a step as a pure function of its number."""

import math
from typing import Literal

from qlora_kit.recipe import TASKS

Schedule = Literal["constant", "linear", "cosine", "wsd"]

WSD_DECAY_SHARE = 0.2
"""Share of the steps in which a warmup-stable-decay schedule falls (arXiv 2404.06395 uses 10 to 20 %)."""

FULL_RATE = 5e-5
"""Best rate of full fine-tuning at a hidden size of 2,000 (the fit of LoRA Without Regret)."""
LORA_FACTOR, SHORT_FACTOR = 10, 15
"""Best rate of LoRA over that of full fine-tuning: in general, and in runs of fewer than `SHORT_RUN` steps."""
SHORT_RUN = 100
FIT_WIDTH = 2000
POWERS = {"llama": 0.781, "qwen": 0.0775}
"""How fast the best rate falls with the hidden size, by family: `model_pow` of the fit."""
NARROWEST = 256
"""Hidden size below which the fit is not followed: it was made on sizes of 1,024 and above, and held against measured
rates at this one, where it says 2.5e-3 (benchmarks/learning_rate.py)."""

PREFERENCE_SHARE = 0.1
"""Of the rate that answers are learnt at, where they are held against each other."""


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


def automatic_rate(family: str, hidden: int, steps: int, full_finetune: bool, task: str = "sft") -> tuple[float, str]:
    """What `train.lr: auto` means, and why: the fit of LoRA Without Regret over 14 Llama and Qwen3 models.

    rate = 5e-5 * factor * (2000 / hidden) ^ power,   factor: LoRA 10, in short runs about 15; full fine-tuning 1

    It does not depend on the rank, as long as updates are scaled by alpha / rank for an alpha of 32, which is the
    recipe's default. Other alphas are outside of the fit, and so are other families: those get the lower of two rates.

    Args:
        family: the configuration's `model_type`.
        hidden: width of the residual stream.
        steps: of the run.
        full_finetune: whether every weight trains.
        task: of `train.task`. Preferences move a model that answers already, and take a tenth; Zephyr (arXiv
            2310.16944) went from 2e-5 for answers to 5e-7 for pairs.

    Source: doi 10.64434/tml.20250929 for the factors and the form; the powers are those that its authors published in
    tinker-cookbook's `hyperparam_utils` of 2025.

    >>> automatic_rate("llama", 4096, 500, False)[0], automatic_rate("qwen3", 4096, 500, False)[0]
    (0.00029, 0.00047)
    """
    width = FIT_WIDTH / max(hidden, NARROWEST)
    known = [power for name, power in POWERS.items() if family.startswith(name)]
    factor = 1 if full_finetune else SHORT_FACTOR if steps < SHORT_RUN else LORA_FACTOR
    rate = FULL_RATE * factor * min(width**power for power in known or POWERS.values())
    whose = "LoRA Without Regret's fit" if known else "the lower of LoRA Without Regret's fits for Llama and Qwen"
    kind = "full fine-tuning" if full_finetune else "a short run" if steps < SHORT_RUN else "LoRA"
    said = f"{whose} for {kind} at a hidden size of {hidden:,}"
    if not TASKS[task].is_preference:
        return float(f"{rate:.1e}"), said
    return float(f"{PREFERENCE_SHARE * rate:.1e}"), f"a tenth of {said}, as preferences need"
