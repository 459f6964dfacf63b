"""What is minimised: the negative log-likelihood of the trained tokens, or of the classes of texts, summed in nats.

Sums, not means: an optimizer step divides once, by the number of labels that count in all its micro-batches, so that
the split into micro-batches changes nothing (transformers issue 34191 tells what happens otherwise).
"""

import torch.nn.functional as F
from torch import Tensor

from qlora_kit.ops import IGNORED


def causal_loss_sum(logits_BTV: Tensor, labels_BT: Tensor) -> Tensor:
    """Summed cross entropy of the next token, fp32 scalar, in nats.

    loss = -sum over b, t with labels[b, t + 1] != IGNORED of log softmax(logits[b, t])[labels[b, t + 1]]

    Args:
        logits_BTV: (batch, tokens, vocabulary), any floating dtype; the softmax is taken in fp32.
        labels_BT: (batch, tokens), the token at each place or IGNORED.
    """
    predicted = logits_BTV[:, :-1].flatten(0, 1).float()
    return F.cross_entropy(predicted, labels_BT[:, 1:].flatten(), ignore_index=IGNORED, reduction="sum")


def classification_loss_sum(logits_BL: Tensor, labels_B: Tensor) -> Tensor:
    """Summed cross entropy of the classes of texts, fp32 scalar, in nats.

    loss = -sum over b of log softmax(logits[b])[labels[b]]

    Args:
        logits_BL: (batch, labels), any floating dtype; the softmax is taken in fp32.
        labels_B: (batch,), the class of each text or IGNORED.
    """
    return F.cross_entropy(logits_BL.float(), labels_B, ignore_index=IGNORED, reduction="sum")
