"""What is minimised: the negative log-likelihood of the trained tokens, or of the classes of texts, summed in nats; and
what preferences make of the likelihoods of whole answers.

Sums, not means: an optimizer step divides once, by the number of labels that count in all its micro-batches, so that
the split into micro-batches changes nothing (transformers issue 34191 tells what happens otherwise).

Axes: P pairs of answers to one prompt, or answers with a verdict. A log ratio is log p(answer) under what is trained
less that under the reference, summed over the answer's tokens.
"""

import torch
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


def classification_loss_sum(logits_BL: Tensor, labels: Tensor) -> Tensor:
    """Summed cross entropy of the classes of texts, fp32 scalar, in nats.

    loss = -sum over b of log softmax(logits[b])[labels[b]]; where a text may have several classes, each is a question
    of its own, and loss = -sum over b of the mean over l of log sigmoid(+-logits[b, l]), + where l is one of them

    Args:
        logits_BL: (batch, classes), any floating dtype; the softmax is taken in fp32.
        labels: (batch,), the class of each text or IGNORED; or (batch, classes), fp32, 1 or 0.
    """
    if labels.is_floating_point():
        return F.binary_cross_entropy_with_logits(logits_BL.float(), labels, reduction="sum") / labels.shape[1]
    return F.cross_entropy(logits_BL.float(), labels, ignore_index=IGNORED, reduction="sum")


def dpo_losses(chosen_P: Tensor, rejected_P: Tensor, beta: float) -> Tensor:
    """Direct preference optimisation, arXiv 2305.18290 (7): -log sigmoid(beta (chosen - rejected)), (P,).

    Args:
        chosen_P: log ratios of the answers that were preferred.
        rejected_P: those of the others.
        beta: how strongly it holds to the reference.
    """
    return -F.logsigmoid(beta * (chosen_P - rejected_P))


def ipo_losses(chosen_P: Tensor, rejected_P: Tensor, beta: float) -> Tensor:
    """Identity preference optimisation, arXiv 2310.12036 (17): (chosen - rejected - 1 / (2 beta))^2, (P,).

    Args:
        chosen_P: log ratios per token of the answers that were preferred: their sums over the answers' lengths, without
            which long answers would have larger losses (the authors' own experiments take them so).
        rejected_P: those of the others.
        beta: tau of the paper.
    """
    return (chosen_P - rejected_P - 1 / (2 * beta)).square()


def odds_ratio_losses(chosen_P: Tensor, rejected_P: Tensor) -> Tensor:
    """The odds ratio's part of ORPO, arXiv 2403.07691 (7): -log sigmoid(log odds(chosen) - log odds(rejected)), (P,).

    odds(p) = p / (1 - p), p the geometric mean of the probabilities of an answer's tokens.

    Args:
        chosen_P: log p of the answers that were preferred, at most 0.
        rejected_P: log p of the others.
    """
    return -F.logsigmoid(_log_odds(chosen_P) - _log_odds(rejected_P))


def kto_losses(ratio_P: Tensor, is_good_P: Tensor, kl: Tensor, beta: float) -> Tensor:
    """Kahneman-Tversky optimisation, arXiv 2402.01306 (8): 1 - sigmoid(+-beta (ratio - kl)), + where good, (P,).

    Args:
        ratio_P: log ratios of the answers.
        is_good_P: bool, whether each is wanted.
        kl: scalar, at least 0, without a graph: how far what is trained has moved from the reference.
        beta: how strongly it holds to the reference.
    """
    gain_P = beta * (ratio_P - kl)
    return 1 - torch.sigmoid(torch.where(is_good_P, gain_P, -gain_P))


def _log_odds(log_p: Tensor) -> Tensor:
    """log p - log(1 - p): by log1p where p is small and by expm1 where it is near 1, since each is exact there only.

    A p that its dtype cannot tell from 1 has infinite odds: it is taken to be the nearest below, and has no gradient.
    """
    log_p = log_p.clamp(max=-torch.finfo(log_p.dtype).eps)
    is_large = log_p > -0.6931
    near_one = torch.log(-torch.expm1(torch.where(is_large, log_p, -1.0)))
    near_zero = torch.log1p(-torch.exp(torch.where(is_large, -1.0, log_p)))
    return log_p - torch.where(is_large, near_one, near_zero)
