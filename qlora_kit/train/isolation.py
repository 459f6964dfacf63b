"""Whether a model keeps the documents of one packed sequence apart.

Most families read documents by themselves (`base/documents.py`) or make a block-diagonal mask from positions that begin
anew. Some do not (OPT, Falcon, BLOOM, gpt-oss), and some carry a state past any mask (Mamba). What leaks is seen in the
gradient: the logits of the second document must not depend on the first one at all, and without a path between them the
gradient is zero exactly.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from qlora_kit.base.documents import reading
from qlora_kit.errors import ModelError

_TOKENS = 8
"""Of each of the two documents."""


def check_isolation(model: PreTrainedModel, sequences: int = 1) -> None:
    """Try the model on two short documents in one sequence; gradients, mode and random states stay as they were.

    Args:
        model: on its device, with its attention.
        sequences: most that stand side by side in a micro-batch: some attention keeps documents apart in one alone.

    Raises:
        ModelError: the second document sees the first.
    """
    if leaked_gradient(model) > 0:
        raise no_packing(model)
    if sequences > 1 and leaked_gradient(model, sequences=2) > 0:
        raise ModelError(
            f"{model.config._attn_implementation} keeps the documents of a sequence apart only where it is alone in a "
            "micro-batch (in this version of transformers); set train.micro_batch=1, base.attention=sdpa or "
            "data.packing=false"
        )


def no_packing(model: PreTrainedModel) -> ModelError:
    """The refusal of a family that mixes documents."""
    return ModelError(
        f"a {model.config.model_type} lets documents of one sequence see each other (in this version of transformers); "
        "set data.packing=false"
    )


def leaked_gradient(model: PreTrainedModel, sequences: int = 1) -> float:
    """Largest gradient of a packed document's logits by the embeddings of the document before it."""
    embedded: list[Tensor] = []

    def keep(module: Any, given: Any, output: Tensor) -> Tensor:
        embedded.append(output.detach().requires_grad_())
        return embedded[-1]

    ids = torch.arange(2 * _TOKENS, device=model.device).repeat(sequences, 1)
    ids %= model.config.get_text_config().vocab_size
    was_training, hook = model.training, model.get_input_embeddings().register_forward_hook(keep)
    try:
        with torch.enable_grad():
            with reading([_TOKENS] * 2 * sequences):
                logits = model.eval()(input_ids=ids, position_ids=ids % _TOKENS, use_cache=False).logits
            # One logit a token, not their sum: in float16 that gradient could overflow.
            (gradient,) = torch.autograd.grad(logits[:, _TOKENS:, 0].sum(), embedded)
    finally:
        hook.remove()
        model.train(was_training)
    return gradient[:, :_TOKENS].abs().max().item()
