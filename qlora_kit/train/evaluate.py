"""How good a model is on held-out rows: loss and perplexity, and exact match where the answers are short.

Evaluation changes nothing: no gradient, no random state (unless answers are sampled), and the mode is put back.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from qlora_kit.data import Batch, end_token_id
from qlora_kit.train.forward import Phase, Rows, evaluation_mode, no_phase
from qlora_kit.train.tasks import LIKELIHOOD, Task

TOKENS_AT_ONCE = 2048
"""Tokens, of prompts and answers, that are generated together: their keys and values stand beside the model, up to
0.5 MiB a token in a 7B model without shared heads."""


@dataclass(frozen=True, slots=True)
class Score:
    """Loss of a model on a set of rows.

    Attributes:
        loss: mean over trained tokens, in nats; of preferences over rows, of classes over texts.
        tokens: trained tokens that counted.
        rows: rows that they came from.
        perplexity: exp(loss), where that is a loss a token.
        exact_match: share of the rows answered exactly, or None where nothing was generated.
        measures: what else the task tells, by name.
    """

    loss: float
    tokens: int
    rows: int
    perplexity: float | None = None
    exact_match: float | None = None
    measures: Mapping[str, float] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """The fields that are known."""
        known = {key: value for key, value in asdict(self).items() if value is not None and key != "measures"}
        return known | dict(self.measures)


def evaluate_loss(
    model: nn.Module,
    batches: Sequence[Batch],
    task: Task = LIKELIHOOD,
    *,
    phase: Phase = no_phase,
    loss_chunk: int | None = None,
) -> Score:
    """Mean loss over all batches, and what else the task measures.

    Args:
        model: that the task can be asked of.
        batches: with at least one trained token in all.
        task: what is evaluated.
        phase: marker for a ledger.
        loss_chunk: tokens whose logits stand at one time, or None.
    """
    count = sum(batch.count for batch in batches)
    loss, measures = 0.0, Counter[str]()
    with evaluation_mode(model), phase("evaluate"):
        begun = task.begun(model, batches, loss_chunk)
        for batch in batches:
            share = begun(model, batch, no_phase, loss_chunk, 1)
            loss += share.value.item() / count
            measures.update({name: value.item() / count for name, value in share.measures.items()})
    return Score(
        loss,
        tokens=sum(batch.trained_tokens for batch in batches),
        rows=sum(batch.rows for batch in batches),
        perplexity=math.exp(min(loss, 700.0)) if task is LIKELIHOOD else None,
        measures=dict(measures),
    )


def rehearse_evaluation(
    model: PreTrainedModel, rows: Rows, task: Task = LIKELIHOOD, *, phase: Phase, loss_chunk: int | None = None
) -> None:
    """What an evaluation of one batch allocates, its values aside: for the dry run.

    Answers are generated over as many tokens: their keys and values stay in a cache, which grows by a copy a step.
    """
    with evaluation_mode(model), phase("evaluate"):
        task.begun(model, [rows], loss_chunk)(model, rows, no_phase, loss_chunk, 1)
    if not task.answers:
        return
    body, ids = model.base_model, rows.input_ids
    with evaluation_mode(model), phase("evaluate/answer"):
        begun = body(input_ids=ids[:, :-1] if ids.shape[1] > 1 else ids, use_cache=True)
        cache = begun.get("past_key_values")  # other kinds of state do not grow
        if cache is not None and ids.shape[1] > 1:
            body(input_ids=ids[:, -1:], past_key_values=cache, use_cache=True)


def generate_texts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    tokens_at_once: int = TOKENS_AT_ONCE,
    temperature: float = 0.0,
) -> list[str]:
    """Continue prompts until an end token; greedy at temperature 0.

    Args:
        model: a causal language model that `generate` works on.
        tokenizer: of the model.
        prompts: token ids, one sequence a row.
        max_new_tokens: most tokens to add to each.
        tokens_at_once: of all rows that are generated together, at most, unless a row alone has more; shorter prompts
            are padded on the left.
        temperature: above 0 samples.

    Returns:
        The new text of each row, without special tokens.
    """
    config = _generation_config(model, tokenizer, max_new_tokens, temperature)
    texts: list[str] = [""] * len(prompts)
    by_length = sorted(range(len(prompts)), key=lambda row: len(prompts[row]), reverse=True)
    with evaluation_mode(model):
        while by_length:
            most = max(1, tokens_at_once // (len(prompts[by_length[0]]) + max_new_tokens))
            rows, by_length = by_length[:most], by_length[most:]
            ids, mask = _pad_left([prompts[row] for row in rows], config.pad_token_id, model.device)
            output = model.generate(  # type: ignore[operator]
                input_ids=ids, attention_mask=mask, generation_config=config
            )
            new = tokenizer.batch_decode(output[:, ids.shape[1] :], skip_special_tokens=True)
            for row, text in zip(rows, new, strict=True):
                texts[row] = text
    return texts


def exact_match(answers: Sequence[str], references: Sequence[str]) -> float:
    """Share of the answers that equal their reference, white space around them aside."""
    equal = [answer.strip() == reference.strip() for answer, reference in zip(answers, references, strict=True)]
    return sum(equal) / len(equal)


def end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> list[int]:
    """Every token that ends an answer: the tokenizer's, its chat template's, and those of the model's generation
    config, ascending."""
    known = model.generation_config.eos_token_id if model.generation_config is not None else None
    listed = known if isinstance(known, list) else [known]
    own = [] if tokenizer is None else [tokenizer.eos_token_id, end_token_id(tokenizer)]
    return sorted({token for token in (*listed, *own) if token is not None})


def _generation_config(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_new_tokens: int, temperature: float
) -> GenerationConfig:
    ends = end_tokens(model, tokenizer)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (ends[0] if ends else 0)
    sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        eos_token_id=ends or None,
        pad_token_id=pad,
        repetition_penalty=1.0,  # said, or transformers takes the model's own, and scores would be those of a penalty
        **sampling,
    )


def _pad_left(rows: Sequence[Sequence[int]], pad: int, device: torch.device) -> tuple[Tensor, Tensor]:
    width = max(len(row) for row in rows)
    ids = torch.tensor([[pad] * (width - len(row)) + list(row) for row in rows], device=device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
    return ids, mask
