"""Where a causal model's logits come from: the last state of its body, its output head, and what follows the product.

In most families logits = head(h). Some multiply, divide or cap them, and say so in their configuration: that is the
table below. `train/probe` asks a model itself before the first step, so a family that does something else is found out.
"""

from typing import Any, TypeGuard

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from qlora_kit.base.vocabulary import QuantizedTable
from qlora_kit.lora.whole import WholeModule
from qlora_kit.ops import IGNORED, LogitRule, head_cross_entropy, linear_cross_entropy

CHUNK_BYTES = 256 * 2**20
"""What the logits of a chunk may take under `memory.loss_chunk: auto`."""
BYTES_A_LOGIT = 6
"""As if all of them stood in 16 bits and in fp32. They take 2 or 4, so there is room to spare."""
FEWEST_TOKENS = 64
"""Below it products are flat, and every one of them reads the whole head; chunks are multiples of it."""

_FACTORS = (
    "logit_scale",  # Cohere
    "lm_head_multiplier",  # Falcon-H1
    "output_multiplier",  # Muse
)
_DIVISORS = ("logits_scaling",)  # Granite; MiniCPM3, which divides the head's input
_MULTIPLIES_ALL = "hyperclovax"  # which has Granite's word for a factor
_CAPS = (
    "final_logit_softcapping",  # Gemma
    "logits_soft_cap",  # RecurrentGemma
    "output_logit_soft_cap",  # xLSTM
)


def automatic_chunk(vocab: int) -> int:
    """What `memory.loss_chunk: auto` means: the tokens whose logits take about 256 MiB, a multiple of 64.

    A batch of fewer tokens is one chunk. That is not slower than whole logits, and takes a third of their memory or
    less (benchmarks/LOG.md).

    Args:
        vocab: size of the vocabulary.
    """
    fitting = CHUNK_BYTES // (BYTES_A_LOGIT * vocab)
    return max(FEWEST_TOKENS, fitting // FEWEST_TOKENS * FEWEST_TOKENS)


def logit_rule(config: PretrainedConfig) -> LogitRule:
    """What a family does to the product of its head, by what its configuration says."""
    text = config.get_text_config()
    scale, cap = 1.0, None
    for name in _FACTORS:
        scale *= _number(text, name) or 1.0
    for name in _DIVISORS:
        number = _number(text, name) or 1.0
        scale *= number if text.model_type.startswith(_MULTIPLIES_ALL) else 1 / number
    for name in _CAPS:
        cap = _number(text, name) or cap
    return LogitRule(scale, cap)


def has_own_head(model: nn.Module) -> TypeGuard[PreTrainedModel]:
    """Whether a model is a body with an output head beside it, so that the head can be called by itself."""
    if not isinstance(model, PreTrainedModel) or model.base_model is model:
        return False
    head = model.get_output_embeddings()
    return head is not None and all(module is not head for module in model.base_model.modules())


def chunked_loss_sum(
    model: PreTrainedModel, hidden_BTD: Tensor, labels_BT: Tensor, chunk: int, divisor: float = 1.0
) -> Tensor:
    """`causal_loss_sum` of a model's logits, divided by `divisor`, from what its body gives.

    Args:
        model: with a head of its own.
        hidden_BTD: last state of the body, (batch, tokens, width).
        labels_BT: (batch, tokens), the token at each place or IGNORED.
        chunk: tokens whose logits stand at one time; a quantised head goes by slices of the vocabulary instead.
        divisor: of the sum.
    """
    # The labels are shifted and not the states, which would be a copy of them.
    labels_N = F.pad(labels_BT[:, 1:], (0, 1), value=IGNORED).flatten()
    h_ND, head, rule = hidden_BTD.flatten(0, 1), _head(model), logit_rule(model.config)
    if type(head) is nn.Linear:
        return linear_cross_entropy(h_ND, labels_N, head.weight, head.bias, chunk=chunk, rule=rule, divisor=divisor)
    if isinstance(head, QuantizedTable) and head.rows_are_whole:
        return head.loss(h_ND, labels_N, rule, divisor)
    trained = [parameter for parameter in head.parameters() if parameter.requires_grad]
    return head_cross_entropy(h_ND, labels_N, head, trained, chunk=chunk, rule=rule, divisor=divisor)


def head_logits(model: PreTrainedModel, hidden_BTD: Tensor) -> Tensor:
    """The logits of which `chunked_loss_sum` takes the loss, whole: (batch, tokens, vocabulary).

    Args:
        model: with a head of its own.
        hidden_BTD: last state of the body.
    """
    logits: Tensor = _head(model)(hidden_BTD)
    return logit_rule(model.config)(logits)


def _head(model: PreTrainedModel) -> Any:
    head = model.get_output_embeddings()
    return head.in_use if isinstance(head, WholeModule) else head


def _number(config: PretrainedConfig, name: str) -> float | None:
    value = getattr(config, name, None)
    return float(value) if isinstance(value, int | float) else None
