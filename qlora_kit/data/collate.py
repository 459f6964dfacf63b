"""Collate: which rows come next, and several rows as one batch.

    B rows of a batch, T tokens of the longest

Rows are padded on the right and no attention mask is made: in a causal model no real token sees a pad that follows it,
and the label of a pad does not count. Everything that a step must know about lengths is a plain number here, so that
no step reads a value off a tensor.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from qlora_kit.data.template import Encoded

IGNORED = -100
"""The label of a token whose prediction the loss does not count."""


@dataclass(frozen=True, slots=True)
class Batch:
    """What one forward is given."""

    input_ids: torch.Tensor
    """(B, T), int64."""
    labels: torch.Tensor
    """(B, T), int64, not shifted: the id where the loss counts its prediction, otherwise IGNORED. The first of a
    row is always ignored, since nothing predicts it."""
    position_ids: torch.Tensor
    """(B, T), int64: 0, 1, ... in every row, through its padding."""
    lengths: tuple[int, ...]
    """Tokens of each row without padding."""
    trained_tokens: int
    """Labels that count, in all rows."""

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch on another device."""
        return replace(
            self,
            input_ids=self.input_ids.to(device),
            labels=self.labels.to(device),
            position_ids=self.position_ids.to(device),
        )


def collate(rows: Sequence[Encoded], pad_id: int) -> Batch:
    """Put rows side by side, padded on the right.

    Args:
        rows: B rows, B >= 1.
        pad_id: any id that the model has; the end token will do, since labels go by position.

    Returns:
        a `Batch` of (B, T) on the CPU, T the length of the longest row.
    """
    lengths = tuple(len(row.input_ids) for row in rows)
    B, T = len(rows), max(lengths)
    input_ids = torch.full((B, T), pad_id, dtype=torch.int64)
    labels = torch.full((B, T), IGNORED, dtype=torch.int64)
    for b, (row, tokens) in enumerate(zip(rows, lengths, strict=True)):
        ids = torch.tensor(row.input_ids, dtype=torch.int64)
        input_ids[b, :tokens] = ids
        labels[b, 1:tokens] = ids[1:].where(torch.tensor(row.trained[1:], dtype=torch.bool), IGNORED)
    position_ids = torch.arange(T).expand(B, T).contiguous()
    return Batch(input_ids, labels, position_ids, lengths, sum(row.trained_tokens for row in rows))


class Sampler:
    """Row numbers for ever, every row once an epoch, in an order that only (seed, epoch) decides.

    The whole state is `position`: set it, and what follows is what would have followed there. No global random state is
    read or moved.

    Args:
        n_rows: rows of the data set, at least 1.
        seed: of the run.

    Attributes:
        position: rows handed out so far, over all epochs.
    """

    def __init__(self, n_rows: int, seed: int) -> None:
        if n_rows < 1:
            raise ValueError(f"a sampler needs at least one row; found {n_rows}")
        self.n_rows, self.seed, self.position = n_rows, seed, 0
        self._shuffled: tuple[int, list[int]] = (-1, [])

    @property
    def epoch(self) -> int:
        """The epoch that the next row belongs to, from 0."""
        return self.position // self.n_rows

    def __iter__(self) -> Iterator[int]:
        return self

    def __next__(self) -> int:
        row = self._order()[self.position % self.n_rows]
        self.position += 1
        return row

    def next_rows(self, k: int) -> list[int]:
        """The next `k` row numbers; a step may reach over the end of an epoch."""
        return [next(self) for _ in range(k)]

    def _order(self) -> list[int]:
        """The order of the current epoch, shuffled when it is first asked for."""
        if self._shuffled[0] != self.epoch:
            order = list(range(self.n_rows))
            random.Random(f"{self.seed}, epoch {self.epoch}").shuffle(order)
            self._shuffled = (self.epoch, order)
        return self._shuffled[1]
