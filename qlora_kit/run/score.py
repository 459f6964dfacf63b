"""Scores of a model on held-out rows: losses always, exact match where answers are short, a few answers to look at."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qlora_kit.data import Batch, Encoded, end_token_id
from qlora_kit.lora import adapters_off
from qlora_kit.run.prepare import Prepared
from qlora_kit.run.rows import eval_batches, positions_of
from qlora_kit.run.tokenizer import pad_id
from qlora_kit.train.classes import classes_in
from qlora_kit.train.evaluate import Score, evaluate_loss, exact_match, f1_score
from qlora_kit.train.generate import generate_texts
from qlora_kit.train.samples import SAMPLE_TOKENS, Question
from qlora_kit.train.tasks import AGAINST_REFERENCE, LIKELIHOOD, Loss, Task

SAMPLES = 4
"""Held-out rows that are answered before and after, and on the way."""
SHORT_ANSWER = 32
"""Tokens up to which every answer is generated and compared: above that exact match says little and costs much."""

Scored = tuple[Score, list[str]]
"""A score, and what the model says to the rows that it was asked for."""


def score(
    model: PreTrainedModel,
    prepared: Prepared,
    task: Task = LIKELIHOOD,
    loss_chunk: int | None = None,
    of_its_base: Scored | None = None,
) -> dict[str, Any]:
    """The base and what was trained on the held-out rows: losses, exact match where it says something, a few answers.

    Args:
        model: as trained; under `adapter` in the result, be it an adapter or every weight.
        prepared: the rows.
        task: whose losses are meant.
        loss_chunk: tokens whose logits stand at one time, or None.
        of_its_base: by `score_base`, where training changed the base or it is known already; None asks the model
            without its adapters.
    """
    tokenizer, rows = prepared.tokenizer, prepared.eval.rows
    batches = eval_batches(rows, pad_id(tokenizer), model.device, prepared.pace.eval_tokens)
    base, base_texts = of_its_base or score_base(model, prepared, task, loss_chunk)
    adapter, texts = score_rows(model, tokenizer, rows, batches, task, loss_chunk)
    asked = questions(tokenizer, rows) if task.answers else classified(model, tokenizer, rows)
    samples = [
        {
            "prompt": question.prompt,
            "reference": question.reference,
            "base": before,
            "adapter": after,
        }
        for question, before, after in zip(asked, base_texts, texts, strict=False)
    ]
    return {
        "rows": len(prepared.eval.rows),
        "base": of_base(base).as_json(),
        "adapter": adapter.as_json(),
        "samples": samples,
    }


def score_base(
    model: PreTrainedModel, prepared: Prepared, task: Task = LIKELIHOOD, loss_chunk: int | None = None
) -> Scored:
    """What `score` tells of the base, with its answers: of the model without its adapters.

    The arguments are those of `score`.
    """
    rows = prepared.eval.rows
    batches = eval_batches(rows, pad_id(prepared.tokenizer), model.device, prepared.pace.eval_tokens)
    with adapters_off(model):
        return score_rows(model, prepared.tokenizer, rows, batches, task, loss_chunk)


def of_base(score: Score) -> Score:
    """The score of a base, which has not moved, without the measures that say how far a model has."""
    own = {name: value for name, value in score.measures.items() if name not in AGAINST_REFERENCE}
    return replace(score, measures=own)


def score_rows(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Encoded],
    batches: list[Batch],
    task: Task = LIKELIHOOD,
    loss_chunk: int | None = None,
) -> Scored:
    """Loss of the model on `rows`, and its answers: to all rows where answers are short, to the first few otherwise."""
    if not task.answers:
        return _told_apart(model, rows, batches, task)
    measured = evaluate_loss(model, batches, task, loss_chunk=loss_chunk)
    answered = answered_rows(rows)
    if not answered:
        return measured, []
    lengths = [len(row.input_ids) - len(row.prompt or ()) for row in answered]
    is_short = max(lengths) <= SHORT_ANSWER
    asked = answered if is_short else answered[:SAMPLES]
    room = max(lengths) + 1 if is_short else SAMPLE_TOKENS
    prompts, positions = [row.prompt or [] for row in asked], positions_of(model.config)
    most = max(batch.input_ids.numel() for batch in batches)  # what the plan of an evaluation counts with
    texts = generate_texts(model, tokenizer, prompts, max_new_tokens=room, tokens_at_once=most, positions=positions)
    if not is_short:
        return measured, texts
    right = exact_match(texts, [reference(tokenizer, row) for row in asked])
    return replace(measured, exact_match=right), texts


def _told_apart(model: PreTrainedModel, rows: Sequence[Encoded], batches: list[Batch], task: Task) -> Scored:
    """The score of a classification with its F1, and what the model says of the first few rows."""
    losses: list[Loss] = []
    measured = evaluate_loss(model, batches, task, see=losses.append)
    classes, said = classes_in(model.config), torch.cat([loss.said.cpu() for loss in losses if loss.said is not None])
    f1 = f1_score(said, torch.cat([batch.labels.cpu() for batch in batches]), len(classes.names))
    by_length = sorted(range(len(rows)), key=lambda row: rows[row].longest)  # the order of the batches
    of_row = dict(zip(by_length, said.tolist(), strict=True))
    words = [classes.words(of_row[row]) for row in range(min(SAMPLES, len(rows)))]
    return replace(measured, measures={**measured.measures, "f1": f1}), words


def classified(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Encoded]) -> list[Question]:
    """The first few texts of a classification, each with the name of its class."""
    classes = classes_in(model.config)
    return [
        Question(
            row.input_ids,
            str(tokenizer.decode(row.input_ids, skip_special_tokens=True)),
            classes.words(row.target or 0),
        )
        for row in rows[:SAMPLES]
    ]


def questions(tokenizer: PreTrainedTokenizerBase, rows: Sequence[Encoded]) -> list[Question]:
    """The first few of the rows that a model can be asked for."""
    asked = [(row.prompt or [], reference(tokenizer, row)) for row in answered_rows(rows)[:SAMPLES]]
    return [Question(ids, str(tokenizer.decode(ids, skip_special_tokens=True)), wanted) for ids, wanted in asked]


def answered_rows(rows: Sequence[Encoded]) -> list[Encoded]:
    """Rows that end in one answer to one prompt, and not in an unwanted one, so that a model can be asked for it."""
    return [row for row in rows if row.prompt and row.answer is not None and row.is_good is not False]


def reference(tokenizer: PreTrainedTokenizerBase, row: Encoded) -> str:
    """What the row was trained to say after its prompt: templates add to it (an empty block of thought)."""
    prompt = row.prompt or []
    if row.input_ids[: len(prompt)] != prompt:
        return row.answer or ""
    ends = max((place for place, is_trained in enumerate(row.trained) if is_trained), default=len(row.input_ids)) + 1
    said = row.input_ids[len(prompt) : ends]  # a template may write on
    # Where all is learnt, what stands behind the end is, too, and yet is not said.
    if all(row.trained[1 : len(prompt)]) and (end := end_token_id(tokenizer)) in said:
        said = said[: said.index(end)]
    return str(tokenizer.decode(said, skip_special_tokens=True))
