"""Information: how many bits there are to learn in the rows that a run sees, an estimate.

    answers and text    1 bit a trained token, or the compressed size of the trained tokens where that is less
    classes             log2(classes) bits a row; where a row may have several classes, 1 bit a class
    preferences         1 bit a row: of two answers which is the better, or of one whether it is good
    orpo                both: the bit, and the tokens of the better answer, which it learns, too

A row that says what another one says tells nothing new, nor does another pass over the same rows; a run that ends
within its first pass sees a part of them. What the base knows already is not subtracted: that would need its weights.

The compressed size matters where answers are all alike; ordinary text compresses to far more than a bit a token.

Source: LoRA Without Regret, doi 10.64434/tml.20250929: a token of the usual sets has a loss of about 1 bit, which is
0.69 nats; a verdict tells O(1) bits, however long what it is on.
"""

import math
import zlib
from array import array
from collections.abc import Iterable
from itertools import compress, islice

from qlora_kit.data.encoded import Encoded
from qlora_kit.data.encoded_set import EncodedSet
from qlora_kit.data.remarks import contents
from qlora_kit.recipe import TASKS

BITS_A_TOKEN = 1
COMPRESSED = 2**20
"""Trained tokens of a source that are compressed; what it has more is taken to be like them."""


def bits_to_learn(rows: EncodedSet, task: str, epochs: float) -> float:
    """Bits that a run has to learn.

    Args:
        rows: that are trained on.
        task: of `train.task`.
        epochs: passes over them, in each of which a row of a source of weight 2 is seen twice.
    """
    left, seen = iter(rows.rows), set[int]()
    return sum(
        min(1.0, part.weight * epochs) * _told(islice(left, part.counts.rows), seen, task, _bits_a_row(rows, task))
        for part in rows.parts
    )


def _told(rows: Iterable[Encoded], seen: set[int], task: str, bits_a_row: float) -> float:
    """Bits in the rows that say what none in `seen` did; they join it."""
    learnt, new, tokens = array("i"), 0, 0
    for row in rows:
        if (said := contents(row)) not in seen:
            seen.add(said)
            new, tokens = new + 1, tokens + row.trained_tokens
            if len(learnt) < COMPRESSED:
                learnt.extend(compress(row.input_ids[1:], row.trained[1:]))
    if task == "classify" or TASKS[task].holds_to_start or not new:
        return bits_a_row * new
    bits_a_token = min(BITS_A_TOKEN, 8 * len(zlib.compress(learnt)) / len(learnt))
    return bits_a_token * tokens + bits_a_row * new


def _bits_a_row(rows: EncodedSet, task: str) -> float:
    """What is told of a row as a whole: its class, or a verdict."""
    if rows.classes is not None:
        return len(rows.classes.names) if rows.classes.is_multi else math.log2(len(rows.classes.names))
    return 1 if TASKS[task].is_preference else 0
