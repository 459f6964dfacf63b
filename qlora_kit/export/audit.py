"""How far an export is from the model as it was trained, token by token, on rows that neither was trained on.

    KL(p || q) = sum over the vocabulary of p (log p - log q),   p as trained, q exported, both in fp32, in nats

Of a classifier it is text by text, and the sum goes over the classes; where a text may have several, each is a question
of its own, with two answers, and the text's divergence is their sum.

Only the predictions count that training would have counted: those of labelled tokens. Two models with the same loss can
still differ at every token, so the loss alone is no audit. Logits are compared a few tokens at a time, so an audit
takes no more of a card's memory than an evaluation.

Axes: N predictions, C of a chunk, V vocabulary, B texts, L classes.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from qlora_kit.base.architecture import head_of
from qlora_kit.base.text import text_body
from qlora_kit.data.collate import Batch
from qlora_kit.errors import DataError, RunError
from qlora_kit.ops import IGNORED
from qlora_kit.train.evaluate import evaluation_mode
from qlora_kit.train.forward import whole_logits
from qlora_kit.train.head import head_logits
from qlora_kit.train.probe import settled_chunk
from qlora_kit.train.tasks import said_classes

LIMITS = {"merged": 0.01}
"""Mean KL in nats a token or text that an export may have, by its kind. On the quickstart, bf16 costs 1.5e-5; what is
re-quantised, or leaves the quantised base, is another model, and its audit says how much of one."""

SCORE_SHARE = 0.01
"""How far a loss may be from the one that the run was scored with, of one nat and that loss; ten times as far where it
is of one prediction alone, since another device or dtype moves single ones more than their mean."""

CHUNK = 64
"""Predictions compared at a time: with a vocabulary of 152 k, logits and their fp32 copies take about 0.15 GiB."""


def compare(as_trained: PreTrainedModel, export: PreTrainedModel, batches: Iterable[Batch]) -> dict[str, float]:
    """Run both models over held-out rows.

    Args:
        as_trained: the quantised base with its adapters in use.
        export: the model as another program loads it; its device and dtype may differ.
        batches: of held-out rows, any number; both models see one at a time.

    Returns:
        `mean_kl` and `max_kl` in nats a token, `top1_agreement` (share of tokens with the same likeliest successor),
        `loss_as_trained` and `loss_export` in nats a token, and `tokens`, how many were compared. Of a classifier the
        same a text, `top1_agreement` being the share of texts that are said to be the same, and `texts`.

    Raises:
        DataError: no token of the batches is labelled, or there is no text.
        RunError: one of the models gives logits that are not finite.
    """
    is_classifier = head_of(as_trained) == "classification"
    with evaluation_mode(as_trained), evaluation_mode(export):
        parts = list((_texts if is_classifier else _tokens)((as_trained, export), batches))
    kl_N, loss_p_N, loss_q_N, same_N = torch.cat(parts, dim=1) if parts else torch.empty(4, 0)
    if len(kl_N) == 0:
        raise DataError("the rows to audit the export on have no labelled token; give rows with answers")
    if not torch.isfinite(kl_N).all():
        culprit = "export" if torch.isfinite(loss_p_N).all() else "model as trained"
        raise RunError(f"the {culprit} gives NaN or infinite logits on the audit's rows; try dtype=bfloat16")
    return {
        # Rounding can leave the sum of a divergence that is truly zero a little below it.
        "mean_kl": max(0.0, kl_N.mean().item()),
        "max_kl": max(0.0, kl_N.max().item()),
        "top1_agreement": same_N.mean().item(),
        "loss_as_trained": loss_p_N.mean().item(),
        "loss_export": loss_q_N.mean().item(),
        "texts" if is_classifier else "tokens": len(kl_N),
    }


def check_audit(
    kind: str,
    found: Mapping[str, float] | None,
    onto: str,
    max_kl: float | None,
    scored_loss: float | None,
    *,
    force: bool,
) -> None:
    """Refuse an export that is too far from what was trained, and one of what is no longer what was trained.

    Args:
        kind: of the export.
        found: what `compare` told; None where nothing was compared.
        onto: what an adapter was merged into: no other weights are expected to be near those that were trained.
        max_kl: largest mean KL asked for, in nats a token or text; None takes the kind's own, or any.
        scored_loss: of the same model on the same rows when it was trained, in nats; None where nobody knows.
        force: let it pass all the same.

    Raises:
        RunError: it is farther off, or the model loses another amount than it did.
    """
    if found is None or force:
        return
    unit = "text" if "texts" in found else "token"
    loss, count = found["loss_as_trained"], found[f"{unit}s"]
    if scored_loss is not None and abs(loss - scored_loss) > SCORE_SHARE * (1 + scored_loss + 10 / count**0.5):
        raise RunError(
            f"the model's held-out loss is {loss:.4g} nats a {unit}, and was {scored_loss:.4g} when it was trained: "
            "its base or its adapter has changed since, or it computes in another dtype; restore what was there, or "
            "export with --force"
        )
    limit = max_kl if max_kl is not None or onto != "dequantized" else LIMITS.get(kind)
    if limit is not None and found["mean_kl"] > limit:
        raise RunError(
            f"the {kind} export is {found['mean_kl']:.2g} nats a {unit} (mean KL) from the model as trained, above "
            f"{limit:.2g}, and is not kept; see whether the dtype is too narrow, or export with --force"
        )


def _tokens(models: Sequence[PreTrainedModel], batches: Iterable[Batch]) -> Iterator[Tensor]:
    """What `_by_label` says of the labelled tokens, some at a time."""
    heads: list[bool] = []
    for batch in batches:
        heads = heads or [_has_head_to_call(model, batch) for model in models]
        labels_N = batch.labels[:, 1:][batch.labels[:, 1:] != IGNORED].to(models[0].device)
        both = (_predictions(*each, batch) for each in zip(models, heads, strict=True))
        yield from map(_by_label, *both, labels_N.split(CHUNK))


def _texts(models: Sequence[PreTrainedModel], batches: Iterable[Batch]) -> Iterator[Tensor]:
    """What `_by_label` says of the texts, a batch at a time."""
    for batch in batches:
        p_BL, q_BL = (whole_logits(model, batch.to(model.device)) for model in models)
        labels = batch.labels.to(p_BL.device)
        yield (_by_labels if labels.is_floating_point() else _by_label)(p_BL, q_BL, labels)


def _by_label(p_CV: Tensor, q_CV: Tensor, label_C: Tensor) -> Tensor:
    """Of every prediction: divergence, both losses, and 1 where both find the same token likeliest; (4, C) fp64."""
    log_p, log_q = p_CV.float().log_softmax(-1), q_CV.to(p_CV.device).float().log_softmax(-1)
    kl_C = F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
    losses_C = [F.nll_loss(log, label_C, reduction="none") for log in (log_p, log_q)]
    return torch.stack([kl_C, *losses_C, log_p.argmax(-1) == log_q.argmax(-1)]).double().cpu()


def _by_labels(p_BL: Tensor, q_BL: Tensor, labels_BL: Tensor) -> Tensor:
    """The same of texts that may have several classes; the loss is a mean over these, as in training; (4, B) fp64."""
    p_BL, q_BL = p_BL.float(), q_BL.to(p_BL.device).float()
    log_p, log_q = (F.logsigmoid(torch.stack([logits, -logits])) for logits in (p_BL, q_BL))
    kl_B = F.kl_div(log_q, log_p, reduction="none", log_target=True).sum((0, 2))
    losses_B = [
        F.binary_cross_entropy_with_logits(logits, labels_BL, reduction="none").mean(1) for logits in (p_BL, q_BL)
    ]
    said_p, said_q = (said_classes(logits, is_multi=True) for logits in (p_BL, q_BL))
    return torch.stack([kl_B, *losses_B, (said_p == said_q).all(1)]).double().cpu()


def _has_head_to_call(model: PreTrainedModel, batch: Batch) -> bool:
    return settled_chunk(model, batch.input_ids[0].tolist(), CHUNK)[0] is not None


def _predictions(model: PreTrainedModel, has_head: bool, batch: Batch) -> Iterator[Tensor]:
    """Logits for the labelled tokens of a batch, (C, V) at a time, made so where a model's head can be called."""
    batch = batch.to(model.device)
    is_labelled = batch.labels[:, 1:] != IGNORED
    if not has_head:
        yield from model(input_ids=batch.input_ids, use_cache=False).logits[:, :-1][is_labelled].split(CHUNK)
        return
    hidden_ND = text_body(model)(input_ids=batch.input_ids, use_cache=False)[0][:, :-1][is_labelled]
    for hidden_CD in hidden_ND.split(CHUNK):
        yield head_logits(model, hidden_CD)
