"""Samples during training: the same few held-out prompts, answered every so many steps, show what losses do not.

Answers are greedy and in evaluation mode; parameters, gradients and random states stay as they were. What is generated
at one time has no more tokens than the largest batch of an evaluation, so the plan of that covers it: where held-out
rows are few and short, answers are cut there.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qlora_kit.train.generate import generate_texts
from qlora_kit.train.metrics import MetricsLog

SAMPLE_TOKENS = 64
"""Most tokens of a sample."""


@dataclass(frozen=True, slots=True)
class Question:
    """A held-out prompt.

    Attributes:
        ids: what the model is given.
        prompt: the same as text.
        reference: what the row was trained to say, or would have been.
    """

    ids: Sequence[int]
    prompt: str
    reference: str


@dataclass(slots=True)
class Samples:
    """Asks the model, and writes down what it says.

    Attributes:
        model: that trains.
        tokenizer: of the model.
        questions: the same each time.
        every: steps between two rounds.
        most_tokens: of the largest batch of an evaluation: no more are generated at one time.
        positions: of the model; None if it has no limit.
        log: gets a row an answer: `step`, `prompt`, `reference`, `answer`.
        watch: is given the step and its rows.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    questions: Sequence[Question]
    every: int
    most_tokens: int
    positions: int | None
    log: MetricsLog
    watch: Callable[[int, Sequence[Mapping[str, Any]]], None]

    def __call__(self, step: int) -> None:
        """Tell that a step is done; at every so many the questions are answered."""
        if step % self.every:
            return
        answers = generate_texts(
            self.model,
            self.tokenizer,
            [question.ids for question in self.questions],
            max_new_tokens=SAMPLE_TOKENS,
            tokens_at_once=self.most_tokens,
            positions=min(self.most_tokens, self.positions or self.most_tokens),
        )
        rows = [
            {"step": step, "prompt": question.prompt, "reference": question.reference, "answer": answer}
            for question, answer in zip(self.questions, answers, strict=True)
        ]
        for row in rows:
            self.log.add(row)
        self.watch(step, rows)
