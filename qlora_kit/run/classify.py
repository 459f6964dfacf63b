"""Ask a trained classifier: the class of each text, and how likely every class is."""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qlora_kit.data import Classes, Encoded, Unlabelled, encode_rows, read_texts, unlabelled
from qlora_kit.errors import DataError, RunError, listed
from qlora_kit.recipe import Recipe
from qlora_kit.run.rows import column_maps, each_eval_batch, positions_for
from qlora_kit.run.tokenizer import pad_id
from qlora_kit.run.use import load_any, tells_apart
from qlora_kit.storage import check_folder
from qlora_kit.train.classes import classes_in
from qlora_kit.train.forward import evaluation_mode, whole_logits
from qlora_kit.train.tasks import said_classes


def classify(
    folder: Path,
    texts: Sequence[str] | Path,
    *,
    force: bool = False,
    trust_remote_code: bool = False,
    tell: Callable[[Sequence[dict[str, Any]], int], None] = lambda answers, of: None,
) -> list[dict[str, Any]]:
    """What a classifier holds texts to be, in their order.

    Args:
        folder: a run of train.task=classify, one of its checkpoints, or a folder with weights.
        texts: themselves, or a file as `read_texts` takes it.
        force: take the adapter although its base's fingerprint differs.
        trust_remote_code: let the model's own code run.
        tell: is given answers as they come, those to the shortest texts first, and how many texts there are.

    Returns:
        For each `text`: `label`, a name, or a list of them where a text may have several; `probabilities` by name,
        to six decimals; and `reference`, where the file has a label.

    Raises:
        RunError: the model is no classifier, or what it says are no numbers.
        DataError: a text cannot be read, or is longer than the model's positions.
    """
    check_folder(folder)
    if tells_apart(folder) is False:
        raise RunError(
            f"{folder} answers prompts and is not a classifier; use qlora-kit generate {folder} --prompt TEXT"
        )
    model, tokenizer, recipe = load_any(folder, force=force, trust_remote_code=trust_remote_code)
    classes, columns = classes_in(model.config), [] if recipe is None else column_maps(recipe.data)
    if model.config.problem_type == "regression" or (len(classes.names) == 1 and not classes.is_multi):
        raise RunError(f"{folder} is a regression model, not a classifier; give a classifier")
    if isinstance(texts, Path):
        asked = read_texts(texts, classes, columns=columns)
    else:
        asked = [unlabelled(text, classes) for text in texts]
    rows = _encoded(asked, classes, recipe, model, tokenizer)
    by_length = sorted(range(len(rows)), key=lambda row: rows[row].longest)  # the order of the batches
    answers: dict[int, dict[str, Any]] = {}
    most = "auto" if recipe is None else recipe.memory.eval_tokens
    for batch in each_eval_batch(rows, pad_id(tokenizer), model.device, most):
        with evaluation_mode(model):
            logits_BL = whole_logits(model, batch).float().cpu()
        numbers = by_length[len(answers) : len(answers) + len(logits_BL)]
        told = [_told(asked[row], logits_L, classes) for row, logits_L in zip(numbers, logits_BL, strict=True)]
        answers |= dict(zip(numbers, told, strict=True))
        tell(told, len(rows))
    return [answers[row] for row in range(len(rows))]


def _encoded(
    asked: Sequence[Unlabelled],
    classes: Classes,
    recipe: Recipe | None,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
) -> Sequence[Encoded]:
    """The texts as the model reads them, a row each; cut where the run cut its rows."""
    is_cut = recipe is not None and recipe.data.over_length == "truncate"
    rows = encode_rows(
        [text.example for text in asked],
        tokenizer,
        max_tokens=recipe.data.max_tokens if recipe is not None and is_cut else sys.maxsize,
        over_length="truncate",
        vocab_size=model.config.get_text_config().vocab_size,
        classes=classes,
    ).rows
    positions = positions_for("classify", tokenizer, model.config) or sys.maxsize
    if long := [row for row in rows if row.longest > positions]:
        raise DataError(
            f"{listed([row.where for row in long])}: longer than the {positions:,} positions of the model (the longest "
            f"has {max(row.longest for row in long):,} tokens); shorten them"
        )
    return rows


def _told(asked: Unlabelled, logits_L: Tensor, classes: Classes) -> dict[str, Any]:
    if not logits_L.isfinite().all():
        raise RunError(f"{asked.example.where}: the model's answer is not finite; its weights are damaged, or overflow")
    said = classes.named(said_classes(logits_L[None], is_multi=classes.is_multi)[0].tolist())
    likely = logits_L.sigmoid() if classes.is_multi else logits_L.softmax(0)
    reference = {} if asked.reference is None else {"reference": asked.reference}
    return {
        "text": asked.example.text,
        "label": said if classes.is_multi else said[0],
        "probabilities": {name: round(p, 6) for name, p in zip(classes.names, likely.tolist(), strict=True)},
        **reference,
    }
