"""Collate: which rows come next, and several rows as one batch.

    B sequences of a batch, T tokens of the longest, L labels that a text may have

Sequences are padded on the right and a causal model gets no attention mask: no real token sees a pad that follows it,
and the label of a pad does not count. Where a sequence holds several documents, positions that begin anew tell
transformers to keep them apart. Everything that a step must know about lengths is a plain number here, so that no step
reads a value off a tensor.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from qlora_kit.data.encoded import Encoded
from qlora_kit.ops import IGNORED


@dataclass(frozen=True, slots=True)
class Batch:
    """What one forward is given."""

    input_ids: torch.Tensor
    """(B, T), int64."""
    labels: torch.Tensor
    """(B, T), int64, not shifted: the id where the loss counts its prediction, otherwise IGNORED. The first of a
    document is always ignored, since nothing predicts it. Of a classification (B,), the class of each text, or (B, L),
    fp32, for each class whether it is one."""
    lengths: tuple[int, ...]
    """Tokens of each sequence without padding."""
    trained_tokens: int
    """Labels that count, in all sequences."""
    rows: int
    """Rows of the data set."""
    count: int
    """What the loss is a mean over: trained tokens, texts, or pairs of answers."""
    position_ids: torch.Tensor | None = None
    """(B, T), int64: 0, 1, ... in every document, the last one's through the padding. None where no sequence holds
    several."""
    documents: tuple[int, ...] | None = None
    """Tokens of each document, sequence after sequence, of the last in each with the padding; B x T in all. None where
    position_ids are."""
    attention_mask: torch.Tensor | None = None
    """(B, T), bool: False at the padding. None for causal models, and where there is none."""
    is_good: torch.Tensor | None = None
    """(B / 2,), bool: the verdict on each answer, where the second half of the sequences are not it."""

    @property
    def tokens(self) -> int:
        """What tokens_per_s counts, in metrics.jsonl and in the plan: tokens of the rows, padding aside, each once.

        However often one goes through the model (blocks that run again, the reference's pass) makes the number smaller,
        so that tokens of the data set over it are seconds; the answers that verdicts are swapped with are no data.
        """
        return sum(self.lengths if self.is_good is None else self.lengths[: self.rows])

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch on another device."""
        values = ((name, getattr(self, name)) for name in self.__slots__)
        moved: dict[str, Any] = {name: each.to(device) for name, each in values if isinstance(each, torch.Tensor)}
        return replace(self, **moved)


def collate(rows: Sequence[Encoded], pad_id: int) -> Batch:
    """Put rows side by side, padded on the right.

    Args:
        rows: B rows, B >= 1.
        pad_id: any id that the model has; the end token will do, since labels go by position.

    Returns:
        a `Batch` of (B, T) on the CPU, T the length of the longest row.
    """
    return collate_packs([[row] for row in rows], pad_id)


def collate_rows(packs: Sequence[Sequence[Encoded]], pad_id: int) -> Batch:
    """A batch of rows of any kind; only those that are a sequence each can share one.

    Args:
        packs: as for `collate_packs`.
        pad_id: as for `collate`.
    """
    rows = [row for pack in packs for row in pack]
    targets = [row.target for row in rows if row.target is not None]
    if targets:
        return collate_texts([row.input_ids for row in rows], targets, pad_id)
    return collate_packs(packs, pad_id) if rows[0].other is None else collate_pairs(rows, pad_id)


def collate_packs(packs: Sequence[Sequence[Encoded]], pad_id: int) -> Batch:
    """Put packed rows side by side: in each sequence one document after the other, then the padding.

    Args:
        packs: the rows of B sequences, B >= 1; see `qlora_kit.data.pack`.
        pad_id: as for `collate`.
    """
    lengths = tuple(sum(len(row.input_ids) for row in pack) for pack in packs)
    shape = len(packs), max(lengths)
    input_ids = torch.full(shape, pad_id, dtype=torch.int64)
    labels = torch.full(shape, IGNORED, dtype=torch.int64)
    for b, pack in enumerate(packs):
        start = 0
        for row in pack:
            end = start + len(row.input_ids)
            ids = torch.tensor(row.input_ids, dtype=torch.int64)
            input_ids[b, start:end] = ids
            labels[b, start + 1 : end] = ids[1:].where(torch.tensor(row.trained[1:], dtype=torch.bool), IGNORED)
            start = end
    documents = tuple(n for pack in packs for n in _documents(pack, shape[1]))
    positions = None if len(documents) == len(packs) else torch.cat([torch.arange(n) for n in documents]).view(shape)
    rows = [row for pack in packs for row in pack]
    trained_tokens = sum(row.trained_tokens for row in rows)
    told = () if positions is None else (positions, documents)
    return Batch(input_ids, labels, lengths, trained_tokens, len(rows), trained_tokens, *told)


def _documents(pack: Sequence[Encoded], T: int) -> Iterator[int]:
    """Tokens of each row of a sequence; the padding goes with the last."""
    *others, _ = (len(row.input_ids) for row in pack)
    yield from others
    yield T - sum(others)


def collate_texts(texts: Sequence[Sequence[int]], targets: Sequence[int | tuple[float, ...]], pad_id: int) -> Batch:
    """Put texts to be classified side by side, padded on the right; a model that looks both ways gets a mask.

    Texts of one length get none: transformers drops a mask of ones when it has read it, which a dry run cannot.

    Args:
        texts: token ids of B texts, B >= 1.
        targets: of each its class, 0 to L - 1, or for each of L classes whether it is one.
        pad_id: the model's own pad token: some models look for it.
    """
    lengths = tuple(len(text) for text in texts)
    T = max(lengths)
    input_ids = torch.tensor([[*text, *[pad_id] * (T - len(text))] for text in texts], dtype=torch.int64)
    mask = torch.arange(T) < torch.tensor(lengths)[:, None] if min(lengths) < T else None
    labels = torch.tensor(targets, dtype=torch.int64 if isinstance(targets[0], int) else torch.float32)
    return Batch(input_ids, labels, lengths, len(texts), len(texts), len(texts), attention_mask=mask)


def collate_pairs(rows: Sequence[Encoded], pad_id: int) -> Batch:
    """Put rows side by side and after them, in the same order, the other sequence that each comes with.

    Args:
        rows: P rows with an `other`, P >= 1.
        pad_id: as for `collate`.

    Returns:
        a `Batch` of (2 P, T) on the CPU, with verdicts where the rows have one.
    """
    both = collate([*rows, *(row.other for row in rows if row.other is not None)], pad_id)
    verdicts = [row.is_good for row in rows if row.is_good is not None]
    if not verdicts:
        return replace(both, rows=len(rows), count=len(rows))
    trained = sum(row.trained_tokens for row in rows)
    return replace(both, trained_tokens=trained, rows=len(rows), count=len(rows), is_good=torch.tensor(verdicts))


def swap_answers(rows: Sequence[Encoded]) -> list[Encoded]:
    """Rows with a verdict, each with another row's answer as its `other`: of the nearest before it that answers another
    prompt, where the last row stands before the first. Where all answer one prompt, it is that of the row before.

    Those tell how far a model has moved where it was not asked to (KTO, arXiv 2402.01306, section 4.1). None is longer
    than the longest row: its answer ends there.
    """
    longest = max(len(row.input_ids) for row in rows)
    starts = [row.trained.index(True) for row in rows]  # of the answers
    prompts = [row.input_ids[:start] for row, start in zip(rows, starts, strict=True)]
    swapped = []
    for place, (row, prompt) in enumerate(zip(rows, prompts, strict=True)):
        earlier = (place - back for back in range(1, len(rows)))  # a place below zero counts from the last row
        before = next((other for other in earlier if prompts[other] != prompt), place - 1)
        ids = [*prompt, *rows[before].input_ids[starts[before] :]][:longest]
        trained = [token >= len(prompt) for token in range(len(ids))]
        swapped.append(replace(row, other=Encoded(ids, trained, where=rows[before].where)))
    return swapped


def as_stepped(rows: list[Encoded]) -> list[Encoded]:
    """The rows of a step; answers with a verdict each with the sequence that only the step gives them."""
    return rows if rows[0].is_good is None else swap_answers(rows)


@dataclass(frozen=True, slots=True)
class Deck:
    """The rows of one source, of which every epoch takes some: a deck of cards that is gone through, then shuffled."""

    rows: int
    """How many it has."""
    weight: float = 1.0
    """How often an epoch sees each of them, on the whole; above 0."""

    @property
    def drawn(self) -> int:
        """Rows that an epoch takes of it, at least one."""
        return max(1, round(self.rows * self.weight)) if self.rows else 0

    def draw(self, epoch: int, salt: str) -> list[int]:
        """Row numbers that an epoch sees, sorted: every row is seen once before any is seen again.

        Args:
            epoch: from 0.
            salt: decides, with how often the deck was shuffled before, how it is.
        """
        start, end = epoch * self.drawn, (epoch + 1) * self.drawn
        found: list[int] = []
        for time in range(start // max(1, self.rows), -(-end // max(1, self.rows))):
            cards = list(range(self.rows))
            random.Random(f"{salt}, time {time}").shuffle(cards)
            found += cards[max(0, start - time * self.rows) : end - time * self.rows]
        return sorted(found)


class Sampler:
    """Row numbers for ever, an epoch's behind the other, in an order that only (seed, epoch) decides.

    An epoch sees every row once, or of several sources each row as often as its weight says: see `Deck`. The whole
    state is `position`: set it, and what follows is what would have followed there. No global random state is read or
    moved.

    Args:
        rows: of the data set, at least 1; or those of its sources, one behind the other.
        seed: of the run.

    Attributes:
        position: rows handed out so far, over all epochs.
        epoch_rows: rows of an epoch.
    """

    def __init__(self, rows: int | Sequence[Deck], seed: int) -> None:
        self.decks = [Deck(rows)] if isinstance(rows, int) else list(rows)
        self.epoch_rows = sum(deck.drawn for deck in self.decks)
        if self.epoch_rows < 1:
            raise ValueError(f"a sampler needs at least one row; found {rows}")
        self.seed, self.position = seed, 0
        self._shuffled: tuple[int, list[int]] = (-1, [])

    @property
    def epoch(self) -> int:
        """The epoch that the next row belongs to, from 0."""
        return self.position // self.epoch_rows

    def __iter__(self) -> Iterator[int]:
        return self

    def __next__(self) -> int:
        row = self._order()[self.position % self.epoch_rows]
        self.position += 1
        return row

    def next_rows(self, k: int) -> list[int]:
        """The next `k` row numbers; a step may reach over the end of an epoch."""
        return [next(self) for _ in range(k)]

    def _order(self) -> list[int]:
        """The order of the current epoch, shuffled when it is first asked for."""
        if self._shuffled[0] != self.epoch:
            order: list[int] = []
            first = 0
            for number, deck in enumerate(self.decks):
                order += [first + row for row in deck.draw(self.epoch, f"{self.seed}, source {number}")]
                first += deck.rows
            random.Random(f"{self.seed}, epoch {self.epoch}").shuffle(order)
            self._shuffled = (self.epoch, order)
        return self._shuffled[1]
